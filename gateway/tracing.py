"""Distributed tracing: the caller's W3C trace context goes on to Triton; with OpenTelemetry on, through our own span.

Rules: https://www.w3.org/TR/trace-context/. What is malformed is dropped and never the caller's error.
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

EXPORT_SECONDS = 2.0  # for a collector to take what is sent; stopping waits no longer either
UNTRACED = "/(health|health_generate|ready|ping|metrics)$"
STATE_MEMBERS, STATE_LENGTH = 32, 512  # at most 32 are valid; 512 characters must be passed on, and gRPC takes few KiB

# version, trace, span, flags, what later versions may add
_PARENT = re.compile(r"([0-9a-f]{2})-([0-9a-f]{32})-([0-9a-f]{16})-[0-9a-f]{2}(-[!-~]{0,100})?")
_KEY = r"[a-z0-9][a-z0-9_*/-]{0,255}|[a-z0-9][a-z0-9_*/-]{0,240}@[a-z][a-z0-9_*/-]{0,13}"
_MEMBER = re.compile(rf"({_KEY})=[ -+\--<>-~]{{0,255}}[!-+\--<>-~]")


def outgoing(request: Request) -> Metadata:
    """gRPC metadata that puts Triton's spans under this request's, or under the caller's own where we make none."""
    tracing: Tracing | None = getattr(request.app.state, "tracing", None)
    return (tracing.current() if tracing else ()) or accepted(request.headers)


def accepted(headers: Headers) -> Metadata:
    """The caller's `traceparent` and `tracestate` as far as they are valid: a state needs a parent."""
    parents = headers.getlist("traceparent")
    if len(parents) != 1 or not _is_parent(parents[0]):
        return ()
    state = _state(",".join(headers.getlist("tracestate")))
    return (("traceparent", parents[0]), *((("tracestate", state),) if state else ()))


def _is_parent(value: str) -> bool:
    found = _PARENT.fullmatch(value)
    if found is None:
        return False
    version, trace, span, more = found.groups()
    return version != "ff" and int(trace, 16) > 0 and int(span, 16) > 0 and not (version == "00" and more)


def _state(value: str) -> str:
    """All members, the last left out where they are long; none if any is malformed."""
    members = [member for member in (part.strip(" \t") for part in value.split(",")) if member]
    keys = {found[1] for member in members if (found := _MEMBER.fullmatch(member))}
    if len(keys) < len(members) or len(members) > STATE_MEMBERS:
        return ""
    while len(state := ",".join(members)) > STATE_LENGTH:
        members.pop()
    return state


def check_installed(settings: Settings) -> None:
    """SettingsError: OpenTelemetry is asked for and not there."""
    needed = ("opentelemetry.sdk", "opentelemetry.instrumentation.asgi", "opentelemetry.exporter.otlp.proto.http")
    if settings.otlp_endpoint and not all(map(_is_there, needed)):
        raise SettingsError("otlp_endpoint needs OpenTelemetry: pip install 'triton-embed[otel]'")


def _is_there(module: str) -> bool:
    try:
        return find_spec(module) is not None
    except ModuleNotFoundError:  # nor is what holds it
        return False


class Tracing:
    """OpenTelemetry's spans of one gateway, sent to the collector of `otlp_endpoint`; the SDK's own variables hold.

    SettingsError: it is not installed.
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

    def around(self, app: ASGIApp) -> ASGIApp:
        """`app` with a span around each request but those of probes."""
        from opentelemetry.instrumentation.asgi import OpenTelemetryMiddleware
        from opentelemetry.trace import get_current_span

        async def within(scope: Scope, receive: Receive, send: Send) -> None:
            whole, span = scope["triton_embed.scope"], get_current_span()

            async def name(message: Message) -> None:
                if message["type"] == "http.response.start" and (path := getattr(whole.get("route"), "path", "")):
                    span.update_name(f"{whole['method']} {path}")  # before the answer ends, and the span with it
                await send(message)

            await app(whole, receive, name)

        traced = OpenTelemetryMiddleware(
            within,
            excluded_urls=UNTRACED,
            default_span_details=lambda scope: (scope["method"], {}),
            tracer_provider=self._provider,
            exclude_spans=["receive", "send"],
        )

        async def outside(scope: Scope, receive: Receive, send: Send) -> None:
            if scope["type"] == "http":
                # Queries are the caller's own business, and OpenTelemetry fails on those that are not UTF-8.
                shown = {**scope, "query_string": b"", "triton_embed.scope": scope}
                await traced(shown, receive, send)
            else:
                await app(scope, receive, send)

        return outside

    def current(self) -> Metadata:
        """The current span as a trace context; nothing outside of one."""
        carrier: dict[str, str] = {}
        self._propagator.inject(carrier)
        return tuple(carrier.items())

    async def close(self) -> None:
        """Send what is left, if the collector takes it soon."""
        await asyncio.to_thread(self._provider.shutdown)
