"""The Prometheus metrics of the gateway."""

import asyncio
import os
import re
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from prometheus_client.parser import text_string_to_metric_families

from conftest import Triton, free_port
from triton_embed.gateway.http.metrics import TRITON_SECONDS, Metrics
from triton_embed.python_backend.wire import ModelInfo


def samples(metrics: Metrics) -> dict[tuple[str, str], float]:
    """Return {(name, label values joined): value}."""
    families = text_string_to_metric_families(metrics.render().decode())
    return {(s.name, " ".join(s.labels.values())): s.value for family in families for s in family.samples}


def test_requests_are_counted_by_route_and_status() -> None:
    metrics = Metrics()
    for status in (200, 200, 400):
        metrics.count_request("/v1/embeddings", status)
    values = samples(metrics)
    assert values["triton_embed_requests_total", "/v1/embeddings 200"] == 2
    assert values["triton_embed_requests_total", "/v1/embeddings 400"] == 1


def test_embeddings_are_counted_by_model() -> None:
    metrics = Metrics()
    metrics.count_embeddings("minilm", inputs=3, tokens=40, truncated=1)
    metrics.count_embeddings("minilm", inputs=1, tokens=2, truncated=0)
    values = samples(metrics)
    assert values["triton_embed_inputs_total", "minilm"] == 4
    assert values["triton_embed_tokens_total", "minilm"] == 42
    assert values["triton_embed_truncated_inputs_total", "minilm"] == 1


def test_stage_is_timed_even_if_it_fails() -> None:
    metrics = Metrics()
    with metrics.stage("parse"):
        pass
    with pytest.raises(ZeroDivisionError), metrics.stage("parse"):
        raise ZeroDivisionError
    assert samples(metrics)["triton_embed_stage_seconds_count", "parse"] == 2
    assert samples(metrics)["triton_embed_stage_seconds_count", "triton"] == 0
    assert samples(metrics)["triton_embed_stage_seconds_count", "media"] == 0


def test_model_info_reports_device_and_kernels() -> None:
    info = {"checkpoint": None, "dimensions": 3, "max_model_len": 7, "vocab_size": 9, "pooling": "cls"}
    info |= {"default_prompt_name": None, "batch_tokens": 9, "small_tokens": 2, "max_request_tokens": 9, "instances": 1}
    info |= {"modalities": ("text",), "matryoshka": None, "instructions": False, "prompt_names": ()}
    slow = ModelInfo(**info, name="slow", family="bert", dtype="float32", device="cuda:0", kernels="torch")
    fast = ModelInfo(**info, name="fast", family="bert", dtype="bfloat16", device="cuda:0", kernels="triton")
    metrics = Metrics()
    metrics.set_models([slow, fast])
    assert samples(metrics)["triton_embed_model_info", "cuda:0 float32 bert torch slow"] == 1
    assert samples(metrics)["triton_embed_model_info", "cuda:0 bfloat16 bert triton fast"] == 1
    metrics.set_models([fast])
    assert [labels for name, labels in samples(metrics) if name == "triton_embed_model_info"] == [
        "cuda:0 bfloat16 bert triton fast"
    ]


def test_two_gateways_do_not_mix() -> None:
    first, second = Metrics(), Metrics()
    first.count_request("/health", 200)
    assert ("triton_embed_requests_total", "/health 200") not in samples(second)


