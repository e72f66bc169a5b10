"""What the OpenAPI document says of each route: forms, examples, errors. The rules themselves are the parsers'."""

from typing import Any, Final

from fastapi import FastAPI

from triton_embed.gateway.foreign import ENCODINGS
from triton_embed.gateway.forms import OUTPUT_DTYPES
from triton_embed.gateway.items import INPUT_TYPES, PART_TYPES
from triton_embed.gateway.schemas import MOST_SIZES, REUSED

Schema = dict[str, Any]

DESCRIPTION: Final = """
Embeddings of texts and images by the models of a Triton model repository, in OpenAI's form.

Errors always have the body `{"error": {"message", "type", "param", "code"}}`. Every answer carries `x-request-id`: the
caller's own, or one that was made. `Authorization: Bearer KEY` is needed where the operator has set keys. JSON is read
whatever the Content-Type says.
"""
TAGS: Final = [
    {"name": "embeddings", "description": "Vectors, and what is made of them"},
    {"name": "models", "description": "What is served"},
    {"name": "health", "description": "For load balancers and people on call"},
]
KEY: Final = {"type": "http", "scheme": "bearer", "description": "Where the operator has set keys"}


class Documented(FastAPI):
    """An app whose document says that a key may be needed."""

    def openapi(self) -> Schema:
        document = super().openapi()
        document.setdefault("components", {})["securitySchemes"] = {"key": KEY}
        document["security"] = [{"key": []}, {}]
        return document


def _object(properties: Schema, required: list[str], **more: Any) -> Schema:
    return {"type": "object", "properties": properties, "required": required, **more}


def _list(items: Schema, **more: Any) -> Schema:
    return {"type": "array", "items": items, **more}


def _nullable(kind: Schema) -> Schema:
    return {"anyOf": [kind, {"type": "null"}]}


def _optional(description: str, kind: Schema) -> Schema:
    return {"description": description, **_nullable(kind)}


STRING: Final[Schema] = {"type": "string"}
INTEGER: Final[Schema] = {"type": "integer"}
NUMBER: Final[Schema] = {"type": "number"}
BOOLEAN: Final[Schema] = {"type": "boolean"}
COUNT: Final[Schema] = {"type": "integer", "minimum": 0}

