"""Around the routes: the key, the counters, the body limit, and the one boundary that no exception passes."""

import logging
import secrets

from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from triton_embed.gateway.errors import ApiError
from triton_embed.gateway.metrics import Metrics

log = logging.getLogger(__name__)

KEYLESS = frozenset({"/health", "/health_generate", "/ready", "/ping"})  # load balancers have no key
CLIENT_GONE = 499  # nginx's number, seen in the metrics only


class Front:
    """The outermost layer of the app. An empty `api_key` admits everyone."""

    def __init__(self, app: ASGIApp, api_key: str, metrics: Metrics) -> None:
        self._app = app
        self._api_key = api_key.encode()
        self._metrics = metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        status = 0

        async def watch(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        with self._metrics.in_flight.track_inprogress():
            try:
                await (self._app if self._admits(scope) else _no_entry)(scope, receive, watch)
            except ClientDisconnect:
                status = CLIENT_GONE
            except Exception:
                log.exception("%s %s failed", scope["method"], scope["path"])
                if not status:
                    await ApiError(500, "The gateway failed to answer").response()(scope, receive, watch)
        self._metrics.answered(getattr(scope.get("route"), "path", "unknown"), status)

    def _admits(self, scope: Scope) -> bool:
        if not self._api_key or scope["path"] in KEYLESS:
            return True
        scheme, _, key = dict(scope["headers"]).get(b"authorization", b"").partition(b" ")
        return secrets.compare_digest(key.strip(), self._api_key) and scheme.lower() == b"bearer"


async def read_body(request: Request, limit: int) -> bytes:
    """The whole body, whatever its Content-Type. ApiError 413 as soon as it is known to pass `limit` bytes."""
    body = bytearray()
    if int(request.headers.get("content-length", "0")) <= limit:
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


async def _no_entry(scope: Scope, receive: Receive, send: Send) -> None:
    message = "Incorrect API key provided: send it as 'Authorization: Bearer KEY'"
    error = ApiError(401, message, headers={"WWW-Authenticate": "Bearer"})
    await error.response()(scope, receive, send)
