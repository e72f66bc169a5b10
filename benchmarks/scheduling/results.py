"""Latencies of several load requests, combined before percentiles are taken."""

import os
import statistics
import time
from typing import Any

from benchmarks.processes import (
    cpu_seconds_elsewhere,
)
from benchmarks.report import percentile
from benchmarks.scheduling.stack import Row


def log_progress(begin: float, text: str) -> None:
    """Print a line with the seconds since `begin`."""
    print(f"{time.monotonic() - begin:5.0f} s  {text}", flush=True)


class OtherCpu:
    """CPU usage of unrelated processes since this object was created."""

    def __init__(self) -> None:
        self._begin, self._cpu = time.monotonic(), cpu_seconds_elsewhere()

    def percent(self) -> float:
        """Return the usage in percent of all cores."""
        seconds = time.monotonic() - self._begin
        return round(100 * (cpu_seconds_elsewhere() - self._cpu) / seconds / len(os.sched_getaffinity(0)), 1)


class LoadResult:
    """The combined replies of several load requests."""

    def __init__(self) -> None:
        self._other_cpu = OtherCpu()
        self.latencies: list[float] = []
        self.stages: dict[str, list[float]] = {}
        self.failures: dict[str, int] = {}

    def add(self, reply: dict[str, Any]) -> None:
        """Add the reply of one load request."""
        self.latencies += reply["latencies_ms"]
        for name, times in reply["stages_ms"].items():
            self.stages.setdefault(name, []).extend(times)
        for name, count in reply["failures"].items():
            self.failures[name] = self.failures.get(name, 0) + count

    def row(self) -> Row:
        """Return percentiles, the median of each stage, and failures if any. Call it right after the last reply."""
        row: Row = {"requests": len(self.latencies), "cpu_percent_elsewhere": self._other_cpu.percent()}
        if self.latencies:
            row |= {f"p{q}_ms": round(percentile(self.latencies, q / 100), 3) for q in (50, 95, 99)}
            row["stages_p50_ms"] = {name: round(statistics.median(times), 3) for name, times in self.stages.items()}
        return row | ({"failures": self.failures} if self.failures else {})
