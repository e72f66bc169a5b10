"""Memory of every process of the stack over time, and whether it stays the same."""

import asyncio
import time
from typing import Any

import numpy as np

from benchmarks.processes import memory

EVERY = 5.0  # seconds
GROWTH = 0.03  # of the second third, that the last third may be above it
SLACK = 2.0  # MB, where that is more
JUDGED = 300.0  # seconds: before, pools and caches are still filling
# PSS is in the samples too, but it rises when another process on the machine that shares a library ends.
RULE = (
    f"judged by RSS. flat: the mean of the last third is at most {GROWTH:.0%} or {SLACK:g} MB above that of the second "
    f"third, and the line through the last two thirds rises by no more than twice that; runs under {JUDGED:g} s are "
    "measured and not judged"
)


class Memory:
    def __init__(self, pid: int) -> None:
        self.pid = pid
        self.begin = time.monotonic()
        self.samples: list[dict[str, Any]] = []

    async def watch(self, end: float) -> None:
        while time.monotonic() < end:
            weights = await asyncio.to_thread(memory, self.pid)  # reading a large process's pages takes milliseconds
            rounded = {
                f"{kind}_mb": {name: round(w[kind], 1) for name, w in weights.items()} for kind in ("rss", "pss")
            }
            self.samples.append({"seconds": round(time.monotonic() - self.begin, 1), **rounded})
            await asyncio.sleep(EVERY)

    @property
    def latest(self) -> dict[str, float]:
        weights: dict[str, float] = self.samples[-1]["rss_mb"] if self.samples else {}
        return weights

    def verdict(self) -> dict[str, dict[str, Any]]:
        """Of each process: MB resident at the start, once settled (a tenth of the way in) and at the end; and how
        it went over the last two thirds."""
        names = dict.fromkeys(name for sample in self.samples for name in sample["rss_mb"])
        return {name: _verdict(name, self.samples) for name in names}


def _verdict(name: str, samples: list[dict[str, Any]]) -> dict[str, Any]:
    settled = samples[min(len(samples) // 10 + 1, len(samples) - 1)]
    when = {"start": samples[0], "settled": settled, "end": samples[-1]}
    found: dict[str, Any] = {at: sample["rss_mb"].get(name) for at, sample in when.items()}
    seen = [(sample["seconds"], sample["rss_mb"][name]) for sample in samples if name in sample["rss_mb"]]
    third = samples[-1]["seconds"] / 3
    second = [mb for at, mb in seen if third <= at < 2 * third]
    last = [mb for at, mb in seen if at >= 2 * third]
    if len(second) < 2 or len(last) < 2:
        return found
    times, sizes = np.array([(at, mb) for at, mb in seen if at >= third]).T
    slope = float(np.polyfit(times, sizes, 1)[0])
    before, after = float(np.mean(second)), float(np.mean(last))
    allowed = max(SLACK, GROWTH * before)
    return found | {
        "second_third": round(before, 2),
        "last_third": round(after, 2),
        "growth_percent": round(100 * (after / before - 1), 2),
        "slope_mb_per_minute": round(60 * slope, 3),
        "flat": bool(after - before <= allowed and slope * 2 * third <= 2 * allowed),
    }
