"""How the soak builds a valid request: the forms of an input, and random fields that do not affect the vectors."""

import base64
import random
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import orjson

from benchmarks.processes import MODEL
from benchmarks.soak.client import Http, SoakCase
from benchmarks.soak.inputs import Input, Inputs, data_uri
from benchmarks.soak.judge import Check, Checker, ExpectedError
from benchmarks.soak.models import GME, QWEN3
from benchmarks.soak.site import ImageSite

# Accepted names of each model; the response must repeat the requested name.
MODEL_NAMES = {
    MODEL: ("minilm", "MiniLM", "sentence-transformers/all-MiniLM-L6-v2", "all-MiniLM-L6-v2"),
    QWEN3: ("qwen3_embedding", "Qwen3_Embedding"),
    GME: ("gme_qwen2_vl", "gme"),
}


class Requests:
    """Builds requests to one gateway."""

    def __init__(self, http: Http, inputs: Inputs, site: ImageSite, checker: Checker) -> None:
        self.http, self.inputs, self.site, self.checker = http, inputs, site, checker

    def embeddings(
        self,
        rng: random.Random,
        form: str,
        model: str,
        expected: Sequence[Input | ExpectedError],
        payload: Any,
        **fields: Any,
    ) -> SoakCase:
        """Create a POST of `payload`, with random fields that do not affect the vectors."""
        body = {"model": rng.choice(MODEL_NAMES[model]), "input": payload, **fields}
        if rng.random() < 0.7:
            body["encoding_format"] = rng.choice(["base64", "base64", "float", ["float"], None])
        if rng.random() < 0.2:
            body["return_receipt"] = True
        if rng.random() < 0.1:
            body |= {
                "user": "somebody",
                "unknown": [1, {"two": None}],
                "priority": rng.choice(["batch", "interactive"]),
            }
        path = rng.choice(("/v1/embeddings", "/v1/embeddings", "/embeddings"))
        return self.post(form, path, body, self.checker.embeddings(expected, body), len(expected))

    def post(self, form: str, path: str, body: Any, check: Check, inputs: int = 1) -> SoakCase:
        """Create a POST with a JSON body. `check`: the check of a response with status 200."""
        request = self.http.request("POST", path, orjson.dumps(body))
        return SoakCase(form, lambda: self.http.send(request), {200: check}, inputs, request)

    def item(self, rng: random.Random, item: Input, *, keys: bool = True) -> dict[str, Any]:
        """Return an input as an object. `keys`: include its instruction."""
        obj: dict[str, Any] = {"text": item.text} if item.text else {}
        if item.images:
            references = self.references(rng, item)
            key = rng.choice(("image", "image_url"))
            obj[key] = references[0] if len(references) == 1 else references
        return {**obj, **(item.keys if keys else {})}

    def content(self, rng: random.Random, item: Input) -> list[dict[str, Any]]:
        """Return an input as content parts of OpenAI's API."""
        parts: list[dict[str, Any]] = [
            {"type": "image_url", "image_url": reference if isinstance(reference, dict) else {"url": reference}}
            for reference in self.references(rng, item)
        ]
        return parts + ([{"type": "text", "text": item.text}] if item.text else [])

    def references(self, rng: random.Random, item: Input) -> list[Any]:
        """Return the images of an input as data URIs, base64 or URLs, plain or in an object."""
        references: list[Any] = []
        for name in item.images:
            file_bytes = self.inputs.image_files[name][1]
            choice = rng.choice((data_uri(file_bytes), base64.b64encode(file_bytes).decode(), self.site.url(name)))
            references.append(rng.choice((choice, choice, {"url": choice, "detail": "auto"})))
        return references

    def with_deadline(self, case: SoakCase, seconds: float) -> SoakCase:
        request = case.request.replace(b"\r\n", f"\r\nx-request-timeout: {seconds}\r\n".encode(), 1)
        return replace(case, send=lambda: self.http.send(request), request=request)

    def draw_same_instruction(self, rng: random.Random, model: str) -> list[Input]:
        """Draw inputs that share one instruction."""
        first = rng.choice(self.inputs.pools[model, "instructed"])
        same = [item for item in self.inputs.pools[model, "instructed"] if item.keys == first.keys]
        return [first, *rng.choices(same, k=rng.choice((0, 0, 1, 3, 7)))]
