"""Memory usage of all processes of the stack over time, and the verdict whether it grows."""

import asyncio
import time
from typing import Any

import numpy as np

from benchmarks.processes import memory

SAMPLE_INTERVAL = 5.0  # seconds
MAX_GROWTH = 0.03  # allowed growth from the second to the last third
MIN_SLACK_MB = 2.0  # allowed growth if MAX_GROWTH is less
MIN_SECONDS = 300.0  # shorter runs get no verdict: pools and caches are still filling
# Samples also contain PSS, but it rises when an unrelated process that shares a library ends.
RULE = (
    f"RSS is flat if the mean of the last third is at most {MAX_GROWTH:.0%} or {MIN_SLACK_MB:g} MB above that of the "
    "second third, and a line fitted to the last two thirds rises by at most twice that. Runs under "
    f"{MIN_SECONDS:g} s get no verdict."
)


class MemoryMonitor:
    """Samples the memory of a process tree."""

    def __init__(self, pid: int) -> None:
        self.pid = pid
        self.begin = time.monotonic()
        self.samples: list[dict[str, Any]] = []

    async def watch(self, end: float) -> None:
        """Take samples until the monotonic time `end`."""
        while time.monotonic() < end:
            usage = await asyncio.to_thread(memory, self.pid)  # takes milliseconds for a large process
            rounded = {
                f"{kind}_mb": {name: round(values[kind], 1) for name, values in usage.items()}
                for kind in ("rss", "pss")
            }
            self.samples.append({"seconds": round(time.monotonic() - self.begin, 1), **rounded})
            await asyncio.sleep(SAMPLE_INTERVAL)

    @property
    def latest(self) -> dict[str, float]:
        """The RSS of each process in the last sample, in MB."""
        rss: dict[str, float] = self.samples[-1]["rss_mb"] if self.samples else {}
        return rss

    def verdict(self) -> dict[str, dict[str, Any]]:
        """Return for each process its RSS in MB at the start, after a tenth of the run and at the end, and its growth.

        Growth is computed over the last two thirds of the run.
        """
        names = dict.fromkeys(name for sample in self.samples for name in sample["rss_mb"])
        return {name: _verdict(name, self.samples) for name in names}


def _verdict(name: str, samples: list[dict[str, Any]]) -> dict[str, Any]:
    settled = samples[min(len(samples) // 10 + 1, len(samples) - 1)]
    points = {"start": samples[0], "settled": settled, "end": samples[-1]}
    result: dict[str, Any] = {point: sample["rss_mb"].get(name) for point, sample in points.items()}
    series = [(sample["seconds"], sample["rss_mb"][name]) for sample in samples if name in sample["rss_mb"]]
    third = samples[-1]["seconds"] / 3
    second = [mb for seconds, mb in series if third <= seconds < 2 * third]
    last = [mb for seconds, mb in series if seconds >= 2 * third]
    if len(second) < 2 or len(last) < 2:
        return result
    times, sizes = np.array([(seconds, mb) for seconds, mb in series if seconds >= third]).T
    slope = float(np.polyfit(times, sizes, 1)[0])
    before, after = float(np.mean(second)), float(np.mean(last))
    allowed = max(MIN_SLACK_MB, MAX_GROWTH * before)
    return result | {
        "second_third": round(before, 2),
        "last_third": round(after, 2),
        "growth_percent": round(100 * (after / before - 1), 2),
        "slope_mb_per_minute": round(60 * slope, 3),
        "flat": bool(after - before <= allowed and slope * 2 * third <= 2 * allowed),
    }
