"""Distributed tracing: pass the caller's W3C trace context to Triton, through our own span if OpenTelemetry is on.

Rules: https://www.w3.org/TR/trace-context/. A malformed context is dropped; it is not an error.
"""

import asyncio
import re
from importlib.util import find_spec
from urllib.parse import urlsplit

from starlette.datastructures import Headers
from starlette.requests import Request
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from triton_embed.gateway.settings import Settings, SettingsError

Metadata = tuple[tuple[str, str], ...]

EXPORT_SECONDS = 2.0  # for one export, and at most this long when stopping
UNTRACED = "/(health|health_generate|ready|ping|metrics)$"
# Limits of tracestate. The standard permits 32 members and requires 512 characters to be passed on; gRPC limits all
# metadata of a call to a few KiB.
STATE_MEMBERS, STATE_LENGTH = 32, 512

# version, trace, span, flags, fields of later versions
_PARENT = re.compile(r"([0-9a-f]{2})-([0-9a-f]{32})-([0-9a-f]{16})-[0-9a-f]{2}(-[!-~]{0,100})?")
_KEY = r"[a-z0-9][a-z0-9_*/-]{0,255}|[a-z0-9][a-z0-9_*/-]{0,240}@[a-z][a-z0-9_*/-]{0,13}"
_MEMBER = re.compile(rf"({_KEY})=[ -+\--<>-~]{{0,255}}[!-+\--<>-~]")


def triton_metadata(request: Request) -> Metadata:
    """Return gRPC metadata that makes Triton's spans children of our span, or of the caller's if we have none."""
    tracing: Tracing | None = getattr(request.app.state, "tracing", None)
    return (tracing.current() if tracing else ()) or incoming_context(request.headers)


def incoming_context(headers: Headers) -> Metadata:
    """Return the caller's `traceparent` and `tracestate` if they are valid. Drop a state without a valid parent."""
    parents = headers.getlist("traceparent")
    if len(parents) != 1 or not _is_parent(parents[0]):
        return ()
    state = _state(",".join(headers.getlist("tracestate")))
    return (("traceparent", parents[0]), *((("tracestate", state),) if state else ()))


def _is_parent(value: str) -> bool:
    match = _PARENT.fullmatch(value)
    if match is None:
        return False
    version, trace, span, extra = match.groups()
    return version != "ff" and int(trace, 16) > 0 and int(span, 16) > 0 and not (version == "00" and extra)


def _state(value: str) -> str:
    """Return the members of a tracestate, cut to STATE_LENGTH at a comma; none if one is invalid or repeated."""
    members = [member for member in (part.strip(" \t") for part in value.split(",")) if member]
    keys = {match[1] for member in members if (match := _MEMBER.fullmatch(member))}
    if len(keys) < len(members) or len(members) > STATE_MEMBERS:
        return ""
    while len(state := ",".join(members)) > STATE_LENGTH:
        members.pop()
    return state


def check_installed(settings: Settings) -> None:
    """Check that OpenTelemetry is installed if the settings need it.

    Raises:
        SettingsError: if it is missing.
    """
    modules = ("opentelemetry.sdk", "opentelemetry.instrumentation.asgi", "opentelemetry.exporter.otlp.proto.http")
    if settings.otlp_endpoint and not all(map(_is_installed, modules)):
        raise SettingsError("otlp_endpoint requires OpenTelemetry. Install it with: pip install 'triton-embed[otel]'")


def _is_installed(module: str) -> bool:
    try:
        return find_spec(module) is not None
    except ModuleNotFoundError:  # its package is missing
        return False


class Tracing:
    """The OpenTelemetry spans of one gateway, sent to the collector at `otlp_endpoint`.

    The SDK's own environment variables apply.

    Raises:
        SettingsError: if OpenTelemetry is not installed.
    """

    def __init__(self, settings: Settings) -> None:
        check_installed(settings)
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
        from opentelemetry.sdk.resources import Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor
        from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

        endpoint = settings.otlp_endpoint
        if urlsplit(endpoint).path in ("", "/"):
            endpoint = f"{endpoint.rstrip('/')}/v1/traces"
        resource = Resource.create({"service.name": "triton-embed"})
        self._provider = TracerProvider(resource=resource)
        self._provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter(endpoint, timeout=EXPORT_SECONDS)))
        self._propagator = TraceContextTextMapPropagator()

    def middleware(self, app: ASGIApp) -> ASGIApp:
        """Return `app` with a span around each request, except probes."""
        from opentelemetry.instrumentation.asgi import OpenTelemetryMiddleware
        from opentelemetry.trace import get_current_span

        async def inside_span(scope: Scope, receive: Receive, send: Send) -> None:
            original, span = scope["triton_embed.scope"], get_current_span()

            async def set_name(message: Message) -> None:
                if message["type"] == "http.response.start" and (path := getattr(original.get("route"), "path", "")):
                    span.update_name(f"{original['method']} {path}")  # before the response, and so the span, ends
                await send(message)

            await app(original, receive, set_name)

        traced = OpenTelemetryMiddleware(
            inside_span,
            excluded_urls=UNTRACED,
            default_span_details=lambda scope: (scope["method"], {}),
            tracer_provider=self._provider,
            exclude_spans=["receive", "send"],
        )

        async def outside_span(scope: Scope, receive: Receive, send: Send) -> None:
            if scope["type"] == "http":
                # Hide the query string from the span: it is private, and OpenTelemetry fails if it is not UTF-8.
                # `inside_span` restores the original scope.
                visible = {**scope, "query_string": b"", "triton_embed.scope": scope}
                await traced(visible, receive, send)
            else:
                await app(scope, receive, send)

        return outside_span

    def current(self) -> Metadata:
        """Return the current span as a trace context, or nothing if there is none."""
        carrier: dict[str, str] = {}
        self._propagator.inject(carrier)
        return tuple(carrier.items())

    async def close(self) -> None:
        """Send the remaining spans, if the collector takes them soon."""
        await asyncio.to_thread(self._provider.shutdown)
