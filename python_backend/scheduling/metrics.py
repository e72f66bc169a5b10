"""The engine's metrics in Triton's /metrics, because Triton's own latencies are wrong for a model that replies later.

An observation takes 18 to 25 us, so there is one per request and a few per forward pass, on the sender thread.
"""

from collections.abc import Sequence
from typing import Any

SECONDS = [0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 30]
TOKENS = [8, 16, 32, 64, 128, 256, 512, 1_024, 2_048, 4_096, 8_192, 16_384, 32_768]
SOURCES = ("computed", "in_flight", "cache")


class EngineMetrics:
    """The metrics of one model. `family` is the Python backend's MetricFamily, which exists in tritonserver only."""

    def __init__(self, family: Any, model: str) -> None:
        self._families: list[Any] = []  # kept, because Triton removes a metric together with its family

        def create(name: str, description: str, kind: Any) -> Any:
            self._families.append(family(name=f"triton_embed_{name}", description=description, kind=kind))
            return self._families[-1]

        def histogram(name: str, description: str, buckets: list[float]) -> Any:
            return create(name, description, family.HISTOGRAM).Metric(labels={"model": model}, buckets=buckets)

        self._waits = histogram("wait_seconds", "Seconds from a request's admission to its first forward pass", SECONDS)
        self._seconds = histogram("forward_seconds", "Seconds of a forward pass", SECONDS)
        self._tokens = histogram("forward_tokens", "Tokens of a forward pass, in all towers", [*TOKENS])
        rows = create(
            "rows_total",
            "Rows by source of their vector: computed, shared with an identical row in flight, or from the cache",
            family.COUNTER,
        )
        self._rows = [rows.Metric(labels={"model": model, "source": source}) for source in SOURCES]
        self._cache = create("cache_bytes", "Bytes of cached vectors", family.GAUGE).Metric(labels={"model": model})
        self._cache_bytes = 0

    def record_pass(self, waits: Sequence[float], seconds: float, tokens: int) -> None:
        """Record one forward pass, and how long each request that started with it had waited."""
        for wait in waits:
            self._waits.observe(wait)
        self._seconds.observe(seconds)
        self._tokens.observe(tokens)

    def record_rows(self, computed: int, in_flight: int, cached: int, cache_bytes: int) -> None:
        """Record rows by the source of their vector, and the size of the cache."""
        for metric, rows in zip(self._rows, (computed, in_flight, cached), strict=True):
            if rows:
                metric.increment(rows)
        if cache_bytes != self._cache_bytes:
            self._cache.set(cache_bytes)
            self._cache_bytes = cache_bytes
