"""Histograms through a stand-in for the Python backend's MetricFamily; the real one is asked in test_serve.py."""

import gc
import weakref
from typing import Any, ClassVar

import pytest

from triton_embed.python_backend.engine_metrics import EngineMetrics


class Family:
    """It refuses what the real one refuses, and its metrics end with it."""

    HISTOGRAM = "histogram"
    made: ClassVar[dict[str, "Histogram"]] = {}

    def __init__(self, *, name: str, description: str, kind: str) -> None:
        assert kind == self.HISTOGRAM
        assert description
        self.name = name

    def Metric(self, *, labels: dict[str, str], buckets: list[float]) -> "Histogram":  # noqa: N802 - the backend's name
        assert isinstance(buckets, list)
        assert buckets == sorted(set(buckets))
        assert labels == {"model": "m"}
        self.made[self.name] = Histogram(self)
        return self.made[self.name]


class Histogram:
    def __init__(self, family: Family) -> None:
        self.family = weakref.ref(family)
        self.seen: list[float] = []

    def observe(self, value: float) -> None:
        assert self.family() is not None, "the family is gone"
        self.seen.append(value)


@pytest.fixture(autouse=True)
def none_made() -> Any:
    Family.made.clear()


def test_a_forward_pass_is_observed_once_and_every_wait() -> None:
    metrics = EngineMetrics(Family, "m")
    gc.collect()
    metrics.observe([0.1, 0.2], 0.5, 70)
    metrics.observe([], 0.25, 8)
    assert {name: histogram.seen for name, histogram in Family.made.items()} == {
        "triton_embed_wait_seconds": [0.1, 0.2],
        "triton_embed_forward_seconds": [0.5, 0.25],
        "triton_embed_forward_tokens": [70, 8],
    }
