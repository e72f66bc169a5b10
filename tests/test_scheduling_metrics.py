"""Tests of the engine's metrics with a fake of the Python backend's MetricFamily. test_serve.py uses the real one."""

import gc
import weakref
from typing import Any, ClassVar

import pytest

from triton_embed.python_backend.scheduling.metrics import EngineMetrics


class Family:
    """A fake MetricFamily: it rejects the same arguments as the real one, and its metrics fail once it is deleted."""

    HISTOGRAM, COUNTER, GAUGE = "histogram", "counter", "gauge"
    created: ClassVar[dict[tuple[str, str], "Metric"]] = {}

    def __init__(self, *, name: str, description: str, kind: str) -> None:
        assert description
        self.name, self.kind = name, kind

    def Metric(self, *, labels: dict[str, str], buckets: list[float] | None = None) -> "Metric":  # noqa: N802 - Triton's name
        assert (buckets is not None) == (self.kind == self.HISTOGRAM)
        assert buckets is None or (isinstance(buckets, list) and buckets == sorted(set(buckets)))
        assert labels["model"] == "m"
        metric = self.created[self.name, labels.get("source", "")] = Metric(self)
        return metric


class Metric:
    def __init__(self, family: Family) -> None:
        self.family = weakref.ref(family)
        self.values: list[float] = []

    def _record(self, value: float, kind: str) -> None:
        family = self.family()
        assert family is not None, "the family was deleted"
        assert family.kind == kind
        self.values.append(value)

    def observe(self, value: float) -> None:
        self._record(value, Family.HISTOGRAM)

    def increment(self, value: float) -> None:
        assert value > 0
        self._record(value, Family.COUNTER)

    def set(self, value: float) -> None:
        self._record(value, Family.GAUGE)


@pytest.fixture(autouse=True)
def no_metrics() -> Any:
    Family.created.clear()


def recorded() -> dict[tuple[str, str], list[float]]:
    return {name: metric.values for name, metric in Family.created.items() if metric.values}


def test_each_forward_pass_and_each_wait_is_observed_once() -> None:
    metrics = EngineMetrics(Family, "m")
    gc.collect()
    metrics.record_pass([0.1, 0.2], 0.5, 70)
    metrics.record_pass([], 0.25, 8)
    assert recorded() == {
        ("triton_embed_wait_seconds", ""): [0.1, 0.2],
        ("triton_embed_forward_seconds", ""): [0.5, 0.25],
        ("triton_embed_forward_tokens", ""): [70, 8],
    }


def test_rows_are_counted_by_source_and_cache_size_is_set_on_change() -> None:
    metrics = EngineMetrics(Family, "m")
    gc.collect()
    metrics.record_rows(3, 0, 0, 0)
    metrics.record_rows(0, 0, 5, 0)
    metrics.record_rows(1, 2, 0, 4_096)
    metrics.record_rows(0, 0, 1, 4_096)
    assert recorded() == {
        ("triton_embed_rows_total", "computed"): [3, 1],
        ("triton_embed_rows_total", "in_flight"): [2],
        ("triton_embed_rows_total", "cache"): [5, 1],
        ("triton_embed_cache_bytes", ""): [4_096],
    }
