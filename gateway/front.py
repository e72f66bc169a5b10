"""Around the routes: the request's id, keys, CORS, counters, limits, the log's line, and the one boundary that no
exception passes.

    Front: id, time limit of the body, counters, log   →   CORS   →   keys, draining, exceptions   →   the app

CORS lies outside of what refuses, so that a page may read a refusal, and a preflight needs no key.
"""

import asyncio
import hashlib
import logging
import re
import secrets
import time
from contextlib import suppress

import orjson
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from triton_embed.gateway.errors import ApiError
from triton_embed.gateway.logs import request_id
from triton_embed.gateway.metrics import Metrics
from triton_embed.gateway.settings import Settings

log = logging.getLogger(__name__)
access = logging.getLogger("triton_embed.access")

PROBES = frozenset({"/health", "/health_generate", "/ready", "/ping"})
KEYLESS = frozenset({"/", "/docs", "/openapi.json", "/favicon.ico"})  # what a browser opens before it has a key
KEYLESS_UNDER = ("/health", "/ready", "/ping", "/docs/")  # load balancers have no key, nor have assets
EXPOSED = ("x-request-id", "x-truncated-inputs", "retry-after", "server-timing")  # what a page may read of an answer
CLIENT_GONE = 499  # nginx's number, seen in metrics and log only
LINGER_SECONDS = 2.0  # how long what is left of a refused body is read: closing at once resets, and loses the answer
STOPPING = "The server is stopping"
EXCHANGE = "triton_embed.exchange"  # where a scope holds its _Exchange

_ID = re.compile(rb"[A-Za-z0-9._-]{1,128}")


class Drain:
    """The end of a gateway: once it is stopping, probes say so; once it has expired, nothing is waited for any more."""

    def __init__(self) -> None:
        self.stopping = False
        self.expired = False
        self.waiting: dict[asyncio.Task[object], _Exchange] = {}

    def expire(self) -> None:
        """Answer 503 to everyone who has no answer yet."""
        self.stopping = self.expired = True
        for task, exchange in self.waiting.items():
            if not exchange.status:
                task.cancel()


