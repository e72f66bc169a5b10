"""The gateway's middleware: request ids, API keys, CORS, counters, limits, access log, and the last exception handler.

    id, time limit of the body, counters, log  ->  CORS  ->  API key, draining, exceptions  ->  the app

CORS is outside of the API key, so that a page can read a refusal and a preflight needs no key.
"""

import asyncio
import hashlib
import logging
import re
import secrets
import time
import zlib
from collections.abc import Callable
from contextlib import suppress
from typing import Any
from urllib.parse import quote

import orjson
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from triton_embed.gateway.errors import ApiError
from triton_embed.gateway.http.logs import request_id
from triton_embed.gateway.http.metrics import Metrics
from triton_embed.gateway.settings import Settings

log = logging.getLogger(__name__)
access = logging.getLogger("triton_embed.access")

PROBE_PATHS = frozenset({"/health", "/health_generate", "/ready", "/ping"})
KEYLESS_PATHS = frozenset({"/", "/docs", "/openapi.json", "/favicon.ico"})  # a browser opens these before it has a key
KEYLESS_PREFIXES = ("/health", "/ready", "/ping", "/docs/")  # load balancers and static files have no key
EXPOSED_HEADERS = ("x-request-id", "x-truncated-inputs", "retry-after", "server-timing")  # pages may read these (CORS)
CLIENT_CLOSED_REQUEST = 499  # nginx's status, only in metrics and log
# How long the rest of a rejected body is read: closing at once would reset the connection and lose the response.
LINGER_SECONDS = 2.0
STOPPING = "The server is stopping"
CYCLE = "triton_embed.cycle"  # key of the _RequestCycle in a scope

_ID = re.compile(rb"[A-Za-z0-9._-]{1,128}")
_SLASHES = re.compile("/{2,}")
_REPEATED_VERSION = re.compile("(?:/v1){2,}(/.+)")
COMPRESSIONS = ("gzip", "x-gzip", "deflate")


class Drain:
    """The shutdown of a gateway: while stopping, probes fail; once expired, requests without a response get a 503."""

    def __init__(self) -> None:
        self.stopping = False
        self.expired = False
        self.in_flight: dict[asyncio.Task[object], _RequestCycle] = {}

    def expire(self) -> None:
        """Send a 503 to every request without a response."""
        self.stopping = self.expired = True
        for task, cycle in self.in_flight.items():
            if not cycle.status:
                task.cancel()


