"""Trace contexts from the caller to the real tritonserver, and the spans sent to collectors."""

import asyncio
import json
import re
import threading
import time
from base64 import b64decode
from collections.abc import Iterator
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import grpc
import httpx
import pytest
from google.protobuf.json_format import MessageToDict
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import (
    ExportTraceServiceRequest,
    ExportTraceServiceResponse,
)
from starlette.datastructures import Headers
from tritonclient.grpc import service_pb2, service_pb2_grpc

from conftest import Triton, free_port
from triton_embed.gateway.app import create_app
from triton_embed.gateway.http.tracing import incoming_context
from triton_embed.gateway.settings import SettingsError, read_settings

TRACE, SPAN = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"
PARENT = f"00-{TRACE}-{SPAN}-01"


def accept(*headers: tuple[str, str]) -> dict[str, str]:
    return dict(incoming_context(Headers(raw=[(name.encode(), value.encode("latin-1")) for name, value in headers])))


@pytest.mark.parametrize(
    "parent",
    [
        PARENT,
        f"00-{TRACE}-{SPAN}-00",
        f"00-{TRACE}-{SPAN}-ff",
        f"cc-{TRACE}-{SPAN}-01",
        f"cc-{TRACE}-{SPAN}-01-what-the-future-adds",
        f"01-{TRACE}-{SPAN}-01-",
    ],
)
def test_valid_traceparent_is_forwarded(parent: str) -> None:
    assert accept(("traceparent", parent)) == {"traceparent": parent}


# From the W3C's test suite: https://github.com/w3c/trace-context/blob/main/test/test.py
MALFORMED = [
    "",
    f"ff-{TRACE}-{SPAN}-01",
    f"00-{'0' * 32}-{SPAN}-01",
    f"00-{TRACE}-{'0' * 16}-01",
    f"00-{TRACE}-{SPAN}-01-more",
    f"00-{TRACE}-{SPAN}-01-",
    f"00-{TRACE}-{SPAN}-01.",
    f"cc-{TRACE}-{SPAN}-01.what",
    f"00-{TRACE.upper()}-{SPAN}-01",
    f"0-{TRACE}-{SPAN}-01",
    f"000-{TRACE}-{SPAN}-01",
    f"..-{TRACE}-{SPAN}-01",
    f"00-{TRACE[:-1]}-{SPAN}-01",
    f"00-{TRACE}-{SPAN[:-1]}-01",
    f"00-{TRACE[:-1]}.-{SPAN}-01",
    f"00-{TRACE}-{SPAN}-1",
    f"00-{TRACE}-{SPAN}-.0",
    f"00-{TRACE}-{SPAN}",
    f"00-{TRACE}-{SPAN}-01\n",
    f"00-{TRACE}-{SPAN}-01é",
    f"cc-{TRACE}-{SPAN}-01-{'x' * 5000}",
]


@pytest.mark.parametrize("parent", MALFORMED)
def test_malformed_traceparent_is_dropped_with_tracestate(parent: str) -> None:
    assert accept(("traceparent", parent), ("tracestate", "a=1")) == {}


def test_two_traceparents_are_dropped() -> None:
    assert accept(("traceparent", PARENT), ("traceparent", PARENT)) == {}
    assert accept(("tracestate", "a=1")) == {}


