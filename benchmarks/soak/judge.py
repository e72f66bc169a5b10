"""Checks of responses. A check returns a description of the problem, or "" if the response is correct."""

import base64
import re
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from benchmarks.report import ROOT
from benchmarks.soak.client import Response
from benchmarks.soak.inputs import Input, Vector

MIN_COSINE = 0.99999  # of an fp32 vector
SIGN_TOLERANCE = 1e-5  # values of smaller magnitude may have either sign
ROUNDING_TOLERANCE = 2e-5  # fp32 error in addition to half a quantization step of int8
SCORE_TOLERANCE = 1e-4
LEAKS = re.compile("|".join(map(re.escape, ("Traceback", ".py", tempfile.gettempdir(), str(ROOT), "site-packages"))))
KINDS = {401: "authentication_error", 429: "rate_limit_error", 500: "server_error", 503: "server_error"}
CODES = {401: "invalid_api_key", 408: "timeout", 413: "body_too_large", 429: "queue_full", 504: "timeout"}

Check = Callable[[Response], str]


@dataclass(frozen=True)
class ExpectedError:
    """The expected result of an invalid input: a phrase of its error message."""

    words: str


class Checker:
    """Creates checks of vectors and records the number of vectors and the lowest cosine."""

    def __init__(self) -> None:
        self.min_cosine = 1.0
        self.vectors = 0

    def embeddings(self, expected_inputs: Sequence[Input | ExpectedError], request: Mapping[str, Any]) -> Check:
        """Return the check of a /v1/embeddings response. `request`: fields of the request."""

        def check(response: Response) -> str:
            body = response.json()
            if list(body) != ["object", "data", "model", "usage"] or body["model"] != request["model"]:
                return f"unexpected fields: {list(body)}, model {body.get('model')}"
            if len(body["data"]) != len(expected_inputs):
                return f"{len(body['data'])} embeddings for {len(expected_inputs)} inputs"
            valid = [expected for expected in expected_inputs if isinstance(expected, Input)]
            if problem := _check_counts(valid, body["usage"]["prompt_tokens"], response):
                return problem
            for i, (item, expected) in enumerate(zip(body["data"], expected_inputs, strict=True)):
                problem = self._check_item(item, expected, i, request)
                if problem:
                    return f"input {i}: {problem}"
            return ""

        return check

    def encoded(self, expected_inputs: Sequence[Input], single: bool) -> Check:
        """Return the check of an /encode response. `single`: the response is an object, not a list."""

        def check(response: Response) -> str:
            items = [response.json()] if single else response.json()
            if len(items) != len(expected_inputs):
                return f"{len(items)} embeddings for {len(expected_inputs)} inputs"
            for i, (item, expected) in enumerate(zip(items, expected_inputs, strict=True)):
                counts = item["meta_info"]["prompt_tokens"], item["meta_info"]["dropped_tokens"]
                if counts != (expected.tokens, expected.dropped):
                    return f"input {i}: got (tokens, dropped) {counts}, expected {(expected.tokens, expected.dropped)}"
                if problem := self.vector(item["embedding"], expected.vector):
                    return f"input {i}: {problem}"
            return ""

        return check

    def tensors(self, expected_inputs: Sequence[Input | ExpectedError]) -> Check:
        """Return the check of a response of Triton. Errors are expected in the ERROR tensor."""

        def check(response: Response) -> str:
            vectors, tokens = response.tensors["EMBEDDING"], response.tensors["TOKENS"]
            for i, expected in enumerate(expected_inputs):
                if isinstance(expected, ExpectedError):
                    message = bytes(response.tensors["ERROR"][i]).decode().rstrip()
                    if expected.words not in message or not re.search(rf"index {i}\b", message) or vectors[i].any():
                        return f"input {i}: unexpected error or a vector that is not zero: {message!r}"
                elif tokens[i, 0] != expected.tokens:
                    return f"input {i}: {tokens[i, 0]} tokens, expected {expected.tokens}"
                elif problem := self.vector(vectors[i], expected.vector):
                    return f"input {i}: {problem}"
            return ""

        return check

    def vector(self, embedding: Any, expected: Vector) -> str:
        """Check one float vector."""
        values = np.asarray(embedding, np.float64)
        if values.shape != expected.shape:
            return f"wrong shape {values.shape}, expected {expected.shape}"
        length = float(np.linalg.norm(values))
        cosine = float(values @ expected) / length if length else 0.0
        self.vectors += 1
        self.min_cosine = min(self.min_cosine, cosine)
        return (
            ""
            if cosine >= MIN_COSINE and abs(length - 1) < 1e-4
            else f"wrong vector: cosine {cosine:.7f}, norm {length}"
        )

    def _check_item(
        self, item: Mapping[str, Any], expected: Input | ExpectedError, index: int, request: Mapping[str, Any]
    ) -> str:
        if item["index"] != index or item["object"] != (
            "error" if isinstance(expected, ExpectedError) else "embedding"
        ):
            return f"got object {item['object']!r} with index {item['index']}"
        if isinstance(expected, ExpectedError):
            return check_error(item["error"], 400, "input", expected.words, f"index {index}")
        if request.get("return_receipt"):
            receipt = item["receipt"]["tokens"], item["receipt"]["dropped_tokens"], bool(item["receipt"]["prompt"])
            if receipt != (expected.tokens, expected.dropped, bool(expected.keys)):
                return f"got receipt {item['receipt']}, expected {(expected.tokens, expected.dropped, expected.keys)}"
        sizes = request.get("dimensions")
        if not isinstance(sizes, list):
            return self._check_values(item["embedding"], item.get("scale"), _truncate(expected.vector, sizes), request)
        if len(item["embedding"]) != len(sizes):
            return f"{len(item['embedding'])} vectors for {len(sizes)} dimensions"
        scales = item.get("scale") or [None] * len(sizes)
        problems = (
            self._check_values(values, scale, _truncate(expected.vector, size), request)
            for values, scale, size in zip(item["embedding"], scales, sizes, strict=True)
        )
        return next(filter(None, problems), "")

    def _check_values(self, values: Any, scale: float | None, expected: Vector, request: Mapping[str, Any]) -> str:
        dtype = request.get("output_dtype") or "float"
        if dtype == "float":
            if (request.get("encoding_format") == "base64") != isinstance(values, str):
                return f"wrong encoding_format: got {type(values).__name__}"
            return self.vector(
                np.frombuffer(base64.b64decode(values), "<f4") if isinstance(values, str) else values, expected
            )
        self.vectors += 1
        numbers = np.array(values)
        if numbers.dtype.kind != "i":
            return f"values are not integers: {numbers.dtype}"
        if dtype in ("binary", "ubinary"):
            octets = (numbers + (128 if dtype == "binary" else 0)).astype(np.uint8)
            bits = np.unpackbits(octets)[: len(expected)]
            wrong = (bits != (expected > 0)) & (np.abs(expected) >= SIGN_TOLERANCE)
            return f"wrong vector: {wrong.sum()} wrong bits" if len(octets) * 8 < len(expected) or wrong.any() else ""
        if scale is None or numbers.shape != expected.shape:
            return f"wrong shape or no scale: shape {numbers.shape}, scale {scale}"
        deviation = np.abs((numbers - (128 if dtype == "uint8" else 0)) * scale - expected).max()
        return (
            ""
            if deviation <= scale / 2 + ROUNDING_TOLERANCE
            else f"wrong vector: off by {deviation / scale:.3f} steps of {dtype}"
        )


