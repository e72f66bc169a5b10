"""The numbers Prometheus reads."""

import pytest
from prometheus_client.parser import text_string_to_metric_families

from triton_embed.gateway.metrics import Metrics
from triton_embed.gateway.model import ModelInfo


def samples(metrics: Metrics) -> dict[tuple[str, str], float]:
    """(name, label values joined) -> value."""
    families = text_string_to_metric_families(metrics.render().decode())
    return {(s.name, " ".join(s.labels.values())): s.value for family in families for s in family.samples}


def test_requests_are_counted_by_route_and_status() -> None:
    metrics = Metrics()
    for status in (200, 200, 400):
        metrics.answered("/v1/embeddings", status)
    found = samples(metrics)
    assert found["triton_embed_requests_total", "/v1/embeddings 200"] == 2
    assert found["triton_embed_requests_total", "/v1/embeddings 400"] == 1


def test_what_was_embedded_is_counted_by_model() -> None:
    metrics = Metrics()
    metrics.embedded("minilm", inputs=3, tokens=40, truncated=1)
    metrics.embedded("minilm", inputs=1, tokens=2, truncated=0)
    found = samples(metrics)
    assert found["triton_embed_inputs_total", "minilm"] == 4
    assert found["triton_embed_tokens_total", "minilm"] == 42
    assert found["triton_embed_truncated_inputs_total", "minilm"] == 1


def test_a_stage_is_timed_even_when_it_fails() -> None:
    metrics = Metrics()
    with metrics.stage("parse"):
        pass
    with pytest.raises(ZeroDivisionError), metrics.stage("parse"):
        raise ZeroDivisionError
    assert samples(metrics)["triton_embed_stage_seconds_count", "parse"] == 2
    assert samples(metrics)["triton_embed_stage_seconds_count", "triton"] == 0
    assert samples(metrics)["triton_embed_stage_seconds_count", "media"] == 0


def test_what_each_model_runs_on_is_told() -> None:
    info = {"checkpoint": None, "dimensions": 3, "max_model_len": 7, "vocab_size": 9, "pooling": "cls"}
    info |= {"modalities": ["text"], "matryoshka": None, "instructions": False, "prompt_names": []}
    slow = ModelInfo(**info, name="slow", family="bert", dtype="float32", device="cuda:0", kernels="torch")
    fast = ModelInfo(**info, name="fast", family="bert", dtype="bfloat16", device="cuda:0", kernels="triton")
    metrics = Metrics()
    metrics.serving([slow, fast])
    assert samples(metrics)["triton_embed_model_info", "cuda:0 float32 bert torch slow"] == 1
    assert samples(metrics)["triton_embed_model_info", "cuda:0 bfloat16 bert triton fast"] == 1
    metrics.serving([fast])
    assert [labels for name, labels in samples(metrics) if name == "triton_embed_model_info"] == [
        "cuda:0 bfloat16 bert triton fast"
    ]


def test_two_gateways_do_not_mix() -> None:
    one, other = Metrics(), Metrics()
    one.answered("/health", 200)
    assert ("triton_embed_requests_total", "/health 200") not in samples(other)
