"""Around the routes: keys, limits, and no exception that reaches a caller. A small app stands in for the routes."""

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import httpx
import pytest
from fastapi import FastAPI
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response

from triton_embed.gateway.errors import ApiError
from triton_embed.gateway.front import Front, api_error, http_error, read_body
from triton_embed.gateway.metrics import Metrics

LIMIT = 10


def app_with(metrics: Metrics, api_key: str = "") -> FastAPI:
    app = FastAPI()

    @app.post("/size")
    async def size(request: Request) -> Response:
        return PlainTextResponse(str(len(await read_body(request, LIMIT))))

    @app.get("/boom")
    async def boom() -> None:
        raise RuntimeError("secret: /etc/key")

    @app.get("/full")
    async def full() -> None:
        raise ApiError(429, "full", headers={"Retry-After": "1"})

    @app.get("/health")
    async def health() -> str:
        return "ok"

    app.add_exception_handler(ApiError, api_error)
    app.add_exception_handler(HTTPException, http_error)
    app.add_middleware(Front, api_key=api_key, metrics=metrics)
    return app


def ask(method: str, path: str, api_key: str = "", metrics: Metrics | None = None, **given: Any) -> httpx.Response:
    async def run() -> httpx.Response:
        transport = httpx.ASGITransport(app_with(metrics or Metrics(), api_key))
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


def test_health_needs_no_key_and_an_unknown_path_does() -> None:
    assert ask("GET", "/health", "key").status_code == 200
    assert ask("GET", "/nowhere", "key").status_code == 401


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