ERROR: Final = _object(
    {
        "message": STRING,
        "type": STRING,
        "param": {"description": "The field at fault", **_nullable(STRING)},
        "code": _nullable(STRING),
    },
    ["message", "type", "param", "code"],
)
USAGE: Final = _object(
    {"prompt_tokens": COUNT, "total_tokens": COUNT},
    ["prompt_tokens", "total_tokens"],
    description="Special tokens, prompts and image tokens included",
)
IMAGE: Final[Schema] = {
    "description": "A data: URI, base64, or an http(s) URL; a list of them is several images in one input",
    "anyOf": [STRING, _list(STRING)],
}
IMAGE_URL: Final[Schema] = {"anyOf": [STRING, _object({"url": STRING, "detail": STRING}, ["url"])]}
PROMPT: Final[Schema] = {
    "instruction": _optional("The task, put before a query as the model was trained", STRING),
    "prompt_name": _optional("One of the model's own prompts", STRING),
    "input_type": _optional(
        "Which side of a search this is: a query gets the model's own prompt for queries, where it has one",
        {"enum": [*INPUT_TYPES]},
    ),
}
ITEM: Final = _object(
    {"text": _nullable(STRING), "image": _nullable(IMAGE), "image_url": _nullable(IMAGE_URL), **PROMPT},
    [],
    description="One input of a text, an image, or both together where the model can",
    additionalProperties=False,
)
PARTS: Final = _list(
    _object(
        {"type": {"enum": [*PART_TYPES]}, "text": STRING, "image_url": IMAGE_URL, "image": IMAGE},
        ["type"],
    ),
    description="Content parts, as OpenAI's messages have them: the parts of one input",
)
TOKENS: Final = _list(INTEGER, description="Token ids of the model's own tokenizer, used as they are")
INPUT: Final[Schema] = {
    "description": "One input or a list of them",
    "anyOf": [
        STRING,
        TOKENS,
        _list(TOKENS),
        _list({"anyOf": [STRING, ITEM, PARTS]}),
        ITEM,
        PARTS,
        _object({"input": {}, **PROMPT}, ["input"], description="The input and how to prompt it, as one object"),
    ],
}
SHARED: Final[Schema] = {
    "model": _optional("Any name of a model that is served; needed when several are", STRING),
    **PROMPT,
    "truncate": _optional(
        "Which end of a text that is too long is cut; none: refuse it", {"enum": ["end", "start", "none", True, False]}
    ),
    "long_text": _optional(
        "mean: a text that is too long becomes the mean of its parts, weighted by their tokens",
        {"enum": ["truncate", "mean"]},
    ),
    "priority": _optional("batch: after everybody else", {"enum": ["interactive", "batch"]}),
}
DIMENSIONS: Final = _optional(
    "The first so many values, normalised again, of models trained for it", {"type": "integer", "minimum": 1}
)
SIZES: Final = _optional(
    "The first so many values, normalised again, of models trained for it; a list: one vector of each size",
    {"anyOf": [{"type": "integer", "minimum": 1}, _list({"type": "integer"}, minItems=1, maxItems=MOST_SIZES)]},
)
ON_ERROR: Final = _optional(
    "report: an input that cannot be embedded stands as an error in its place, the others are embedded",
    {"enum": ["fail", "report"]},
)
TOKEN_ENCODING: Final = _optional(
    "Whose ids these are, if not the model's own: they become text again", {"enum": [*ENCODINGS]}
)
VECTOR: Final[Schema] = {
    "description": "Numbers of length 1, or base64 of little-endian float32, or integers; a list of these for several "
    "dimensions",
    "anyOf": [_list(NUMBER), STRING, _list({"anyOf": [_list(NUMBER), STRING]})],
}
RECEIPT: Final = _object(
    {
        "tokens": COUNT,
        "dropped_tokens": COUNT,
        "prompt": _nullable(_object({"instruction": STRING, "prompt_name": STRING}, [])),
        "reused": {
            "description": "null: computed for this input; in_flight: for an identical one, of this request or another "
            "that ran; cache: for an earlier one",
            "enum": [*REUSED],
        },
    },
    ["tokens", "dropped_tokens", "prompt", "reused"],
)
EMBEDDING: Final = _object(
    {
        "object": {"const": "embedding"},
        "embedding": VECTOR,
        "index": COUNT,
        "scale": {
            "description": "Of int8 and uint8: a value is scale * int8, or scale * (uint8 - 128)",
            "anyOf": [NUMBER, _list(NUMBER)],
        },
        "receipt": RECEIPT,
    },
    ["object", "embedding", "index"],
)
FAILED: Final = _object({"object": {"const": "error"}, "index": COUNT, "error": ERROR}, ["object", "index", "error"])
MODEL_CARD: Final = _object(
    {
        "id": STRING,
        "object": {"const": "model"},
        "created": COUNT,
        "owned_by": STRING,
        "ready": BOOLEAN,
        "checkpoint": _nullable(STRING),
        "reason": {"description": "Why it is not ready", **STRING},
        "dimensions": COUNT,
        "max_model_len": COUNT,
        "modalities": _list({"enum": ["text", "image", "text+image"]}),
        "pooling": STRING,
        "matryoshka": {"anyOf": [BOOLEAN, _list(INTEGER), {"type": "null"}]},
        "instructions": BOOLEAN,
        "prompt_names": _list(STRING),
        "default_prompt_name": _nullable(STRING),
    },
    ["id", "object", "created", "owned_by", "ready", "checkpoint"],
)

