"""The middleware, around a small app: request ids, API keys, CORS, limits, and exceptions."""

import asyncio
import logging
import re
import time
from collections.abc import AsyncIterator
from typing import Any

import httpx
import pytest
from fastapi import FastAPI
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response

from triton_embed.gateway.errors import ApiError
from triton_embed.gateway.http.metrics import Metrics
from triton_embed.gateway.http.middleware import (
    EXPOSED_HEADERS,
    Drain,
    GatewayMiddleware,
    api_error,
    http_error,
    read_body,
)
from triton_embed.gateway.settings import read_settings

LIMIT = 10
OPEN = ("/", "/health", "/health_generate", "/ready", "/ping", "/docs", "/docs/asset.js", "/openapi.json")
PAGE = "https://page.example"


def app_with(metrics: Metrics, drain: Drain | None = None, **settings: Any) -> FastAPI:
    app = FastAPI(docs_url=None)

    @app.post("/size")
    async def size(request: Request) -> Response:
        body = await read_body(request, LIMIT)
        request.state.model, request.state.inputs, request.state.tokens = "tiny", 2, 7
        return PlainTextResponse(str(len(body)))

    @app.get("/boom")
    async def boom() -> None:
        raise RuntimeError("secret: /etc/key")

    @app.get("/full")
    async def full() -> None:
        raise ApiError(429, "full", headers={"Retry-After": "1"})

    async def open_to_all() -> str:
        return "ok"

    for path in OPEN:
        app.add_api_route(path, open_to_all)

    app.add_exception_handler(ApiError, api_error)
    app.add_exception_handler(HTTPException, http_error)
    app.add_middleware(GatewayMiddleware, settings=read_settings(**settings), metrics=metrics, drain=drain or Drain())
    return app


def send(
    method: str,
    path: str,
    api_key: str = "",
    metrics: Metrics | None = None,
    settings: dict[str, Any] | None = None,
    **options: Any,
) -> httpx.Response:
    async def run() -> httpx.Response:
        app = app_with(metrics or Metrics(), api_key=api_key, **settings or {})
        transport = httpx.ASGITransport(app)
        async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
            return await client.request(method, path, **options)

    return asyncio.run(run())


def counted(metrics: Metrics, route: str, status: int) -> bool:
    return f'route="{route}",status="{status}"}} 1.0' in metrics.render().decode()


def test_exception_becomes_500_without_details(caplog: pytest.LogCaptureFixture) -> None:
    metrics = Metrics()
    response = send("GET", "/boom", metrics=metrics)
    assert response.status_code == 500
    assert response.json()["error"]["code"] == "internal_error"
    assert "secret" not in response.text
    assert "secret: /etc/key" in caplog.text  # the log has the details
    assert counted(metrics, "/boom", 500)
    assert "in_flight 0.0" in metrics.render().decode()


def test_api_error_keeps_its_headers() -> None:
    response = send("GET", "/full")
    assert (response.status_code, response.headers["retry-after"]) == (429, "1")


@pytest.mark.parametrize(
    ("method", "path", "status", "code", "message"),
    [
        ("GET", "/nowhere", 404, "not_found", "Not found: GET /nowhere"),
        ("GET", "/size", 405, "method_not_allowed", "Method not allowed: GET /size"),
    ],
)
def test_routing_errors_have_the_same_body(method: str, path: str, status: int, code: str, message: str) -> None:
    response = send(method, path)
    assert response.status_code == status
    expected = {"message": message, "type": "invalid_request_error", "param": None, "code": code}
    assert response.json() == {"error": expected}


def test_unknown_path_is_not_a_metric_label() -> None:
    metrics = Metrics()
    send("GET", "/made-up-by-a-scanner", metrics=metrics)
    assert counted(metrics, "unknown", 404)


@pytest.mark.parametrize("header", ["Bearer k€y", "bearer k€y", "Bearer  k€y "])
def test_valid_key_is_accepted(header: str) -> None:
    assert send("POST", "/size", "k€y", headers={"Authorization": header.encode()}, content=b"x").text == "1"


@pytest.mark.parametrize("header", [None, "", "Bearer", "Bearer ", "Bearer k€", "Bearer k€yy", "Basic k€y", "k€y"])
def test_any_other_authorization_is_rejected(header: str | None) -> None:
    metrics = Metrics()
    headers = {} if header is None else {"Authorization": header.encode()}
    response = send("POST", "/size", "k€y", metrics, headers=headers, content=b"x")
    assert response.status_code == 401
    assert response.headers["www-authenticate"] == "Bearer"
    assert response.json()["error"]["code"] == "invalid_api_key"
    assert counted(metrics, "unknown", 401)


@pytest.mark.parametrize("path", OPEN)
def test_probes_and_pages_need_no_key(path: str) -> None:
    assert send("GET", path, "key").status_code == 200


@pytest.mark.parametrize("path", ["/nowhere", "/docsearch", "/metrics", "/v1/health"])
def test_other_paths_need_a_key(path: str) -> None:
    assert send("GET", path, "key").status_code == 401


