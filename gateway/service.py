"""What the routes share, one for each app, open while the app runs: from a request's bytes to a model's answer."""

import asyncio
import math
import time
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager
from typing import TypeVar

from starlette.requests import ClientDisconnect, Request

from triton_embed.gateway.client import TritonClient
from triton_embed.gateway.dispatch import Caller, Dispatcher
from triton_embed.gateway.errors import ApiError, invalid
from triton_embed.gateway.fetch import Fetcher
from triton_embed.gateway.front import read_body
from triton_embed.gateway.media import Media
from triton_embed.gateway.metrics import Metrics
from triton_embed.gateway.model import ModelInfo, fit
from triton_embed.gateway.registry import Card, Registry
from triton_embed.gateway.schemas import EmbeddingRequest, Embeddings
from triton_embed.gateway.settings import Settings
from triton_embed.gateway.tracing import outgoing

T = TypeVar("T")

TIMEOUT_HEADER = "x-request-timeout"


class Gateway:
    """Opened in a running event loop, closed there."""

    def __init__(self, settings: Settings, metrics: Metrics) -> None:
        self.settings = settings
        self.metrics = metrics
        self.client = TritonClient(settings.triton_grpc, repository_header=settings.triton_repository_header)
        self.dispatcher = Dispatcher(self.client, most_waiting=settings.max_waiting_tokens, sharers=settings.workers)
        self.media = Media(
            Fetcher(settings.allowed_hosts) if settings.media_urls else None,
            max_bytes=settings.max_body_bytes,
            timeout=settings.request_timeout,
        )
        self.registry = Registry(
            self.client, interval=settings.refresh_interval, served_name=settings.served_model_name
        )

    async def close(self) -> None:
        """Let what runs come to its end, for a few seconds."""
        await self.registry.stop()
        await self.media.close()
        await self.client.close()

    @asynccontextmanager
    async def deadline(self, request: Request) -> AsyncIterator["Answering"]:
        """The time a request has, by its own header or the operator's setting. ApiError 504: it is over."""
        seconds = _seconds(request.headers.get(TIMEOUT_HEADER), self.settings)
        deadline = asyncio.get_running_loop().time() + seconds
        try:
            async with asyncio.timeout_at(deadline):
                yield Answering(self, request, deadline)
        except TimeoutError:
            raise ApiError(504, f"No answer within {seconds:g} s") from None

    async def images(self, asked: EmbeddingRequest, model: ModelInfo) -> Sequence[Sequence[bytes]] | None:
        """Those of each input; None for a model that takes none."""
        if "image" not in model.modalities:
            return None
        if not asked.images:
            return [()] * asked.count
        return await self.media.load(asked.images, asked.param, asked.refuse)

    async def ask(
        self, model: ModelInfo, asked: EmbeddingRequest, images: Sequence[Sequence[bytes]] | None, caller: Caller
    ) -> Embeddings:
        """The model's answer; a failure that is not the caller's makes the registry look again."""
        try:
            return await self.dispatcher.embed(model, asked, images, caller)
        except ApiError as error:
            if error.status >= 500:
                self.registry.suspect()
            raise

    async def probe(self, card: Card) -> Embeddings:
        """A text of one letter, past those that wait. ApiError 504: it was not embedded in the time a request has."""
        asked = EmbeddingRequest(model=None, texts=["a"], ids=[], single=True, param="input")
        images = await self.images(asked, card.info) if card.info else None
        seconds = self.settings.request_timeout
        try:
            async with asyncio.timeout(seconds):
                return await self.client.embed(card.name, asked, range(1), images, seconds=seconds)
        except TimeoutError:
            raise ApiError(504, f"No answer within {seconds:g} s") from None

    async def trouble(self) -> str:
        """Why nothing can be embedded now; empty when something can."""
        try:
            await self.client.live()
            await self.registry.resolve(None)
        except ApiError as error:
            if error.status == 400:  # several models are ready
                return ""
            self.registry.suspect()
            return error.message
        return ""


class Answering:
    """One HTTP request on its way through."""

    def __init__(self, gateway: Gateway, request: Request, deadline: float) -> None:
        self._gateway = gateway
        self._request = request
        self._deadline = deadline
        self._stages: list[str] = []
        self._reply: Embeddings | None = None

    async def read(self, parse: Callable[[bytes, Settings], T]) -> T:
        """What was asked. ApiError 400 or 413."""
        settings = self._gateway.settings
        body = await read_body(self._request, settings.max_body_bytes)
        with self.stage("parse"):
            return parse(body, settings)

    async def model(self, asked: EmbeddingRequest) -> tuple[ModelInfo, EmbeddingRequest]:
        """(who is asked, the request as it understands it)."""
        model = await self._gateway.registry.resolve(asked.model)
        self._request.state.model = model.name
        return model, fit(asked, model)

    async def embed(self, asked: EmbeddingRequest) -> tuple[str, EmbeddingRequest, Embeddings]:
        """(the name of the model, the request as it understood it, its answer)."""
        gateway = self._gateway
        model, asked = await self.model(asked)
        if asked.images and "image" in model.modalities:
            with self.stage("media"):
                images = await gateway.images(asked, model)
        else:
            images = await gateway.images(asked, model)
        caller = Caller(self._deadline, outgoing(self._request), self._left)
        with self.stage("triton"):
            reply = await gateway.ask(model, asked, images, caller)
        for i, message in enumerate(reply.errors):
            if message:
                asked.refuse(i, message)
        state = self._request.state
        state.inputs, state.tokens = asked.count, reply.token_count
        gateway.metrics.embedded(model.name, asked.count, reply.token_count, reply.truncated)
        self._reply = reply
        return asked.model or gateway.settings.served_model_name or model.name, asked, reply

    def headers(self) -> dict[str, str]:
        """What was cut, and where the time went (Server-Timing, milliseconds)."""
        headers = {"Server-Timing": ", ".join(self._stages)}
        if self._reply is not None and self._reply.truncated:
            headers["x-truncated-inputs"] = str(self._reply.truncated)
        return headers

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Time one of the metrics' STAGES."""
        start = time.perf_counter()
        with self._gateway.metrics.stage(name):
            yield
        self._stages.append(f"{name};dur={1_000 * (time.perf_counter() - start):.2f}")

    async def _left(self) -> None:
        """Raises ClientDisconnect when the caller has hung up: after the body, that is all there is to receive."""
        while (await self._request.receive())["type"] != "http.disconnect":
            pass
        raise ClientDisconnect


def _seconds(stated: str | None, settings: Settings) -> float:
    if stated is None:
        return settings.request_timeout
    try:
        seconds = float(stated)
    except ValueError:
        seconds = math.nan
    if not 0 < seconds < math.inf:
        raise invalid(f"{TIMEOUT_HEADER} must be a number of seconds above 0, got '{stated[:100]}'", TIMEOUT_HEADER)
    return min(seconds, settings.max_request_timeout)
