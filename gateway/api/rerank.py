"""Reranking and scoring by the cosine of two vectors. No model here was trained to judge pairs.

The request and response forms are Cohere's and Jina's `rerank`, and vLLM's `score`.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import orjson

from triton_embed.gateway.api.inputs import JSON_TYPES, NO_PROMPT, PROMPT_KEYS, Prompt, read_prompt
from triton_embed.gateway.api.requests import EmbeddingRequest, Embeddings, parse_object, read_request
from triton_embed.gateway.errors import invalid
from triton_embed.gateway.settings import Settings

QUERY, DOCUMENT = Prompt(input_type="query"), Prompt(input_type="document")


@dataclass(frozen=True, slots=True)
class Ranking:
    """A rerank request: the documents, then the query last, so that an index names the same document everywhere."""

    request: EmbeddingRequest
    documents: Sequence[Any]  # as received
    top_n: int
    return_documents: bool


@dataclass(frozen=True, slots=True)
class Scoring:
    """A score request: its inputs, and the pairs to compare by index."""

    request: EmbeddingRequest
    pairs: Sequence[tuple[int, int]]


def parse_rerank(body: bytes, settings: Settings) -> Ranking:
    """Parse the body of POST /v1/rerank.

    Raises:
        ApiError: 400 for an invalid request.
    """
    fields = parse_object(body)
    documents, query = fields.get("documents"), fields.get("query")
    if type(documents) is not list or not documents:
        raise invalid(f"documents must be a list of one document or more, got {_kind(documents)}", "documents")
    if query is None or type(query) is list or (type(query) is str and not query.strip()):
        raise invalid(f"query must be a text or an object, got {_kind(query)}", "query")
    top_n = fields.get("top_n")
    if top_n is not None and (type(top_n) is not int or top_n < 1):
        raise invalid("top_n must be an integer above 0", "top_n")
    return_documents = fields.get("return_documents")
    if return_documents is not None and type(return_documents) is not bool:
        raise invalid("return_documents must be a boolean", "return_documents")
    query_prompt = read_prompt(fields)
    shared = {key: value for key, value in fields.items() if key not in PROMPT_KEYS}
    request = _read(shared, [*map(_item, documents), _item(query)], "documents", settings)
    own = request.prompts or [NO_PROMPT] * request.count
    prompts = [*(prompt or DOCUMENT for prompt in own[:-1]), own[-1] or query_prompt or QUERY]
    request = replace(request, prompts=prompts)
    return Ranking(request, documents, min(top_n or len(documents), len(documents)), bool(return_documents))


def parse_score(body: bytes, settings: Settings) -> Scoring:
    """Parse the body of POST /v1/score: one text against one or many, or lists of equal length.

    Raises:
        ApiError: 400 for an invalid request.
    """
    fields = parse_object(body)
    left, right = (_texts(fields.get(name), name) for name in ("text_1", "text_2"))
    if len(left) != len(right) and len(left) != 1:
        message = f"text_1 must be one text, or as many as text_2: {len(left)} and {len(right)}"
        raise invalid(message, "text_1")
    request = _read(fields, [*left, *right], "text_2", settings)
    return Scoring(request, [(i if len(left) > 1 else 0, len(left) + i) for i in range(len(right))])


def rerank_json(reply: Embeddings, ranking: Ranking, model: str) -> bytes:
    """Return the response of a rerank: best document first, equal scores in the order of the documents."""
    scores = _cosines(reply.vectors[:-1], reply.vectors[-1:])
    order = np.argsort(-scores, kind="stable")[: ranking.top_n].tolist()
    results: list[dict[str, Any]] = [{"index": i, "relevance_score": float(scores[i])} for i in order]
    if ranking.return_documents:
        for result in results:
            document = ranking.documents[result["index"]]
            result["document"] = {"text": document} if type(document) is str else document
    return orjson.dumps({"model": model, "results": results, "usage": _usage(reply)})


def score_json(reply: Embeddings, scoring: Scoring, model: str) -> bytes:
    """Return the response of a score request: one score per pair, in order."""
    left, right = np.array(scoring.pairs).T
    scores = _cosines(reply.vectors[left], reply.vectors[right])
    data = [{"index": i, "object": "score", "score": score} for i, score in enumerate(scores.tolist())]
    return orjson.dumps({"object": "list", "model": model, "data": data, "usage": _usage(reply)})


def _cosines(left: npt.NDArray[np.float32], right: npt.NDArray[np.float32]) -> npt.NDArray[np.float64]:
    """Return the cosines of unit vectors, row by row, clipped to [-1, 1] because rounding may exceed it."""
    product: npt.NDArray[np.float64] = (left.astype(np.float64) * right).sum(axis=1)
    return np.clip(product, -1.0, 1.0)


def _usage(reply: Embeddings) -> dict[str, int]:
    return {"prompt_tokens": reply.token_count, "total_tokens": reply.token_count}


def _item(value: Any) -> Any:
    """Return a text as an object, so that a list of them can only be read as separate inputs."""
    return {"text": value} if type(value) is str else value


def _texts(value: Any, name: str) -> list[Any]:
    texts = value if type(value) is list else [value]
    if not texts or any(type(text) is not str for text in texts):
        raise invalid(f"{name} must be a text or a list of texts", name)
    return texts


def _read(fields: dict[str, Any], inputs: list[Any], param: str, settings: Settings) -> EmbeddingRequest:
    request = read_request(fields, inputs, param, settings)
    if request.errors.report:
        raise invalid("on_error cannot be 'report' here: there is no score without both vectors", "on_error")
    if request.vector_format.several:
        raise invalid("dimensions must be one integer here", "dimensions")
    return request


def _kind(value: Any) -> str:
    return "an empty one" if value in ("", []) else JSON_TYPES[type(value)]