@pytest.mark.parametrize(("key", "status"), [("one", 200), ("two", 200), ("three", 200), ("one,two", 401), ("", 401)])
def test_each_of_several_keys_is_accepted(key: str, status: int) -> None:
    headers = {"Authorization": f"Bearer {key}"}
    assert send("POST", "/size", "one, two,three", headers=headers, content=b"x").status_code == status


def test_every_key_is_compared(monkeypatch: pytest.MonkeyPatch) -> None:
    """Compare all keys, so that the time taken does not reveal which one matches."""
    length_differences: list[int] = []

    def compare(a: bytes, b: bytes) -> bool:
        length_differences.append(len(a) - len(b))
        return a == b

    monkeypatch.setattr("triton_embed.gateway.http.middleware.secrets.compare_digest", compare)
    for key in ("one", "three", "none-of-them"):
        send("POST", "/size", "one,two,three", headers={"Authorization": f"Bearer {key}"}, content=b"x")
    assert length_differences == [0] * 9


ODD_HEADERS = [
    (b"authorization", b"Bearer \xff\xfe"),
    (b"authorization", b"\xff"),
    (b"authorization", b" "),
    (b"authorization", b"Bearer " + b"k" * 10_000),
    (b"host", b"["),
    (b"host", b"\xff"),
    (b"content-length", b"many"),
    (b"content-length", b"-1"),
    (b"content-length", b"\xb2"),
    (b"content-length", b"9" * 5000),
    (b"content-type", b"\xff"),
    (b"origin", b"\xff"),
    (b"x-request-id", b"\xff"),
    (b"expect", b"\xff"),
    (b"transfer-encoding", b"\xff"),
]


@pytest.mark.parametrize("path", ["/size", "/nowhere"])
@pytest.mark.parametrize("header", ODD_HEADERS, ids=str)
def test_malformed_headers_never_cause_a_500(header: tuple[bytes, bytes], path: str) -> None:
    sent: list[Any] = []

    async def run() -> None:
        scope = {"type": "http", "method": "POST", "path": path, "query_string": b"", "http_version": "1.1"}
        headers = [(b"authorization", b"Bearer k"), header] if header[0] != b"authorization" else [header]

        async def receive() -> dict[str, Any]:
            return {"type": "http.request", "body": b"x", "more_body": False}

        async def send(message: Any) -> None:
            sent.append(message)

        app = app_with(Metrics(), api_key="k", cors_origins=PAGE)
        await app({**scope, "headers": headers, "root_path": "", "scheme": "http", "server": ("a", 1)}, receive, send)

    asyncio.run(run())
    assert sent[0]["status"] in {200, 401, 404}
    assert not sent[-1].get("more_body")


@pytest.mark.parametrize("sent_id", ["a", "A-b_c.9", "x" * 128])
def test_valid_request_id_is_returned(sent_id: str) -> None:
    assert send("POST", "/size", headers={"x-request-id": sent_id}, content=b"x").headers["x-request-id"] == sent_id


@pytest.mark.parametrize("sent_id", [None, "", "x" * 129, "a b", "é", "<script>", "a\tb"])
def test_missing_or_invalid_request_id_is_replaced(sent_id: str | None) -> None:
    headers = {} if sent_id is None else {"x-request-id": sent_id.encode()}
    ids = {send("POST", "/size", headers=headers, content=b"x").headers["x-request-id"] for _ in range(2)}
    assert len(ids) == 2
    assert all(re.fullmatch("[0-9a-f]{32}", id_) for id_ in ids)


@pytest.mark.parametrize(
    ("method", "path", "key", "length", "status"),
    [
        ("POST", "/size", "", 1, 401),
        ("GET", "/nowhere", "k", 0, 404),
        ("GET", "/size", "k", 0, 405),
        ("POST", "/size", "k", LIMIT + 1, 413),
        ("GET", "/full", "k", 0, 429),
        ("GET", "/boom", "k", 0, 500),
    ],
)
def test_every_error_has_request_id_and_cors_headers(
    method: str, path: str, key: str, length: int, status: int
) -> None:
    headers = {"x-request-id": "mine", "Authorization": f"Bearer {key}", "Origin": PAGE}
    response = send(method, path, "k", settings={"cors_origins": PAGE}, headers=headers, content=b"x" * length)
    assert response.status_code == status
    assert response.headers["x-request-id"] == "mine"
    assert response.headers["access-control-allow-origin"] == PAGE
    exposed = {name.strip() for name in response.headers["access-control-expose-headers"].split(",")}
    assert exposed == set(EXPOSED_HEADERS) == {"x-request-id", "x-truncated-inputs", "retry-after", "server-timing"}


PREFLIGHT = {"Access-Control-Request-Method": "POST", "Access-Control-Request-Headers": "authorization,content-type"}


