"""Whether an answer is right: each check returns what is wrong, and nothing when nothing is."""

import base64
import re
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from benchmarks.record import ROOT
from benchmarks.soak_http import Answer
from benchmarks.soak_inputs import Input, Vector

COSINE = 0.99999  # the least of a vector in fp32
FAINT = 1e-5  # a value of smaller magnitude may have either sign
ROUNDED = 2e-5  # what fp32 adds to half a step of int8
SCORE = 1e-4
LEAKS = re.compile("|".join(map(re.escape, ("Traceback", ".py", tempfile.gettempdir(), str(ROOT), "site-packages"))))
KINDS = {401: "authentication_error", 429: "rate_limit_error", 500: "server_error", 503: "server_error"}
CODES = {401: "invalid_api_key", 408: "timeout", 413: "body_too_large", 429: "queue_full", 504: "timeout"}

Check = Callable[[Answer], str]


@dataclass(frozen=True)
class Fault:
    """In the place of an input that cannot be embedded: what its error says."""

    words: str


class Judge:
    def __init__(self) -> None:
        self.worst = 1.0
        self.vectors = 0

    def embeddings(self, wanted: Sequence[Input | Fault], asked: Mapping[str, Any]) -> Check:
        """Of /v1/embeddings; `asked` are the request's own fields."""

        def check(answer: Answer) -> str:
            found = answer.json()
            if list(found) != ["object", "data", "model", "usage"] or found["model"] != asked["model"]:
                return f"wrong form: {list(found)}, model {found.get('model')}"
            if len(found["data"]) != len(wanted):
                return f"{len(found['data'])} embeddings for {len(wanted)} inputs"
            good = [want for want in wanted if isinstance(want, Input)]
            if problem := _counts(good, found["usage"]["prompt_tokens"], answer):
                return problem
            for i, (item, want) in enumerate(zip(found["data"], wanted, strict=True)):
                problem = self._item(item, want, i, asked)
                if problem:
                    return f"input {i}: {problem}"
            return ""

        return check

    def encoded(self, wanted: Sequence[Input], single: bool) -> Check:
        """Of /encode."""

        def check(answer: Answer) -> str:
            found = [answer.json()] if single else answer.json()
            if len(found) != len(wanted):
                return f"{len(found)} embeddings for {len(wanted)} inputs"
            for i, (item, want) in enumerate(zip(found, wanted, strict=True)):
                told = item["meta_info"]["prompt_tokens"], item["meta_info"]["dropped_tokens"]
                if told != (want.tokens, want.dropped):
                    return f"input {i}: {told} tokens and dropped, not {(want.tokens, want.dropped)}"
                if problem := self.vector(item["embedding"], want.vector):
                    return f"input {i}: {problem}"
            return ""

        return check

    def tensors(self, wanted: Sequence[Input | Fault]) -> Check:
        """Of Triton itself; with faults among `wanted`, ERROR tells them."""

        def check(answer: Answer) -> str:
            vectors, tokens = answer.tensors["EMBEDDING"], answer.tensors["TOKENS"]
            for i, want in enumerate(wanted):
                if isinstance(want, Fault):
                    told = answer.tensors["ERROR"][i, 0].decode()
                    if want.words not in told or not re.search(rf"index {i}\b", told) or vectors[i].any():
                        return f"input {i}: no error as it should be: {told!r}"
                elif tokens[i, 0] != want.tokens:
                    return f"input {i}: {tokens[i, 0]} tokens, not {want.tokens}"
                elif problem := self.vector(vectors[i], want.vector):
                    return f"input {i}: {problem}"
            return ""

        return check

    def vector(self, found: Any, expected: Vector) -> str:
        values = np.asarray(found, np.float64)
        if values.shape != expected.shape:
            return f"wrong shape {values.shape}, not {expected.shape}"
        length = float(np.linalg.norm(values))
        cosine = float(values @ expected) / length if length else 0.0
        self.vectors += 1
        self.worst = min(self.worst, cosine)
        return (
            "" if cosine >= COSINE and abs(length - 1) < 1e-4 else f"wrong vector: cosine {cosine:.7f}, norm {length}"
        )

    def _item(self, item: Mapping[str, Any], want: Input | Fault, index: int, asked: Mapping[str, Any]) -> str:
        if item["index"] != index or item["object"] != ("error" if isinstance(want, Fault) else "embedding"):
            return f"is {item['object']} {item['index']}"
        if isinstance(want, Fault):
            return fault(item["error"], 400, "input", want.words, f"index {index}")
        if asked.get("return_receipt"):
            told = item["receipt"]["tokens"], item["receipt"]["dropped_tokens"], bool(item["receipt"]["prompt"])
            if told != (want.tokens, want.dropped, bool(want.keys)):
                return f"receipt {item['receipt']}, not {(want.tokens, want.dropped, want.keys)}"
        sizes = asked.get("dimensions")
        if not isinstance(sizes, list):
            return self._form(item["embedding"], item.get("scale"), _cut(want.vector, sizes), asked)
        if len(item["embedding"]) != len(sizes):
            return f"{len(item['embedding'])} vectors for {len(sizes)} dimensions"
        scales = item.get("scale") or [None] * len(sizes)
        problems = (
            self._form(values, scale, _cut(want.vector, size), asked)
            for values, scale, size in zip(item["embedding"], scales, sizes, strict=True)
        )
        return next(filter(None, problems), "")

    def _form(self, values: Any, scale: float | None, expected: Vector, asked: Mapping[str, Any]) -> str:
        dtype = asked.get("output_dtype") or "float"
        if dtype == "float":
            if (asked.get("encoding_format") == "base64") != isinstance(values, str):
                return f"not in the encoding asked for: {type(values).__name__}"
            return self.vector(
                np.frombuffer(base64.b64decode(values), "<f4") if isinstance(values, str) else values, expected
            )
        self.vectors += 1
        numbers = np.array(values)
        if numbers.dtype.kind != "i":
            return f"no integers: {numbers.dtype}"
        if dtype in ("binary", "ubinary"):
            octets = (numbers + (128 if dtype == "binary" else 0)).astype(np.uint8)
            bits = np.unpackbits(octets)[: len(expected)]
            wrong = (bits != (expected > 0)) & (np.abs(expected) >= FAINT)
            return f"wrong vector: {wrong.sum()} wrong bits" if len(octets) * 8 < len(expected) or wrong.any() else ""
        if scale is None or numbers.shape != expected.shape:
            return f"wrong form: shape {numbers.shape}, scale {scale}"
        away = np.abs((numbers - (128 if dtype == "uint8" else 0)) * scale - expected).max()
        return "" if away <= scale / 2 + ROUNDED else f"wrong vector: {away / scale:.3f} steps of {dtype} away"


