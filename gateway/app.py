"""The routes: what HTTP clients see. One straight line each: read, check, ask Triton, write."""

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from typing import Any

import orjson
from fastapi import APIRouter, FastAPI
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response

from triton_embed.gateway import schemas
from triton_embed.gateway.client import TritonClient
from triton_embed.gateway.errors import ApiError
from triton_embed.gateway.fetch import Fetcher
from triton_embed.gateway.front import Front, api_error, http_error, read_body
from triton_embed.gateway.media import Media
from triton_embed.gateway.metrics import CONTENT_TYPE, Metrics
from triton_embed.gateway.model import ModelInfo, check
from triton_embed.gateway.registry import Card, Registry
from triton_embed.gateway.schemas import EmbeddingRequest, Embeddings
from triton_embed.gateway.settings import Settings

router = APIRouter()

PROBE = EmbeddingRequest(model=None, texts=["a"], ids=[], single=True, param="input")
EMBEDDINGS_BODY = {
    "requestBody": {"required": True, "content": {"application/json": {"schema": schemas.EMBEDDINGS_BODY}}}
}


def create_app(settings: Settings) -> FastAPI:
    """The gateway as an ASGI app; Triton may come up before it or after."""
    metrics = Metrics()

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        gateway = app.state.gateway = Gateway(settings, metrics)
        await gateway.registry.start()
        yield
        await gateway.registry.stop()
        await gateway.media.close()
        await gateway.client.close()

    app = FastAPI(title="triton-embed", lifespan=lifespan, redirect_slashes=False)
    app.include_router(router)
    app.add_exception_handler(ApiError, api_error)
    app.add_exception_handler(HTTPException, http_error)
    app.add_middleware(Front, api_key=settings.api_key.get_secret_value(), metrics=metrics)
    return app


class Gateway:
    """What the routes share: one for each app, open while the app runs."""

    def __init__(self, settings: Settings, metrics: Metrics) -> None:
        self.settings = settings
        self.metrics = metrics
        self.client = TritonClient(
            settings.triton_grpc,
            timeout=settings.request_timeout,
            repository_header=settings.triton_repository_header,
        )
        self.media = Media(
            Fetcher(settings.allowed_hosts) if settings.media_urls else None,
            max_bytes=settings.max_body_bytes,
            timeout=settings.request_timeout,
        )
        self.registry = Registry(
            self.client, interval=settings.refresh_interval, served_name=settings.served_model_name
        )

    async def embed(
        self, request: Request, parse: Callable[[bytes, Settings], EmbeddingRequest]
    ) -> tuple[EmbeddingRequest, str, Embeddings]:
        """(what was asked, the model that answered, its answer) for one HTTP request."""
        body = await read_body(request, self.settings.max_body_bytes)
        with self.metrics.stage("parse"):
            asked = parse(body, self.settings)
            model = await self.registry.resolve(asked.model)
            check(asked, model)
        images = await self._images(asked, model)
        with self.metrics.stage("triton"):
            reply = await self.ask(model.name, asked, images)
        self.metrics.embedded(model.name, len(reply.tokens), reply.token_count, reply.truncated)
        return asked, model.name, reply

    async def _images(self, asked: EmbeddingRequest, model: ModelInfo) -> Sequence[Sequence[bytes]] | None:
        """Those of each input; None for a model that takes none."""
        if "image" not in model.modalities:
            return None
        if not asked.images:
            return [()] * len(asked.texts)
        with self.metrics.stage("media"):
            return await self.media.load(asked.images, asked.param)

    async def ask(
        self, model: str, asked: EmbeddingRequest, images: Sequence[Sequence[bytes]] | None = None
    ) -> Embeddings:
        """One inference; a failure that is not the caller's makes the registry look again."""
        try:
            return await self.client.embed(model, asked, images)
        except ApiError as error:
            if error.status >= 500:
                self.registry.suspect()
            raise

    async def probe(self, card: Card) -> Embeddings:
        """A text of one letter, as the model takes texts."""
        return await self.ask(card.name, PROBE, await self._images(PROBE, card.info) if card.info else None)

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


@router.post("/v1/embeddings", summary="Embed texts, images or token ids", openapi_extra=EMBEDDINGS_BODY)
@router.post("/embeddings", include_in_schema=False)
async def embeddings(request: Request) -> Response:
    """OpenAI's embeddings endpoint. Inputs that had to be cut are counted in `x-truncated-inputs`."""
    gateway = _gateway(request)
    asked, model, reply = await gateway.embed(request, schemas.parse_embeddings)
    name = asked.model or gateway.settings.served_model_name or model
    with gateway.metrics.stage("encode"):
        return _json_bytes(schemas.embeddings_json(reply, name, base64=asked.base64), reply)


