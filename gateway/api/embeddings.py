"""Embeddings as the JSON bodies of responses: OpenAI's form and SGLang's."""

import orjson

from triton_embed.gateway.api.requests import EmbeddingRequest, Embeddings
from triton_embed.gateway.api.responses import (
    Embedding,
    EmbeddingsResponse,
    Encoded,
    ErrorResponse,
    InputError,
    Receipt,
    Reuse,
    Usage,
)
from triton_embed.python_backend.wire import Reused

REUSE_VALUES: dict[Reused, Reuse] = {Reused.COMPUTED: None, Reused.IN_FLIGHT: "in_flight", Reused.CACHED: "cache"}


def embeddings_json(reply: Embeddings, request: EmbeddingRequest, model: str) -> bytes:
    """Return OpenAI's response body. Reported errors take the place of their vectors."""
    values, scales = request.vector_format.encode(reply.vectors)
    items: list[Embedding] = [{"object": "embedding", "embedding": value, "index": i} for i, value in enumerate(values)]
    if scales is not None:
        for item, scale in zip(items, scales, strict=True):
            item["scale"] = scale
    if request.vector_format.receipt:
        for i, item in enumerate(items):
            item["receipt"] = _receipt(reply, request, i)
    data: list[Embedding | InputError] = [*items]
    for i, error in request.errors.by_index.items():
        data[i] = {"object": "error", "index": i, "error": error.body()}
    body: EmbeddingsResponse = {"object": "list", "data": data, "model": model, "usage": usage_of(reply)}
    return orjson.dumps(body, option=orjson.OPT_SERIALIZE_NUMPY)


def encode_json(reply: Embeddings, request: EmbeddingRequest) -> bytes:
    """Return SGLang's response body: one object for a single input, a list for a list."""
    values, _ = request.vector_format.encode(reply.vectors)
    items: list[Encoded | ErrorResponse] = [
        {"embedding": value, "meta_info": {"prompt_tokens": tokens, "dropped_tokens": dropped}}
        for value, tokens, dropped in zip(values, reply.tokens.tolist(), reply.dropped.tolist(), strict=True)
    ]
    for i, error in request.errors.by_index.items():
        items[i] = {"error": error.body()}
    return orjson.dumps(items[0] if request.single else items, option=orjson.OPT_SERIALIZE_NUMPY)


def usage_of(reply: Embeddings) -> Usage:
    return {"prompt_tokens": reply.token_count, "total_tokens": reply.token_count}


def _receipt(reply: Embeddings, request: EmbeddingRequest, index: int) -> Receipt:
    return {
        "tokens": int(reply.tokens[index]),
        "dropped_tokens": int(reply.dropped[index]),
        "prompt": request.prompt_of(index).parameters() or None,
        "reused": None if reply.reused is None else REUSE_VALUES[Reused(reply.reused[index])],
    }
