"""The steps that the embedding routes share, from the bytes of a request to the reply of a model."""

import asyncio
import math
import time
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager
from functools import partial
from typing import TypeVar

from starlette.requests import ClientDisconnect, Request

from triton_embed.gateway.api.requests import EmbeddingRequest, Embeddings
from triton_embed.gateway.errors import ApiError, invalid
from triton_embed.gateway.http.metrics import Metrics
from triton_embed.gateway.http.middleware import read_body
from triton_embed.gateway.http.tracing import triton_metadata
from triton_embed.gateway.media.images import Media
from triton_embed.gateway.media.safe_fetch import Fetcher
from triton_embed.gateway.settings import Settings
from triton_embed.gateway.triton.client import TritonClient
from triton_embed.gateway.triton.dispatch import CallContext, Dispatcher
from triton_embed.gateway.triton.model_info import fit
from triton_embed.gateway.triton.registry import ModelEntry, Registry
from triton_embed.python_backend.wire import ModelInfo

T = TypeVar("T")

TIMEOUT_HEADER = "x-request-timeout"


class Gateway:
    """The clients, queues and registry of one app. Created and closed in a running event loop."""

    def __init__(self, settings: Settings, metrics: Metrics) -> None:
        self.settings = settings
        self.metrics = metrics
        self._body_bytes = 0  # of the requests that are being answered
        self.client = TritonClient(settings.triton_grpc, repository_header=settings.triton_repository_header)
        self.dispatcher = Dispatcher(
            self.client, max_pending_tokens=settings.max_waiting_tokens, gateway_count=settings.workers
        )
        self.media = Media(
            Fetcher(settings.allowed_hosts) if settings.media_urls else None,
            max_bytes=settings.max_body_bytes,
            timeout=settings.request_timeout,
        )
        self.registry = Registry(
            self.client, interval=settings.refresh_interval, served_name=settings.served_model_name
        )

    async def close(self) -> None:
        """Close everything; calls in flight get a few seconds to end."""
        await self.registry.stop()
        await self.media.close()
        await self.client.close()

    @asynccontextmanager
    async def exchange(self, request: Request) -> AsyncIterator["Exchange"]:
        """Open the exchange of a request, and end it at the deadline: x-request-timeout, or `request_timeout`.

        Raises:
            ApiError: 504 at the deadline; 400 if the header is invalid.
        """
        seconds = _timeout_seconds(request.headers.get(TIMEOUT_HEADER), self.settings)
        deadline = asyncio.get_running_loop().time() + seconds
        exchange = Exchange(self, request, deadline)
        try:
            async with asyncio.timeout_at(deadline):
                yield exchange
        except TimeoutError:
            raise ApiError(504, f"No answer within {seconds:g} s") from None
        finally:
            self._body_bytes -= exchange.body_bytes

    def hold(self, exchange: "Exchange", size: int) -> None:
        """Count bytes of a body until its exchange ends.

        Raises:
            ApiError: 429 if all bodies together are too large.
        """
        others = self._body_bytes - exchange.body_bytes
        if others and self._body_bytes + size > self.settings.max_pending_body_bytes:
            raise ApiError(
                429, "Too many large requests are being answered, try again later", headers={"Retry-After": "1"}
            )
        self._body_bytes += size
        exchange.body_bytes += size

    async def images(self, embedding_request: EmbeddingRequest, model: ModelInfo) -> Sequence[Sequence[bytes]] | None:
        """Return the image files of each input, or None for a model that takes no images.

        Raises:
            ApiError: 400 if an image is invalid or too large; 504 if fetching takes too long.
        """
        if "image" not in model.modalities:
            return None
        if not embedding_request.images:
            return [()] * embedding_request.count
        return await self.media.load(embedding_request.images, embedding_request.param, embedding_request.refuse)

    async def embed(
        self,
        model: ModelInfo,
        embedding_request: EmbeddingRequest,
        images: Sequence[Sequence[bytes]] | None,
        context: CallContext,
    ) -> Embeddings:
        """Return the model's reply. After a 5xx, the registry refreshes soon: the model may be gone.

        Raises:
            ApiError: as `Dispatcher.embed`.
        """
        try:
            return await self.dispatcher.embed(model, embedding_request, images, context)
        except ApiError as error:
            if error.status >= 500:
                self.registry.refresh_soon()
            raise

    async def probe(self, entry: ModelEntry) -> Embeddings:
        """Embed a one-letter text, bypassing admission.

        Raises:
            ApiError: 504 after `request_timeout`, or as `TritonClient.embed`.
        """
        embedding_request = EmbeddingRequest(model=None, texts=["a"], ids=[], single=True, param="input")
        images = await self.images(embedding_request, entry.info) if entry.info else None
        seconds = self.settings.request_timeout
        try:
            async with asyncio.timeout(seconds):
                return await self.client.embed(entry.name, embedding_request, range(1), images, seconds=seconds)
        except TimeoutError:
            raise ApiError(504, f"No answer within {seconds:g} s") from None

    async def why_unavailable(self) -> str:
        """Return why no model can embed now, or an empty string if one can."""
        try:
            await self.client.live()
            await self.registry.resolve(None)
        except ApiError as error:
            if error.status == 400:  # several models are ready
                return ""
            self.registry.refresh_soon()
            return error.message
        return ""


