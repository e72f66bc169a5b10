"""Around the routes: ids, keys, CORS, limits, and no exception that reaches a caller. A small app stands in."""

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
from triton_embed.gateway.front import EXPOSED, Drain, Front, api_error, http_error, read_body
from triton_embed.gateway.metrics import Metrics
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
    app.add_middleware(Front, settings=read_settings(**settings), metrics=metrics, drain=drain or Drain())
    return app


def ask(
    method: str,
    path: str,
    api_key: str = "",
    metrics: Metrics | None = None,
    settings: dict[str, Any] | None = None,
    **given: Any,
) -> httpx.Response:
    async def run() -> httpx.Response:
        app = app_with(metrics or Metrics(), api_key=api_key, **settings or {})
        transport = httpx.ASGITransport(app)
        async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
            return await client.request(method, path, **given)

    return asyncio.run(run())


def counted(metrics: Metrics, route: str, status: int) -> bool:
    return f'route="{route}",status="{status}"}} 1.0' in metrics.render().decode()


def test_an_exception_becomes_a_500_that_says_nothing(caplog: pytest.LogCaptureFixture) -> None:
    metrics = Metrics()
    response = ask("GET", "/boom", metrics=metrics)
    assert response.status_code == 500
    assert response.json()["error"]["code"] == "internal_error"
    assert "secret" not in response.text
    assert "secret: /etc/key" in caplog.text  # the operator is told
    assert counted(metrics, "/boom", 500)
    assert "in_flight 0.0" in metrics.render().decode()


def test_our_own_errors_keep_their_headers() -> None:
    response = ask("GET", "/full")
    assert (response.status_code, response.headers["retry-after"]) == (429, "1")


@pytest.mark.parametrize(
    ("method", "path", "status", "code", "message"),
    [
        ("GET", "/nowhere", 404, "not_found", "There is no GET /nowhere"),
        ("GET", "/size", 405, "method_not_allowed", "Not allowed here: GET /size"),
    ],
)
def test_routing_answers_in_the_same_form(method: str, path: str, status: int, code: str, message: str) -> None:
    response = ask(method, path)
    assert response.status_code == status
    expected = {"message": message, "type": "invalid_request_error", "param": None, "code": code}
    assert response.json() == {"error": expected}


def test_a_callers_own_path_is_no_label() -> None:
    metrics = Metrics()
    ask("GET", "/made-up-by-a-scanner", metrics=metrics)
    assert counted(metrics, "unknown", 404)


@pytest.mark.parametrize("header", ["Bearer k€y", "bearer k€y", "Bearer  k€y "])
def test_the_key_opens(header: str) -> None:
    assert ask("POST", "/size", "k€y", headers={"Authorization": header.encode()}, content=b"x").text == "1"


@pytest.mark.parametrize("header", [None, "", "Bearer", "Bearer ", "Bearer k€", "Bearer k€yy", "Basic k€y", "k€y"])
def test_nothing_else_does(header: str | None) -> None:
    metrics = Metrics()
    headers = {} if header is None else {"Authorization": header.encode()}
    response = ask("POST", "/size", "k€y", metrics, headers=headers, content=b"x")
    assert response.status_code == 401
    assert response.headers["www-authenticate"] == "Bearer"
    assert response.json()["error"]["code"] == "invalid_api_key"
    assert counted(metrics, "unknown", 401)


@pytest.mark.parametrize("path", OPEN)
def test_what_load_balancers_and_browsers_ask_first_needs_no_key(path: str) -> None:
    assert ask("GET", path, "key").status_code == 200


@pytest.mark.parametrize("path", ["/nowhere", "/docsearch", "/metrics", "/v1/health"])
def test_an_unknown_path_does(path: str) -> None:
    assert ask("GET", path, "key").status_code == 401


@pytest.mark.parametrize(("key", "status"), [("one", 200), ("two", 200), ("three", 200), ("one,two", 401), ("", 401)])
def test_each_of_several_keys_opens(key: str, status: int) -> None:
    headers = {"Authorization": f"Bearer {key}"}
    assert ask("POST", "/size", "one, two,three", headers=headers, content=b"x").status_code == status


def test_every_key_is_compared_whichever_fits(monkeypatch: pytest.MonkeyPatch) -> None:
    """The time it takes must not tell which key it was."""
    compared: list[int] = []

    def watch(one: bytes, other: bytes) -> bool:
        compared.append(len(one) - len(other))
        return one == other

    monkeypatch.setattr("triton_embed.gateway.front.secrets.compare_digest", watch)
    for key in ("one", "three", "none-of-them"):
        ask("POST", "/size", "one,two,three", headers={"Authorization": f"Bearer {key}"}, content=b"x")
    assert compared == [0] * 9


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
def test_odd_headers_are_never_our_failure(header: tuple[bytes, bytes], path: str) -> None:
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


