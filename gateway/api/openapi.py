"""The OpenAPI document of each route: schemas, examples and errors. The parsers, not this file, enforce the rules."""

from typing import Any, Final

from fastapi import FastAPI

from triton_embed.gateway.api.inputs import INPUT_TYPES, PART_TYPES
from triton_embed.gateway.api.requests import MAX_SIZES, REUSED
from triton_embed.gateway.api.token_encodings import ENCODINGS
from triton_embed.gateway.api.vector_formats import OUTPUT_DTYPES

Schema = dict[str, Any]

DESCRIPTION: Final = """
Embeddings of texts and images by the models of a Triton model repository, with OpenAI's request and response format.

Errors always have the body `{"error": {"message", "type", "param", "code"}}`. Every response has an `x-request-id`: the
caller's own, or a generated one. `Authorization: Bearer KEY` is required if the operator has set API keys. A request
body is read as JSON, whatever its Content-Type.
"""
TAGS: Final = [
    {"name": "embeddings", "description": "Vectors, and rankings and scores computed from them"},
    {"name": "models", "description": "The models that are served"},
    {"name": "health", "description": "Probes and metrics, for load balancers and operators"},
]
KEY: Final = {"type": "http", "scheme": "bearer", "description": "Required if the operator has set API keys"}


class Documented(FastAPI):
    """A FastAPI app whose OpenAPI document declares the optional API key."""

    def openapi(self) -> Schema:
        document = super().openapi()
        document.setdefault("components", {})["securitySchemes"] = {"key": KEY}
        document["security"] = [{"key": []}, {}]
        return document


def _object(properties: Schema, required: list[str], **keywords: Any) -> Schema:
    return {"type": "object", "properties": properties, "required": required, **keywords}


def _list(items: Schema, **keywords: Any) -> Schema:
    return {"type": "array", "items": items, **keywords}


def _nullable(schema: Schema) -> Schema:
    return {"anyOf": [schema, {"type": "null"}]}


def _optional(description: str, schema: Schema) -> Schema:
    return {"description": description, **_nullable(schema)}


STRING: Final[Schema] = {"type": "string"}
INTEGER: Final[Schema] = {"type": "integer"}
NUMBER: Final[Schema] = {"type": "number"}
BOOLEAN: Final[Schema] = {"type": "boolean"}
COUNT: Final[Schema] = {"type": "integer", "minimum": 0}

