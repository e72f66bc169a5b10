"""Good traffic: every form of a request that the gateway takes, drawn from a seed, each with what must come back."""

import base64
import random
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import orjson

from benchmarks import soak_judge
from benchmarks.processes import MODEL
from benchmarks.soak_http import Ask, Http
from benchmarks.soak_inputs import Input, Inputs, data_uri
from benchmarks.soak_judge import Check, Fault, Judge
from benchmarks.soak_models import GME, QWEN3, QWEN3_TOKENS
from benchmarks.soak_site import Site

# What each model may be called; the answer must repeat it.
CALLED = {
    MODEL: ("minilm", "MiniLM", "sentence-transformers/all-MiniLM-L6-v2", "all-MiniLM-L6-v2"),
    QWEN3: ("qwen3_embedding", "Qwen3_Embedding"),
    GME: ("gme_qwen2_vl", "gme"),
}
LENGTHS = {MODEL: 256, QWEN3: QWEN3_TOKENS}
SIZES = (1, 8, 20, 32, 63, 64)  # of the tiny Qwen3's 64
BULK = (100, 400)  # inputs of a request that can wait
# Seconds: of who can wait while everybody else goes first, and of who cannot wait at all.
PATIENT = 300.0
HURRIED = (0.0005, 0.002, 0.02)
OVERLONG = "word " * 700
BROKEN_IMAGE = base64.b64encode(b"\x89PNG\r\n\x1a\nno picture").decode()


