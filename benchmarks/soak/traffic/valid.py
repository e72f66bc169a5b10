"""Valid traffic of the soak: seeded random requests of every form that the gateway accepts, with their checks."""

import base64
import random
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from benchmarks.processes import MODEL
from benchmarks.soak import judge
from benchmarks.soak.client import Http, SoakCase
from benchmarks.soak.inputs import Input, Inputs
from benchmarks.soak.judge import Checker, ExpectedError
from benchmarks.soak.models import GME, QWEN3, QWEN3_TOKENS
from benchmarks.soak.site import ImageSite
from benchmarks.soak.traffic.requests import MODEL_NAMES, Requests

LENGTHS = {MODEL: 256, QWEN3: QWEN3_TOKENS}
DIMENSIONS = (1, 8, 20, 32, 63, 64)  # the tiny Qwen3 has 64
BULK_INPUTS = (100, 400)  # minimum and maximum inputs of a request with priority batch
BULK_DEADLINE_SECONDS = 300.0  # long enough to wait for all interactive requests
SHORT_DEADLINES_SECONDS = (0.0005, 0.002, 0.02)  # too short for most requests
OVERLONG = "word " * 700
BROKEN_IMAGE = base64.b64encode(b"\x89PNG\r\n\x1a\nno picture").decode()