_FAILURES: Final = {
    400: "Bad input: the message names the field, and the index of the input",
    401: "No key, or another one",
    404: "No such model",
    408: "The body did not come in time",
    413: "The body is too large",
    429: "Too much work is waiting: Retry-After says when to come back",
    500: "The gateway or the model failed",
    503: "The model is not ready, or Triton does not answer",
    504: "No answer in time",
}
_ALWAYS: Final[Schema] = {"x-request-id": {"description": "Identifies this request in the logs", "schema": STRING}}
_REQUEST_HEADERS: Final = [
    {"name": "x-request-id", "in": "header", "schema": STRING, "description": "Comes back, and is in the logs"},
    {
        "name": "x-request-timeout",
        "in": "header",
        "schema": {"type": "string", "pattern": r"^\d+(\.\d+)?$"},
        "description": "Seconds this request may take; work that has not begun by then is dropped",
    },
    {"name": "traceparent", "in": "header", "schema": STRING, "description": "W3C trace context, passed on to Triton"},
]


def _answer(schema: Schema, description: str, headers: Schema | None = None, example: Any = None) -> Schema:
    content: Schema = {"schema": schema}
    if example is not None:
        content["example"] = example
    return {
        "description": description,
        "content": {"application/json": content},
        "headers": {**_ALWAYS, **(headers or {})},
    }


def _failures(*statuses: int) -> dict[int | str, Schema]:
    body = _object({"error": ERROR}, ["error"])
    found: dict[int | str, Schema] = {status: _answer(body, _FAILURES[status]) for status in statuses}
    if 429 in found:
        found[429]["headers"]["Retry-After"] = {"description": "Seconds", "schema": INTEGER}
    return found


def _post(summary: str, description: str, tag: str, body: Schema, examples: Schema, answer: Schema) -> Schema:
    """Keyword arguments of a route that takes JSON."""
    content = {"application/json": {"schema": body, "examples": {name: {"value": x} for name, x in examples.items()}}}
    return {
        "summary": summary,
        "description": description,
        "tags": [tag],
        "responses": {200: answer, **_failures(*_FAILURES)},
        "openapi_extra": {"requestBody": {"required": True, "content": content}, "parameters": _REQUEST_HEADERS},
    }


def _get(summary: str, description: str, tag: str, answer: Schema, *statuses: int, **more: Any) -> Schema:
    """Keyword arguments of a route that takes nothing, or what `more` says."""
    found = {200: answer, **_failures(*statuses)}
    return {"summary": summary, "description": description, "tags": [tag], "responses": found, "openapi_extra": more}


_TIMED: Final[Schema] = {
    "Server-Timing": {"description": "Milliseconds of each stage", "schema": STRING},
    "x-truncated-inputs": {"description": "How many inputs lost tokens, if any did", "schema": INTEGER},
}
_PICTURE: Final = (
    "data:image/png;base64,iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNkYPhfDwAChwGA60e6kgAAAABJ"
    "RU5ErkJggg=="
)