def ranking(query: Input, documents: Sequence[Input], asked: Mapping[str, Any]) -> Check:
    """Of /v1/rerank."""
    scores = [float(query.vector @ document.vector) for document in documents]

    def check(answer: Answer) -> str:
        results = answer.json()["results"]
        told = [result["relevance_score"] for result in results]
        if len(results) != min(asked.get("top_n") or len(scores), len(scores)):
            return f"{len(results)} results"
        if any(abs(score - scores[result["index"]]) > SCORE for score, result in zip(told, results, strict=True)):
            return f"wrong scores: {told}"
        left_out = set(range(len(scores))) - {result["index"] for result in results}
        if told != sorted(told, reverse=True) or any(scores[i] > told[-1] + SCORE for i in left_out):
            return f"wrong order: {told}"
        if asked.get("return_documents"):
            texts = [asked["documents"][result["index"]] for result in results]
            if [result["document"]["text"] for result in results] != texts:
                return "wrong documents"
        return _counts([query, *documents], answer.json()["usage"]["prompt_tokens"], answer)

    return check


def scores(left: Sequence[Input], right: Sequence[Input]) -> Check:
    """Of /v1/score, pair by pair; one on the left stands beside each on the right."""
    pairs = zip(left if len(left) > 1 else [*left] * len(right), right, strict=True)
    wanted = [float(one.vector @ other.vector) for one, other in pairs]

    def check(answer: Answer) -> str:
        told = [item["score"] for item in answer.json()["data"]]
        if len(told) != len(wanted) or np.abs(np.subtract(told, wanted)).max() > SCORE:
            return f"wrong scores: {told}, not {wanted}"
        return _counts([*left, *right], answer.json()["usage"]["prompt_tokens"], answer)

    return check