class ValidTraffic(Requests):
    """Creates valid requests. `forms`: (weight, name, function that creates a case) of each form of traffic."""

    def __init__(self, http: Http, inputs: Inputs, site: ImageSite, checker: Checker) -> None:
        super().__init__(http, inputs, site, checker)
        self.forms = (
            (14, "lists of strings", self.strings),
            (8, "a string", self.string),
            (6, "token ids", self.ids),
            (5, "objects", self.items),
            (4, "content parts", self.parts),
            (5, "pictures", self.images),
            (4, "pictures and text together", self.fused),
            (4, "one instruction", self.instruction),
            (2, "an instruction in the input", self.wrapped_instruction),
            (3, "input_type query", self.queries),
            (4, "an instruction an item", self.instructions),
            (3, "dimensions", self.dimensions),
            (3, "several dimensions", self.several_dimensions),
            (5, "int8, uint8, binary, ubinary", self.quantized),
            (3, "long texts cut", self.truncated),
            (3, "long texts averaged", self.averaged),
            (5, "bad items reported", self.reported_errors),
            (1, "priority batch", self.bulk),
            (4, "/encode", self.encode),
            (4, "/v1/rerank", self.rerank),
            (4, "/v1/score", self.score),
            (3, "/tokenize", self.tokenize),
            (3, "GET", self.get),
            (2, "slow senders", self.slow),
            (1, "a deadline too short", self.short_deadline),
        )

    def strings(self, rng: random.Random, form: str) -> SoakCase:
        model = rng.choice((MODEL, MODEL, QWEN3, GME))
        expected = self.inputs.draw(rng, model, "texts")
        return self.embeddings(rng, form, model, expected, [item.text for item in expected])

    def string(self, rng: random.Random, form: str) -> SoakCase:
        model = rng.choice((MODEL, MODEL, QWEN3, GME))
        expected = self.inputs.draw(rng, model, "texts", 1)
        return self.embeddings(rng, form, model, expected, expected[0].text)

    def ids(self, rng: random.Random, form: str) -> SoakCase:
        model = rng.choice((MODEL, QWEN3))
        expected = self.inputs.draw(rng, model, "texts")
        rows = [item.ids for item in expected]
        return self.embeddings(rng, form, model, expected, rows[0] if len(rows) == 1 and rng.random() < 0.7 else rows)

    def items(self, rng: random.Random, form: str) -> SoakCase:
        model = rng.choice((MODEL, QWEN3, GME))
        expected = self.inputs.draw(rng, model, "texts")
        payload: list[Any] = [self.item(rng, item) for item in expected]
        if len(payload) > 1 and rng.random() < 0.3:
            payload[0] = expected[0].text  # strings and objects can be mixed
        return self.embeddings(rng, form, model, expected, payload[0] if len(payload) == 1 else payload)

    def parts(self, rng: random.Random, form: str) -> SoakCase:
        expected = self.inputs.draw(rng, GME, rng.choice(("texts", "images", "fused")), 4)
        payload = [self.content(rng, item) for item in expected]
        return self.embeddings(rng, form, GME, expected, payload[0] if len(payload) == 1 else payload)

    def images(self, rng: random.Random, form: str) -> SoakCase:
        expected = self.inputs.draw(rng, GME, "images", 8)
        return self.embeddings(rng, form, GME, expected, [self.item(rng, item) for item in expected])

    def fused(self, rng: random.Random, form: str) -> SoakCase:
        kinds = rng.choice((("fused",), ("fused", "texts", "images")))
        expected = [item for kind in kinds for item in self.inputs.draw(rng, GME, kind, 4)]
        return self.embeddings(rng, form, GME, expected, [self.item(rng, item) for item in expected])

    def instruction(self, rng: random.Random, form: str) -> SoakCase:
        model = rng.choice((QWEN3, QWEN3, GME))
        expected = self.draw_same_instruction(rng, model)
        payload = [self.item(rng, item, keys=False) if item.images else item.text for item in expected]
        return self.embeddings(rng, form, model, expected, payload, **expected[0].keys)

    def wrapped_instruction(self, rng: random.Random, form: str) -> SoakCase:
        expected = self.draw_same_instruction(rng, QWEN3)
        texts = [item.text for item in expected]
        return self.embeddings(rng, form, QWEN3, expected, {"input": texts, **expected[0].keys})

    def queries(self, rng: random.Random, form: str) -> SoakCase:
        expected = self.inputs.draw(rng, QWEN3, "queries")
        keys = rng.choice(({"input_type": "query"}, {"prompt_name": "query"}, {"input_type": "search_query"}))
        return self.embeddings(rng, form, QWEN3, expected, [item.text for item in expected], **keys)

    def instructions(self, rng: random.Random, form: str) -> SoakCase:
        model = rng.choice((QWEN3, QWEN3, GME))
        expected = self.inputs.draw(rng, model, "instructed", 8) + self.inputs.draw(rng, model, "texts", 4)
        rng.shuffle(expected)
        return self.embeddings(rng, form, model, expected, [self.item(rng, item) for item in expected])

    def dimensions(self, rng: random.Random, form: str) -> SoakCase:
        expected = self.inputs.draw(rng, QWEN3, "texts")
        return self.embeddings(
            rng, form, QWEN3, expected, [item.text for item in expected], dimensions=rng.choice((*DIMENSIONS, None))
        )

    def several_dimensions(self, rng: random.Random, form: str) -> SoakCase:
        expected = self.inputs.draw(rng, QWEN3, "texts", 8)
        dimensions = rng.sample(DIMENSIONS, rng.choice((1, 2, 3)))
        if rng.random() < 0.3:
            return self.quantized(rng, form, dimensions)
        return self.embeddings(rng, form, QWEN3, expected, [item.text for item in expected], dimensions=dimensions)

    def quantized(self, rng: random.Random, form: str, dimensions: Any = None) -> SoakCase:
        model = QWEN3 if dimensions else rng.choice((MODEL, QWEN3, GME))
        expected = self.inputs.draw(rng, model, "texts")
        dtype = rng.choice(("int8", "uint8", "binary", "ubinary"))
        texts = [item.text for item in expected]
        return self.embeddings(rng, form, model, expected, texts, output_dtype=dtype, dimensions=dimensions)

    def truncated(self, rng: random.Random, form: str) -> SoakCase:
        model, fit = rng.choice((MODEL, QWEN3)), rng.choice(("end", "start"))
        expected = self.inputs.draw(rng, model, fit, 4) + self.inputs.draw(rng, model, "texts", 2)
        rng.shuffle(expected)
        fields = rng.choice(({"truncate": fit}, {"truncate": True}, {})) if fit == "end" else {"truncate": fit}
        return self.embeddings(rng, form, model, expected, [item.text for item in expected], **fields)

    def averaged(self, rng: random.Random, form: str) -> SoakCase:
        model = rng.choice((MODEL, QWEN3))
        kind = rng.choice(("mean", "instructed mean")) if model == QWEN3 else "mean"
        expected = self.inputs.draw(rng, model, kind, 4)
        fields: dict[str, Any] = dict(expected[0].keys)
        if kind == "mean":
            expected += self.inputs.draw(rng, model, "texts", 2)
        rng.shuffle(expected)
        if model == QWEN3 and rng.random() < 0.3:
            fields["dimensions"] = rng.choice((8, 32))
        texts = [item.text for item in expected]
        return self.embeddings(rng, form, model, expected, texts, long_text="mean", **fields)

    def reported_errors(self, rng: random.Random, form: str) -> SoakCase:
        """Mix valid and invalid inputs, with on_error "report"."""
        model = rng.choice((MODEL, QWEN3, GME))
        if model != GME and rng.random() < 0.3:
            texts = self.inputs.draw(rng, model, "texts")
            rows = [*((item.ids, item) for item in texts), ([999_999], ExpectedError("check_embedding_ctx_length"))]
            rows.append(([], ExpectedError("cannot be empty")))
            rng.shuffle(rows)
            return self._report_errors(rng, form, model, rows)
        kinds = ("texts", "images", "fused") if model == GME else ("texts",)
        expected = [item for kind in kinds for item in self.inputs.draw(rng, model, kind, 4)]
        invalid: list[tuple[Any, ExpectedError]] = [
            ({"text": ""}, ExpectedError("cannot be empty")),
            (" \n", ExpectedError("cannot be empty")),
            (None, ExpectedError("must be")),
            ({"text": "a", "instruction": 1}, ExpectedError("instruction must be a string")),
            ({"text": "a", "colour": "red"}, ExpectedError("unknown key")),
        ]
        if model == GME:
            invalid += [
                ({"image": "???"}, ExpectedError("base64")),
                ({"image": BROKEN_IMAGE}, ExpectedError("image")),
                ({"image": self.site.url("missing.png")}, ExpectedError("could not be fetched")),
                ({"image": self.site.forbidden}, ExpectedError("could not be fetched")),
            ]
        else:
            invalid.append(({"text": OVERLONG}, ExpectedError("longer than the model's context length")))
            invalid.append(({"image": BROKEN_IMAGE}, ExpectedError("image")))
        items = [*((self.item(rng, item), item) for item in expected), *rng.sample(invalid, rng.choice((1, 2, 3)))]
        rng.shuffle(items)
        return self._report_errors(rng, form, model, items)

    def bulk(self, rng: random.Random, form: str) -> SoakCase:
        model = rng.choice((MODEL, QWEN3, QWEN3))
        pool = [item for item in self.inputs.pools[model, "texts"] if item.tokens < 40]
        expected = rng.choices(pool, k=rng.randint(*BULK_INPUTS))
        case = self.embeddings(rng, form, model, expected, [item.text for item in expected], priority="batch")
        return self.with_deadline(case, BULK_DEADLINE_SECONDS)

    def encode(self, rng: random.Random, form: str) -> SoakCase:
        model = rng.choice((MODEL, QWEN3, GME))
        expected = self.inputs.draw(rng, model, "images" if model == GME else rng.choice(("texts", "end")), 4)
        single = len(expected) == 1
        if model == GME:
            body: dict[str, Any] = {"image_data": [self.references(rng, item) for item in expected]}
        elif all(not item.dropped for item in expected) and rng.random() < 0.5:
            body = {"input_ids": [item.ids for item in expected]}
        else:
            body = {"text": [item.text for item in expected]}
        if single:
            body = {key: values[0] for key, values in body.items()}
        body["model"] = rng.choice(MODEL_NAMES[model])
        return self.post(form, "/encode", body, self.checker.encoded(expected, single), len(expected))

    def rerank(self, rng: random.Random, form: str) -> SoakCase:
        model = rng.choice((MODEL, QWEN3))
        query = rng.choice(self.inputs.pools[model, "queries" if model == QWEN3 else "texts"])
        documents = self.inputs.draw(rng, model, "texts")
        body = {
            "model": rng.choice(MODEL_NAMES[model]),
            "query": query.text,
            "documents": [item.text for item in documents],
            "top_n": rng.choice((None, 1, 3, 20)),
            "return_documents": rng.choice((None, True, False)),
        }
        path = rng.choice(("/v1/rerank", "/rerank"))
        return self.post(form, path, body, judge.ranking(query, documents, body), len(documents) + 1)

    def score(self, rng: random.Random, form: str) -> SoakCase:
        model = rng.choice((MODEL, QWEN3))
        right = self.inputs.draw(rng, model, "texts", 8)
        left = rng.choices(self.inputs.pools[model, "texts"], k=rng.choice((1, len(right))))
        text_1, text_2 = [item.text for item in left], [item.text for item in right]
        body = {
            "model": rng.choice(MODEL_NAMES[model]),
            "text_1": text_1[0] if len(text_1) == 1 else text_1,
            "text_2": text_2,
        }
        path = rng.choice(("/v1/score", "/score"))
        return self.post(form, path, body, judge.scores(left, right), len(left) + len(right))

    def tokenize(self, rng: random.Random, form: str) -> SoakCase:
        model, kind = rng.choice(((MODEL, "texts"), (MODEL, "end"), (QWEN3, "texts"), (QWEN3, "instructed")))
        expected = (
            self.draw_same_instruction(rng, model) if kind == "instructed" else self.inputs.draw(rng, model, kind, 4)
        )
        texts: Any = [item.text for item in expected]
        single = len(texts) == 1
        field = rng.choice(("prompt", "input", "text"))
        body = {"model": rng.choice(MODEL_NAMES[model]), field: texts[0] if single else texts, **expected[0].keys}
        return self.post(form, "/tokenize", body, judge.tokens(expected, single), 0)

    def get(self, rng: random.Random, form: str) -> SoakCase:
        paths = (
            "/health",
            "/ready",
            "/v1/models",
            "/v1/models/minilm",
            "/get_server_info",
            "/metrics",
            "/openapi.json",
            "/",
        )
        path = rng.choice(paths)
        request = self.http.request("GET", path)
        return SoakCase(form, lambda: self.http.send(request), {200: judge.any_body}, request=request)

    def slow(self, rng: random.Random, form: str) -> SoakCase:
        case = self.strings(rng, form)
        seconds = rng.uniform(0.2, 2)
        return replace(case, send=lambda: self.http.send_slowly(case.request, seconds))

    def short_deadline(self, rng: random.Random, form: str) -> SoakCase:
        """Create a request with a short deadline: the only form for which a 504 is acceptable, or a 429 at any time."""
        case = self.strings(rng, form)
        case = self.with_deadline(case, rng.choice(SHORT_DEADLINES_SECONDS))
        return replace(case, checks={**case.checks, 504: judge.expect_error(504, None), 429: judge.queue_full})

    def burst(self, rng: random.Random) -> SoakCase:
        """Create one of several simultaneous requests that together exceed the limit of pending tokens."""
        expected = rng.choices(self.inputs.pools[QWEN3, "texts"], k=300)
        case = self.embeddings(rng, "burst", QWEN3, expected, [item.text for item in expected])
        return replace(case, checks={**case.checks, 429: judge.queue_full})

    def _report_errors(
        self, rng: random.Random, form: str, model: str, items: Sequence[tuple[Any, Input | ExpectedError]]
    ) -> SoakCase:
        payload, expected = [value for value, _ in items], [result for _, result in items]
        return self.embeddings(rng, form, model, expected, payload, on_error="report", truncate="none")
