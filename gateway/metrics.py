"""Prometheus: what came in, what went out, and where the time of a request went."""

import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.exposition import CONTENT_TYPE_LATEST

from triton_embed.gateway.model import ModelInfo

CONTENT_TYPE = CONTENT_TYPE_LATEST
STAGES = ("parse", "media", "triton", "encode")
# Seconds. Parsing takes tens of microseconds, a long batch on a CPU takes a minute.
BUCKETS = (0.00005, 0.0001, 0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 10, 60)


class Metrics:
    """One gateway's own metrics: two gateways in a process do not mix."""

    def __init__(self) -> None:
        self._registry = registry = CollectorRegistry()
        self._requests = Counter(
            "triton_embed_requests", "HTTP requests answered", ("route", "status"), registry=registry
        )
        self.in_flight = Gauge("triton_embed_requests_in_flight", "HTTP requests now open", registry=registry)
        self._inputs = Counter("triton_embed_inputs", "Inputs embedded", ("model",), registry=registry)
        self._tokens = Counter("triton_embed_tokens", "Tokens computed", ("model",), registry=registry)
        self._truncated = Counter(
            "triton_embed_truncated_inputs", "Inputs that lost tokens", ("model",), registry=registry
        )
        self._models = Gauge(
            "triton_embed_model_info",
            "Models that answer: 1 each. kernels is triton, or torch (on a CPU, or because the operator asked for it)",
            ("model", "family", "dtype", "device", "kernels"),
            registry=registry,
        )
        stages = Histogram(
            "triton_embed_stage_seconds",
            "Time of a request's stages: read and check it, get its images, wait for Triton, write the answer",
            ("stage",),
            buckets=BUCKETS,
            registry=registry,
        )
        self._stages = {stage: stages.labels(stage) for stage in STAGES}

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Time one of STAGES, failed or not."""
        start = time.perf_counter()
        try:
            yield
        finally:
            self._stages[name].observe(time.perf_counter() - start)

    def answered(self, route: str, status: int) -> None:
        """Count a request. `route` is a route's template, never a caller's own path: labels must stay few."""
        self._requests.labels(route, status).inc()

    def embedded(self, model: str, inputs: int, tokens: int, truncated: int) -> None:
        """Count what a model computed."""
        self._inputs.labels(model).inc(inputs)
        self._tokens.labels(model).inc(tokens)
        self._truncated.labels(model).inc(truncated)

    def serving(self, models: Iterable[ModelInfo]) -> None:
        """State the models that answer now, and what they run on."""
        self._models.clear()
        for model in models:
            self._models.labels(model.name, model.family, model.dtype, model.device, model.kernels).set(1)

    def render(self) -> bytes:
        """The text Prometheus scrapes, of CONTENT_TYPE."""
        return generate_latest(self._registry)
