"""Device timing: CUDA events around calls whose inputs are not in the L2 cache, and the median of many repeats."""

import math
import time
from collections.abc import Callable
from statistics import median
from typing import Any

import torch

from benchmarks.report import percentile

Call = Callable[[int], object]
BLOCK_SECONDS = 1e-3  # minimum device time between two events
MAX_CALLS = 50  # between two events
MAX_PAUSE_SECONDS = 20e-3


class Timer:
    """Timer that repeats each measurement `repeats` times. On a CPU (dry run) it uses the wall clock."""

    def __init__(self, device: torch.device, repeats: int = 20) -> None:
        self.device, self.repeats = device, repeats
        self._cuda = device.type == "cuda"
        properties: Any = torch.cuda.get_device_properties(device) if self._cuda else None
        self.cache = int(getattr(properties, "L2_cache_size", 64 << 20))  # bytes
        # clock_rate is in kHz; the pause kernel counts cycles.
        self._cycles_per_second = 1e3 * int(getattr(properties, "clock_rate", 0) or 2_000_000)

    def wait(self) -> None:
        """Wait until the device has finished all submitted work."""
        if self._cuda:
            torch.cuda.synchronize(self.device)

    def sets(self, size: int) -> int:
        """Return how many input sets of `size` bytes to cycle through so that none is still in the L2 cache."""
        return max(2, min(32, math.ceil(2 * self.cache / max(size, 1)))) if self._cuda else 2

    def device_ms(self, call: Call, sets: int) -> dict[str, Any]:
        """Measure `call(i)` on the device, in milliseconds, with i cycling through the input sets.

        A pause kernel occupies the device while calls are submitted, so that Python's overhead is not measured.
        """
        for i in range(3):
            call(i % sets)
        self.wait()
        begin = time.perf_counter()
        for i in range(sets):
            call(i)
        submitted = (time.perf_counter() - begin) / sets
        self.wait()
        call_seconds = (time.perf_counter() - begin) / sets
        if not self._cuda:
            return summary([1e3 * _seconds(lambda i=i: call(i % sets)) for i in range(self.repeats)])  # type: ignore[misc]
        calls = max(1, min(MAX_CALLS, math.ceil(BLOCK_SECONDS / call_seconds)))
        pause = int(self._cycles_per_second * min(MAX_PAUSE_SECONDS, 2 * submitted * calls + 20e-6))
        marks = [
            (torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(self.repeats)
        ]
        number = 0
        for start, end in marks:
            torch.cuda._sleep(pause)
            start.record()
            for _ in range(calls):
                call(number % sets)
                number += 1
            end.record()
        self.wait()
        return summary([start.elapsed_time(end) / calls for start, end in marks])

    def wall_ms(self, call: Callable[[], object], repeats: int = 0, seconds: float = math.inf) -> dict[str, Any]:
        """Measure `call()` by the wall clock, host and device together, in milliseconds.

        After `seconds` it stops early, but never before three repeats.
        """
        call()
        self.wait()
        begin, times_ms = time.perf_counter(), list[float]()
        while len(times_ms) < (repeats or self.repeats):
            times_ms.append(1e3 * _seconds(call, self.wait))
            if len(times_ms) >= 3 and time.perf_counter() - begin > seconds:
                break
        return summary(times_ms)


def _seconds(call: Callable[[], object], wait: Callable[[], None] = lambda: None) -> float:
    begin = time.perf_counter()
    call()
    wait()
    return time.perf_counter() - begin


def summary(values: list[float]) -> dict[str, Any]:
    """Return statistics of durations in milliseconds; p99 by nearest rank."""
    ordered = sorted(values)
    return {
        "median_ms": median(ordered),
        "least_ms": ordered[0],
        "most_ms": ordered[-1],
        "p99_ms": percentile(ordered, 0.99),
        "repeats": len(ordered),
    }
