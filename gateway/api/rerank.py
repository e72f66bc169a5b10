"""Reranking and scoring by the cosine of two vectors. No model here was trained to judge pairs.

The request and response forms are Cohere's and Jina's `rerank`, and vLLM's `score`.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import orjson

from triton_embed.gateway.api.bodies import RequestFields, RerankBody, ScoreBody
from triton_embed.gateway.api.embeddings import usage_of
from triton_embed.gateway.api.inputs import NO_PROMPT, PROMPT_FIELDS, Prompt, read_prompt
from triton_embed.gateway.api.requests import EmbeddingRequest, Embeddings, read_request
from triton_embed.gateway.api.responses import PairScore, RankedDocument, RerankResponse, ScoreResponse
from triton_embed.gateway.api.validation import parse_object, validate
from triton_embed.gateway.errors import invalid
from triton_embed.gateway.settings import Settings

QUERY, DOCUMENT = Prompt(input_type="query"), Prompt(input_type="document")


@dataclass(frozen=True, slots=True)
class Ranking:
    """A rerank request. Its inputs are the documents, then the query: input i is document i."""

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
    fields = validate(RerankBody, parse_object(body))
    documents = fields.documents
    query_prompt = read_prompt(fields)
    fields = fields.model_copy(update=dict.fromkeys(PROMPT_FIELDS))  # the prompt of the request is for the query only
    request = _read(fields, [*map(_item, documents), _item(fields.query)], "documents", settings)
    item_prompts = request.prompts or [NO_PROMPT] * request.count
    prompts = [*(prompt or DOCUMENT for prompt in item_prompts[:-1]), item_prompts[-1] or query_prompt or QUERY]
    request = replace(request, prompts=prompts)
    top_n = min(fields.top_n or len(documents), len(documents))
    return Ranking(request, documents, top_n, bool(fields.return_documents))


def parse_score(body: bytes, settings: Settings) -> Scoring:
    """Parse the body of POST /v1/score: one text against one or many, or lists of equal length.

    Raises:
        ApiError: 400 for an invalid request.
    """
    fields = validate(ScoreBody, parse_object(body))
    left, right = ([texts] if isinstance(texts, str) else texts for texts in (fields.text_1, fields.text_2))
    if len(left) != len(right) and len(left) != 1:
        message = f"text_1 must be one text, or as many as text_2: {len(left)} and {len(right)}"
        raise invalid(message, "text_1")
    request = _read(fields, [*left, *right], "text_2", settings)
    return Scoring(request, [(i if len(left) > 1 else 0, len(left) + i) for i in range(len(right))])


def rerank_json(reply: Embeddings, ranking: Ranking, model: str) -> bytes:
    """Return the response of a rerank: best document first, equal scores in the order of the documents."""
    scores = _cosines(reply.vectors[:-1], reply.vectors[-1:])
    order = np.argsort(-scores, kind="stable")[: ranking.top_n].tolist()
    results: list[RankedDocument] = [{"index": i, "relevance_score": float(scores[i])} for i in order]
    if ranking.return_documents:
        for result in results:
            document = ranking.documents[result["index"]]
            result["document"] = {"text": document} if type(document) is str else document
    body: RerankResponse = {"model": model, "results": results, "usage": usage_of(reply)}
    return orjson.dumps(body)


def score_json(reply: Embeddings, scoring: Scoring, model: str) -> bytes:
    """Return the response of a score request: one score per pair, in order."""
    left, right = np.array(scoring.pairs).T
    scores = _cosines(reply.vectors[left], reply.vectors[right])
    data: list[PairScore] = [{"index": i, "object": "score", "score": score} for i, score in enumerate(scores.tolist())]
    body: ScoreResponse = {"object": "list", "model": model, "data": data, "usage": usage_of(reply)}
    return orjson.dumps(body)


def _cosines(left: npt.NDArray[np.float32], right: npt.NDArray[np.float32]) -> npt.NDArray[np.float64]:
    """Return the cosines of unit vectors, row by row, clipped to [-1, 1] because rounding may exceed it."""
    product: npt.NDArray[np.float64] = (left.astype(np.float64) * right).sum(axis=1)
    return np.clip(product, -1.0, 1.0)


def _item(value: Any) -> Any:
    """Return a text as an object, so that a list of them can only be read as separate inputs."""
    return {"text": value} if type(value) is str else value


def _read(fields: RequestFields, inputs: list[Any], param: str, settings: Settings) -> EmbeddingRequest:
    request = read_request(fields, inputs, param, settings)
    if request.errors.report:
        raise invalid("on_error cannot be 'report' here: there is no score without both vectors", "on_error")
    if request.vector_format.several:
        raise invalid("dimensions must be one integer here", "dimensions")
    return request
