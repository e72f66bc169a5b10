"""Prometheus metrics: requests, tokens, time per stage, and Triton's own metrics after ours."""

import asyncio
import re
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from http.client import HTTPException
from pathlib import Path
from typing import Any
from urllib.request import ProxyHandler, build_opener

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.core import GaugeMetricFamily
from prometheus_client.exposition import CONTENT_TYPE_LATEST
from prometheus_client.multiprocess import MultiProcessCollector
from prometheus_client.registry import Collector

from triton_embed.python_backend.wire import ModelInfo

CONTENT_TYPE = CONTENT_TYPE_LATEST
STAGES = ("parse", "media", "triton", "encode")
# Seconds. Parsing takes tens of microseconds, a long batch on a CPU takes a minute.
BUCKETS = (0.00005, 0.0001, 0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 10, 60)
TRITON_SECONDS = 1.0  # longest wait of a scrape for Triton's metrics
TRITON_BYTES = 8 * 2**20

_FAMILY = re.compile(r"# (?:HELP|TYPE) (\S+)")


class Metrics:
    """The metrics of one gateway; two gateways in a process do not mix.

    Args:
        shared: This process is one of several whose metrics are summed by prometheus_client's multiprocess mode, which
            the environment must have enabled. There a gauge needs a `multiprocess_mode`, and values that are the same
            in all processes come from `_Current`.
        triton: host:port of Triton's metrics.
    """

    def __init__(self, *, shared: bool = False, triton: str = "") -> None:
        self._shared = shared
        self._triton = triton
        self._registry = registry = CollectorRegistry()
        self._current = _Current()
        registry.register(self._current)
        self._requests = Counter(
            "triton_embed_requests", "HTTP requests by route and status", ("route", "status"), registry=registry
        )
        self.in_flight = Gauge(
            "triton_embed_requests_in_flight", "HTTP requests in flight", registry=registry, multiprocess_mode="livesum"
        )
        self._inputs = Counter("triton_embed_inputs", "Inputs embedded", ("model",), registry=registry)
        self._tokens = Counter("triton_embed_tokens", "Tokens computed", ("model",), registry=registry)
        self._truncated = Counter(
            "triton_embed_truncated_inputs", "Inputs that were truncated", ("model",), registry=registry
        )
        stages = Histogram(
            "triton_embed_stage_seconds",
            "Duration of a request's stages: parse the body, load images, wait for Triton, encode the response",
            ("stage",),
            buckets=BUCKETS,
            registry=registry,
        )
        self._stages = {stage: stages.labels(stage) for stage in STAGES}

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Measure one of STAGES, even if it fails."""
        start = time.perf_counter()
        try:
            yield
        finally:
            self._stages[name].observe(time.perf_counter() - start)

    def count_request(self, route: str, status: int) -> None:
        """Count a request. `route` is a route's template, never a caller's path, because labels must stay few."""
        self._requests.labels(route, status).inc()

    def count_embeddings(self, model: str, inputs: int, tokens: int, truncated: int) -> None:
        """Count the work of a model."""
        self._inputs.labels(model).inc(inputs)
        self._tokens.labels(model).inc(tokens)
        self._truncated.labels(model).inc(truncated)

    def set_models(self, models: Iterable[ModelInfo]) -> None:
        """Set the models that are ready now, and what they run on."""
        self._current.models = list(models)

    def render(self) -> bytes:
        """Return our metrics as text of CONTENT_TYPE."""
        if not self._shared:
            return generate_latest(self._registry)
        registry = CollectorRegistry()
        registry.register(self._current)
        _AllProcesses(registry)  # type: ignore[no-untyped-call]
        return generate_latest(registry)

    async def scrape(self) -> bytes:
        """Return our metrics, then Triton's if its endpoint is known and answers soon."""
        if not self._triton:
            return self.render()
        try:
            async with asyncio.timeout(TRITON_SECONDS):
                theirs = await asyncio.to_thread(_fetch, f"http://{self._triton}/metrics")
        except (OSError, HTTPException, UnicodeDecodeError):  # a TimeoutError is an OSError
            theirs = None
        self._current.triton_up = theirs is not None
        ours = self.render()
        return ours + _without_duplicates(ours.decode(), theirs or "").encode()


class _Current(Collector):
    """Values read at the time of a scrape, rather than counted."""

    def __init__(self) -> None:
        self.models: Sequence[ModelInfo] = ()
        self.triton_up: bool | None = None  # None: it is not scraped

    def collect(self) -> Iterator[GaugeMetricFamily]:
        models = GaugeMetricFamily(
            "triton_embed_model_info",
            "Models that are ready: 1 each. kernels is triton, cpu, or reference (plain torch)",
            labels=("model", "family", "dtype", "device", "kernels"),
        )
        for model in self.models:
            models.add_metric((model.name, model.family, model.dtype, model.device, model.kernels), 1)
        yield models
        if self.triton_up is not None:
            yield GaugeMetricFamily(
                "triton_embed_triton_metrics_up",
                "Whether Triton's metrics are included: 0 if its endpoint does not answer",
                self.triton_up,
            )


class _AllProcesses(MultiProcessCollector):
    """The sum over all processes. Skips empty files, which a starting process has not filled yet."""

    def collect(self) -> Any:
        files = [file for file in Path(self._path).glob("*.db") if _is_filled(file)]
        return self.merge(map(str, files))  # type: ignore[no-untyped-call]


def _is_filled(file: Path) -> bool:
    try:
        return file.stat().st_size > 0
    except FileNotFoundError:  # its process has just ended
        return False


def _fetch(url: str) -> str:
    # Not through a proxy: Triton is on this machine or next to it.
    with build_opener(ProxyHandler({})).open(url, timeout=TRITON_SECONDS) as response:
        if not response.headers.get_content_type().startswith("text/"):
            raise OSError(f"{url} serves no metrics")
        return str(response.read(TRITON_BYTES), "utf-8")


def _without_duplicates(ours: str, theirs: str) -> str:
    """Return `theirs` without metric families that `ours` has or that are repeated: Prometheus refuses duplicates."""
    seen = set(_FAMILY.findall(ours))
    lines: list[str] = []
    family, new = "", True
    for line in theirs.splitlines():
        if (header := _FAMILY.match(line)) and header[1] != family:
            family = header[1]
            new = family not in seen
            seen.add(family)
        if new and line:
            lines.append(f"{line}\n")
    return "".join(lines)