EMBEDDINGS: Final = _post(
    "Embed texts, images or token ids",
    "OpenAI's embeddings endpoint and what it lacks. What was cut is never silent: `x-truncated-inputs` counts it and "
    "`return_receipt` says it of each input.",
    "embeddings",
    _object(
        {
            "input": INPUT,
            **SHARED,
            "dimensions": SIZES,
            "encoding_format": _optional(
                "base64: of little-endian float32. Integers are lists always",
                {"anyOf": [{"enum": ["float", "base64"]}, _list({"enum": ["float", "base64"]})]},
            ),
            "output_dtype": _optional(
                "int8, uint8: value / scale, the scale beside it; binary, ubinary: eight signs a byte",
                {"enum": [*OUTPUT_DTYPES]},
            ),
            "on_error": ON_ERROR,
            "token_encoding": TOKEN_ENCODING,
            "return_receipt": _optional("Tokens, tokens dropped, prompt and reuse of each input", BOOLEAN),
            "user": {"description": "Ignored"},
        },
        ["input"],
    ),
    {
        "a text": {"input": "Once upon a time"},
        "several, with a receipt": {"input": ["Once upon a time", "The end"], "return_receipt": True},
        "token ids": {"input": [101, 2320, 2588, 1037, 2051, 102]},
        "a query": {"input": "Who wrote it?", "input_type": "query"},
        "text and image": {"input": [{"text": "A red dot"}, {"image": _PICTURE}], "on_error": "report"},
    },
    _answer(
        _object(
            {
                "object": {"const": "list"},
                "data": _list({"anyOf": [EMBEDDING, FAILED]}),
                "model": {"description": "The name that was asked for", **STRING},
                "usage": USAGE,
            },
            ["object", "data", "model", "usage"],
        ),
        "One embedding for each input, in order",
        _TIMED,
        {
            "object": "list",
            "data": [{"object": "embedding", "embedding": [0.6, 0.8], "index": 0}],
            "model": "minilm",
            "usage": {"prompt_tokens": 6, "total_tokens": 6},
        },
    ),
)
_ENCODED: Final[Schema] = {
    "anyOf": [
        _object(
            {
                "embedding": _list(NUMBER),
                "meta_info": _object({"prompt_tokens": COUNT, "dropped_tokens": COUNT}, ["prompt_tokens"]),
            },
            ["embedding", "meta_info"],
        ),
        _object({"error": ERROR}, ["error"]),
    ]
}
ENCODE: Final = _post(
    "Embed texts, images or token ids, in SGLang's form",
    "`text` and `image_data`, or `input_ids` in; `embedding` and `meta_info` out, a list of them for a list.",
    "embeddings",
    _object(
        {
            "text": {"anyOf": [STRING, _list(STRING), {"type": "null"}]},
            "input_ids": {"anyOf": [TOKENS, _list(TOKENS), {"type": "null"}]},
            "image_data": {"anyOf": [IMAGE, _list(_nullable(IMAGE)), {"type": "null"}]},
            **SHARED,
            "dimensions": DIMENSIONS,
            "on_error": ON_ERROR,
            "token_encoding": TOKEN_ENCODING,
        },
        [],
    ),
    {"a text": {"text": "Once upon a time"}},
    _answer({"anyOf": [_ENCODED, _list(_ENCODED)]}, "One object, or a list of them for a list", _TIMED),
)
_DOCUMENT: Final[Schema] = {"anyOf": [{"type": "string", "minLength": 1}, ITEM]}
RERANK: Final = _post(
    "Order documents by their similarity to a query",
    "The relevance of a document is the cosine of its vector and the query's: these are embedding models, none of them "
    "was trained to judge pairs. The query gets `instruction` or the model's own prompt for queries.",
    "embeddings",
    _object(
        {
            "query": _DOCUMENT,
            "documents": _list(_DOCUMENT, minItems=1),
            "top_n": _optional("The best so many", {"type": "integer", "minimum": 1}),
            "return_documents": _optional("Whether each result holds its document", BOOLEAN),
            **SHARED,
            "dimensions": DIMENSIONS,
        },
        ["query", "documents"],
    ),
    {"three documents": {"query": "What is red?", "documents": ["A cherry", "The sea", "Snow"], "top_n": 2}},
    _answer(
        _object(
            {
                "model": STRING,
                "results": _list(
                    _object(
                        {
                            "index": COUNT,
                            "relevance_score": {"type": "number", "minimum": -1, "maximum": 1},
                            "document": {"type": "object"},
                        },
                        ["index", "relevance_score"],
                    )
                ),
                "usage": USAGE,
            },
            ["model", "results", "usage"],
        ),
        "The best document first",
        _TIMED,
    ),
)
SCORE: Final = _post(
    "Similarity of pairs of texts",
    "The cosine of two vectors, for one text against many or for as many pairs. No prompt but the one that is sent.",
    "embeddings",
    _object(
        {
            "text_1": {"anyOf": [STRING, _list(STRING, minItems=1)]},
            "text_2": {"anyOf": [STRING, _list(STRING, minItems=1)]},
            **SHARED,
            "dimensions": DIMENSIONS,
        },
        ["text_1", "text_2"],
    ),
    {"one against two": {"text_1": "A cherry", "text_2": ["A red fruit", "The sea"]}},
    _answer(
        _object(
            {
                "object": {"const": "list"},
                "model": STRING,
                "data": _list(
                    _object(
                        {
                            "index": COUNT,
                            "object": {"const": "score"},
                            "score": {"type": "number", "minimum": -1, "maximum": 1},
                        },
                        ["index", "object", "score"],
                    )
                ),
                "usage": USAGE,
            },
            ["object", "model", "data", "usage"],
        ),
        "One score for each pair, in order",
        _TIMED,
    ),
)
TOKENIZE: Final = _post(
    "The token ids of texts, as the model sees them",
    "Prompt and special tokens included, and not yet cut: compare `count` with `max_model_len`. `prompt`, `input` and "
    "`text` mean the same.",
    "embeddings",
    _object(
        {name: {"anyOf": [STRING, _list(STRING), {"type": "null"}]} for name in ("prompt", "input", "text")}
        | {"model": SHARED["model"], **PROMPT, "add_special_tokens": {"enum": [True, None]}},
        [],
    ),
    {"a text": {"prompt": "Once upon a time"}},
    _answer(
        _object(
            {
                "tokens": {"anyOf": [_list(COUNT), _list(_list(COUNT))]},
                "count": {"anyOf": [COUNT, _list(COUNT)]},
                "max_model_len": COUNT,
                "model": STRING,
            },
            ["tokens", "count", "max_model_len", "model"],
        ),
        "Ids and their number, a list of them for a list",
        _TIMED,
    ),
)
MODELS: Final = _get(
    "The models of the repository, those that are ready first",
    "With what helps to choose one, and why one is not ready.",
    "models",
    _answer(_object({"object": {"const": "list"}, "data": _list(MODEL_CARD)}, ["object", "data"]), "OpenAI's cards"),
    401,
)
MODEL: Final = _get(
    "One model, by any of its names",
    "Its directory, its Hugging Face id, the id's last part, or an alias.",
    "models",
    _answer(MODEL_CARD, "Its card"),
    401,
    404,
    503,
    parameters=[{"name": "model", "in": "path", "required": True, "schema": STRING}],
)
MODEL_INFO: Final = _get(
    "What a model says about itself, in SGLang's form",
    "The only one that is ready, or the one that is named.",
    "models",
    _answer(
        _object(
            {"model_path": STRING, "tokenizer_path": STRING, "is_generation": {"const": False}},
            ["model_path", "tokenizer_path", "is_generation"],
        ),
        "Its sizes, pooling, prompts and kernels",
    ),
    400,
    401,
    404,
    503,
    parameters=[{"name": "model", "in": "query", "required": False, "schema": STRING}],
)
SERVER_INFO: Final = _get(
    "Version, limits and models",
    "The settings that concern a caller, as they are in effect.",
    "models",
    _answer(_object({"version": STRING, "models": _list({"type": "object"})}, ["version", "models"]), "In effect now"),
    401,
)
_HEALTHY: Final = _object({"status": {"const": "healthy"}, "models": {"type": "object"}}, ["status"])
_UNHEALTHY: Final = _answer(
    _object(
        {"status": {"const": "unavailable"}, "reason": STRING, "models": {"type": "object"}},
        ["status"],
    ),
    "Not now, and why",
)
HEALTH: Final = _get(
    "Whether Triton answers and a model is ready",
    "Asks Triton. `/ready` and `/ping` are the same. Needs no key.",
    "health",
    _answer(_HEALTHY, "It is"),
)
HEALTH_GENERATE: Final = _get(
    "Whether every ready model really embeds",
    "One letter through each: 503 as well when Triton calls a model ready that does not answer. A full queue is no "
    "failure.",
    "health",
    _answer(_HEALTHY, "They do"),
)
for _route in (HEALTH, HEALTH_GENERATE):
    _route["responses"][503] = _UNHEALTHY
    _route["openapi_extra"]["security"] = []
METRICS: Final = _get(
    "Prometheus metrics",
    "The gateway's own, and Triton's where the operator has said where they are.",
    "health",
    {"description": "Prometheus text", "content": {"text/plain": {"schema": STRING}}, "headers": _ALWAYS},
    401,
)
