"""Prometheus: what came in, what went out, where the time of a request went; and Triton's own metrics below ours."""

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

from triton_embed.gateway.model import ModelInfo

CONTENT_TYPE = CONTENT_TYPE_LATEST
STAGES = ("parse", "media", "triton", "encode")
# Seconds. Parsing takes tens of microseconds, a long batch on a CPU takes a minute.
BUCKETS = (0.00005, 0.0001, 0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 10, 60)
TRITON_SECONDS = 1.0  # a scrape never waits longer for Triton's
TRITON_BYTES = 8 * 2**20

_FAMILY = re.compile(r"# (?:HELP|TYPE) (\S+)")


class Metrics:
    """One gateway's own metrics: two gateways in a process do not mix.

    `shared`: this process is one of several whose sum is told, by prometheus_client's multiprocess mode, which its
    environment must have switched on. There a gauge needs a `multiprocess_mode`, and what is the same in all of them
    is told by `_Stated`. `triton`: host:port of Triton's own.
    """

    def __init__(self, *, shared: bool = False, triton: str = "") -> None:
        self._shared = shared
        self._triton = triton
        self._registry = registry = CollectorRegistry()
        self._stated = _Stated()
        registry.register(self._stated)
        self._requests = Counter(
            "triton_embed_requests", "HTTP requests answered", ("route", "status"), registry=registry
        )
        self.in_flight = Gauge(
            "triton_embed_requests_in_flight", "HTTP requests now open", registry=registry, multiprocess_mode="livesum"
        )
        self._inputs = Counter("triton_embed_inputs", "Inputs embedded", ("model",), registry=registry)
        self._tokens = Counter("triton_embed_tokens", "Tokens computed", ("model",), registry=registry)
        self._truncated = Counter(
            "triton_embed_truncated_inputs", "Inputs that lost tokens", ("model",), registry=registry
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
        self._stated.models = list(models)

    def render(self) -> bytes:
        """Our own, as Prometheus scrapes them: text of CONTENT_TYPE."""
        if not self._shared:
            return generate_latest(self._registry)
        everybody = CollectorRegistry()
        everybody.register(self._stated)
        _Everybody(everybody)  # type: ignore[no-untyped-call]
        return generate_latest(everybody)

    async def scrape(self) -> bytes:
        """Our own, then Triton's where its endpoint is known and answers soon."""
        if not self._triton:
            return self.render()
        try:
            async with asyncio.timeout(TRITON_SECONDS):
                theirs = await asyncio.to_thread(_fetch, f"http://{self._triton}/metrics")
        except (OSError, HTTPException, UnicodeDecodeError):  # a TimeoutError is an OSError
            theirs = None
        self._stated.triton_up = theirs is not None
        ours = self.render()
        return ours + _others(ours.decode(), theirs or "").encode()


class _Stated(Collector):
    """What is known when asked, rather than counted."""

    def __init__(self) -> None:
        self.models: Sequence[ModelInfo] = ()
        self.triton_up: bool | None = None  # None: nobody asks it

    def collect(self) -> Iterator[GaugeMetricFamily]:
        models = GaugeMetricFamily(
            "triton_embed_model_info",
            "Models that answer: 1 each. kernels is triton, or torch (on a CPU, or because the operator asked for it)",
            labels=("model", "family", "dtype", "device", "kernels"),
        )
        for model in self.models:
            models.add_metric((model.name, model.family, model.dtype, model.device, model.kernels), 1)
        yield models
        if self.triton_up is not None:
            yield GaugeMetricFamily(
                "triton_embed_triton_metrics_up",
                "Whether Triton's own metrics follow: 0 when its endpoint does not answer",
                self.triton_up,
            )


class _Everybody(MultiProcessCollector):
    """The sum over all processes; one that is only just starting has made files and put nothing in them yet."""

    def collect(self) -> Any:
        files = [file for file in Path(self._path).glob("*.db") if _is_filled(file)]
        return self.merge(map(str, files))  # type: ignore[no-untyped-call]


def _is_filled(file: Path) -> bool:
    try:
        return file.stat().st_size > 0
    except FileNotFoundError:  # of a process that has ended
        return False


def _fetch(url: str) -> str:
    # Never by way of a proxy: it is on this machine or beside it.
    with build_opener(ProxyHandler({})).open(url, timeout=TRITON_SECONDS) as answer:
        if not answer.headers.get_content_type().startswith("text/"):
            raise OSError(f"{url} serves no metrics")
        return str(answer.read(TRITON_BYTES), "utf-8")


def _others(ours: str, theirs: str) -> str:
    """`theirs` without the families that `ours` has, or that came before: Prometheus refuses a page with both."""
    known = set(_FAMILY.findall(ours))
    kept: list[str] = []
    family, wanted = "", True
    for line in theirs.splitlines():
        if (found := _FAMILY.match(line)) and found[1] != family:
            family = found[1]
            wanted = family not in known
            known.add(family)
        if wanted and line:
            kept.append(f"{line}\n")
    return "".join(kept)
