"""Throughput and latency percentiles of one benchmark cell."""

import math
from collections.abc import Sequence
from typing import Any


def percentile(values: Sequence[float], q: float) -> float:
    """Return the nearest-rank percentile: always a measured value, never an interpolated one."""
    ordered = sorted(values)
    return ordered[max(0, math.ceil(q * len(ordered)) - 1)]


def summary(latencies: Sequence[float], inputs: int, seconds: float) -> dict[str, Any]:
    """Return sentences per second and the p50 and p99 latency in milliseconds.

    Args:
        latencies: Seconds per successful call.
        inputs: Texts per call.
        seconds: Time from the first call to the last response.
    """
    return {
        "sentences_per_s": len(latencies) * inputs / seconds,
        "p50_ms": 1000 * percentile(latencies, 0.50) if latencies else math.nan,
        "p99_ms": 1000 * percentile(latencies, 0.99) if latencies else math.nan,
    }
