"""The OpenAPI document of each route: the schemas of its bodies, with summaries, examples, headers and errors."""

from collections.abc import Iterable
from typing import Any, Final

from fastapi import FastAPI

from triton_embed.gateway.api import bodies, responses
from triton_embed.gateway.api.bodies import schema_of

Json = dict[str, Any]

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
ERRORS: Final = {
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
STRING: Final = {"type": "string"}


class Documented(FastAPI):
    """A FastAPI app whose OpenAPI document declares the optional API key."""

    def openapi(self) -> Json:
        document = super().openapi()
        document.setdefault("components", {})["securitySchemes"] = {"key": KEY}
        document["security"] = [{"key": []}, {}]
        return document


def _header(description: str, kind: str = "string") -> Json:
    return {"description": description, "schema": {"type": kind}}


def _parameter(place: str, name: str, description: str, schema: Json = STRING) -> Json:
    return {"name": name, "in": place, "required": place == "path", "schema": schema, "description": description}


DEADLINE: Final = "Deadline of this request in seconds; work that has not started by then is dropped"
REQUEST_HEADERS: Final = [
    _parameter("header", "x-request-id", "Returned in the response and written to the logs"),
    _parameter("header", "x-request-timeout", DEADLINE, {"type": "string", "pattern": r"^\d+(\.\d+)?$"}),
    _parameter("header", "traceparent", "W3C trace context, passed on to Triton"),
]
ID_HEADER: Final = {"x-request-id": _header("Identifies this request in the logs")}
EMBEDDING_HEADERS: Final = {
    "Server-Timing": _header("Duration of each stage in milliseconds"),
    "x-truncated-inputs": _header("Number of truncated inputs; absent if there are none", "integer"),
}
RETRY_AFTER: Final = {"Retry-After": _header("Seconds", "integer")}


def _response(body: Any, description: str, headers: Json | None = None) -> Json:
    return {"model": body, "description": description, "headers": {**ID_HEADER, **(headers or {})}}


def _route(tag: str, summary: str, description: str, response: Json, errors: Iterable[int] = (), **extra: Any) -> Json:
    """Return the keyword arguments of a route; `extra` is its `openapi_extra`."""
    replies: dict[int, Json] = {200: response}
    for status in errors:
        replies[status] = _response(responses.ErrorResponse, ERRORS[status], RETRY_AFTER if status == 429 else None)
    return {"summary": summary, "description": description, "tags": [tag], "responses": replies, "openapi_extra": extra}


def _post(summary: str, description: str, body: Any, examples: Json, response: Any, meaning: str) -> Json:
    """Return the keyword arguments of a route with a JSON body."""
    content = {"schema": schema_of(body), "examples": {name: {"value": value} for name, value in examples.items()}}
    return _route(
        "embeddings",
        summary,
        description,
        _response(response, meaning, EMBEDDING_HEADERS),
        ERRORS,
        requestBody={"required": True, "content": {"application/json": content}},
        parameters=REQUEST_HEADERS,
    )


IMAGE: Final = (
    "data:image/png;base64,iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNkYPhfDwAChwGA60e6kgAAAABJ"
    "RU5ErkJggg=="
)
RESPONSE: Final = {
    "object": "list",
    "data": [{"object": "embedding", "embedding": [0.6, 0.8], "index": 0}],
    "model": "minilm",
    "usage": {"prompt_tokens": 6, "total_tokens": 6},
}
EMBEDDINGS: Final = _post(
    "Embed texts, images or token ids",
    "OpenAI's embeddings endpoint with extensions. Truncation is never silent: `x-truncated-inputs` counts truncated "
    "inputs, and `return_receipt` reports the dropped tokens of each input.",
    bodies.EmbeddingsBody,
    {
        "a text": {"input": "Once upon a time"},
        "several, with a receipt": {"input": ["Once upon a time", "The end"], "return_receipt": True},
        "token ids": {"input": [101, 2320, 2588, 1037, 2051, 102]},
        "a query": {"input": "Who wrote it?", "input_type": "query"},
        "text and image": {"input": [{"text": "A red dot"}, {"image": IMAGE}], "on_error": "report"},
    },
    responses.EmbeddingsResponse,
    "One embedding per input, in order",
)
EMBEDDINGS["responses"][200]["content"] = {"application/json": {"example": RESPONSE}}
ENCODE: Final = _post(
    "Embed texts, images or token ids, in SGLang's format",
    "Takes `text` and `image_data`, or `input_ids`. Returns `embedding` and `meta_info`, or a list of them for a list.",
    bodies.EncodeBody,
    {"a text": {"text": "Once upon a time"}},
    responses.EncodeResponse,
    "One object, or a list if the input is a list",
)
RERANK: Final = _post(
    "Order documents by their similarity to a query",
    "The relevance of a document is the cosine of its vector and the query's: these are embedding models, not trained "
    "rerankers. The query gets `instruction` or the model's prompt for queries.",
    bodies.RerankBody,
    {"three documents": {"query": "What is red?", "documents": ["A cherry", "The sea", "Snow"], "top_n": 2}},
    responses.RerankResponse,
    "Results, best document first",
)
SCORE: Final = _post(
    "Similarity of pairs of texts",
    "The cosine of two vectors, for one text against many or for pairs of two lists. No prompt is added by default.",
    bodies.ScoreBody,
    {"one against two": {"text_1": "A cherry", "text_2": ["A red fruit", "The sea"]}},
    responses.ScoreResponse,
    "One score per pair, in order",
)
TOKENIZE: Final = _post(
    "Token ids of texts, as the model receives them",
    "Including prompt and special tokens, and not truncated: compare `count` with `max_model_len`. `prompt`, `input` "
    "and `text` mean the same.",
    bodies.TokenizeBody,
    {"a text": {"prompt": "Once upon a time"}},
    responses.TokenizeResponse,
    "Token ids and their count, as lists if the input is a list",
)
MODELS: Final = _route(
    "models",
    "Models of the repository, ready ones first",
    "Includes the properties needed to choose a model, and the reason if a model is not ready.",
    _response(responses.ModelsResponse, "Model objects, as in OpenAI's API"),
    (401,),
)
MODEL: Final = _route(
    "models",
    "One model, by any of its names",
    "The name is the directory, the Hugging Face id, the last part of the id, or an alias.",
    _response(responses.Model, "The model object"),
    (401, 404, 503),
    parameters=[_parameter("path", "model", "Any name of the model")],
)
MODEL_INFO: Final = _route(
    "models",
    "Properties of a model, in SGLang's format",
    "The named model, or the only ready one.",
    _response(responses.ModelInfoResponse, "Dimensions, pooling, prompts and kernels"),
    (400, 401, 404, 503),
    parameters=[_parameter("query", "model", "Any name of the model")],
)
SERVER_INFO: Final = _route(
    "models",
    "Version, limits and models",
    "The effective settings that concern callers.",
    _response(responses.ServerInfoResponse, "Version, settings and ready models"),
    (401,),
)
HEALTH: Final = _route(
    "health",
    "Whether Triton answers and a model is ready",
    "Calls Triton. `/ready` and `/ping` are aliases. No API key is needed.",
    _response(responses.Healthy, "Healthy"),
    security=[],
)
HEALTH_GENERATE: Final = _route(
    "health",
    "Whether every ready model can embed",
    "Embeds one letter with each model; 503 also if Triton reports a model as ready that does not answer. A full queue "
    "is not a failure.",
    _response(responses.Healthy, "Every ready model can embed"),
    security=[],
)
for _health in (HEALTH, HEALTH_GENERATE):
    _health["responses"][503] = _response(responses.Unavailable, "Unavailable, with the reason")
METRICS: Final = _route(
    "health",
    "Prometheus metrics",
    "Metrics of the gateway, and of Triton if its metrics endpoint is configured.",
    {"description": "Prometheus text", "content": {"text/plain": {"schema": STRING}}, "headers": ID_HEADER},
    (401,),
)
