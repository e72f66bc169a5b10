"""Invalid traffic of the soak: requests of attackers and broken clients, each with the expected error, if any."""

import base64
import json
import random
from typing import Any

from benchmarks.processes import MODEL
from benchmarks.soak.client import SoakCase
from benchmarks.soak.inputs import data_uri
from benchmarks.soak.judge import Check, any_body, expect_error
from benchmarks.soak.models import GME, QWEN3
from benchmarks.soak.traffic.valid import BROKEN_IMAGE, OVERLONG, ValidTraffic

PATHS = ("/v1/embeddings", "/v1/embeddings", "/encode", "/v1/rerank", "/v1/score", "/tokenize")
# Bodies that are not a JSON object or are nested too deeply.
MALFORMED = (
    *(b"", b"{", b'{"input": "a"', b"null", b"[]", b"5", b'"text"', b'{"input": NaN}', b"\xff\xfe{}", b"input=text"),
    *(b'{"input": ' + b"[" * 100_000, b'{"input": "a"} trailing', b"\x00" * 100),
)
# (field, invalid value)
WRONG_TYPES: tuple[tuple[str, Any], ...] = (
    *(
        ("input", value)
        for value in (5, 1.5, True, None, [], "", "  ", {}, [[]], [None], [["a"]], [1, "a"], {"text": 5}, "\ud800")
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
# Hosts that resolve to this machine or its network, in spellings that bypass weak checks.
INTERNAL_HOSTS = (
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


class InvalidTraffic:
    """Creates invalid requests. `forms`: (weight, name, function that creates a case) of each form of traffic."""

    def __init__(self, valid: ValidTraffic, body_limit: int) -> None:
        self.valid, self.http, self.inputs, self.site = valid, valid.http, valid.inputs, valid.site
        self.body_limit = body_limit
        self.forms = (
            (5, "malformed bodies", self.malformed),
            (6, "wrong types", self.wrong_type),
            (4, "foreign token ids", self.foreign_ids),
            (3, "unknown models", self.unknown_model),
            (3, "too long", self.too_long),
            (2, "too many", self.too_many),
            (4, "broken images", self.broken_image),
            (4, "addresses inside", self.internal_address),
            (1, "oversized bodies", self.oversized),
            (3, "bodies sent in half", self.partial_body),
            (4, "callers that hang up", self.hang_up),
            (1, "bodies that stall", self.stalled_body),
            (2, "no number of seconds", self.bad_timeout),
            (3, "no key", self.no_key),
            (3, "wrong paths and methods", self.wrong_path),
            (2, "no HTTP", self.not_http),
            (2, "what a model cannot do", self.unsupported),
        )

    def post(
        self, form: str, body: bytes, status: int, check: Check, path: str = "/v1/embeddings", **headers: str
    ) -> SoakCase:
        """Create a POST whose response must have `status` and pass `check`."""
        request = self.http.request("POST", path, body, **headers)
        return SoakCase(form, lambda: self.http.send(request), {status: check}, request=request)

    def expect_400(
        self,
        form: str,
        param: str | tuple[str | None, ...] | None,
        *words: str,
        path: str = "/v1/embeddings",
        **fields: Any,
    ) -> SoakCase:
        """Create a POST that must be answered with a 400 that names `param`."""
        return self.post(form, json.dumps(fields).encode(), 400, expect_error(400, param, *words), path)

    def malformed(self, rng: random.Random, form: str) -> SoakCase:
        return self.post(form, rng.choice(MALFORMED), 400, expect_error(400, None), rng.choice(PATHS))

    def wrong_type(self, rng: random.Random, form: str) -> SoakCase:
        field, value = rng.choice(WRONG_TYPES)
        return self.expect_400(form, field, **{"model": MODEL, "input": "a", field: value})

    def foreign_ids(self, rng: random.Random, form: str) -> SoakCase:
        model = rng.choice((MODEL, QWEN3))
        valid_ids = self.inputs.draw(rng, model, "texts", 2)[0].ids
        index, rows = rng.choice(
            (
                (0, [999_999]),
                (0, [-5]),
                (0, [[10**12]]),
                (1, [valid_ids, [15_496, 995, 100_255]]),
                (0, [[2**31], valid_ids]),
                (0, [2**31 - 1]),
            )
        )
        words = ("check_embedding_ctx_length=False", f"index {index}")
        return self.expect_400(form, "input", *words, model=model, input=rows)

    def unknown_model(self, rng: random.Random, form: str) -> SoakCase:
        name = rng.choice(("gpt-4", "text-embedding-3-small", "../minilm", "minilm\n", "x" * 3_000, "минилм"))
        body = json.dumps({"model": name, "input": "a", "text": "a"}).encode()
        path = rng.choice(("/v1/embeddings", "/encode"))
        return self.post(form, body, 404, expect_error(404, "model", "minilm"), path)

    def too_long(self, rng: random.Random, form: str) -> SoakCase:
        model = rng.choice((MODEL, QWEN3, GME))
        texts = ["a", OVERLONG]
        truncate = rng.choice(("none", False))
        words = ("longer than the model's context length", "index 1")
        return self.expect_400(form, "input", *words, model=model, input=texts, truncate=truncate)

    def too_many(self, rng: random.Random, form: str) -> SoakCase:
        payload: Any = rng.choice((["a"] * 2_049, [[1] * 200] * 1_501))
        return self.expect_400(form, "input", model=MODEL, input=payload)

    def broken_image(self, rng: random.Random, form: str) -> SoakCase:
        file_bytes = rng.choice(list(self.inputs.image_files.values()))[1]
        truncated = base64.b64encode(file_bytes[: len(file_bytes) // 2]).decode()
        image = rng.choice(
            (
                "???",
                BROKEN_IMAGE,
                truncated,
                data_uri(file_bytes).replace(";base64", ""),
                "data:image/png;base64,",
                "/etc/passwd",
            )
        )
        items = [{"text": "a"}, {"image": image}]
        return self.expect_400(form, "input", "index 1", model=GME, input=items)

    def internal_address(self, rng: random.Random, form: str) -> SoakCase:
        """Create a request with an image URL that points into this machine's network (server-side request forgery)."""
        hosts = [host.format(port=self.site.forbidden_port) for host in INTERNAL_HOSTS]
        urls = [*(f"http://{host}/0.png" for host in hosts), "file:///etc/passwd", "ftp://127.0.0.1/0.png"]
        urls += [self.site.url("inside"), self.site.url("inside"), self.site.url("missing.png")]
        urls += [self.site.url("endless")] if rng.random() < 0.1 else []
        url = rng.choice(urls)
        part = {"type": "image_url", "image_url": {"url": url}}
        payload = rng.choice(([{"image": url}], [part], {"image_url": url}))
        return self.expect_400(form, "input", "index 0", model=GME, input=payload)

    def oversized(self, rng: random.Random, form: str) -> SoakCase:
        """Create a request above the body limit, announced by Content-Length or sent in chunks without one."""
        check = expect_error(413, None)
        if rng.random() < 0.7:
            request = self.http.request("POST", "/v1/embeddings", b"{" * 1_000, Content_Length=str(self.body_limit + 1))
            return SoakCase(form, lambda: self.http.send_pieces([(request, 0.0)]), {413: check}, request=request)
        head = self.http.request("POST", "/encode", Content_Length="", Transfer_Encoding="chunked")
        size = 2**20
        chunk = f"{size:x}\r\n".encode() + b" " * size + b"\r\n"
        pieces = [(head, 0.0), *[(chunk, 0.0)] * (self.body_limit // size + 2), (b"0\r\n\r\n", 0.0)]
        return SoakCase(form, lambda: self.http.send_pieces(pieces), {413: check}, request=head)

    def partial_body(self, rng: random.Random, form: str) -> SoakCase:
        """Create a request whose caller disconnects before it is complete."""
        request = self.valid.strings(rng, form).request
        sent = request[: rng.randint(1, len(request) - 1)]
        return SoakCase(form, lambda: self.http.disconnect(sent, rng.uniform(0, 0.2)), {}, request=sent)

    def hang_up(self, rng: random.Random, form: str) -> SoakCase:
        """Create a complete request whose caller disconnects before the response."""
        make = rng.choice(
            (self.valid.strings, self.valid.strings, self.valid.fused, self.valid.averaged, self.valid.bulk)
        )
        request = make(rng, form).request
        return SoakCase(
            form, lambda: self.http.disconnect(request, rng.choice((0, 0.001, 0.01, 0.05))), {}, request=request
        )

    def stalled_body(self, rng: random.Random, form: str) -> SoakCase:
        """Create a request whose body stays incomplete: 408 after the gateway's body timeout."""
        request = self.valid.strings(rng, form).request
        sent = request[:-1]
        return SoakCase(
            form, lambda: self.http.send_pieces([(sent, 0.0)]), {408: expect_error(408, None)}, request=sent
        )

    def bad_timeout(self, rng: random.Random, form: str) -> SoakCase:
        timeout = rng.choice(("soon", "-1", "0", "nan", "inf", "1s"))
        check = expect_error(400, "x-request-timeout")
        return self.post(form, b'{"model": "minilm", "input": "a"}', 400, check, x_request_timeout=timeout)

    def no_key(self, rng: random.Random, form: str) -> SoakCase:
        key = rng.choice(("", "Bearer wrong", "Basic c29hay1rZXk6", "Bearer"))
        return self.post(form, b'{"model": "minilm", "input": "a"}', 401, expect_error(401, None), Authorization=key)

    def wrong_path(self, rng: random.Random, form: str) -> SoakCase:
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
        check = expect_error(status, "model" if path.endswith("no-such-model") else None)
        return SoakCase(form, lambda: self.http.send(request), {status: check}, request=request)

    def not_http(self, rng: random.Random, form: str) -> SoakCase:
        request = rng.choice(
            (
                b"GARBAGE\r\n\r\n",
                b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + b"\0" * 100 + b"\r\n\r\n",
                b"POST /v1/embeddings HTTP/1.1\r\nHost: x\r\nContent-Length: minus\r\n\r\n",
                b"GET / HTTP/1.1\r\nx: " + b"y" * 500_000 + b"\r\n\r\n",
                b"POST /encode HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\nnothex\r\n",
            )
        )
        return SoakCase(
            form, lambda: self.http.send_pieces([(request, 0.0)]), {400: any_body, 401: any_body}, request=request
        )

    def unsupported(self, rng: random.Random, form: str) -> SoakCase:
        """Create a well-formed request that the model does not support."""
        image_item = {"image": BROKEN_IMAGE}
        param, fields = rng.choice(
            (
                ("instruction", {"model": MODEL, "input": "a", "instruction": "Find it"}),
                ("dimensions", {"model": MODEL, "input": "a", "dimensions": 128}),
                ("dimensions", {"model": QWEN3, "input": "a", "dimensions": [8, 65]}),
                ("input", {"model": QWEN3, "input": [image_item]}),
                ("instruction", {"model": QWEN3, "input": [1, 2], "instruction": "Find it"}),
                ("token_encoding", {"model": MODEL, "input": [1, 2], "token_encoding": "cl100k_base"}),
                ("model", {"input": "a"}),
            )
        )
        return self.expect_400(form, param, **fields)
