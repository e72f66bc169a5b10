"""What one cell of a benchmark comes to: throughput and latency percentiles."""

import math
from collections.abc import Sequence
from typing import Any


def percentile(values: Sequence[float], q: float) -> float:
    """Nearest rank: a value that was measured, never one between two."""
    ordered = sorted(values)
    return ordered[max(0, math.ceil(q * len(ordered)) - 1)]


def summary(latencies: Sequence[float], inputs: int, seconds: float) -> dict[str, Any]:
    """`latencies`: seconds of each answered call of `inputs` texts; `seconds`: first call to last answer."""
    return {
        "sentences_per_s": len(latencies) * inputs / seconds,
        "p50_ms": 1000 * percentile(latencies, 0.50) if latencies else math.nan,
        "p99_ms": 1000 * percentile(latencies, 0.99) if latencies else math.nan,
    }
