"""Response bodies: each field once, with its type and description. The OpenAPI document is made of these types."""

from typing import Annotated, Any, Literal, NotRequired

from pydantic import Field
from typing_extensions import TypedDict

from triton_embed.gateway.api.bodies import accepts
from triton_embed.gateway.errors import ErrorBody

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
    embedding: Annotated[Any, accepts(Vector)]  # numpy arrays, which orjson serializes
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
