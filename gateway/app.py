"""The routes: what HTTP clients see. One straight line each: read, check, ask Triton, write."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from importlib import metadata
from typing import Any

import orjson
from fastapi import APIRouter, FastAPI
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response

from triton_embed.gateway import openapi, pages, schemas, similarity
from triton_embed.gateway.errors import ApiError
from triton_embed.gateway.front import Drain, Front, api_error, http_error
from triton_embed.gateway.metrics import CONTENT_TYPE, Metrics
from triton_embed.gateway.registry import Card, Registry
from triton_embed.gateway.schemas import Embeddings
from triton_embed.gateway.service import Answering, Gateway
from triton_embed.gateway.settings import Settings
from triton_embed.gateway.tracing import Tracing

router = APIRouter()

# What /get_server_info tells: no secrets, addresses or paths.
PUBLIC = {
    "max_inputs",
    "max_request_tokens",
    "max_waiting_tokens",
    "max_body_bytes",
    "request_timeout",
    "max_request_timeout",
    "media_urls",
    "served_model_name",
    "workers",
}


def create_app(settings: Settings) -> FastAPI:
    """The gateway as an ASGI app; Triton may come up before it or after."""
    metrics = Metrics(shared=settings.workers > 1, triton=settings.triton_metrics)
    tracing = Tracing(settings) if settings.otlp_endpoint else None
    drain = Drain()

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        gateway = app.state.gateway = Gateway(settings, metrics)
        await gateway.registry.start()
        yield
        await gateway.close()
        if tracing is not None:
            await tracing.close()

    app = openapi.Documented(
        title="triton-embed",
        version=metadata.version("triton-embed"),
        description=openapi.DESCRIPTION,
        openapi_tags=openapi.TAGS,
        lifespan=lifespan,
        redirect_slashes=False,
        docs_url=None,
        redoc_url=None,
    )
    app.include_router(router)
    app.include_router(pages.router)
    app.add_exception_handler(ApiError, api_error)
    app.add_exception_handler(HTTPException, http_error)
    if tracing is not None:
        app.add_middleware(tracing.around)
    app.add_middleware(Front, settings=settings, metrics=metrics, drain=drain)
    app.state.tracing, app.state.drain = tracing, drain
    return app


@router.post("/v1/embeddings", **openapi.EMBEDDINGS)
@router.post("/embeddings", include_in_schema=False)
async def embeddings(request: Request) -> Response:
    async with _gateway(request).deadline(request) as answering:
        asked = await answering.read(schemas.parse_embeddings)
        name, asked, reply = await answering.embed(asked)
        with answering.stage("encode"):
            body = schemas.embeddings_json(reply, asked, name)
        return _json_bytes(body, answering)


@router.post("/encode", **openapi.ENCODE)
async def encode(request: Request) -> Response:
    async with _gateway(request).deadline(request) as answering:
        asked = await answering.read(schemas.parse_encode)
        _, asked, reply = await answering.embed(asked)
        with answering.stage("encode"):
            body = schemas.encode_json(reply, asked)
        return _json_bytes(body, answering)


@router.post("/v1/rerank", **openapi.RERANK)
@router.post("/rerank", include_in_schema=False)
async def rerank(request: Request) -> Response:
    async with _gateway(request).deadline(request) as answering:
        ranking = await answering.read(similarity.parse_rerank)
        name, _, reply = await answering.embed(ranking.request)
        with answering.stage("encode"):
            body = similarity.rerank_json(reply, ranking, name)
        return _json_bytes(body, answering)


@router.post("/v1/score", **openapi.SCORE)
@router.post("/score", include_in_schema=False)
async def score(request: Request) -> Response:
    async with _gateway(request).deadline(request) as answering:
        scoring = await answering.read(similarity.parse_score)
        name, _, reply = await answering.embed(scoring.request)
        with answering.stage("encode"):
            body = similarity.score_json(reply, scoring, name)
        return _json_bytes(body, answering)


@router.post("/tokenize", **openapi.TOKENIZE)
@router.post("/v1/tokenize", include_in_schema=False)
async def tokenize(request: Request) -> Response:
    gateway = _gateway(request)
    async with gateway.deadline(request) as answering:
        model, asked = await answering.model(await answering.read(schemas.parse_tokenize))
        ids = await gateway.client.tokenize(model.name, asked, "image" in model.modalities)
        counts = [len(row) for row in ids]
        tokens, count = (ids[0], counts[0]) if asked.single else (ids, counts)
        name = asked.model or gateway.settings.served_model_name or model.name
        return _json({"tokens": tokens, "count": count, "max_model_len": model.max_model_len, "model": name})


@router.get("/v1/models", **openapi.MODELS)
async def models(request: Request) -> Response:
    registry = _gateway(request).registry
    cards = sorted(registry.cards, key=lambda card: card.info is None)
    return _json({"object": "list", "data": [_describe(card, registry) for card in cards]})


@router.get("/v1/models/{model:path}", **openapi.MODEL)
async def model(request: Request) -> Response:
    registry = _gateway(request).registry
    return _json(_describe(await registry.find(request.path_params["model"]), registry))


@router.get("/get_model_info", **openapi.MODEL_INFO)
@router.get("/model_info", include_in_schema=False)
async def model_info(request: Request) -> Response:
    info = await _gateway(request).registry.resolve(request.query_params.get("model"))
    path = info.checkpoint or info.name
    return _json({"model_path": path, "tokenizer_path": path, "is_generation": False, **info.model_dump()})


@router.get("/get_server_info", **openapi.SERVER_INFO)
@router.get("/server_info", include_in_schema=False)
async def server_info(request: Request) -> Response:
    gateway = _gateway(request)
    settings = gateway.settings.model_dump(include=PUBLIC)
    ready = [info.model_dump() for info in gateway.registry.ready]
    return _json({"version": request.app.version, **settings, "models": ready})


@router.get("/health", **openapi.HEALTH)
@router.get("/ready", include_in_schema=False)
@router.get("/ping", include_in_schema=False)
async def health(request: Request) -> Response:
    trouble = await _gateway(request).trouble()
    return _json({"status": "unavailable", "reason": trouble}, 503) if trouble else _json({"status": "healthy"})


@router.get("/health_generate", **openapi.HEALTH_GENERATE)
async def health_generate(request: Request) -> Response:
    gateway = _gateway(request)
    if trouble := await gateway.trouble():
        return _json({"status": "unavailable", "reason": trouble}, 503)
    cards = [card for card in gateway.registry.cards if card.info or card.broken]
    answers = await asyncio.gather(*(gateway.probe(card) for card in cards), return_exceptions=True)
    found = {card.name: _verdict(answer) for card, answer in zip(cards, answers, strict=True)}
    healthy = all(verdict in ("ok", "busy") for verdict in found.values())
    return _json({"status": "healthy" if healthy else "unavailable", "models": found}, 200 if healthy else 503)


@router.get("/metrics", **openapi.METRICS)
async def metrics(request: Request) -> Response:
    gateway = _gateway(request)
    gateway.metrics.serving(gateway.registry.ready)
    return Response(await gateway.metrics.scrape(), media_type=CONTENT_TYPE)


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
    fields = {
        "dimensions",
        "max_model_len",
        "modalities",
        "pooling",
        "matryoshka",
        "instructions",
        "prompt_names",
        "default_prompt_name",
    }
    return {**described, **info.model_dump(include=fields)}


def _verdict(answer: Embeddings | BaseException) -> str:
    if isinstance(answer, Embeddings):
        return "ok"
    if not isinstance(answer, ApiError):
        raise answer
    return "busy" if answer.status == 429 else answer.message


def _json(content: dict[str, Any], status: int = 200) -> Response:
    return Response(orjson.dumps(content), status, media_type="application/json")


def _json_bytes(body: bytes, answering: Answering) -> Response:
    return Response(body, headers=answering.headers(), media_type="application/json")