def ranking(query: Input, documents: Sequence[Input], request: Mapping[str, Any]) -> Check:
    """Return the check of a /v1/rerank response."""
    expected_scores = [float(query.vector @ document.vector) for document in documents]

    def check(response: Response) -> str:
        results = response.json()["results"]
        scores = [result["relevance_score"] for result in results]
        if len(results) != min(request.get("top_n") or len(expected_scores), len(expected_scores)):
            return f"wrong number of results: {len(results)}"
        if any(
            abs(score - expected_scores[result["index"]]) > SCORE_TOLERANCE
            for score, result in zip(scores, results, strict=True)
        ):
            return f"wrong scores: {scores}"
        omitted = set(range(len(expected_scores))) - {result["index"] for result in results}
        if scores != sorted(scores, reverse=True) or any(
            expected_scores[i] > scores[-1] + SCORE_TOLERANCE for i in omitted
        ):
            return f"wrong order: {scores}"
        if request.get("return_documents"):
            texts = [request["documents"][result["index"]] for result in results]
            if [result["document"]["text"] for result in results] != texts:
                return "wrong documents"
        return _check_counts([query, *documents], response.json()["usage"]["prompt_tokens"], response)

    return check


def scores(left: Sequence[Input], right: Sequence[Input]) -> Check:
    """Return the check of a /v1/score response. A single `left` input is paired with each `right` input."""
    pairs = zip(left if len(left) > 1 else [*left] * len(right), right, strict=True)
    expected_scores = [float(a.vector @ b.vector) for a, b in pairs]

    def check(response: Response) -> str:
        scores = [item["score"] for item in response.json()["data"]]
        if len(scores) != len(expected_scores) or np.abs(np.subtract(scores, expected_scores)).max() > SCORE_TOLERANCE:
            return f"wrong scores: {scores}, expected {expected_scores}"
        return _check_counts([*left, *right], response.json()["usage"]["prompt_tokens"], response)

    return check


