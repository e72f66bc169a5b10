"""The engine's metrics through a stand-in for the Python backend's MetricFamily; test_serve.py asks the real one."""

import gc
import weakref
from typing import Any, ClassVar

import pytest

from triton_embed.python_backend.scheduling.metrics import EngineMetrics


class Family:
    """It refuses what the real one refuses, and its metrics end with it."""

    HISTOGRAM, COUNTER, GAUGE = "histogram", "counter", "gauge"
    made: ClassVar[dict[tuple[str, str], "Metric"]] = {}

    def __init__(self, *, name: str, description: str, kind: str) -> None:
        assert description
        self.name, self.kind = name, kind

    def Metric(self, *, labels: dict[str, str], buckets: list[float] | None = None) -> "Metric":  # noqa: N802 - its name
        assert (buckets is not None) == (self.kind == self.HISTOGRAM)
        assert buckets is None or (isinstance(buckets, list) and buckets == sorted(set(buckets)))
        assert labels["model"] == "m"
        made = self.made[self.name, labels.get("source", "")] = Metric(self)
        return made


class Metric:
    def __init__(self, family: Family) -> None:
        self.family = weakref.ref(family)
        self.seen: list[float] = []

    def _see(self, value: float, kind: str) -> None:
        family = self.family()
        assert family is not None, "the family is gone"
        assert family.kind == kind
        self.seen.append(value)

    def observe(self, value: float) -> None:
        self._see(value, Family.HISTOGRAM)

    def increment(self, value: float) -> None:
        assert value > 0
        self._see(value, Family.COUNTER)

    def set(self, value: float) -> None:
        self._see(value, Family.GAUGE)


@pytest.fixture(autouse=True)
def none_made() -> Any:
    Family.made.clear()


def seen() -> dict[tuple[str, str], list[float]]:
    return {name: metric.seen for name, metric in Family.made.items() if metric.seen}


def test_a_forward_pass_is_observed_once_and_every_wait() -> None:
    metrics = EngineMetrics(Family, "m")
    gc.collect()
    metrics.passed([0.1, 0.2], 0.5, 70)
    metrics.passed([], 0.25, 8)
    assert seen() == {
        ("triton_embed_wait_seconds", ""): [0.1, 0.2],
        ("triton_embed_forward_seconds", ""): [0.5, 0.25],
        ("triton_embed_forward_tokens", ""): [70, 8],
    }


def test_rows_are_counted_by_where_their_vectors_came_from_and_nothing_is_told_twice() -> None:
    metrics = EngineMetrics(Family, "m")
    gc.collect()
    metrics.answered(3, 0, 0, 0)
    metrics.answered(0, 0, 5, 0)
    metrics.answered(1, 2, 0, 4_096)
    metrics.answered(0, 0, 1, 4_096)
    assert seen() == {
        ("triton_embed_rows_total", "computed"): [3, 1],
        ("triton_embed_rows_total", "in_flight"): [2],
        ("triton_embed_rows_total", "cache"): [5, 1],
        ("triton_embed_cache_bytes", ""): [4_096],
    }
