"""Response bodies: each field once, and the writers of embeddings. The OpenAPI document is made of these types."""

from typing import Annotated, Any, Literal, NotRequired

import orjson
from pydantic import Field
from typing_extensions import TypedDict

from triton_embed.gateway.api.bodies import accepts
from triton_embed.gateway.api.requests import EmbeddingRequest, Embeddings
from triton_embed.gateway.errors import ErrorBody
from triton_embed.python_backend.wire import Reused

Count = Annotated[int, Field(ge=0)]
Cosine = Annotated[float, Field(ge=-1, le=1)]
Vector = Annotated[
    list[float] | str | list[list[float] | str],
    Field(
        description="A unit vector: floats, base64 of little-endian float32, or integers. A list for several dimensions"
    ),
]


class ErrorResponse(TypedDict):
    error: ErrorBody


class Usage(TypedDict):
    """Including special tokens, prompts and image tokens"""

    prompt_tokens: Count
    total_tokens: Count


class UsedPrompt(TypedDict, total=False):
    instruction: str
    prompt_name: str


Reuse = Literal["in_flight", "cache"] | None
REUSED: dict[Reused, Reuse] = {Reused.COMPUTED: None, Reused.IN_FLIGHT: "in_flight", Reused.CACHED: "cache"}


class Receipt(TypedDict):
    tokens: Count
    dropped_tokens: Count
    prompt: Annotated[dict[str, str] | None, accepts(UsedPrompt | None)]
    reused: Annotated[
        Reuse,
        Field(
            description="null: computed for this input; in_flight: shared with an identical input of this or a "
            "concurrent request; cache: reused from an earlier input"
        ),
    ]


class Embedding(TypedDict):
    object: Literal["embedding"]
    embedding: Annotated[Any, accepts(Vector)]  # arrays, which orjson writes
    index: Count
    scale: NotRequired[
        Annotated[
            float | list[float],
            Field(description="For int8 and uint8: a value is scale * int8, or scale * (uint8 - 128)"),
        ]
    ]
    receipt: NotRequired[Receipt]


class InputError(TypedDict):
    object: Literal["error"]
    index: Count
    error: ErrorBody


class EmbeddingsResponse(TypedDict):
    object: Literal["list"]
    data: list[Embedding | InputError]
    model: Annotated[str, Field(description="The requested name")]
    usage: Usage


class EncodedTokens(TypedDict):
    prompt_tokens: Count
    dropped_tokens: NotRequired[Count]


class Encoded(TypedDict):
    embedding: Annotated[Any, accepts(list[float])]
    meta_info: EncodedTokens


EncodeResponse = Encoded | ErrorResponse | list[Encoded | ErrorResponse]


class RankedDocument(TypedDict):
    index: Count
    relevance_score: Cosine
    document: NotRequired[dict[str, Any]]


class RerankResponse(TypedDict):
    model: str
    results: list[RankedDocument]
    usage: Usage


class PairScore(TypedDict):
    index: Count
    object: Literal["score"]
    score: Cosine


class ScoreResponse(TypedDict):
    object: Literal["list"]
    model: str
    data: list[PairScore]
    usage: Usage


class TokenizeResponse(TypedDict):
    tokens: list[Count] | list[list[Count]]
    count: Count | list[Count]
    max_model_len: Count
    model: str


class Model(TypedDict):
    id: str
    object: Literal["model"]
    created: Count
    owned_by: str
    ready: bool
    checkpoint: str | None
    reason: NotRequired[Annotated[str, Field(description="Why the model is not ready")]]
    dimensions: NotRequired[Count]
    max_model_len: NotRequired[Count]
    modalities: NotRequired[list[Literal["text", "image", "text+image"]]]
    pooling: NotRequired[str]
    matryoshka: NotRequired[bool | list[int] | None]
    instructions: NotRequired[bool]
    prompt_names: NotRequired[list[str]]
    default_prompt_name: NotRequired[str | None]


class ModelsResponse(TypedDict):
    object: Literal["list"]
    data: list[Model]


class ModelInfoResponse(TypedDict):
    model_path: str
    tokenizer_path: str
    is_generation: Literal[False]


class ServerInfoResponse(TypedDict):
    version: str
    models: list[dict[str, Any]]


class Healthy(TypedDict):
    status: Literal["healthy"]
    models: NotRequired[dict[str, Any]]


class Unavailable(TypedDict):
    status: Literal["unavailable"]
    reason: NotRequired[str]
    models: NotRequired[dict[str, Any]]


def embeddings_json(reply: Embeddings, request: EmbeddingRequest, model: str) -> bytes:
    """Return OpenAI's response body. Reported errors take the place of their vectors."""
    values, scales = request.vector_format.encode(reply.vectors)
    rows: list[Embedding] = [{"object": "embedding", "embedding": row, "index": i} for i, row in enumerate(values)]
    if scales is not None:
        for item, scale in zip(rows, scales, strict=True):
            item["scale"] = scale
    if request.vector_format.receipt:
        for i, item in enumerate(rows):
            item["receipt"] = _receipt(reply, request, i)
    data: list[Embedding | InputError] = [*rows]
    for i, error in request.errors.by_index.items():
        data[i] = {"object": "error", "index": i, "error": error.body()}
    body: EmbeddingsResponse = {"object": "list", "data": data, "model": model, "usage": usage_of(reply)}
    return orjson.dumps(body, option=orjson.OPT_SERIALIZE_NUMPY)


def encode_json(reply: Embeddings, request: EmbeddingRequest) -> bytes:
    """Return SGLang's response body: one object for a single input, a list for a list."""
    rows, _ = request.vector_format.encode(reply.vectors)
    items: list[Encoded | ErrorResponse] = [
        {"embedding": row, "meta_info": {"prompt_tokens": tokens, "dropped_tokens": dropped}}
        for row, tokens, dropped in zip(rows, reply.tokens.tolist(), reply.dropped.tolist(), strict=True)
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
        "reused": None if reply.reused is None else REUSED[Reused(reply.reused[index])],
    }