@pytest.mark.parametrize("given", ["a", "A-b_c.9", "x" * 128])
def test_a_request_keeps_its_id(given: str) -> None:
    assert ask("POST", "/size", headers={"x-request-id": given}, content=b"x").headers["x-request-id"] == given


@pytest.mark.parametrize("given", [None, "", "x" * 129, "a b", "é", "<script>", "a\tb"])
def test_a_request_without_a_good_one_is_given_its_own(given: str | None) -> None:
    headers = {} if given is None else {"x-request-id": given.encode()}
    ids = {ask("POST", "/size", headers=headers, content=b"x").headers["x-request-id"] for _ in range(2)}
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
def test_every_refusal_has_the_id_and_can_be_read_by_a_page(
    method: str, path: str, key: str, length: int, status: int
) -> None:
    headers = {"x-request-id": "mine", "Authorization": f"Bearer {key}", "Origin": PAGE}
    response = ask(method, path, "k", settings={"cors_origins": PAGE}, headers=headers, content=b"x" * length)
    assert response.status_code == status
    assert response.headers["x-request-id"] == "mine"
    assert response.headers["access-control-allow-origin"] == PAGE
    exposed = {name.strip() for name in response.headers["access-control-expose-headers"].split(",")}
    assert exposed == set(EXPOSED) == {"x-request-id", "x-truncated-inputs", "retry-after", "server-timing"}


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
def test_a_preflight_needs_no_key_but_an_origin_that_is_allowed(origins: str, origin: str, allowed: str | None) -> None:
    settings = {"cors_origins": origins}
    response = ask("OPTIONS", "/size", "k", settings=settings, headers={"Origin": origin, **PREFLIGHT})
    assert response.status_code == 200 if allowed else response.status_code in {400, 401}
    assert response.headers.get("access-control-allow-origin") == allowed
    assert "x-request-id" in response.headers
    assert "access-control-allow-credentials" not in response.headers
    if allowed:
        assert response.headers["access-control-allow-headers"] == "authorization,content-type"


def test_a_body_that_does_not_arrive_in_time_is_given_up() -> None:
    async def dribble() -> AsyncIterator[bytes]:
        for _ in range(LIMIT):
            await asyncio.sleep(0.1)
            yield b"x"

    began = time.monotonic()
    response = ask("POST", "/size", settings={"body_timeout": 0.25}, content=dribble())
    assert (response.status_code, response.json()["error"]["code"]) == (408, "timeout")
    assert response.json()["error"]["message"] == "The request body did not arrive within 0.25 s"
    assert response.headers["connection"] == "close"
    assert time.monotonic() - began < 3
    assert ask("POST", "/size", settings={"body_timeout": 5}, content=dribble()).text == str(LIMIT)


def lines_of(caplog: pytest.LogCaptureFixture) -> list[logging.LogRecord]:
    return [record for record in caplog.records if record.name == "triton_embed.access"]


def test_the_log_tells_of_each_request_and_nothing_of_what_it_holds(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    headers = {"Authorization": "Bearer k3y", "x-request-id": "mine"}
    path = "/size?secret=query"
    ask("POST", path, "k3y", settings={"log_format": "json"}, headers=headers, content=b"hush")
    ask("POST", "/hush?secret", "k3y", settings={"log_format": "json"}, headers={"Authorization": "Bearer hush"})
    answered, refused = (dict(record.fields) for record in lines_of(caplog))  # type: ignore[attr-defined]
    assert 0 < answered.pop("seconds") < 5
    assert 0 < refused.pop("seconds") < 5
    expected = {"method": "POST", "route": "/size", "status": 200, "model": "tiny", "inputs": 2, "tokens": 7}
    assert answered == {**expected, "client": "127.0.0.1"}
    assert (refused["route"], refused["status"], refused["model"]) == ("unknown", 401, None)
    assert not re.search("secret|hush|k3y", str([(record.getMessage(), vars(record)) for record in lines_of(caplog)]))


def test_in_text_requests_are_logged_for_those_who_debug(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    ask("GET", "/health")
    assert lines_of(caplog) == []
    caplog.set_level(logging.DEBUG)
    ask("GET", "/health")
    assert "GET /health 200 in " in lines_of(caplog)[0].getMessage()


def test_probes_are_told_that_it_is_stopping_and_others_are_still_answered() -> None:
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
def test_the_body_limit(length: int, status: int) -> None:
    async def chunks() -> AsyncIterator[bytes]:
        for _ in range(length):
            yield b"x"

    declared = ask("POST", "/size", content=b"x" * length)
    chunked = ask("POST", "/size", content=chunks())  # no Content-Length to go by
    assert (declared.status_code, chunked.status_code) == (status, status)
    if status == 413:
        assert declared.json()["error"]["message"] == f"The request body is larger than {LIMIT} bytes"
        assert declared.json() == chunked.json()


def test_a_client_that_leaves_is_counted_and_not_logged(caplog: pytest.LogCaptureFixture) -> None:
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