@pytest.mark.parametrize(
    ("headers", "forwarded"),
    [
        (["a=1"], "a=1"),
        (["foo=1,bar=2", "rojo=1,congo=2"], "foo=1,bar=2,rojo=1,congo=2"),
        (["foo=1 \t , \t bar=2, \t baz=3"], "foo=1,bar=2,baz=3"),
        (["foo=1,,bar=2,"], "foo=1,bar=2"),
        (["0a_-*/@v=!~"], "0a_-*/@v=!~"),
        (["a= 1"], "a= 1"),
        ([",".join(f"k{i}=1" for i in range(32))], ",".join(f"k{i}=1" for i in range(32))),
        ([f"a=1,b={'x' * 250},c={'y' * 250},d={'z' * 250}"], f"a=1,b={'x' * 250},c={'y' * 250}"),
        ([""], None),
        (["foo"], None),
        (["foo=1,foo=2"], None),
        (["FOO=1"], None),
        (["foo@=1"], None),
        (["@foo=1"], None),
        (["foo@@bar=1"], None),
        (["foo =1"], None),
        (["foo=1,b=é"], None),
        (["foo=a=b"], None),
        ([f"{'z' * 257}=1"], None),
        ([f"a={'z' * 257}"], None),
        ([",".join(f"k{i}=1" for i in range(33))], None),
    ],
)
def test_valid_tracestate_is_forwarded(headers: list[str], forwarded: str | None) -> None:
    context = accept(("traceparent", PARENT), *(("tracestate", line) for line in headers))
    assert context.pop("traceparent") == PARENT
    assert context == ({} if forwarded is None else {"tracestate": forwarded})


@dataclass(frozen=True)
class Span:
    """The fields of a span that the tests check. Ids are in hexadecimal."""

    service: str
    name: str
    trace: str
    id: str
    parent: str
    attributes: str


def spans_of(body: bytes, media_type: str) -> Iterator[Span]:
    """Yield the spans of an OTLP export request, in JSON (Triton) or protobuf (OpenTelemetry's Python).

    OTLP's JSON has ids in hexadecimal, but `MessageToDict` returns base64.
    """
    if media_type == "application/json":
        request = json.loads(body)
    else:
        request = MessageToDict(ExportTraceServiceRequest.FromString(body))
    read_id = str if media_type == "application/json" else lambda text: b64decode(text).hex()
    for resource in request["resourceSpans"]:
        attributes = {item["key"]: item["value"].get("stringValue", "") for item in resource["resource"]["attributes"]}
        for span in (span for scope in resource["scopeSpans"] for span in scope["spans"]):
            ids = (read_id(span.get(key, "")) for key in ("traceId", "spanId", "parentSpanId"))
            yield Span(attributes.get("service.name", ""), span["name"], *ids, str(span.get("attributes")))


class Collector:
    """An OTLP/HTTP collector that stores the spans it receives."""

    def __init__(self) -> None:
        spans: list[Span] = []
        self.spans = spans

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                assert self.path == "/v1/traces"
                body = self.rfile.read(int(self.headers["content-length"]))
                spans.extend(spans_of(body, self.headers["content-type"]))
                self.send_response(200)
                self.send_header("Content-Type", "application/x-protobuf")
                self.end_headers()
                self.wfile.write(ExportTraceServiceResponse().SerializeToString())

            def log_message(self, *_: object) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        self._thread = threading.Thread(target=self._server.serve_forever)
        self._thread.start()

    def wait(self, **fields: str) -> Span:
        """Wait for a span with these field values and return it."""
        for _ in range(200):
            for span in list(self.spans):
                if all(getattr(span, key) == value for key, value in fields.items()):
                    return span
            time.sleep(0.1)
        raise AssertionError(self.spans)

    def close(self) -> None:
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()


@pytest.fixture(scope="module")
def collector() -> Iterator[Collector]:
    server = Collector()
    yield server
    server.close()


@pytest.fixture(scope="module")
def traced(model_directory: Path, tmp_path_factory: pytest.TempPathFactory, collector: Collector) -> Iterator[Triton]:
    """Start the real tritonserver, which sends its spans to `collector`."""
    settings = ["mode=opentelemetry", f"opentelemetry,url={collector.url}/v1/traces", "rate=1", "level=TIMESTAMPS"]
    settings += ["opentelemetry,bsp_schedule_delay=100"]
    flags = [f"--trace-config={setting}" for setting in settings]
    server = Triton(model_directory, tmp_path_factory.mktemp("traced") / "log", *flags)
    yield server
    server.stop()