def tokens(wanted: Sequence[Input], single: bool) -> Check:
    """Of /tokenize."""
    rows = [list(want.ids) for want in wanted]
    ids: Any = rows[0] if single else rows
    counts: Any = len(rows[0]) if single else [len(row) for row in rows]

    def check(answer: Answer) -> str:
        found = answer.json()
        return (
            "" if (found["tokens"], found["count"]) == (ids, counts) else f"wrong ids: {found['count']}, not {counts}"
        )

    return check


def anything(answer: Answer) -> str:
    return "" if answer.body else "an empty body"


def refusal(status: int, param: str | tuple[str | None, ...] | None, *words: str) -> Check:
    """An error in OpenAI's form that names `param`, or one of them, and says `words`."""

    def check(answer: Answer) -> str:
        found = answer.json()
        if list(found) != ["error"]:
            return f"wrong form: {list(found)}"
        return fault(found["error"], status, param, *words)

    return check


def fault(found: Mapping[str, Any], status: int, param: str | tuple[str | None, ...] | None, *words: str) -> str:
    """What is wrong with the inner object of an error."""
    if list(found) != ["message", "type", "param", "code"] or not found["message"]:
        return f"wrong form: {list(found)}"
    kind = KINDS.get(status, "server_error" if status >= 500 else "invalid_request_error")
    if found["type"] != kind or found["code"] != CODES.get(status, found["code"]):
        return f"is a {found['type']} with code {found['code']}"
    if LEAKS.search(found["message"]):
        return f"leaks: {found['message'][:200]}"
    if missing := [word for word in words if word not in found["message"]]:
        return f"does not say {missing}: {found['message'][:200]}"
    if found["param"] in (param if isinstance(param, tuple) else (param,)):
        return ""
    return f"names param {found['param']!r}, not {param!r}: {found['message'][:200]}"


def full(answer: Answer) -> str:
    """A 429: it must say when to come back."""
    if not re.fullmatch(r"[1-9]\d*", answer.headers.get("retry-after", "")):
        return f"429 without a Retry-After in seconds: {answer.headers.get('retry-after')!r}"
    return refusal(429, None)(answer)


def tensors_refused(*words: str) -> Check:
    """Triton's own refusal; its text stands in `body`."""

    def check(answer: Answer) -> str:
        told = answer.body.decode()
        return "" if all(word in told for word in words) and not LEAKS.search(told) else f"wrong message: {told[:200]}"

    return check


def _cut(vector: Vector, size: int | None) -> Vector:
    part = vector[:size]
    shortened: Vector = part / np.linalg.norm(part)
    return shortened


def _counts(good: Sequence[Input], told: int, answer: Answer) -> str:
    """Tokens computed, and how many inputs the header says were truncated."""
    if told != (computed := sum(want.tokens for want in good)):
        return f"{told} prompt_tokens, not {computed}"
    truncated = sum(want.dropped > 0 for want in good)
    if int(answer.headers.get("x-truncated-inputs", 0)) != truncated:
        return f"x-truncated-inputs {answer.headers.get('x-truncated-inputs')}, not {truncated}"
    return ""