class Good:
    def __init__(self, http: Http, inputs: Inputs, site: Site, judge: Judge) -> None:
        self.http, self.inputs, self.site, self.judge = http, inputs, site, judge
        # how often, name, how one is made
        self.forms = (
            (14, "lists of strings", self.strings),
            (8, "a string", self.string),
            (6, "token ids", self.ids),
            (5, "objects", self.items),
            (4, "content parts", self.parts),
            (5, "pictures", self.pictures),
            (4, "pictures and text together", self.fused),
            (4, "one instruction", self.instruction),
            (2, "an instruction in the input", self.wrapped),
            (3, "input_type query", self.queries),
            (4, "an instruction an item", self.instructions),
            (3, "dimensions", self.dimensions),
            (3, "several dimensions", self.several),
            (5, "int8, uint8, binary, ubinary", self.quantised),
            (3, "long texts cut", self.cut),
            (3, "long texts averaged", self.averaged),
            (5, "bad items reported", self.reported),
            (1, "priority batch", self.bulk),
            (4, "/encode", self.encode),
            (4, "/v1/rerank", self.rerank),
            (4, "/v1/score", self.score),
            (3, "/tokenize", self.tokenize),
            (3, "GET", self.get),
            (2, "slow senders", self.slow),
            (1, "a deadline too short", self.hurried),
        )

    def embeddings(
        self,
        rng: random.Random,
        form: str,
        model: str,
        wanted: Sequence[Input | Fault],
        given: Any,
        **fields: Any,
    ) -> Ask:
        """A POST of `given`, with some of the fields that change nothing of the vectors."""
        asked = {"model": rng.choice(CALLED[model]), "input": given, **fields}
        if rng.random() < 0.7:
            asked["encoding_format"] = rng.choice(["base64", "base64", "float", ["float"], None])
        if rng.random() < 0.2:
            asked["return_receipt"] = True
        if rng.random() < 0.1:
            asked |= {
                "user": "somebody",
                "unknown": [1, {"two": None}],
                "priority": rng.choice(["batch", "interactive"]),
            }
        path = rng.choice(("/v1/embeddings", "/v1/embeddings", "/embeddings"))
        return self.post(form, path, asked, self.judge.embeddings(wanted, asked), len(wanted))

    def post(self, form: str, path: str, asked: Any, check: Check, inputs: int = 1) -> Ask:
        request = self.http.request("POST", path, orjson.dumps(asked))
        return Ask(form, lambda: self.http.whole(request), {200: check}, inputs, request)

    def strings(self, rng: random.Random, form: str) -> Ask:
        model = rng.choice((MODEL, MODEL, QWEN3, GME))
        wanted = self.inputs.draw(rng, model, "texts")
        return self.embeddings(rng, form, model, wanted, [one.text for one in wanted])

    def string(self, rng: random.Random, form: str) -> Ask:
        model = rng.choice((MODEL, MODEL, QWEN3, GME))
        wanted = self.inputs.draw(rng, model, "texts", 1)
        return self.embeddings(rng, form, model, wanted, wanted[0].text)

    def ids(self, rng: random.Random, form: str) -> Ask:
        model = rng.choice((MODEL, QWEN3))
        wanted = self.inputs.draw(rng, model, "texts")
        rows = [one.ids for one in wanted]
        return self.embeddings(rng, form, model, wanted, rows[0] if len(rows) == 1 and rng.random() < 0.7 else rows)

    def items(self, rng: random.Random, form: str) -> Ask:
        model = rng.choice((MODEL, QWEN3, GME))
        wanted = self.inputs.draw(rng, model, "texts")
        given: list[Any] = [self.item(rng, one) for one in wanted]
        if len(given) > 1 and rng.random() < 0.3:
            given[0] = wanted[0].text  # strings and objects mix
        return self.embeddings(rng, form, model, wanted, given[0] if len(given) == 1 else given)

    def parts(self, rng: random.Random, form: str) -> Ask:
        wanted = self.inputs.draw(rng, GME, rng.choice(("texts", "pictures", "fused")), 4)
        given = [self.content(rng, one) for one in wanted]
        return self.embeddings(rng, form, GME, wanted, given[0] if len(given) == 1 else given)

    def pictures(self, rng: random.Random, form: str) -> Ask:
        wanted = self.inputs.draw(rng, GME, "pictures", 8)
        return self.embeddings(rng, form, GME, wanted, [self.item(rng, one) for one in wanted])

    def fused(self, rng: random.Random, form: str) -> Ask:
        kinds = rng.choice((("fused",), ("fused", "texts", "pictures")))
        wanted = [one for kind in kinds for one in self.inputs.draw(rng, GME, kind, 4)]
        return self.embeddings(rng, form, GME, wanted, [self.item(rng, one) for one in wanted])

    def instruction(self, rng: random.Random, form: str) -> Ask:
        model = rng.choice((QWEN3, QWEN3, GME))
        wanted = self._alike(rng, model)
        given = [self.item(rng, one, keys=False) if one.images else one.text for one in wanted]
        return self.embeddings(rng, form, model, wanted, given, **wanted[0].keys)

    def wrapped(self, rng: random.Random, form: str) -> Ask:
        wanted = self._alike(rng, QWEN3)
        texts = [one.text for one in wanted]
        return self.embeddings(rng, form, QWEN3, wanted, {"input": texts, **wanted[0].keys})

    def queries(self, rng: random.Random, form: str) -> Ask:
        wanted = self.inputs.draw(rng, QWEN3, "queries")
        keys = rng.choice(({"input_type": "query"}, {"prompt_name": "query"}, {"input_type": "search_query"}))
        return self.embeddings(rng, form, QWEN3, wanted, [one.text for one in wanted], **keys)

    def instructions(self, rng: random.Random, form: str) -> Ask:
        model = rng.choice((QWEN3, QWEN3, GME))
        wanted = self.inputs.draw(rng, model, "instructed", 8) + self.inputs.draw(rng, model, "texts", 4)
        rng.shuffle(wanted)
        return self.embeddings(rng, form, model, wanted, [self.item(rng, one) for one in wanted])

    def dimensions(self, rng: random.Random, form: str) -> Ask:
        wanted = self.inputs.draw(rng, QWEN3, "texts")
        return self.embeddings(
            rng, form, QWEN3, wanted, [one.text for one in wanted], dimensions=rng.choice((*SIZES, None))
        )

    def several(self, rng: random.Random, form: str) -> Ask:
        wanted = self.inputs.draw(rng, QWEN3, "texts", 8)
        sizes = rng.sample(SIZES, rng.choice((1, 2, 3)))
        if rng.random() < 0.3:
            return self.quantised(rng, form, sizes)
        return self.embeddings(rng, form, QWEN3, wanted, [one.text for one in wanted], dimensions=sizes)

    def quantised(self, rng: random.Random, form: str, sizes: Any = None) -> Ask:
        model = QWEN3 if sizes else rng.choice((MODEL, QWEN3, GME))
        wanted = self.inputs.draw(rng, model, "texts")
        dtype = rng.choice(("int8", "uint8", "binary", "ubinary"))
        texts = [one.text for one in wanted]
        return self.embeddings(rng, form, model, wanted, texts, output_dtype=dtype, dimensions=sizes)

    def cut(self, rng: random.Random, form: str) -> Ask:
        model, fit = rng.choice((MODEL, QWEN3)), rng.choice(("end", "start"))
        wanted = self.inputs.draw(rng, model, fit, 4) + self.inputs.draw(rng, model, "texts", 2)
        rng.shuffle(wanted)
        stated = rng.choice(({"truncate": fit}, {"truncate": True}, {})) if fit == "end" else {"truncate": fit}
        return self.embeddings(rng, form, model, wanted, [one.text for one in wanted], **stated)

    def averaged(self, rng: random.Random, form: str) -> Ask:
        model = rng.choice((MODEL, QWEN3))
        kind = rng.choice(("mean", "instructed mean")) if model == QWEN3 else "mean"
        wanted = self.inputs.draw(rng, model, kind, 4)
        fields: dict[str, Any] = dict(wanted[0].keys)
        if kind == "mean":
            wanted += self.inputs.draw(rng, model, "texts", 2)
        rng.shuffle(wanted)
        if model == QWEN3 and rng.random() < 0.3:
            fields["dimensions"] = rng.choice((8, 32))
        texts = [one.text for one in wanted]
        return self.embeddings(rng, form, model, wanted, texts, long_text="mean", **fields)

    def reported(self, rng: random.Random, form: str) -> Ask:
        """Good inputs with bad ones in between."""
        model = rng.choice((MODEL, QWEN3, GME))
        if model != GME and rng.random() < 0.3:
            found = self.inputs.draw(rng, model, "texts")
            rows = [*((one.ids, one) for one in found), ([999_999], Fault("check_embedding_ctx_length"))]
            rows.append(([], Fault("cannot be empty")))
            rng.shuffle(rows)
            return self._reported(rng, form, model, rows)
        kinds = ("texts", "pictures", "fused") if model == GME else ("texts",)
        wanted = [one for kind in kinds for one in self.inputs.draw(rng, model, kind, 4)]
        bad: list[tuple[Any, Fault]] = [
            ({"text": ""}, Fault("cannot be empty")),
            (" \n", Fault("cannot be empty")),
            (None, Fault("must be")),
            ({"text": "a", "instruction": 1}, Fault("instruction must be a string")),
            ({"text": "a", "colour": "red"}, Fault("unknown key")),
        ]
        if model == GME:
            bad += [
                ({"image": "???"}, Fault("base64")),
                ({"image": BROKEN_IMAGE}, Fault("image")),
                ({"image": self.site.url("missing.png")}, Fault("could not be fetched")),
                ({"image": self.site.forbidden}, Fault("could not be fetched")),
            ]
        else:
            bad.append(({"text": OVERLONG}, Fault("longer than the model's context length")))
            bad.append(({"image": BROKEN_IMAGE}, Fault("image")))
        items = [*((self.item(rng, one), one) for one in wanted), *rng.sample(bad, rng.choice((1, 2, 3)))]
        rng.shuffle(items)
        return self._reported(rng, form, model, items)

    def bulk(self, rng: random.Random, form: str) -> Ask:
        model = rng.choice((MODEL, QWEN3, QWEN3))
        pool = [one for one in self.inputs.pools[model, "texts"] if one.tokens < 40]
        wanted = rng.choices(pool, k=rng.randint(*BULK))
        ask = self.embeddings(rng, form, model, wanted, [one.text for one in wanted], priority="batch")
        return self._with_deadline(ask, PATIENT)

    def encode(self, rng: random.Random, form: str) -> Ask:
        model = rng.choice((MODEL, QWEN3, GME))
        wanted = self.inputs.draw(rng, model, "pictures" if model == GME else rng.choice(("texts", "end")), 4)
        single = len(wanted) == 1
        if model == GME:
            asked: dict[str, Any] = {"image_data": [self.references(rng, one) for one in wanted]}
        elif all(not one.dropped for one in wanted) and rng.random() < 0.5:
            asked = {"input_ids": [one.ids for one in wanted]}
        else:
            asked = {"text": [one.text for one in wanted]}
        if single:
            asked = {key: values[0] for key, values in asked.items()}
        asked["model"] = rng.choice(CALLED[model])
        return self.post(form, "/encode", asked, self.judge.encoded(wanted, single), len(wanted))

    def rerank(self, rng: random.Random, form: str) -> Ask:
        model = rng.choice((MODEL, QWEN3))
        query = rng.choice(self.inputs.pools[model, "queries" if model == QWEN3 else "texts"])
        documents = self.inputs.draw(rng, model, "texts")
        asked = {
            "model": rng.choice(CALLED[model]),
            "query": query.text,
            "documents": [one.text for one in documents],
            "top_n": rng.choice((None, 1, 3, 20)),
            "return_documents": rng.choice((None, True, False)),
        }
        path = rng.choice(("/v1/rerank", "/rerank"))
        return self.post(form, path, asked, soak_judge.ranking(query, documents, asked), len(documents) + 1)

    def score(self, rng: random.Random, form: str) -> Ask:
        model = rng.choice((MODEL, QWEN3))
        right = self.inputs.draw(rng, model, "texts", 8)
        left = rng.choices(self.inputs.pools[model, "texts"], k=rng.choice((1, len(right))))
        one, other = [each.text for each in left], [each.text for each in right]
        asked = {"model": rng.choice(CALLED[model]), "text_1": one[0] if len(one) == 1 else one, "text_2": other}
        path = rng.choice(("/v1/score", "/score"))
        return self.post(form, path, asked, soak_judge.scores(left, right), len(left) + len(right))

    def tokenize(self, rng: random.Random, form: str) -> Ask:
        model, kind = rng.choice(((MODEL, "texts"), (MODEL, "end"), (QWEN3, "texts"), (QWEN3, "instructed")))
        wanted = self._alike(rng, model) if kind == "instructed" else self.inputs.draw(rng, model, kind, 4)
        texts: Any = [one.text for one in wanted]
        single = len(texts) == 1
        field = rng.choice(("prompt", "input", "text"))
        asked = {"model": rng.choice(CALLED[model]), field: texts[0] if single else texts, **wanted[0].keys}
        return self.post(form, "/tokenize", asked, soak_judge.tokens(wanted, single), 0)

    def get(self, rng: random.Random, form: str) -> Ask:
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
        return Ask(form, lambda: self.http.whole(request), {200: soak_judge.anything}, request=request)

    def slow(self, rng: random.Random, form: str) -> Ask:
        ask = self.strings(rng, form)
        seconds = rng.uniform(0.2, 2)
        return replace(ask, send=lambda: self.http.drip(ask.request, seconds))

    def hurried(self, rng: random.Random, form: str) -> Ask:
        """In time or not: the only requests that may be answered 504."""
        ask = self.strings(rng, form)
        ask = self._with_deadline(ask, rng.choice(HURRIED))
        return replace(ask, answers={**ask.answers, 504: soak_judge.refusal(504, None)})

    def burst(self, rng: random.Random) -> Ask:
        """A request that, with others of its kind, is more than may wait."""
        wanted = rng.choices(self.inputs.pools[QWEN3, "texts"], k=300)
        ask = self.embeddings(rng, "burst", QWEN3, wanted, [one.text for one in wanted])
        return replace(ask, answers={**ask.answers, 429: soak_judge.full})

    def item(self, rng: random.Random, one: Input, *, keys: bool = True) -> dict[str, Any]:
        """An input as an object."""
        given: dict[str, Any] = {"text": one.text} if one.text else {}
        if one.images:
            references = self.references(rng, one)
            key = rng.choice(("image", "image_url"))
            given[key] = references[0] if len(references) == 1 else references
        return {**given, **(one.keys if keys else {})}

    def content(self, rng: random.Random, one: Input) -> list[dict[str, Any]]:
        """An input as OpenAI's content parts."""
        parts: list[dict[str, Any]] = [
            {"type": "image_url", "image_url": reference if isinstance(reference, dict) else {"url": reference}}
            for reference in self.references(rng, one)
        ]
        return parts + ([{"type": "text", "text": one.text}] if one.text else [])

    def references(self, rng: random.Random, one: Input) -> list[Any]:
        """The images of an input: data URIs, base64 or URLs, as they are or in an object."""
        found: list[Any] = []
        for name in one.images:
            stored = self.inputs.pictures[name][1]
            choice = rng.choice((data_uri(stored), base64.b64encode(stored).decode(), self.site.url(name)))
            found.append(rng.choice((choice, choice, {"url": choice, "detail": "auto"})))
        return found

    def _with_deadline(self, ask: Ask, seconds: float) -> Ask:
        request = ask.request.replace(b"\r\n", f"\r\nx-request-timeout: {seconds}\r\n".encode(), 1)
        return replace(ask, send=lambda: self.http.whole(request), request=request)

    def _alike(self, rng: random.Random, model: str) -> list[Input]:
        """Inputs that have one instruction."""
        first = rng.choice(self.inputs.pools[model, "instructed"])
        alike = [one for one in self.inputs.pools[model, "instructed"] if one.keys == first.keys]
        return [first, *rng.choices(alike, k=rng.choice((0, 0, 1, 3, 7)))]

    def _reported(self, rng: random.Random, form: str, model: str, items: Sequence[tuple[Any, Input | Fault]]) -> Ask:
        given, wanted = [given for given, _ in items], [want for _, want in items]
        return self.embeddings(rng, form, model, wanted, given, on_error="report", truncate="none")
