"""Bad traffic: what strangers and broken clients send, each with the refusal that it must meet, if any can."""

import base64
import json
import random
from typing import Any

from benchmarks.processes import MODEL
from benchmarks.soak_good import BROKEN_IMAGE, OVERLONG, Good
from benchmarks.soak_http import Ask
from benchmarks.soak_inputs import data_uri
from benchmarks.soak_judge import Check, anything, refusal
from benchmarks.soak_models import GME, QWEN3

PATHS = ("/v1/embeddings", "/v1/embeddings", "/encode", "/v1/rerank", "/v1/score", "/tokenize")
# Bodies that are no JSON object, and some that are one too deep to be read.
MALFORMED = (
    *(b"", b"{", b'{"input": "a"', b"null", b"[]", b"5", b'"text"', b'{"input": NaN}', b"\xff\xfe{}", b"input=text"),
    *(b'{"input": "\\ud800"}', b'{"input": ' + b"[" * 100_000, b'{"input": "a"} trailing', b"\x00" * 100),
)
# The field at fault, and what is sent in it.
WRONG_TYPES: tuple[tuple[str, Any], ...] = (
    *(
        ("input", value)
        for value in (5, 1.5, True, None, [], "", "  ", {}, [[]], [None], [["a"]], [1, "a"], {"text": 5})
    ),
    *(("input", value) for value in ([{"type": "text"}], [{"type": "video", "video": "x"}], {"image": 1}, [" "])),
    *(("dimensions", value) for value in ("12", 1.5, 0, -1, 10**30, [], [8, "8"], True, 4_096)),
    *(("encoding_format", value) for value in ("hex", 5, ["float", "base64"])),
    *(("truncate", value) for value in ("middle", 7, ["end"])),
    *(("long_text", value) for value in ("sum", 1)),
    *(("output_dtype", value) for value in ("int4", 8)),
    *(("return_receipt", value) for value in ("yes", 1)),
    *(("on_error", value) for value in ("ignore", 3)),
    *(("priority", value) for value in ("now", 1)),
    *(("token_encoding", value) for value in ("p50k_base", 1)),
    *(("instruction", value) for value in (5, ["a"])),
    *(("input_type", value) for value in ("question", 5)),
    ("prompt_name", "no_such_prompt"),
    ("model", 7),
)
# Hosts that lead into this machine or its neighbourhood, in the spellings that get past careless checks.
INSIDE = (
    *(
        "127.0.0.1:{port}",
        "localhost:{port}",
        "2130706433:{port}",
        "0177.0.0.1:{port}",
        "0x7f.1:{port}",
        "127.1:{port}",
    ),
    *("[::1]:{port}", "[::ffff:127.0.0.1]:{port}", "0.0.0.0:{port}", "169.254.169.254", "10.0.0.1", "[fe80::1]"),
)


