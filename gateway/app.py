"""The FastAPI app and its routes. An embedding route parses the body, calls Triton, and writes the response."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import asdict, replace
from importlib import metadata
from typing import Any

import orjson
from fastapi import APIRouter, FastAPI
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response

from triton_embed.gateway.api import openapi
from triton_embed.gateway.api.embeddings import embeddings_json, encode_json
from triton_embed.gateway.api.requests import Embeddings, parse_embeddings, parse_encode, parse_tokenize
from triton_embed.gateway.api.rerank import parse_rerank, parse_score, rerank_json, score_json
from triton_embed.gateway.errors import ApiError
from triton_embed.gateway.handler import Exchange, Gateway
from triton_embed.gateway.http import web_page
from triton_embed.gateway.http.metrics import CONTENT_TYPE, Metrics
from triton_embed.gateway.http.middleware import Drain, GatewayMiddleware, api_error, http_error
from triton_embed.gateway.http.tracing import Tracing
from triton_embed.gateway.settings import Settings
from triton_embed.gateway.triton.registry import ModelEntry, Registry

router = APIRouter()

# Settings that /get_server_info shows: no secrets, addresses or paths.
PUBLIC_SETTINGS = {
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
    """Return the gateway as an ASGI app. Triton may start before or after it.

    Raises:
        SettingsError: if `otlp_endpoint` is set but OpenTelemetry is not installed.
    """
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
    app.include_router(web_page.router)
    app.add_exception_handler(ApiError, api_error)
    app.add_exception_handler(HTTPException, http_error)
    if tracing is not None:
        app.add_middleware(tracing.middleware)
    app.add_middleware(GatewayMiddleware, settings=settings, metrics=metrics, drain=drain)
    app.state.tracing, app.state.drain = tracing, drain
    return app


@router.post("/v1/embeddings", **openapi.EMBEDDINGS)
@router.post("/embeddings", include_in_schema=False)
@router.post("/openai/deployments/{model:path}/embeddings", include_in_schema=False)  # Azure's
async def embeddings(request: Request) -> Response:
    async with _gateway(request).exchange(request) as exchange:
        embedding_request = await exchange.read(parse_embeddings)
        if deployment := request.path_params.get("model"):
            embedding_request = replace(embedding_request, model=deployment)
        name, embedding_request, reply = await exchange.embed(embedding_request)
        with exchange.stage("encode"):
            body = embeddings_json(reply, embedding_request, name)
        return _json_bytes(body, exchange)


@router.post("/encode", **openapi.ENCODE)
async def encode(request: Request) -> Response:
    async with _gateway(request).exchange(request) as exchange:
        embedding_request = await exchange.read(parse_encode)
        _, embedding_request, reply = await exchange.embed(embedding_request)
        with exchange.stage("encode"):
            body = encode_json(reply, embedding_request)
        return _json_bytes(body, exchange)


@router.post("/v1/rerank", **openapi.RERANK)
@router.post("/rerank", include_in_schema=False)
async def rerank(request: Request) -> Response:
    async with _gateway(request).exchange(request) as exchange:
        ranking = await exchange.read(parse_rerank)
        name, _, reply = await exchange.embed(ranking.request)
        with exchange.stage("encode"):
            body = rerank_json(reply, ranking, name)
        return _json_bytes(body, exchange)


@router.post("/v1/score", **openapi.SCORE)
@router.post("/score", include_in_schema=False)
async def score(request: Request) -> Response:
    async with _gateway(request).exchange(request) as exchange:
        scoring = await exchange.read(parse_score)
        name, _, reply = await exchange.embed(scoring.request)
        with exchange.stage("encode"):
            body = score_json(reply, scoring, name)
        return _json_bytes(body, exchange)


@router.post("/tokenize", **openapi.TOKENIZE)
@router.post("/v1/tokenize", include_in_schema=False)
async def tokenize(request: Request) -> Response:
    gateway = _gateway(request)
    async with gateway.exchange(request) as exchange:
        model, embedding_request = await exchange.resolve(await exchange.read(parse_tokenize))
        ids = await gateway.client.tokenize(model.name, embedding_request, "image" in model.modalities)
        counts = [len(row) for row in ids]
        tokens, count = (ids[0], counts[0]) if embedding_request.single else (ids, counts)
        name = embedding_request.model or gateway.settings.served_model_name or model.name
        return _json({"tokens": tokens, "count": count, "max_model_len": model.max_model_len, "model": name})


@router.get("/v1/models", **openapi.MODELS)
@router.get("/models", include_in_schema=False)
async def models(request: Request) -> Response:
    registry = _gateway(request).registry
    entries = sorted(registry.entries, key=lambda entry: entry.info is None)
    return _json({"object": "list", "data": [_describe(entry, registry) for entry in entries]})


@router.get("/v1/models/{model:path}", **openapi.MODEL)
async def model(request: Request) -> Response:
    registry = _gateway(request).registry
    return _json(_describe(await registry.find(request.path_params["model"]), registry))


@router.get("/get_model_info", **openapi.MODEL_INFO)
@router.get("/model_info", include_in_schema=False)
async def model_info(request: Request) -> Response:
    info = await _gateway(request).registry.resolve(request.query_params.get("model"))
    path = info.checkpoint or info.name
    return _json({"model_path": path, "tokenizer_path": path, "is_generation": False, **asdict(info)})


@router.get("/get_server_info", **openapi.SERVER_INFO)
@router.get("/server_info", include_in_schema=False)
async def server_info(request: Request) -> Response:
    gateway = _gateway(request)
    settings = gateway.settings.model_dump(include=PUBLIC_SETTINGS)
    ready = [asdict(info) for info in gateway.registry.ready]
    return _json({"version": request.app.version, **settings, "models": ready})


@router.get("/health", **openapi.HEALTH)
@router.get("/ready", include_in_schema=False)
@router.get("/ping", include_in_schema=False)
async def health(request: Request) -> Response:
    reason = await _gateway(request).why_unavailable()
    return _json({"status": "unavailable", "reason": reason}, 503) if reason else _json({"status": "healthy"})


@router.get("/health_generate", **openapi.HEALTH_GENERATE)
async def health_generate(request: Request) -> Response:
    gateway = _gateway(request)
    if reason := await gateway.why_unavailable():
        return _json({"status": "unavailable", "reason": reason}, 503)
    entries = [entry for entry in gateway.registry.entries if entry.info or entry.broken]
    replies = await asyncio.gather(*(gateway.probe(entry) for entry in entries), return_exceptions=True)
    states = {entry.name: _state(reply) for entry, reply in zip(entries, replies, strict=True)}
    healthy = all(state in ("ok", "busy") for state in states.values())
    return _json({"status": "healthy" if healthy else "unavailable", "models": states}, 200 if healthy else 503)


@router.get("/metrics", **openapi.METRICS)
async def metrics(request: Request) -> Response:
    gateway = _gateway(request)
    gateway.metrics.set_models(gateway.registry.ready)
    return Response(await gateway.metrics.scrape(), media_type=CONTENT_TYPE)


def _gateway(request: Request) -> Gateway:
    gateway: Gateway = request.app.state.gateway
    return gateway


def _describe(entry: ModelEntry, registry: Registry) -> dict[str, Any]:
    """Return OpenAI's model object with the facts that help to choose a model."""
    info = entry.info
    described: dict[str, Any] = {
        "id": registry.public_name(entry),
        "object": "model",
        "created": entry.created,
        "owned_by": "triton-embed",
        "ready": info is not None,
        "checkpoint": info.checkpoint if info else entry.checkpoint,
    }
    if info is None:
        return {**described, "reason": entry.reason}
    fields = (
        "dimensions",
        "max_model_len",
        "pooling",
        "modalities",
        "matryoshka",
        "instructions",
        "prompt_names",
        "default_prompt_name",
    )
    return {**described, **{field: getattr(info, field) for field in fields}}


def _state(reply: Embeddings | BaseException) -> str:
    """Return what /health_generate reports for a model: ok, busy (its queue is full), or the message of the error."""
    if isinstance(reply, Embeddings):
        return "ok"
    if not isinstance(reply, ApiError):
        raise reply
    return "busy" if reply.status == 429 else reply.message


def _json(content: dict[str, Any], status: int = 200) -> Response:
    return Response(orjson.dumps(content), status, media_type="application/json")


def _json_bytes(body: bytes, exchange: Exchange) -> Response:
    return Response(body, headers=exchange.headers(), media_type="application/json")