@pytest.mark.parametrize(
    ("origins", "origin", "allowed"),
    [
        (PAGE, PAGE, PAGE),
        (f"http://a, {PAGE.upper()}", PAGE, PAGE),
        ("*", "https://any.where", "*"),
        (PAGE, "https://page.example.evil", None),
        (PAGE, "http://page.example", None),
        ("", PAGE, None),
    ],
)
def test_preflight_needs_no_key_but_an_allowed_origin(origins: str, origin: str, allowed: str | None) -> None:
    settings = {"cors_origins": origins}
    response = send("OPTIONS", "/size", "k", settings=settings, headers={"Origin": origin, **PREFLIGHT})
    assert response.status_code == 200 if allowed else response.status_code in {400, 401}
    assert response.headers.get("access-control-allow-origin") == allowed
    assert "x-request-id" in response.headers
    assert "access-control-allow-credentials" not in response.headers
    if allowed:
        assert response.headers["access-control-allow-headers"] == "authorization,content-type"


def test_body_that_arrives_too_slowly_gets_408() -> None:
    async def slow_body() -> AsyncIterator[bytes]:
        for _ in range(LIMIT):
            await asyncio.sleep(0.1)
            yield b"x"

    start = time.monotonic()
    response = send("POST", "/size", settings={"body_timeout": 0.25}, content=slow_body())
    assert (response.status_code, response.json()["error"]["code"]) == (408, "timeout")
    assert response.json()["error"]["message"] == "The request body did not arrive within 0.25 s"
    assert response.headers["connection"] == "close"
    assert time.monotonic() - start < 3
    assert send("POST", "/size", settings={"body_timeout": 5}, content=slow_body()).text == str(LIMIT)


def access_records(caplog: pytest.LogCaptureFixture) -> list[logging.LogRecord]:
    return [record for record in caplog.records if record.name == "triton_embed.access"]


def test_access_log_has_a_line_per_request_without_its_content(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    headers = {"Authorization": "Bearer k3y", "x-request-id": "mine"}
    path = "/size?secret=query"
    send("POST", path, "k3y", settings={"log_format": "json"}, headers=headers, content=b"hush")
    send("POST", "/hush?secret", "k3y", settings={"log_format": "json"}, headers={"Authorization": "Bearer hush"})
    answered, refused = (dict(record.fields) for record in access_records(caplog))  # type: ignore[attr-defined]
    assert 0 < answered.pop("seconds") < 5
    assert 0 < refused.pop("seconds") < 5
    expected = {"method": "POST", "route": "/size", "status": 200, "model": "tiny", "inputs": 2, "tokens": 7}
    assert answered == {**expected, "client": "127.0.0.1"}
    assert (refused["route"], refused["status"], refused["model"]) == ("unknown", 401, None)
    assert not re.search(
        "secret|hush|k3y", str([(record.getMessage(), vars(record)) for record in access_records(caplog)])
    )


def test_text_access_log_is_at_debug_level(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    send("GET", "/health")
    assert access_records(caplog) == []
    caplog.set_level(logging.DEBUG)
    send("GET", "/health")
    assert "GET /health 200 in " in access_records(caplog)[0].getMessage()


def test_while_stopping_probes_get_503_and_requests_are_processed() -> None:
    async def run() -> tuple[httpx.Response, httpx.Response, httpx.Response]:
        drain = Drain()
        transport = httpx.ASGITransport(app_with(Metrics(), drain))
        async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
            drain.stopping = True
            ready, size = await client.get("/ready"), await client.post("/size", content=b"x")
            drain.expire()
            return ready, size, await client.post("/size", content=b"x")

    ready, size, late = asyncio.run(run())
    assert ready.status_code == 503
    assert ready.json() == {"status": "unavailable", "reason": "The server is stopping"}
    assert (size.text, size.headers["connection"]) == ("1", "close")
    assert (late.status_code, late.json()["error"]["message"]) == (503, "The server is stopping")


@pytest.mark.parametrize(("length", "status"), [(0, 200), (LIMIT, 200), (LIMIT + 1, 413)])
def test_body_limit(length: int, status: int) -> None:
    async def chunks() -> AsyncIterator[bytes]:
        for _ in range(length):
            yield b"x"

    declared = send("POST", "/size", content=b"x" * length)
    chunked = send("POST", "/size", content=chunks())  # without a Content-Length
    assert (declared.status_code, chunked.status_code) == (status, status)
    if status == 413:
        assert declared.json()["error"]["message"] == f"The request body is larger than {LIMIT} bytes"
        assert declared.json() == chunked.json()


def test_disconnected_client_is_counted_but_not_logged(caplog: pytest.LogCaptureFixture) -> None:
    metrics = Metrics()
    sent: list[Any] = []

    async def run() -> None:
        scope = {"type": "http", "method": "POST", "path": "/size", "headers": [], "query_string": b""}

        async def receive() -> dict[str, Any]:
            return {"type": "http.disconnect"}

        async def send(message: Any) -> None:
            sent.append(message)

        await app_with(metrics)(scope, receive, send)

    asyncio.run(run())
    assert sent == []
    assert counted(metrics, "/size", 499)
    assert caplog.text == ""