class GatewayMiddleware:
    """The outermost layer of the app.

    Routes store what the access log reports in `request.state.model`, `.inputs` and `.tokens`.
    """

    def __init__(self, app: ASGIApp, settings: Settings, metrics: Metrics, drain: Drain) -> None:
        self._app = app
        self._keys = [_digest(key.encode()) for key in settings.keys]
        self._body_seconds = settings.body_timeout
        self._metrics = metrics
        self._drain = drain
        # In text format, which people read, a line per request would hide the other lines.
        self._access_level = logging.INFO if settings.log_format == "json" else logging.DEBUG
        self._inner: ASGIApp = self._handle
        if settings.origins:
            self._inner = CORSMiddleware(
                self._handle,
                allow_origins=settings.origins,
                allow_methods=("GET", "POST"),
                allow_headers=("*",),
                expose_headers=EXPOSED_HEADERS,
            )

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        start = time.perf_counter()
        scope = _canonical(scope)
        cycle = scope[CYCLE] = _RequestCycle(scope, receive, send, self._body_seconds, self._drain)
        token = request_id.set(cycle.id)
        try:
            with self._metrics.in_flight.track_inprogress():
                await self._inner(scope, cycle.receive, cycle.send)
        except ClientDisconnect:
            cycle.status = CLIENT_CLOSED_REQUEST
        finally:
            route = getattr(scope.get("route"), "path", "unknown")
            self._metrics.count_request(route, cycle.status)
            if access.isEnabledFor(self._access_level):
                self._log_access(scope, route, cycle.status, time.perf_counter() - start)
            request_id.reset(token)

    async def _handle(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Run the app, and turn every exception into a response."""
        cycle: _RequestCycle = scope[CYCLE]
        task = asyncio.current_task()
        assert task is not None  # noqa: S101 - coroutines run in tasks
        self._drain.in_flight[task] = cycle
        try:
            if self._drain.expired:
                raise ApiError(503, STOPPING)
            if self._drain.stopping and scope["path"] in PROBE_PATHS:
                await _unavailable()(scope, receive, send)
            elif self._is_authorized(scope):
                await self._app(scope, receive, send)
            else:
                await _unauthorized().response()(scope, receive, send)
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
            if not cycle.status:
                await ApiError(500, "The gateway failed to process the request").response()(scope, receive, send)
        finally:
            del self._drain.in_flight[task]

    def _is_authorized(self, scope: Scope) -> bool:
        path = scope["path"]
        if not self._keys or path in KEYLESS_PATHS or path.startswith(KEYLESS_PREFIXES):
            return True
        headers = dict(scope["headers"])
        scheme, _, key = headers.get(b"authorization", b"").partition(b" ")
        if b"api-key" in headers:  # Azure's
            scheme, key = b"bearer", headers[b"api-key"]
        digest = _digest(key.strip())
        # Compare with every key, so that the response time does not depend on which one matches.
        matches = [secrets.compare_digest(digest, accepted) for accepted in self._keys]
        return any(matches) and scheme.lower() == b"bearer"

    def _log_access(self, scope: Scope, route: str, status: int, seconds: float) -> None:
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
        message = "%(method)s %(route)s %(status)s in %(seconds)s s"
        if fields["model"]:
            message += ", %(model)s: %(inputs)s inputs, %(tokens)s tokens"
        access.log(self._access_level, message, fields, extra={"fields": fields})


class _RequestCycle:
    """One request and its response as ASGI messages."""

    def __init__(self, scope: Scope, receive: Receive, send: Send, body_seconds: float, drain: Drain) -> None:
        headers = dict(scope["headers"])
        sent_id = headers.get(b"x-request-id", b"")
        self.id = sent_id.decode() if _ID.fullmatch(sent_id) else secrets.token_hex(16)
        self.status = 0  # 0: the response has not begun
        self._receive = receive
        self._send = send
        self._drain = drain
        self._body_seconds = body_seconds
        self._deadline = asyncio.get_running_loop().time() + body_seconds
        self._body_pending = b"transfer-encoding" in headers or headers.get(b"content-length", b"0") != b"0"
        # The client sends its body only after 100 Continue, which uvicorn sends at the first `receive`.
        self._awaits_continue = headers.get(b"expect", b"").lower() == b"100-continue"

    async def receive(self) -> Message:
        """Receive the next message.

        Raises:
            ApiError: 408 if the body takes too long to arrive.
        """
        self._awaits_continue = False
        if not self._body_pending:
            return await self._receive()
        try:
            async with asyncio.timeout_at(self._deadline):
                return await self._next()
        except TimeoutError:
            raise ApiError(408, f"The request body did not arrive within {self._body_seconds:g} s") from None

    async def send(self, message: Message) -> None:
        """Send a message, with our headers in its head. Close the connection if the body has not been read completely.

        The response is then held open while the rest of the body is discarded, see LINGER_SECONDS.
        """
        if message["type"] == "http.response.start":
            headers = [*message.get("headers", ()), (b"x-request-id", self.id.encode())]
            if self._body_pending or self._drain.stopping:
                headers.append((b"connection", b"close"))
            await self._send({**message, "headers": headers})
            self.status = message["status"]
        elif self._body_pending and not self._awaits_continue and not message.get("more_body"):
            await self._send({**message, "more_body": True})
            await self._discard_body()
            await self._send({"type": "http.response.body"})
        else:
            await self._send(message)

    async def _next(self) -> Message:
        message = await self._receive()
        self._body_pending = bool(message.get("more_body"))  # false also after a disconnect
        return message

    async def _discard_body(self) -> None:
        with suppress(TimeoutError):
            async with asyncio.timeout(LINGER_SECONDS):
                while self._body_pending:
                    await self._next()


async def read_body(request: Request, limit: int, count: Callable[[int], None] | None = None) -> bytes:
    """Read the whole body, whatever its Content-Type, and decompress it.

    Args:
        limit: Bytes of the body, decompressed.
        count: Called with the number of bytes of each part of the body, decompressed.

    Raises:
        ApiError: 413 as soon as the body, decompressed, is known to exceed `limit` bytes; 400 if its compression is
            unknown or broken.
    """
    body = bytearray()
    coding = request.headers.get("content-encoding", "").strip().lower()
    if coding not in ("", "identity", *COMPRESSIONS):
        known = ", ".join(COMPRESSIONS)
        raise ApiError(400, f"The Content-Encoding of the request body must be one of {known}, got '{coding[:100]}'")
    decoder = zlib.decompressobj(wbits=47) if coding in COMPRESSIONS else None  # 47: gzip or zlib, told by the header
    if _content_length(request) <= limit:
        async for chunk in request.stream():
            part = chunk if decoder is None else _decompress(decoder, chunk, limit + 1 - len(body), coding)
            if count is not None:
                count(len(part))
            body += part
            if len(body) > limit:
                break
        else:
            if decoder is not None and not decoder.eof:
                raise ApiError(400, f"The request body is not complete {coding}")
            return bytes(body)
    raise ApiError(413, f"The request body is larger than {limit} bytes")


def _decompress(decoder: Any, chunk: bytes, max_bytes: int, coding: str) -> bytes:
    try:
        return bytes(decoder.decompress(chunk, max_bytes))
    except zlib.error:
        raise ApiError(400, f"The request body is not valid {coding}") from None


async def api_error(_: Request, error: Exception) -> Response:
    """Handle an ApiError."""
    assert isinstance(error, ApiError)  # noqa: S101 - registered for this type
    return error.response()


async def http_error(request: Request, error: Exception) -> Response:
    """Handle routing errors: unknown path or wrong method."""
    assert isinstance(error, HTTPException)  # noqa: S101 - registered for this type
    problem = {404: "Not found:", 405: "Method not allowed:"}.get(error.status_code, "Refused:")
    message = f"{problem} {request.method} {request.url.path[:200]}"
    if repeated := _REPEATED_VERSION.fullmatch(request.url.path[:200]):
        message += f"; this server has /v1{repeated[1]}: let the base URL end in /v1 once"
    return ApiError(error.status_code, message, headers=error.headers).response()


def _canonical(scope: Scope) -> Scope:
    """Return the scope with a path without empty segments, and with HEAD as GET: the server sends no body for it."""
    path = _SLASHES.sub("/", scope["path"]).rstrip("/") or "/"
    method = "GET" if scope["method"] == "HEAD" else scope["method"]
    return {**scope, "path": path, "raw_path": quote(path).encode(), "method": method}


def _content_length(request: Request) -> int:
    """Return the Content-Length, or 0 if it is missing or not a number of bytes."""
    value = request.headers.get("content-length", "")
    return int(value) if re.fullmatch(r"[0-9]{1,18}", value) else 0


def _digest(key: bytes) -> bytes:
    """Return a digest of fixed length, so that comparing keys does not reveal their length."""
    return hashlib.sha256(key).digest()


def _unauthorized() -> ApiError:
    message = "Incorrect API key provided: send it as 'Authorization: Bearer KEY'"
    return ApiError(401, message, headers={"WWW-Authenticate": "Bearer"})


def _unavailable() -> Response:
    """Return a 503 in the form of a probe's response."""
    body = orjson.dumps({"status": "unavailable", "reason": STOPPING})
    return Response(body, 503, media_type="application/json")