def tokens(expected_inputs: Sequence[Input], single: bool) -> Check:
    """Return the check of a /tokenize response. `single`: one text, not a list."""
    rows = [list(expected.ids) for expected in expected_inputs]
    ids: Any = rows[0] if single else rows
    counts: Any = len(rows[0]) if single else [len(row) for row in rows]

    def check(response: Response) -> str:
        body = response.json()
        return (
            ""
            if (body["tokens"], body["count"]) == (ids, counts)
            else f"wrong token ids: count {body['count']}, expected {counts}"
        )

    return check


def any_body(response: Response) -> str:
    """Accept any response with a body."""
    return "" if response.body else "empty body"


def expect_error(status: int, param: str | tuple[str | None, ...] | None, *words: str) -> Check:
    """Return the check of an error in OpenAI's format.

    `param`: the expected value, or a tuple of acceptable values. `words`: phrases that the message must contain.
    """

    def check(response: Response) -> str:
        body = response.json()
        if list(body) != ["error"]:
            return f"unexpected fields: {list(body)}"
        return check_error(body["error"], status, param, *words)

    return check


def check_error(error: Mapping[str, Any], status: int, param: str | tuple[str | None, ...] | None, *words: str) -> str:
    """Check the inner object of an error."""
    if list(error) != ["message", "type", "param", "code"] or not error["message"]:
        return f"unexpected fields: {list(error)}"
    kind = KINDS.get(status, "server_error" if status >= 500 else "invalid_request_error")
    if error["type"] != kind or error["code"] != CODES.get(status, error["code"]):
        return f"wrong type {error['type']} or code {error['code']}"
    if LEAKS.search(error["message"]):
        return f"leaks internals: {error['message'][:200]}"
    if missing := [word for word in words if word not in error["message"]]:
        return f"message lacks {missing}: {error['message'][:200]}"
    if error["param"] in (param if isinstance(param, tuple) else (param,)):
        return ""
    return f"got param {error['param']!r}, expected {param!r}: {error['message'][:200]}"


def queue_full(response: Response) -> str:
    """Check a 429: it must have a Retry-After header."""
    if not re.fullmatch(r"[1-9]\d*", response.headers.get("retry-after", "")):
        return f"429 without a Retry-After in seconds: {response.headers.get('retry-after')!r}"
    return expect_error(429, None)(response)


def expect_triton_error(*words: str) -> Check:
    """Return the check of an error of Triton, whose message is in `body`."""

    def check(response: Response) -> str:
        message = response.body.decode()
        correct = all(word in message for word in words) and not LEAKS.search(message)
        return "" if correct else f"wrong message: {message[:200]}"

    return check


def _truncate(vector: Vector, size: int | None) -> Vector:
    part = vector[:size]
    shortened: Vector = part / np.linalg.norm(part)
    return shortened


def _check_counts(inputs: Sequence[Input], prompt_tokens: int, response: Response) -> str:
    """Check the number of tokens computed and the header with the number of truncated inputs."""
    if prompt_tokens != (computed := sum(item.tokens for item in inputs)):
        return f"got {prompt_tokens} prompt_tokens, expected {computed}"
    truncated = sum(item.dropped > 0 for item in inputs)
    if int(response.headers.get("x-truncated-inputs", 0)) != truncated:
        return f"got x-truncated-inputs {response.headers.get('x-truncated-inputs')}, expected {truncated}"
    return ""