class Front:
    """The outermost layer of the app.

    Routes leave what the log tells of a request in its state: `request.state.model`, `.inputs` and `.tokens`.
    """

    def __init__(self, app: ASGIApp, settings: Settings, metrics: Metrics, drain: Drain) -> None:
        self._app = app
        self._keys = [_digest(key.encode()) for key in settings.keys]
        self._body_seconds = settings.body_timeout
        self._metrics = metrics
        self._drain = drain
        # In text a line for every request would hide those a person waits for.
        self._access_level = logging.INFO if settings.log_format == "json" else logging.DEBUG
        self._entrance: ASGIApp = self._enter
        if settings.origins:
            self._entrance = CORSMiddleware(
                self._enter,
                allow_origins=settings.origins,
                allow_methods=("GET", "POST"),
                allow_headers=("*",),
                expose_headers=EXPOSED,
            )

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        began = time.perf_counter()
        exchange = scope[EXCHANGE] = _Exchange(scope, receive, send, self._body_seconds, self._drain)
        token = request_id.set(exchange.id)
        try:
            with self._metrics.in_flight.track_inprogress():
                await self._entrance(scope, exchange.receive, exchange.send)
        except ClientDisconnect:
            exchange.status = CLIENT_GONE
        finally:
            route = getattr(scope.get("route"), "path", "unknown")
            self._metrics.answered(route, exchange.status)
            if access.isEnabledFor(self._access_level):
                self._tell(scope, route, exchange.status, time.perf_counter() - began)
            request_id.reset(token)

    async def _enter(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer, whatever happens behind."""
        exchange: _Exchange = scope[EXCHANGE]
        task = asyncio.current_task()
        assert task is not None  # noqa: S101 - coroutines run in tasks
        self._drain.waiting[task] = exchange
        try:
            if self._drain.expired:
                raise ApiError(503, STOPPING)
            if self._drain.stopping and scope["path"] in PROBES:
                await _unavailable()(scope, receive, send)
            elif self._admits(scope):
                await self._app(scope, receive, send)
            else:
                await _no_entry().response()(scope, receive, send)
        except ClientDisconnect:
            raise
        except asyncio.CancelledError:
            if not self._drain.expired:
                raise
            task.uncancel()
            await ApiError(503, STOPPING).response()(scope, receive, send)
        except ApiError as error:
            await error.response()(scope, receive, send)
        except Exception:
            log.exception("%s %s failed", scope["method"], getattr(scope.get("route"), "path", "unknown"))
            if not exchange.status:
                await ApiError(500, "The gateway failed to answer").response()(scope, receive, send)
        finally:
            del self._drain.waiting[task]

    def _admits(self, scope: Scope) -> bool:
        path = scope["path"]
        if not self._keys or path in KEYLESS or path.startswith(KEYLESS_UNDER):
            return True
        scheme, _, key = dict(scope["headers"]).get(b"authorization", b"").partition(b" ")
        given = _digest(key.strip())
        # All of them, found or not: the time it takes tells nothing.
        fits = [secrets.compare_digest(given, known) for known in self._keys]
        return any(fits) and scheme.lower() == b"bearer"

    def _tell(self, scope: Scope, route: str, status: int, seconds: float) -> None:
        state = scope.get("state", {})
        client = scope.get("client")
        fields = {
            "method": scope["method"],
            "route": route,
            "status": status,
            "seconds": round(seconds, 6),
            "model": state.get("model"),
            "inputs": state.get("inputs"),
            "tokens": state.get("tokens"),
            "client": client[0] if client else None,
        }
        told = "%(method)s %(route)s %(status)s in %(seconds)s s"
        if fields["model"]:
            told += ", %(model)s: %(inputs)s inputs, %(tokens)s tokens"
        access.log(self._access_level, told, fields, extra={"fields": fields})


class _Exchange:
    """One request and its answer, as they pass."""

    def __init__(self, scope: Scope, receive: Receive, send: Send, body_seconds: float, drain: Drain) -> None:
        headers = dict(scope["headers"])
        given = headers.get(b"x-request-id", b"")
        self.id = given.decode() if _ID.fullmatch(given) else secrets.token_hex(16)
        self.status = 0  # 0: no answer has begun
        self._receive = receive
        self._send = send
        self._drain = drain
        self._body_seconds = body_seconds
        self._deadline = asyncio.get_running_loop().time() + body_seconds
        self._body_left = b"transfer-encoding" in headers or headers.get(b"content-length", b"0") != b"0"
        # Such a client sends nothing before it is asked to, by the first `receive`.
        self._unasked = headers.get(b"expect", b"").lower() == b"100-continue"

    async def receive(self) -> Message:
        """ApiError 408: the body takes too long to arrive."""
        self._unasked = False
        if not self._body_left:
            return await self._receive()
        try:
            async with asyncio.timeout_at(self._deadline):
                return await self._next()
        except TimeoutError:
            raise ApiError(408, f"The request body did not arrive within {self._body_seconds:g} s") from None

    async def send(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            headers = [*message.get("headers", ()), (b"x-request-id", self.id.encode())]
            if self._body_left or self._drain.stopping:
                headers.append((b"connection", b"close"))
            await self._send({**message, "headers": headers})
            self.status = message["status"]
        elif self._body_left and not self._unasked and not message.get("more_body"):
            await self._send({**message, "more_body": True})
            await self._read_on()
            await self._send({"type": "http.response.body"})
        else:
            await self._send(message)

    async def _next(self) -> Message:
        message = await self._receive()
        self._body_left = bool(message.get("more_body"))  # a client that is gone sends no more either
        return message

    async def _read_on(self) -> None:
        with suppress(TimeoutError):
            async with asyncio.timeout(LINGER_SECONDS):
                while self._body_left:
                    await self._next()


async def read_body(request: Request, limit: int) -> bytes:
    """The whole body, whatever its Content-Type. ApiError 413 as soon as it is known to pass `limit` bytes."""
    body = bytearray()
    if (coding := request.headers.get("content-encoding", "identity").lower()) != "identity":
        raise ApiError(400, f"The request body must not be compressed, and its Content-Encoding is '{coding[:100]}'")
    if _declared(request) <= limit:
        async for chunk in request.stream():
            body += chunk
            if len(body) > limit:
                break
        else:
            return bytes(body)
    raise ApiError(413, f"The request body is larger than {limit} bytes")


async def api_error(_: Request, error: Exception) -> Response:
    """The handler of ApiError."""
    assert isinstance(error, ApiError)  # noqa: S101 - what it is registered for
    return error.response()


async def http_error(request: Request, error: Exception) -> Response:
    """The handler of routing's own refusals: no such path, or not with this method."""
    assert isinstance(error, HTTPException)  # noqa: S101 - what it is registered for
    what = {404: "There is no", 405: "Not allowed here:"}.get(error.status_code, "Refused:")
    message = f"{what} {request.method} {request.url.path[:200]}"
    return ApiError(error.status_code, message, headers=error.headers).response()


def _declared(request: Request) -> int:
    """What Content-Length says; 0 where it says nothing that is a number of bytes."""
    stated = request.headers.get("content-length", "")
    return int(stated) if re.fullmatch(r"[0-9]{1,18}", stated) else 0


def _digest(key: bytes) -> bytes:
    """Keys of one length: comparing them tells nothing of their own."""
    return hashlib.sha256(key).digest()


def _no_entry() -> ApiError:
    message = "Incorrect API key provided: send it as 'Authorization: Bearer KEY'"
    return ApiError(401, message, headers={"WWW-Authenticate": "Bearer"})


def _unavailable() -> Response:
    """In the form of the probes' own answers."""
    body = orjson.dumps({"status": "unavailable", "reason": STOPPING})
    return Response(body, 503, media_type="application/json")