@router.post("/encode", summary="Embed texts, images or token ids, in SGLang's form")
async def encode(request: Request) -> Response:
    """`text` and `image_data` or `input_ids` in; `embedding` and `meta_info` out, a list of them for a list."""
    gateway = _gateway(request)
    asked, _, reply = await gateway.embed(request, schemas.parse_encode)
    with gateway.metrics.stage("encode"):
        return _json_bytes(schemas.encode_json(reply, single=asked.single), reply)


@router.get("/v1/models", summary="The models of the repository, those that are ready first")
async def models(request: Request) -> Response:
    registry = _gateway(request).registry
    cards = sorted(registry.cards, key=lambda card: card.info is None)
    return _json({"object": "list", "data": [_describe(card, registry) for card in cards]})


@router.get("/v1/models/{model:path}", summary="One model, by any of its names")
async def model(request: Request) -> Response:
    registry = _gateway(request).registry
    return _json(_describe(await registry.find(request.path_params["model"]), registry))


@router.get("/get_model_info", summary="The model that answers when none is named, in SGLang's form")
@router.get("/model_info", include_in_schema=False)
async def model_info(request: Request) -> Response:
    """Another with `?model=`."""
    info = await _gateway(request).registry.resolve(request.query_params.get("model"))
    path = info.checkpoint or info.name
    return _json({"model_path": path, "tokenizer_path": path, "is_generation": False, **info.model_dump()})


@router.get("/health", summary="Whether Triton answers and a model is ready")
@router.get("/ready", include_in_schema=False)
@router.get("/ping", include_in_schema=False)
async def health(request: Request) -> Response:
    trouble = await _gateway(request).trouble()
    return _json({"status": "unavailable", "reason": trouble}, 503) if trouble else _json({"status": "healthy"})


@router.get("/health_generate", summary="Whether every ready model really embeds: one letter through each")
async def health_generate(request: Request) -> Response:
    """503 as well when Triton calls a model ready that does not answer. A full queue is no failure."""
    gateway = _gateway(request)
    if trouble := await gateway.trouble():
        return _json({"status": "unavailable", "reason": trouble}, 503)
    cards = [card for card in gateway.registry.cards if card.info or card.broken]
    answers = await asyncio.gather(*(gateway.probe(card) for card in cards), return_exceptions=True)
    found = {card.name: _verdict(answer) for card, answer in zip(cards, answers, strict=True)}
    healthy = all(verdict in ("ok", "busy") for verdict in found.values())
    return _json({"status": "healthy" if healthy else "unavailable", "models": found}, 200 if healthy else 503)


@router.get("/metrics", summary="Prometheus metrics")
async def metrics(request: Request) -> Response:
    gateway = _gateway(request)
    gateway.metrics.serving(gateway.registry.ready)
    return Response(gateway.metrics.render(), media_type=CONTENT_TYPE)


def _gateway(request: Request) -> Gateway:
    gateway: Gateway = request.app.state.gateway
    return gateway


def _describe(card: Card, registry: Registry) -> dict[str, Any]:
    """OpenAI's model card, and what helps to choose one."""
    info = card.info
    described: dict[str, Any] = {
        "id": registry.public_name(card),
        "object": "model",
        "created": card.created,
        "owned_by": "triton-embed",
        "ready": info is not None,
        "checkpoint": info.checkpoint if info else card.checkpoint,
    }
    if info is None:
        return {**described, "reason": card.reason}
    fields = {"dimensions", "max_model_len", "modalities", "pooling", "matryoshka", "instructions", "prompt_names"}
    return {**described, **info.model_dump(include=fields)}


def _verdict(answer: Embeddings | BaseException) -> str:
    if isinstance(answer, Embeddings):
        return "ok"
    if not isinstance(answer, ApiError):
        raise answer
    return "busy" if answer.status == 429 else answer.message


def _json(content: dict[str, Any], status: int = 200) -> Response:
    return Response(orjson.dumps(content), status, media_type="application/json")


def _json_bytes(body: bytes, reply: Embeddings) -> Response:
    cut = reply.truncated
    headers = {"x-truncated-inputs": str(cut)} if cut else None
    return Response(body, headers=headers, media_type="application/json")