class Bad:
    def __init__(self, good: Good, body_limit: int) -> None:
        self.good, self.http, self.inputs, self.site = good, good.http, good.inputs, good.site
        self.body_limit = body_limit
        self.forms = (
            (5, "malformed bodies", self.malformed),
            (6, "wrong types", self.wrong_type),
            (4, "foreign token ids", self.foreign),
            (3, "unknown models", self.unknown_model),
            (3, "too long", self.too_long),
            (2, "too many", self.too_many),
            (4, "broken images", self.broken_image),
            (4, "addresses inside", self.inside),
            (1, "oversized bodies", self.oversized),
            (3, "bodies sent in half", self.half),
            (4, "callers that hang up", self.hang_up),
            (1, "bodies that stall", self.stalled),
            (2, "no number of seconds", self.bad_timeout),
            (3, "no key", self.no_key),
            (3, "wrong paths and methods", self.wrong_path),
            (2, "no HTTP", self.no_http),
            (2, "what a model cannot do", self.unable),
        )

    def post(
        self, form: str, body: bytes, status: int, check: Check, path: str = "/v1/embeddings", **headers: str
    ) -> Ask:
        request = self.http.request("POST", path, body, **headers)
        return Ask(form, lambda: self.http.whole(request), {status: check}, request=request)

    def refused(
        self,
        form: str,
        param: str | tuple[str | None, ...] | None,
        *words: str,
        path: str = "/v1/embeddings",
        **asked: Any,
    ) -> Ask:
        """A 400 that names `param`."""
        return self.post(form, json.dumps(asked).encode(), 400, refusal(400, param, *words), path)

    def malformed(self, rng: random.Random, form: str) -> Ask:
        return self.post(form, rng.choice(MALFORMED), 400, refusal(400, None), rng.choice(PATHS))

    def wrong_type(self, rng: random.Random, form: str) -> Ask:
        field, value = rng.choice(WRONG_TYPES)
        return self.refused(form, field, **{"model": MODEL, "input": "a", field: value})

    def foreign(self, rng: random.Random, form: str) -> Ask:
        model = rng.choice((MODEL, QWEN3))
        good = self.inputs.draw(rng, model, "texts", 2)[0].ids
        index, rows = rng.choice(
            (
                (0, [999_999]),
                (0, [-5]),
                (0, [[10**12]]),
                (1, [good, [15_496, 995, 100_255]]),
                (0, [[2**31], good]),
                (0, [2**31 - 1]),
            )
        )
        words = ("check_embedding_ctx_length=False", f"index {index}")
        return self.refused(form, "input", *words, model=model, input=rows)

    def unknown_model(self, rng: random.Random, form: str) -> Ask:
        name = rng.choice(("gpt-4", "text-embedding-3-small", "../minilm", "minilm\n", "x" * 3_000, "минилм"))
        body = json.dumps({"model": name, "input": "a", "text": "a"}).encode()
        path = rng.choice(("/v1/embeddings", "/encode"))
        return self.post(form, body, 404, refusal(404, "model", "minilm"), path)

    def too_long(self, rng: random.Random, form: str) -> Ask:
        model = rng.choice((MODEL, QWEN3, GME))
        texts = ["a", OVERLONG]
        truncate = rng.choice(("none", False))
        words = ("longer than the model's context length", "index 1")
        return self.refused(form, "input", *words, model=model, input=texts, truncate=truncate)

    def too_many(self, rng: random.Random, form: str) -> Ask:
        given: Any = rng.choice((["a"] * 2_049, [[1] * 200] * 1_501))
        return self.refused(form, "input", model=MODEL, input=given)

    def broken_image(self, rng: random.Random, form: str) -> Ask:
        stored = rng.choice(list(self.inputs.pictures.values()))[1]
        cut = base64.b64encode(stored[: len(stored) // 2]).decode()
        image = rng.choice(
            ("???", BROKEN_IMAGE, cut, data_uri(stored).replace(";base64", ""), "data:image/png;base64,", "/etc/passwd")
        )
        items = [{"text": "a"}, {"image": image}]
        return self.refused(form, "input", "index 1", model=GME, input=items)

    def inside(self, rng: random.Random, form: str) -> Ask:
        """URLs that would lend strangers this machine's place in the network."""
        hosts = [host.format(port=self.site.forbidden_port) for host in INSIDE]
        urls = [*(f"http://{host}/0.png" for host in hosts), "file:///etc/passwd", "ftp://127.0.0.1/0.png"]
        urls += [self.site.url("inside"), self.site.url("inside"), self.site.url("missing.png")]
        urls += [self.site.url("endless")] if rng.random() < 0.1 else []
        url = rng.choice(urls)
        part = {"type": "image_url", "image_url": {"url": url}}
        given = rng.choice(([{"image": url}], [part], {"image_url": url}))
        return self.refused(form, "input", "index 0", model=GME, input=given)

    def oversized(self, rng: random.Random, form: str) -> Ask:
        """Refused by what Content-Length says, or, where it says nothing, once it is too much."""
        check = refusal(413, None)
        if rng.random() < 0.7:
            request = self.http.request("POST", "/v1/embeddings", b"{" * 1_000, Content_Length=str(self.body_limit + 1))
            return Ask(form, lambda: self.http.pieces([(request, 0.0)]), {413: check}, request=request)
        head = self.http.request("POST", "/encode", Content_Length="", Transfer_Encoding="chunked")
        size = 2**20
        chunk = f"{size:x}\r\n".encode() + b" " * size + b"\r\n"
        pieces = [(head, 0.0), *[(chunk, 0.0)] * (self.body_limit // size + 2), (b"0\r\n\r\n", 0.0)]
        return Ask(form, lambda: self.http.pieces(pieces), {413: check}, request=head)

    def half(self, rng: random.Random, form: str) -> Ask:
        """The caller is gone in the middle of its request."""
        request = self.good.strings(rng, form).request
        sent = request[: rng.randint(1, len(request) - 1)]
        return Ask(form, lambda: self.http.hang_up(sent, rng.uniform(0, 0.2)), {}, request=sent)

    def hang_up(self, rng: random.Random, form: str) -> Ask:
        """The caller asked, and does not wait for the answer."""
        make = rng.choice((self.good.strings, self.good.strings, self.good.fused, self.good.averaged, self.good.bulk))
        request = make(rng, form).request
        return Ask(form, lambda: self.http.hang_up(request, rng.choice((0, 0.001, 0.01, 0.05))), {}, request=request)

    def stalled(self, rng: random.Random, form: str) -> Ask:
        """A body that never ends: 408, after the gateway's patience."""
        request = self.good.strings(rng, form).request
        sent = request[:-1]
        return Ask(form, lambda: self.http.pieces([(sent, 0.0)]), {408: refusal(408, None)}, request=sent)

    def bad_timeout(self, rng: random.Random, form: str) -> Ask:
        stated = rng.choice(("soon", "-1", "0", "nan", "inf", "1s"))
        check = refusal(400, "x-request-timeout")
        return self.post(form, b'{"model": "minilm", "input": "a"}', 400, check, x_request_timeout=stated)

    def no_key(self, rng: random.Random, form: str) -> Ask:
        key = rng.choice(("", "Bearer wrong", "Basic c29hay1rZXk6", "Bearer"))
        return self.post(form, b'{"model": "minilm", "input": "a"}', 401, refusal(401, None), Authorization=key)

    def wrong_path(self, rng: random.Random, form: str) -> Ask:
        method, path, status = rng.choice(
            (
                ("GET", "/v1/embeddings", 405),
                ("DELETE", "/v1/models", 405),
                ("POST", "/v1/chat/completions", 404),
                ("GET", "/v1/models/no-such-model", 404),
                ("GET", "/../../etc/passwd", 404),
                ("GET", "/docs/%2e%2e/%2e%2e/etc/passwd", 404),
            )
        )
        request = self.http.request(method, path)
        check = refusal(status, "model" if path.endswith("no-such-model") else None)
        return Ask(form, lambda: self.http.whole(request), {status: check}, request=request)

    def no_http(self, rng: random.Random, form: str) -> Ask:
        request = rng.choice(
            (
                b"GARBAGE\r\n\r\n",
                b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + b"\0" * 100 + b"\r\n\r\n",
                b"POST /v1/embeddings HTTP/1.1\r\nHost: x\r\nContent-Length: minus\r\n\r\n",
                b"GET / HTTP/1.1\r\nx: " + b"y" * 500_000 + b"\r\n\r\n",
                b"POST /encode HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\nnothex\r\n",
            )
        )
        return Ask(form, lambda: self.http.pieces([(request, 0.0)]), {400: anything, 401: anything}, request=request)

    def unable(self, rng: random.Random, form: str) -> Ask:
        """A well-formed request that its model was not made for."""
        picture = {"image": BROKEN_IMAGE}
        param, asked = rng.choice(
            (
                ("instruction", {"model": MODEL, "input": "a", "instruction": "Find it"}),
                ("dimensions", {"model": MODEL, "input": "a", "dimensions": 128}),
                ("dimensions", {"model": QWEN3, "input": "a", "dimensions": [8, 65]}),
                ("input", {"model": QWEN3, "input": [picture]}),
                ("instruction", {"model": QWEN3, "input": [1, 2], "instruction": "Find it"}),
                ("token_encoding", {"model": MODEL, "input": [1, 2], "token_encoding": "cl100k_base"}),
                ("model", {"input": "a"}),
            )
        )
        return self.refused(form, param, **asked)
