"""Reranking and scoring by embedding similarity: the cosine of two vectors, nothing that was trained to judge a pair.

The endpoints' forms are those people know: Cohere's and Jina's `rerank`, vLLM's `score`.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import orjson

from triton_embed.gateway.errors import invalid
from triton_embed.gateway.items import NO_PROMPT, PROMPT_KEYS, WORDS, Prompt, read_prompt
from triton_embed.gateway.schemas import EmbeddingRequest, Embeddings, parse_object, read_request
from triton_embed.gateway.settings import Settings

QUERY, DOCUMENT = Prompt(input_type="query"), Prompt(input_type="document")


@dataclass(frozen=True, slots=True)
class Ranking:
    """The documents to rank, and last the query: so an index names the same document everywhere."""

    request: EmbeddingRequest
    documents: Sequence[Any]  # as they came
    most: int
    echo: bool


@dataclass(frozen=True, slots=True)
class Scoring:
    """Pairs of inputs, by index."""

    request: EmbeddingRequest
    pairs: Sequence[tuple[int, int]]


def parse_rerank(body: bytes, settings: Settings) -> Ranking:
    """POST /v1/rerank. ApiError 400 for anything that is not a request."""
    fields = parse_object(body)
    documents, query = fields.get("documents"), fields.get("query")
    if type(documents) is not list or not documents:
        raise invalid(f"documents must be a list of one document or more, got {_word(documents)}", "documents")
    if query is None or type(query) is list or (type(query) is str and not query.strip()):
        raise invalid(f"query must be a text or an object, got {_word(query)}", "query")
    most = fields.get("top_n")
    if most is not None and (type(most) is not int or most < 1):
        raise invalid("top_n must be an integer above 0", "top_n")
    echo = fields.get("return_documents")
    if echo is not None and type(echo) is not bool:
        raise invalid("return_documents must be a boolean", "return_documents")
    outer = read_prompt(fields)  # the query's: documents are not asked anything
    shared = {key: value for key, value in fields.items() if key not in PROMPT_KEYS}
    asked = _read(shared, [*map(_item, documents), _item(query)], "documents", settings)
    own = asked.prompts or [NO_PROMPT] * asked.count
    prompts = [*(prompt or DOCUMENT for prompt in own[:-1]), own[-1] or outer or QUERY]
    asked = replace(asked, prompts=prompts)
    return Ranking(asked, documents, min(most or len(documents), len(documents)), bool(echo))


def parse_score(body: bytes, settings: Settings) -> Scoring:
    """POST /v1/score: one text against one or many, or as many against as many. ApiError 400 for anything else."""
    fields = parse_object(body)
    left, right = (_texts(fields.get(name), name) for name in ("text_1", "text_2"))
    if len(left) != len(right) and len(left) != 1:
        message = f"text_1 must be one text, or as many as text_2: {len(left)} and {len(right)}"
        raise invalid(message, "text_1")
    request = _read(fields, [*left, *right], "text_2", settings)
    return Scoring(request, [(i if len(left) > 1 else 0, len(left) + i) for i in range(len(right))])


def rerank_json(reply: Embeddings, ranking: Ranking, model: str) -> bytes:
    """Best first; equal scores in the order in which the documents came."""
    scores = _cosines(reply.vectors[:-1], reply.vectors[-1:])
    order = np.argsort(-scores, kind="stable")[: ranking.most].tolist()
    results: list[dict[str, Any]] = [{"index": i, "relevance_score": float(scores[i])} for i in order]
    if ranking.echo:
        for result in results:
            document = ranking.documents[result["index"]]
            result["document"] = {"text": document} if type(document) is str else document
    return orjson.dumps({"model": model, "results": results, "usage": _usage(reply)})


def score_json(reply: Embeddings, scoring: Scoring, model: str) -> bytes:
    """One score a pair, in order."""
    left, right = np.array(scoring.pairs).T
    scores = _cosines(reply.vectors[left], reply.vectors[right])
    data = [{"index": i, "object": "score", "score": score} for i, score in enumerate(scores.tolist())]
    return orjson.dumps({"object": "list", "model": model, "data": data, "usage": _usage(reply)})


def _cosines(left: npt.NDArray[np.float32], right: npt.NDArray[np.float32]) -> npt.NDArray[np.float64]:
    """Of unit vectors, row by row; never beyond 1 by rounding."""
    product: npt.NDArray[np.float64] = (left.astype(np.float64) * right).sum(axis=1)
    return np.clip(product, -1.0, 1.0)


def _usage(reply: Embeddings) -> dict[str, int]:
    return {"prompt_tokens": reply.token_count, "total_tokens": reply.token_count}


def _item(given: Any) -> Any:
    """As an object, so that no list of them is taken for anything but inputs."""
    return {"text": given} if type(given) is str else given


def _texts(given: Any, name: str) -> list[Any]:
    texts = given if type(given) is list else [given]
    if not texts or any(type(text) is not str for text in texts):
        raise invalid(f"{name} must be a text or a list of texts", name)
    return texts


def _read(fields: dict[str, Any], inputs: list[Any], param: str, settings: Settings) -> EmbeddingRequest:
    asked = read_request(fields, inputs, param, settings)
    if asked.faults.report:
        raise invalid("on_error cannot be 'report' here: there is no score without both vectors", "on_error")
    if asked.form.several:
        raise invalid("dimensions must be one integer here", "dimensions")
    return asked


def _word(given: Any) -> str:
    return "an empty one" if given in ("", []) else WORDS[type(given)]
