"""How long a call takes on the device: events around calls whose inputs no cache holds, medians of many."""

import math
import time
from collections.abc import Callable
from statistics import median
from typing import Any

import torch

Call = Callable[[int], object]
BLOCK_SECONDS = 1e-3  # what is between two events lasts at least so long
MOST_CALLS = 50  # between two events
LONGEST_WAIT = 20e-3


class Timer:
    """`repeats` measurements each. On a CPU, for a rehearsal, the wall clock stands in for events."""

    def __init__(self, device: torch.device, repeats: int = 20) -> None:
        self.device, self.repeats = device, repeats
        self._cuda = device.type == "cuda"
        properties: Any = torch.cuda.get_device_properties(device) if self._cuda else None
        self.cache = int(getattr(properties, "L2_cache_size", 64 << 20))  # bytes
        # In kHz; the waiting kernel counts cycles.
        self._cycles_per_second = 1e3 * int(getattr(properties, "clock_rate", 0) or 2_000_000)

    def wait(self) -> None:
        """Until the device has done all it was given."""
        if self._cuda:
            torch.cuda.synchronize(self.device)

    def sets(self, size: int) -> int:
        """How many sets of inputs of `size` bytes to take in turn, so that none is still in the cache."""
        return max(2, min(32, math.ceil(2 * self.cache / max(size, 1)))) if self._cuda else 2

    def device_ms(self, call: Call, sets: int) -> dict[str, Any]:
        """Milliseconds of `call(i)` on the device, i going round the input sets.

        The device is kept waiting while calls are submitted, so that how long Python takes is no part of it.
        """
        for i in range(3):
            call(i % sets)
        self.wait()
        begin = time.perf_counter()
        for i in range(sets):
            call(i)
        submitted = (time.perf_counter() - begin) / sets
        self.wait()
        taken = (time.perf_counter() - begin) / sets
        if not self._cuda:
            return summary([1e3 * _seconds(lambda i=i: call(i % sets)) for i in range(self.repeats)])  # type: ignore[misc]
        calls = max(1, min(MOST_CALLS, math.ceil(BLOCK_SECONDS / taken)))
        pause = int(self._cycles_per_second * min(LONGEST_WAIT, 2 * submitted * calls + 20e-6))
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
        """Milliseconds of `call()` by the wall clock, host and device together; fewer repeats, but at least three,
        once `seconds` have passed."""
        call()
        self.wait()
        begin, found = time.perf_counter(), list[float]()
        while len(found) < (repeats or self.repeats):
            found.append(1e3 * _seconds(call, self.wait))
            if len(found) >= 3 and time.perf_counter() - begin > seconds:
                break
        return summary(found)


def _seconds(call: Callable[[], object], wait: Callable[[], None] = lambda: None) -> float:
    begin = time.perf_counter()
    call()
    wait()
    return time.perf_counter() - begin


def summary(values: list[float]) -> dict[str, Any]:
    """Of milliseconds; p99 by nearest rank."""
    ordered = sorted(values)
    return {
        "median_ms": median(ordered),
        "least_ms": ordered[0],
        "most_ms": ordered[-1],
        "p99_ms": ordered[max(0, math.ceil(0.99 * len(ordered)) - 1)],
        "repeats": len(ordered),
    }