def embed(app: Any, path: str = "/v1/embeddings", **headers: str) -> httpx.Response:
    async def run() -> httpx.Response:
        async with app.router.lifespan_context(app), httpx.AsyncClient(transport=httpx.ASGITransport(app)) as client:
            body = {"model": "minilm", "input": "hello"}
            return await client.post(f"http://gateway.test{path}", json=body, headers=headers)

    return asyncio.run(run())


def test_triton_span_joins_the_callers_trace(traced: Triton, collector: Collector) -> None:
    response = embed(create_app(read_settings(triton_grpc=traced.grpc)), traceparent=PARENT, tracestate="a=1")
    assert response.status_code == 200, response.text
    collector.wait(name="InferRequest", trace=TRACE, parent=SPAN)
    assert not any(span.service == "triton-embed" for span in collector.spans)


def test_opentelemetry_span_is_parent_of_tritons_span(traced: Triton, collector: Collector) -> None:
    trace = TRACE[::-1]
    settings = read_settings(triton_grpc=traced.grpc, otlp_endpoint=collector.url)
    response = embed(create_app(settings), "/v1/embeddings?secret=%ff", traceparent=f"00-{trace}-{SPAN}-01")
    assert response.status_code == 200, response.text
    ours = collector.wait(service="triton-embed", trace=trace)
    assert (ours.name, ours.parent) == ("POST /v1/embeddings", SPAN)
    assert "http.status_code" in ours.attributes
    assert "secret" not in ours.attributes
    collector.wait(name="InferRequest", trace=trace, parent=ours.id)


def test_opentelemetry_starts_a_trace_if_there_is_none(traced: Triton, collector: Collector) -> None:
    settings = read_settings(triton_grpc=traced.grpc, otlp_endpoint=f"{collector.url}/v1/traces")
    assert embed(create_app(settings), traceparent="nonsense").status_code == 200
    ours = collector.wait(service="triton-embed", parent="")
    collector.wait(name="InferRequest", trace=ours.trace, parent=ours.id)


def test_unreachable_collector_fails_no_request_and_exits_soon() -> None:
    settings = read_settings(triton_grpc=f"127.0.0.1:{free_port()}", otlp_endpoint=f"http://127.0.0.1:{free_port()}")
    start = time.monotonic()
    assert embed(create_app(settings)).status_code == 503  # Triton is unreachable too
    assert time.monotonic() - start < 8


def test_missing_opentelemetry_is_a_settings_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> None:
        raise ModuleNotFoundError(name)

    create_app(read_settings())  # not needed without otlp_endpoint
    monkeypatch.setattr("triton_embed.gateway.http.tracing.find_spec", missing)
    with pytest.raises(SettingsError, match=re.escape("pip install 'triton-embed[otel]'")):
        create_app(read_settings(otlp_endpoint="http://localhost:4318"))


def test_longest_trace_context_is_valid_grpc_metadata() -> None:
    """Send the longest accepted context through grpc.aio, as the client does."""
    received: dict[str, str] = {}

    class Servicer(service_pb2_grpc.GRPCInferenceServiceServicer):  # type: ignore[misc]
        async def ServerLive(self, request: Any, context: Any) -> Any:  # noqa: N802 - Triton's name
            received.update(context.invocation_metadata())
            return service_pb2.ServerLiveResponse(live=True)

    parent = f"cc-{TRACE}-{SPAN}-01-{'x' * 99}"
    state = ",".join(f"{i}{'k' * 100}={'~' * 200}" for i in range(32))
    metadata = tuple(accept(("traceparent", parent), ("tracestate", state)).items())

    async def run() -> None:
        server = grpc.aio.server()
        service_pb2_grpc.add_GRPCInferenceServiceServicer_to_server(Servicer(), server)
        port = server.add_insecure_port("127.0.0.1:0")
        await server.start()
        async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
            stub = service_pb2_grpc.GRPCInferenceServiceStub(channel)
            assert (await stub.ServerLive(service_pb2.ServerLiveRequest(), metadata=metadata)).live
        await server.stop(None)

    asyncio.run(run())
    assert received["traceparent"] == parent
    assert state.startswith(received["tracestate"])
    assert len(received["tracestate"]) <= 512