@contextmanager
def serving(
    body: bytes, media_type: str = "text/plain; charset=utf-8", delay: float = 0, status: int = 200
) -> Iterator[str]:
    """Serve `body` in place of Triton's metrics, and yield host:port."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            done.wait(delay)
            self.send_response(status)
            self.send_header("Content-Type", media_type)
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: object) -> None:
            pass

    done = threading.Event()
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.handle_error = lambda *_: None  # type: ignore[method-assign] - the client hangs up on a late response
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield f"127.0.0.1:{server.server_port}"
    finally:
        done.set()
        server.shutdown()
        thread.join()
        server.server_close()


def scrape_families(triton: str) -> dict[str, float]:
    """Parse a scrape with Prometheus' parser and check that no family is repeated.

    Returns:
        {family: value of its first sample}.
    """
    metrics = Metrics(triton=triton)
    metrics.count_request("/health", 200)
    text = asyncio.run(metrics.scrape()).decode()
    assert text.endswith("\n")
    families = list(text_string_to_metric_families(text))
    assert max(Counter(family.name for family in families).values()) == 1
    assert max(Counter(re.findall(r"^# TYPE (\S+)", text, re.MULTILINE)).values()) == 1
    return {family.name: family.samples[0].value for family in families if family.samples}


def test_tritons_metrics_follow_ours(triton: Triton) -> None:
    families = scrape_families(f"127.0.0.1:{triton._ports[2]}")
    assert families["triton_embed_requests"] == 1
    assert families["triton_embed_triton_metrics_up"] == 1
    assert "nv_inference_request_success" in families
    assert "nv_cpu_utilization" in families


def test_without_endpoint_there_are_no_triton_metrics() -> None:
    assert not any(name.startswith("nv_") or "triton_metrics" in name for name in scrape_families(""))


def test_unreachable_triton_leaves_our_metrics() -> None:
    families = scrape_families(f"127.0.0.1:{free_port()}")
    assert (families["triton_embed_requests"], families["triton_embed_triton_metrics_up"]) == (1, 0)


@pytest.mark.parametrize(
    "response",
    [
        {"body": b"nv_x 1\n", "status": 500},
        {"body": b"<html>", "media_type": "application/json"},
        {"body": b"\xff\xfe"},
        {"body": b"nv_x 1\n", "delay": 30},
    ],
    ids=["failing", "wrong type", "not text", "slow"],
)
def test_bad_triton_metrics_are_left_out_in_time(response: dict[str, object]) -> None:
    start = time.monotonic()
    with serving(**response) as address:  # type: ignore[arg-type]
        metrics = Metrics(triton=address)

        async def scrape() -> tuple[bytes, float]:
            return await metrics.scrape(), time.monotonic() - start

        text, seconds = asyncio.run(scrape())
        assert b"triton_embed_triton_metrics_up 0.0" in text
        assert b"nv_x" not in text
        assert seconds < TRITON_SECONDS + 1


def test_duplicate_metric_family_is_taken_from_ours() -> None:
    theirs = """# HELP nv_a first
# TYPE nv_a counter
nv_a{model="m"} 1
# HELP triton_embed_inputs_total another's
# TYPE triton_embed_inputs_total counter
triton_embed_inputs_total{model="m"} 9

# HELP nv_b
# TYPE nv_b gauge
nv_b 3
# HELP nv_a again
# TYPE nv_a counter
nv_a{model="m"} 5"""
    with serving(theirs.encode()) as address:
        families = scrape_families(address)
    assert (families["nv_a"], families["nv_b"]) == (1, 3)
    assert "triton_embed_inputs" not in families or families["triton_embed_inputs"] != 9


WORKER = """
import sys
from triton_embed.gateway.http.metrics import Metrics
metrics = Metrics(shared=True)
metrics.count_request("/health", 200)
metrics.count_embeddings("minilm", 2, 30, 1)
metrics.in_flight.inc()
with metrics.stage("parse"):
    pass
sys.stdout.write(metrics.render().decode())
sys.stdout.flush()
sys.stdin.read()
sys.stdout.write(metrics.render().decode())
"""


def test_each_of_several_processes_reports_the_sum(tmp_path: Path) -> None:
    (tmp_path / "counter_1.db").touch()  # of a process that is just starting
    env = {**os.environ, "PROMETHEUS_MULTIPROC_DIR": str(tmp_path)}
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    processes = [subprocess.Popen([sys.executable, "-c", WORKER], env=env, **pipes) for _ in range(2)]  # type: ignore[call-overload]
    for process in processes:
        for line in process.stdout:  # its first page is written, so it has counted
            if line.startswith("triton_embed_stage_seconds_count"):
                break
    for process in processes:
        values: dict[tuple[str, str], float] = {}
        pages = process.communicate(timeout=60)[0]
        for family in text_string_to_metric_families(pages[pages.index("# HELP") :]):
            values |= {(s.name, " ".join(s.labels.values())): s.value for s in family.samples}
        assert values["triton_embed_requests_total", "/health 200"] == 2
        assert values["triton_embed_tokens_total", "minilm"] == 60
        assert values["triton_embed_stage_seconds_count", "parse"] == 2
        assert values["triton_embed_requests_in_flight", ""] == 2
        assert process.returncode == 0
