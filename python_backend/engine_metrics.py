"""The engine's histograms, in Triton's own /metrics: Triton's latencies are wrong for a model that answers later.

An observation takes 18 to 25 us, so there is one for each request and two for each forward pass, on the delivery
thread.
"""

from collections.abc import Sequence
from typing import Any

SECONDS = [0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 30]
TOKENS = [8, 16, 32, 64, 128, 256, 512, 1_024, 2_048, 4_096, 8_192, 16_384, 32_768]


class EngineMetrics:
    """Histograms of one model; `family` is the Python backend's MetricFamily, which only exists inside tritonserver."""

    def __init__(self, family: Any, model: str) -> None:
        self._families: list[Any] = []  # kept: a histogram ends with its family

        def histogram(name: str, description: str, buckets: list[float]) -> Any:
            made = family(name=f"triton_embed_{name}", description=description, kind=family.HISTOGRAM)
            self._families.append(made)
            return made.Metric(labels={"model": model}, buckets=buckets)

        self._waits = histogram("wait_seconds", "Seconds from a request's admission to its first forward pass", SECONDS)
        self._seconds = histogram("forward_seconds", "Seconds of a forward pass", SECONDS)
        self._tokens = histogram("forward_tokens", "Tokens of a forward pass, in all towers", [*TOKENS])

    def observe(self, waits: Sequence[float], seconds: float, tokens: int) -> None:
        """One forward pass, and how long each request that began with it had waited."""
        for wait in waits:
            self._waits.observe(wait)
        self._seconds.observe(seconds)
        self._tokens.observe(tokens)