class Exchange:
    """One HTTP request on its way through a route: its body, deadline, stages and reply."""

    def __init__(self, gateway: Gateway, request: Request, deadline: float) -> None:
        self._gateway = gateway
        self._request = request
        self._deadline = deadline
        self._stages: list[str] = []
        self.body_bytes = 0  # held by this exchange
        self._reply: Embeddings | None = None

    async def read(self, parse: Callable[[bytes, Settings], T]) -> T:
        """Read and parse the body.

        Raises:
            ApiError: 400 or 413; 429 if the bodies of all requests are too large.
        """
        settings = self._gateway.settings
        body = await read_body(self._request, settings.max_body_bytes, partial(self._gateway.hold, self))
        with self.stage("parse"):
            return parse(body, settings)

    async def resolve(self, embedding_request: EmbeddingRequest) -> tuple[ModelInfo, EmbeddingRequest]:
        """Return (the model that the request names, the request fitted to that model).

        Raises:
            ApiError: as `Registry.resolve` and `fit`.
        """
        model = await self._gateway.registry.resolve(embedding_request.model)
        self._request.state.model = model.name
        return model, fit(embedding_request, model)

    async def embed(self, embedding_request: EmbeddingRequest) -> tuple[str, EmbeddingRequest, Embeddings]:
        """Return (name of the model for the response, the request fitted to the model, the model's reply).

        Raises:
            ApiError: 400 for invalid images or refused inputs, or as `resolve` and `Dispatcher.embed`.
        """
        gateway = self._gateway
        model, embedding_request = await self.resolve(embedding_request)
        if embedding_request.images and "image" in model.modalities:
            with self.stage("media"):  # only requests with images count in the metric of this stage
                images = await gateway.images(embedding_request, model)
        else:
            images = await gateway.images(embedding_request, model)
        context = CallContext(self._deadline, triton_metadata(self._request), self._disconnected)
        with self.stage("triton"):
            reply = await gateway.embed(model, embedding_request, images, context)
        for i, message in enumerate(reply.errors):
            if message:
                embedding_request.refuse(i, message)
        state = self._request.state
        state.inputs, state.tokens = embedding_request.count, reply.token_count
        gateway.metrics.count_embeddings(model.name, embedding_request.count, reply.token_count, reply.truncated)
        self._reply = reply
        return embedding_request.model or gateway.settings.served_model_name or model.name, embedding_request, reply

    def headers(self) -> dict[str, str]:
        """Return the response headers: truncated inputs, and the time of each stage (Server-Timing, milliseconds)."""
        headers = {"Server-Timing": ", ".join(self._stages)}
        if self._reply is not None and self._reply.truncated:
            headers["x-truncated-inputs"] = str(self._reply.truncated)
        return headers

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Measure a stage, one of metrics.STAGES, for the metric and the Server-Timing header."""
        start = time.perf_counter()
        with self._gateway.metrics.stage(name):
            yield
        self._stages.append(f"{name};dur={1_000 * (time.perf_counter() - start):.2f}")

    async def _disconnected(self) -> None:
        """Wait until the caller disconnects. Once the body is read, `receive` returns nothing else of interest.

        Raises:
            ClientDisconnect: always.
        """
        while (await self._request.receive())["type"] != "http.disconnect":
            pass
        raise ClientDisconnect


def _timeout_seconds(header: str | None, settings: Settings) -> float:
    if header is None:
        return settings.request_timeout
    try:
        seconds = float(header)
    except ValueError:
        seconds = math.nan
    if not 0 < seconds < math.inf:
        raise invalid(f"{TIMEOUT_HEADER} must be a number of seconds above 0, got '{header[:100]}'", TIMEOUT_HEADER)
    return min(seconds, settings.max_request_timeout)