ERROR: Final = _object(
    {
        "message": STRING,
        "type": STRING,
        "param": {"description": "The request field that is wrong", **_nullable(STRING)},
        "code": _nullable(STRING),
    },
    ["message", "type", "param", "code"],
)
USAGE: Final = _object(
    {"prompt_tokens": COUNT, "total_tokens": COUNT},
    ["prompt_tokens", "total_tokens"],
    description="Including special tokens, prompts and image tokens",
)
IMAGE: Final[Schema] = {
    "description": "A data: URI, base64, or an http(s) URL; a list means several images in one input",
    "anyOf": [STRING, _list(STRING)],
}
IMAGE_URL: Final[Schema] = {"anyOf": [STRING, _object({"url": STRING, "detail": STRING}, ["url"])]}
PROMPT: Final[Schema] = {
    "instruction": _optional("The task description, placed before a query as the model was trained", STRING),
    "prompt_name": _optional("Name of one of the model's prompts", STRING),
    "input_type": _optional(
        "The role of the input in a search: a query gets the model's prompt for queries, if it has one",
        {"enum": [*INPUT_TYPES]},
    ),
}
ITEM: Final = _object(
    {"text": _nullable(STRING), "image": _nullable(IMAGE), "image_url": _nullable(IMAGE_URL), **PROMPT},
    [],
    description="One input: a text, an image, or both if the model embeds them together",
    additionalProperties=False,
)
PARTS: Final = _list(
    _object(
        {"type": {"enum": [*PART_TYPES]}, "text": STRING, "image_url": IMAGE_URL, "image": IMAGE},
        ["type"],
    ),
    description="Content parts of one input, as in OpenAI's messages",
)
TOKENS: Final = _list(INTEGER, description="Token ids of the model's tokenizer, used without changes")
INPUT: Final[Schema] = {
    "description": "One input or a list of inputs",
    "anyOf": [
        STRING,
        TOKENS,
        _list(TOKENS),
        _list({"anyOf": [STRING, ITEM, PARTS]}),
        ITEM,
        PARTS,
        _object({"input": {}, **PROMPT}, ["input"], description="The input and its prompt as one object"),
    ],
}
SHARED: Final[Schema] = {
    "model": _optional("Any name of a served model; required if several models are served", STRING),
    **PROMPT,
    "truncate": _optional(
        "Which end of a too long text is cut off; none: reject the text",
        {"enum": ["end", "start", "none", True, False]},
    ),
    "long_text": _optional(
        "mean: embed a too long text as the mean of its chunks, weighted by their token counts",
        {"enum": ["truncate", "mean"]},
    ),
    "priority": _optional("batch: processed after interactive requests", {"enum": ["interactive", "batch"]}),
}
DIMENSIONS: Final = _optional(
    "Return this many leading values, normalized again; only for models trained for it",
    {"type": "integer", "minimum": 1},
)
SIZES: Final = _optional(
    "Return this many leading values, normalized again; only for models trained for it. A list: one vector per entry",
    {"anyOf": [{"type": "integer", "minimum": 1}, _list({"type": "integer"}, minItems=1, maxItems=MAX_SIZES)]},
)
ON_ERROR: Final = _optional(
    "report: an input that cannot be embedded becomes an error at its index; the others are embedded",
    {"enum": ["fail", "report"]},
)
TOKEN_ENCODING: Final = _optional(
    "The tokenizer of the ids, if it is not the model's: the ids are decoded to text first", {"enum": [*ENCODINGS]}
)
VECTOR: Final[Schema] = {
    "description": "A unit vector: floats, base64 of little-endian float32, or integers. A list of vectors for several "
    "dimensions",
    "anyOf": [_list(NUMBER), STRING, _list({"anyOf": [_list(NUMBER), STRING]})],
}
RECEIPT: Final = _object(
    {
        "tokens": COUNT,
        "dropped_tokens": COUNT,
        "prompt": _nullable(_object({"instruction": STRING, "prompt_name": STRING}, [])),
        "reused": {
            "description": "null: computed for this input; in_flight: shared with an identical input of this or a "
            "concurrent request; cache: reused from an earlier input",
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
            "description": "For int8 and uint8: a value is scale * int8, or scale * (uint8 - 128)",
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
        "reason": {"description": "Why the model is not ready", **STRING},
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
    400: "Invalid request: the message names the field and the index of the input",
    401: "Missing or wrong API key",
    404: "The model does not exist",
    408: "The body did not arrive in time",
    413: "The body is too large",
    429: "The queue is full: Retry-After says when to retry",
    500: "The gateway or the model failed",
    503: "The model is not ready, or Triton does not answer",
    504: "The deadline of the request is exceeded",
}
_COMMON_HEADERS: Final[Schema] = {
    "x-request-id": {"description": "Identifies this request in the logs", "schema": STRING}
}
_REQUEST_HEADERS: Final = [
    {
        "name": "x-request-id",
        "in": "header",
        "schema": STRING,
        "description": "Returned in the response and written to the logs",
    },
    {
        "name": "x-request-timeout",
        "in": "header",
        "schema": {"type": "string", "pattern": r"^\d+(\.\d+)?$"},
        "description": "Deadline of this request in seconds; work that has not started by then is dropped",
    },
    {"name": "traceparent", "in": "header", "schema": STRING, "description": "W3C trace context, passed on to Triton"},
]


def _response(schema: Schema, description: str, headers: Schema | None = None, example: Any = None) -> Schema:
    content: Schema = {"schema": schema}
    if example is not None:
        content["example"] = example
    return {
        "description": description,
        "content": {"application/json": content},
        "headers": {**_COMMON_HEADERS, **(headers or {})},
    }


def _failures(*statuses: int) -> dict[int | str, Schema]:
    body = _object({"error": ERROR}, ["error"])
    responses: dict[int | str, Schema] = {status: _response(body, _FAILURES[status]) for status in statuses}
    if 429 in responses:
        responses[429]["headers"]["Retry-After"] = {"description": "Seconds", "schema": INTEGER}
    return responses


def _post(summary: str, description: str, tag: str, body: Schema, examples: Schema, response: Schema) -> Schema:
    """Return the keyword arguments of a route with a JSON body."""
    content = {"application/json": {"schema": body, "examples": {name: {"value": x} for name, x in examples.items()}}}
    return {
        "summary": summary,
        "description": description,
        "tags": [tag],
        "responses": {200: response, **_failures(*_FAILURES)},
        "openapi_extra": {"requestBody": {"required": True, "content": content}, "parameters": _REQUEST_HEADERS},
    }


def _get(summary: str, description: str, tag: str, response: Schema, *statuses: int, **extra: Any) -> Schema:
    """Return the keyword arguments of a route without a body; `extra` is its `openapi_extra`."""
    responses = {200: response, **_failures(*statuses)}
    return {
        "summary": summary,
        "description": description,
        "tags": [tag],
        "responses": responses,
        "openapi_extra": extra,
    }


_EMBEDDING_HEADERS: Final[Schema] = {
    "Server-Timing": {"description": "Duration of each stage in milliseconds", "schema": STRING},
    "x-truncated-inputs": {"description": "Number of truncated inputs; absent if there are none", "schema": INTEGER},
}
_IMAGE_URI: Final = (
    "data:image/png;base64,iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNkYPhfDwAChwGA60e6kgAAAABJ"
    "RU5ErkJggg=="
)

EMBEDDINGS: Final = _post(
    "Embed texts, images or token ids",
    "OpenAI's embeddings endpoint with extensions. Truncation is never silent: `x-truncated-inputs` counts truncated "
    "inputs, and `return_receipt` reports the dropped tokens of each input.",
    "embeddings",
    _object(
        {
            "input": INPUT,
            **SHARED,
            "dimensions": SIZES,
            "encoding_format": _optional(
                "base64: little-endian float32. Integers are always lists",
                {"anyOf": [{"enum": ["float", "base64"]}, _list({"enum": ["float", "base64"]})]},
            ),
            "output_dtype": _optional(
                "int8, uint8: value / scale, returned with its scale; binary, ubinary: eight signs per byte",
                {"enum": [*OUTPUT_DTYPES]},
            ),
            "on_error": ON_ERROR,
            "token_encoding": TOKEN_ENCODING,
            "return_receipt": _optional("Report tokens, dropped tokens, prompt and reuse of each input", BOOLEAN),
            "user": {"description": "Ignored"},
        },
        ["input"],
    ),
    {
        "a text": {"input": "Once upon a time"},
        "several, with a receipt": {"input": ["Once upon a time", "The end"], "return_receipt": True},
        "token ids": {"input": [101, 2320, 2588, 1037, 2051, 102]},
        "a query": {"input": "Who wrote it?", "input_type": "query"},
        "text and image": {"input": [{"text": "A red dot"}, {"image": _IMAGE_URI}], "on_error": "report"},
    },
    _response(
        _object(
            {
                "object": {"const": "list"},
                "data": _list({"anyOf": [EMBEDDING, FAILED]}),
                "model": {"description": "The requested name", **STRING},
                "usage": USAGE,
            },
            ["object", "data", "model", "usage"],
        ),
        "One embedding per input, in order",
        _EMBEDDING_HEADERS,
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
    "Embed texts, images or token ids, in SGLang's format",
    "Takes `text` and `image_data`, or `input_ids`. Returns `embedding` and `meta_info`, or a list of them for a list.",
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
    _response({"anyOf": [_ENCODED, _list(_ENCODED)]}, "One object, or a list if the input is one", _EMBEDDING_HEADERS),
)
_DOCUMENT: Final[Schema] = {"anyOf": [{"type": "string", "minLength": 1}, ITEM]}
RERANK: Final = _post(
    "Order documents by their similarity to a query",
    "The relevance of a document is the cosine of its vector and the query's: these are embedding models, not trained "
    "rerankers. The query gets `instruction` or the model's prompt for queries.",
    "embeddings",
    _object(
        {
            "query": _DOCUMENT,
            "documents": _list(_DOCUMENT, minItems=1),
            "top_n": _optional("Return only this many of the best documents", {"type": "integer", "minimum": 1}),
            "return_documents": _optional("Whether to return the document of each result", BOOLEAN),
            **SHARED,
            "dimensions": DIMENSIONS,
        },
        ["query", "documents"],
    ),
    {"three documents": {"query": "What is red?", "documents": ["A cherry", "The sea", "Snow"], "top_n": 2}},
    _response(
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
        "Results, best document first",
        _EMBEDDING_HEADERS,
    ),
)
SCORE: Final = _post(
    "Similarity of pairs of texts",
    "The cosine of two vectors, for one text against many or for pairs of two lists. No prompt is added by default.",
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
    _response(
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
        "One score per pair, in order",
        _EMBEDDING_HEADERS,
    ),
)
TOKENIZE: Final = _post(
    "Token ids of texts, as the model receives them",
    "Including prompt and special tokens, and not truncated: compare `count` with `max_model_len`. `prompt`, `input` "
    "and `text` mean the same.",
    "embeddings",
    _object(
        {name: {"anyOf": [STRING, _list(STRING), {"type": "null"}]} for name in ("prompt", "input", "text")}
        | {"model": SHARED["model"], **PROMPT, "add_special_tokens": {"enum": [True, None]}},
        [],
    ),
    {"a text": {"prompt": "Once upon a time"}},
    _response(
        _object(
            {
                "tokens": {"anyOf": [_list(COUNT), _list(_list(COUNT))]},
                "count": {"anyOf": [COUNT, _list(COUNT)]},
                "max_model_len": COUNT,
                "model": STRING,
            },
            ["tokens", "count", "max_model_len", "model"],
        ),
        "Token ids and their count, as lists if the input is a list",
        _EMBEDDING_HEADERS,
    ),
)
MODELS: Final = _get(
    "Models of the repository, ready ones first",
    "Includes the properties needed to choose a model, and the reason if a model is not ready.",
    "models",
    _response(
        _object({"object": {"const": "list"}, "data": _list(MODEL_CARD)}, ["object", "data"]),
        "Model objects, as in OpenAI's API",
    ),
    401,
)
MODEL: Final = _get(
    "One model, by any of its names",
    "The name is the directory, the Hugging Face id, the last part of the id, or an alias.",
    "models",
    _response(MODEL_CARD, "The model object"),
    401,
    404,
    503,
    parameters=[{"name": "model", "in": "path", "required": True, "schema": STRING}],
)
MODEL_INFO: Final = _get(
    "Properties of a model, in SGLang's format",
    "The named model, or the only ready one.",
    "models",
    _response(
        _object(
            {"model_path": STRING, "tokenizer_path": STRING, "is_generation": {"const": False}},
            ["model_path", "tokenizer_path", "is_generation"],
        ),
        "Dimensions, pooling, prompts and kernels",
    ),
    400,
    401,
    404,
    503,
    parameters=[{"name": "model", "in": "query", "required": False, "schema": STRING}],
)
SERVER_INFO: Final = _get(
    "Version, limits and models",
    "The effective settings that concern callers.",
    "models",
    _response(
        _object({"version": STRING, "models": _list({"type": "object"})}, ["version", "models"]),
        "Version, settings and ready models",
    ),
    401,
)
_HEALTHY: Final = _object({"status": {"const": "healthy"}, "models": {"type": "object"}}, ["status"])
_UNHEALTHY: Final = _response(
    _object(
        {"status": {"const": "unavailable"}, "reason": STRING, "models": {"type": "object"}},
        ["status"],
    ),
    "Unavailable, with the reason",
)
HEALTH: Final = _get(
    "Whether Triton answers and a model is ready",
    "Calls Triton. `/ready` and `/ping` are aliases. No API key is needed.",
    "health",
    _response(_HEALTHY, "Healthy"),
)
HEALTH_GENERATE: Final = _get(
    "Whether every ready model can embed",
    "Embeds one letter with each model; 503 also if Triton reports a model as ready that does not answer. A full queue "
    "is not a failure.",
    "health",
    _response(_HEALTHY, "Every ready model can embed"),
)
for _route in (HEALTH, HEALTH_GENERATE):
    _route["responses"][503] = _UNHEALTHY
    _route["openapi_extra"]["security"] = []
METRICS: Final = _get(
    "Prometheus metrics",
    "Metrics of the gateway, and of Triton if its metrics endpoint is configured.",
    "health",
    {"description": "Prometheus text", "content": {"text/plain": {"schema": STRING}}, "headers": _COMMON_HEADERS},
    401,
)
