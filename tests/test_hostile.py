"""Hostile requests over raw sockets to the real stack, and to tritonserver's own ports.

The server rejects each with the usual error body, or closes the connection as HTTP requires. It must respond correctly
afterwards, without using more memory: after each test, the fixture `unharmed` requests a vector and searches the log
for tracebacks.
"""

import contextlib
import gzip
import json
import re
import socket
import struct
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import oracles
import psutil
import pytest
from checkpoints import write_decoder
from sentence_transformers import SentenceTransformer
from tritonclient.grpc import service_pb2, service_pb2_grpc

from conftest import MINILM, REPOSITORY, ROOT, Stack
from triton_embed.python_backend.checkpoint import repository

TEXT = "Once upon a time"
LIMIT = 32 * 2**20  # bytes of a body, by default
BODY_SECONDS = 3  # the body timeout of this stack; 30 s by default
MAX_GROWTH_BYTES = 300 * 2**20  # how much the gateway's memory may grow
MAX_SECONDS = 10  # for the largest bodies, which block all other requests
ROUTES = ("/v1/embeddings", "/encode", "/tokenize", "/v1/rerank", "/v1/score")
GOOD = json.dumps({"model": "minilm", "input": TEXT}).encode()


@dataclass(frozen=True)
class RawResponse:
    status: int
    headers: dict[str, str]
    body: bytes

    @property
    def error(self) -> dict[str, Any]:
        """Return the error object and check that it is complete and reveals no path or stack trace."""
        assert self.headers["content-type"] == "application/json", self
        error: dict[str, Any] = json.loads(self.body)["error"]
        assert list(error) == ["message", "type", "param", "code"]
        assert error["message"]
        assert error["type"] == ("server_error" if self.status >= 500 else "invalid_request_error")
        assert not re.search(rf"{re.escape(str(ROOT))}|site-packages|Traceback|File \"|/home/", error["message"])
        return error

    def is_correct(self, expected: np.ndarray) -> bool:
        assert self.status == 200, self
        return _is_close(json.loads(self.body)["data"][0]["embedding"], expected)


def _is_close(vector: Any, expected: np.ndarray) -> bool:
    return float(np.asarray(vector) @ expected) > 0.99999


@pytest.fixture(scope="module")
def qwen3(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_decoder(tmp_path_factory.mktemp("checkpoints") / "qwen3", "qwen3")


@pytest.fixture(scope="module")
def stack(qwen3: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    """Start a stack with minilm and qwen3, which supports instructions."""
    directory = tmp_path_factory.mktemp("hostile")
    repository.write_model(REPOSITORY, "minilm", directory / "models", "minilm", {})
    repository.write_model(REPOSITORY, "qwen3_embedding", directory / "models", "qwen3", {"checkpoint": str(qwen3)})
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_EMBED_BODY_TIMEOUT", str(BODY_SECONDS))
        server = Stack(directory / "log", f"--model-repository={directory / 'models'}")
    memory = resident(server)
    yield server
    growth = resident(server) - memory
    server.stop()
    assert growth < MAX_GROWTH_BYTES


@pytest.fixture(scope="module")
def network() -> SentenceTransformer:
    return SentenceTransformer(str(MINILM), device="cpu")


@pytest.fixture(scope="module")
def expected(network: SentenceTransformer) -> np.ndarray:
    return network.encode([TEXT])[0]


@pytest.fixture(autouse=True)
def unharmed(stack: Stack, expected: np.ndarray) -> Iterator[None]:
    """Check after each test that the server responds, logged no traceback, and has no request in flight."""
    log_length, memory = len(stack.output()), resident(stack)
    yield
    assert exchange(stack, post(GOOD))[0].is_correct(expected)
    assert "Traceback" not in stack.output()[log_length:]
    assert resident(stack) < memory + MAX_GROWTH_BYTES
    deadline = time.monotonic() + 10
    while in_flight(stack) > 1 and time.monotonic() < deadline:  # the request for the metrics itself
        time.sleep(0.1)
    assert in_flight(stack) == 1


def resident(stack: Stack) -> int:
    """Return the resident bytes of the gateway's processes, without tritonserver and its stubs."""
    engine = {child.pid for child in stack.processes() if "triton" in child.name()}
    processes = [psutil.Process(stack.process.pid), *stack.processes()]
    return sum(process.memory_info().rss for process in processes if process.pid not in engine)


def in_flight(stack: Stack) -> float:
    (response,) = exchange(stack, get("/metrics"))
    values = re.findall(r"^triton_embed_requests_in_flight(?:\{.*\})? (\S+)$", response.body.decode(), re.MULTILINE)
    return sum(map(float, values))


def post(body: bytes, path: str = "/v1/embeddings", *headers: bytes) -> bytes:
    """Return a complete POST request, the last of its connection."""
    return request(b"POST", path.encode(), b"Content-Length: %d" % len(body), *headers) + body


def get(path: str, *headers: bytes) -> bytes:
    return request(b"GET", path.encode(), *headers)


def request(method: bytes, path: bytes, *headers: bytes) -> bytes:
    lines = [method + b" " + path + b" HTTP/1.1", b"Host: example.org", b"Connection: close", *headers]
    return b"\r\n".join(lines) + b"\r\n\r\n"


def open_to(stack: Stack) -> socket.socket:
    return socket.create_connection(("127.0.0.1", int(stack.url.rpartition(":")[2])), timeout=30)


def exchange(stack: Stack, *pieces: bytes, pause: float = 0.0) -> list[RawResponse]:
    """Send pieces on one connection and return all responses; fail after 30 s without a byte."""
    with open_to(stack) as connection:
        with contextlib.suppress(ConnectionError):  # the server may stop reading after a rejection
            for piece in pieces:
                connection.sendall(piece)
                time.sleep(pause)
        return read_responses(connection)


def read_responses(connection: socket.socket) -> list[RawResponse]:
    received = bytearray()
    with contextlib.suppress(ConnectionError):
        while piece := connection.recv(2**16):
            received += piece
    responses, rest = [], bytes(received)
    while rest:
        head, _, rest = rest.partition(b"\r\n\r\n")
        first, *lines = head.decode("ascii").split("\r\n")
        version, status, _ = first.split(" ", 2)
        assert version == "HTTP/1.1"
        headers = {name.lower(): value for name, _, value in (line.partition(": ") for line in lines)}
        size = int(headers.get("content-length", "0"))
        responses.append(RawResponse(int(status), headers, rest[:size]))
        rest = rest[size:]
    return responses


def field(name: str, value: bytes) -> bytes:
    """Return a body that is valid except for one field."""
    fields = {b"model": b'"minilm"', b"input": b'"Once upon a time"', name.encode(): value}
    return b"{" + b",".join(b'"%s":%s' % item for item in fields.items()) + b"}"


MILLION = 10**6
DEEP = 100_000
INVALID_BODIES = {
    "nothing": b"",
    "blanks": b" \n\t ",
    "a letter": b"x",
    "a string": b'"input"',
    "a number": b"1",
    "null": b"null",
    "a list": b'["a"]',
    "a form": b"input=a&model=minilm",
    "no quotes": b"{input: 'a'}",
    "only a key": b'{"input"',
    "cut in a string": b'{"input": "Once upon',
    "cut in a list": b'{"input": ["a", ',
    "cut in an escape": b'{"input": "\\u00',
    "a comma too many": b'{"input": "a",}',
    "two JSON documents": b'{"input": "a"}{"input": "b"}',
    "a comment": b'{"input": "a" /* b */}',
    "NaN": b'{"input": NaN}',
    "NaN in ids": b'{"input": [1, NaN]}',
    "Infinity": b'{"input": [Infinity]}',
    "minus Infinity": b'{"input": "a", "dimensions": -Infinity}',
    "hexadecimal": b'{"input": [0x10]}',
    "a leading zero": b'{"input": [007]}',
    "a line break in a string": b'{"input": "a\nb"}',
    "a NUL in a string": b'{"input": "a\x00b"}',
    "a NUL at the end": b'{"input": "a"}\x00',
    "deep lists": b"[" * DEEP,
    "deep lists, closed": b'{"input": ' + b"[" * DEEP + b"]" * DEEP + b"}",
    "deep objects": b'{"input":' * DEEP,
    "deep objects, closed": b'{"input":' * DEEP + b"1" + b"}" * DEEP,
    "deep lists in an ignored field": b'{"input": "a", "user": ' + b"[" * DEEP + b"]" * DEEP + b"}",
    "bytes that are not UTF-8": b'{"input": "\xff\xfe"}',
    "overlong UTF-8": b'{"input": "\xc0\xaf"}',
    "a surrogate in UTF-8": b'{"input": "\xed\xa0\x80"}',
    "UTF-8 cut short": b'{"input": "\xe4\xbd"}',
    "latin-1": '{"input": "naïve"}'.encode("latin-1"),
    "UTF-16": GOOD.decode().encode("utf-16"),
    "UTF-32": GOOD.decode().encode("utf-32"),
    "a lone surrogate": b'{"input": "\\ud800"}',
    "a lone low surrogate": b'{"input": "\\udc00 a"}',
    "surrogates in the wrong order": b'{"input": "\\udc00\\ud800"}',
    "a lone surrogate in a list": b'{"input": ["a", "\\ud800"]}',
}


@pytest.mark.parametrize("path", ROUTES)
def test_invalid_body_is_400(stack: Stack, path: str) -> None:
    for name, body in INVALID_BODIES.items():
        (response,) = exchange(stack, post(body, path))
        assert response.status == 400, name
        assert response.error["message"], name


# JSON literals, including some that Python cannot write.
NOT_A_STRING = (b"7", b"-1.5", b"true", b"[]", b'["a"]', b"{}", b"[[]]", b"18446744073709551616")
NOT_AN_OPTION = (*NOT_A_STRING, b'"nonsense"', b'""', b'"a\\u0000"', b'"' + b"x" * 100_000 + b'"')
INVALID_FIELDS = {
    "model": NOT_A_STRING,
    "encoding_format": (b"7", b"true", b"[]", b'["float","float"]', b"{}", b'["hex"]', b'[["float"]]', b'"hex"'),
    "dimensions": (
        *(
            b'"128"',
            b"1.5",
            b"1.0",
            b"true",
            b"{}",
            b"-1",
            b"0",
            b"385",
            b"9223372036854775807",
            b"9223372036854775808",
        ),
        *(b"18446744073709551615", b"18446744073709551616", b"1e30", b"[]", b"[true]", b'["1"]', b"[0]", b"[-1]"),
        *(b"[1.5]", b"[[1]]", b"[18446744073709551616]", b"[" + b",".join([b"1"] * 10_000) + b"]"),
    ),
    "instruction": (*NOT_A_STRING, b'"find"', b'"a\\u0000"'),
    "prompt_name": (*NOT_A_STRING, b'"nonsense"', b'"a\\u0000"'),
    "input_type": (*NOT_A_STRING, b'"nonsense"', b'"a\\u0000"'),
    "truncate": (b"7", b"1.5", b"[]", b"{}", b'"middle"', b'""', b'"end\\u0000"', b'["end"]'),
    "long_text": NOT_AN_OPTION,
    "output_dtype": NOT_AN_OPTION,
    "return_receipt": (b"7", b'"true"', b"[]", b"{}", b"1.0"),
    "on_error": NOT_AN_OPTION,
    "priority": tuple(value for value in NOT_AN_OPTION if value != b"7"),
    "token_encoding": NOT_AN_OPTION,
}


@pytest.mark.parametrize("name", INVALID_FIELDS)
def test_invalid_field_is_named(stack: Stack, name: str) -> None:
    for value in INVALID_FIELDS[name]:
        (response,) = exchange(stack, post(field(name, value)))
        assert response.status == 400, value[:100]
        assert response.error["param"] == name, value[:100]
        assert len(response.body) < 1000, value[:100]


@pytest.mark.parametrize("name", INVALID_FIELDS)
def test_lone_surrogate_in_any_field(stack: Stack, name: str) -> None:
    for value in (b'"\\ud800"', b'"a\\udfffb"', b'["\\ud800"]', b'{"\\ud800": 1}'):
        assert exchange(stack, post(field(name, value)))[0].error["type"], value


INVALID_INPUTS = {
    "null": b"null",
    "an empty string": b'""',
    "blanks": b'" \\t\\n\\u2003 "',
    "an empty list": b"[]",
    "empty lists": b"[[],[]]",
    "an empty object": b"{}",
    "empty objects": b"[{}]",
    "a number": b"7",
    "true": b"true",
    "a fraction": b"[1.5]",
    "an integral fraction": b"[1.0]",
    "an exponent": b"[1e3]",
    "booleans": b"[true, false]",
    "a boolean among ids": b"[101, true, 102]",
    "null among ids": b"[101, null]",
    "a negative id": b"[101, -1, 102]",
    "an id beyond the vocabulary": b"[30522]",
    "an id of 31 bits": b"[2147483648]",
    "an id of 32 bits": b"[4294967397]",  # 101 when truncated to 32 bits
    "an id of 63 bits": b"[9223372036854775808]",
    "an id of 64 bits": b"[18446744073709551717]",
    "an id of 200 digits": b"[" + b"9" * 200 + b"]",
    "ids and strings": b'[101, "a"]',
    "strings and ids": b'["a", 101]',
    "strings and lists of ids": b'["a", [101]]',
    "lists of ids and strings": b'[[101], "a"]',
    "lists in lists": b"[[[101]]]",
    "lists of fractions": b"[[101], [1.5]]",
    "one blank string of many": b'["a", " "]',
    "null of many": b'["a", null]',
    "an unknown key": b'{"video": "a"}',
    "an input in an input": b'{"input": {"input": {"input": "a"}}}',
    "a nested input of the wrong type": b'{"input": 7}',
    "a part without a type": b'[[{"type": "text", "text": "a"}, {"text": "b"}]]',
    "a part of an unknown type": b'[{"type": "audio", "audio": "a"}]',
    "a part whose type is a list": b'[{"type": ["text"], "text": "a"}]',
    "a part whose type is an object": b'[{"type": {}, "text": "a"}]',
    "a part without a text": b'[{"type": "text"}]',
    "a text of the wrong type": b'{"text": ["a"]}',
    "an image for a text model": b'{"image": "data:image/png;base64,AAAA"}',
    "a file for an image": b'{"image": "/etc/passwd"}',
    "a file's URL for an image": b'{"image": "file:///etc/passwd"}',
    "an image of the wrong type": b'{"image": {"url": {}}}',
    "a million ids": b"[" + b",".join([b"101"] * MILLION) + b"]",
    "a million strings": b"[" + b",".join([b'"a"'] * MILLION) + b"]",
    "a million lists": b"[" + b",".join([b"[101]"] * MILLION) + b"]",
    "a million empty lists": b"[" + b",".join([b"[]"] * MILLION) + b"]",
    "a million objects": b"[" + b",".join([b'{"text":"a"}'] * MILLION) + b"]",
    "a million keys": b"{" + b",".join(b'"%d":1' % i for i in range(MILLION)) + b"}",
    "a million blank strings": b"[" + b",".join([b'" "'] * MILLION) + b"]",
    "a million empty objects": b"[" + b",".join([b"{}"] * MILLION) + b"]",
    "a million images": b'{"image": [' + b",".join([b'"AAAA"'] * MILLION) + b"]}",
}


@pytest.mark.parametrize("name", INVALID_INPUTS)
def test_invalid_input_is_400(stack: Stack, name: str) -> None:
    assert_rejected(stack, field("input", INVALID_INPUTS[name]))


@pytest.mark.parametrize("name", [name for name in INVALID_INPUTS if "million" in name and "keys" not in name])
def test_on_error_report_does_not_bypass_limits(stack: Stack, name: str) -> None:
    """Check that a million invalid inputs do not become a million error objects."""
    assert_rejected(stack, field("input", INVALID_INPUTS[name])[:-1] + b', "on_error": "report"}')


def assert_rejected(stack: Stack, body: bytes) -> None:
    start = time.monotonic()
    (response,) = exchange(stack, post(body))
    assert response.status == 400
    assert response.error["param"] == "input"
    assert len(response.body) < 1000
    assert time.monotonic() - start < MAX_SECONDS


@pytest.mark.parametrize(
    ("text", "decoded"),
    [
        (b"a\\u0000b", "a\0b"),
        (b"\\ud83d\\ude00 \\u202e \\ufffe \\uffff", "😀 \u202e \ufffe \uffff"),
        (b"e" + b"\\u0301" * 5000, "e" + "\u0301" * 5000),
        (b"ab " * 100_000, "ab " * 100_000),
        (b"ab" * 120_000, "ab" * 120_000),
        (b"a " * 15_000_000, "a " * 1_000),
        (b"[PAD] [MASK] [CLS] </s> <|endoftext|>", "[PAD] [MASK] [CLS] </s> <|endoftext|>"),
    ],
    ids=[
        "NUL",
        "noncharacters",
        "5000 accents",
        "100,000 words",
        "a word of 240 KB",
        "a text of 30 MB",
        "special tokens",
    ],
)
def test_unusual_texts_have_the_reference_vector(
    stack: Stack, network: SentenceTransformer, text: bytes, decoded: str
) -> None:
    (response,) = exchange(stack, post(field("input", b'"' + text + b'"')))
    assert response.is_correct(network.encode([decoded])[0])


def test_last_duplicate_key_counts(stack: Stack, expected: np.ndarray) -> None:
    body = b'{"model": "nowhere", "input": 7, "input": "Once upon a time", "model": "minilm"}'
    assert exchange(stack, post(body))[0].is_correct(expected)


def test_nul_does_not_truncate_an_instruction(stack: Stack, qwen3: Path) -> None:
    """Send a NUL: it is rejected or part of the instruction."""
    for name, value in (("instruction", "Find\0 nothing"), ("prompt_name", "query\0 nonsense")):
        (response,) = exchange(stack, post(json.dumps({"model": "qwen3", "input": TEXT, name: value}).encode()))
        if response.status == 200:
            rows = oracles.token_ids(qwen3, [f"Instruct: {value}\nQuery:{TEXT}"])
            assert name == "instruction"
            assert response.is_correct(oracles.decoder_vectors(qwen3, rows)[0])
        else:
            assert response.status == 400
            assert response.error["param"] == name


@pytest.mark.parametrize("path", ["/v1/embeddings", "/encode", "/tokenize"])
def test_unknown_model_names_are_404(stack: Stack, path: str) -> None:
    key = {"/encode": "text"}.get(path, "input")
    for name in (
        "",
        " ",
        "\0",
        "minilm\0",
        "../minilm",
        "minilm/../minilm",
        "*",
        "a" * 1_000_000,
        "😀",
        "minilm\r\nX: y",
    ):
        (response,) = exchange(stack, post(json.dumps({"model": name, key: "a"}).encode(), path))
        assert response.status == (404 if name else 400), name[:100]
        assert response.error["param"] == "model"
        assert len(response.body) < 1000


INVALID_RERANK_FIELDS = {
    "query": (b"7", b"true", b"[]", b'["a"]', b"{}", b'""', b'" "', b'{"video": "a"}', b"null", b'{"text": 7}'),
    "documents": (b"7", b'"a"', b"{}", b"[]", b"[7]", b"[null]", b'[["a"]]', b'[" "]', b'[{"text": 7}]', b"[{}]"),
    "top_n": (b"0", b"-1", b"1.5", b'"1"', b"true", b"[]", b"{}", b"1e30"),
    "return_documents": (b"1", b'"true"', b"[]", b"{}"),
}


@pytest.mark.parametrize("name", INVALID_RERANK_FIELDS)
def test_invalid_rerank_is_400(stack: Stack, name: str) -> None:
    for value in INVALID_RERANK_FIELDS[name]:
        fields = {b"model": b'"minilm"', b"query": b'"a"', b"documents": b'["b"]', name.encode(): value}
        body = b"{" + b",".join(b'"%s":%s' % item for item in fields.items()) + b"}"
        (response,) = exchange(stack, post(body, "/v1/rerank"))
        assert response.status == 400, value
        assert response.error["param"] in {name, "documents"}, value


def test_invalid_score_is_400(stack: Stack) -> None:
    for text_1 in (
        b"7",
        b"true",
        b"{}",
        b"[]",
        b"[7]",
        b"[null]",
        b'[["a"]]',
        b'""',
        b'[" "]',
        b'["a","b","c"]',
        b"null",
    ):
        (response,) = exchange(
            stack, post(b'{"model": "minilm", "text_1": %s, "text_2": ["a", "b"]}' % text_1, "/v1/score")
        )
        assert response.status == 400, text_1
        assert response.error["param"] in {"text_1", "text_2"}, text_1


HEAD = b"POST /v1/embeddings HTTP/1.1\r\nHost: example.org\r\n"
CHUNKED = HEAD + b"Connection: close\r\nTransfer-Encoding: chunked\r\n"
CHUNK = b"%x\r\n%s\r\n" % (len(GOOD), GOOD)
LENGTH = b"Content-Length: %d\r\n" % len(GOOD)
UPGRADE = HEAD + b"Connection: close, Upgrade, HTTP2-Settings\r\n"
INVALID_HTTP = {
    "a length too short": HEAD + b"Content-Length: 5\r\n\r\n" + GOOD,
    "a negative length": HEAD + b"Content-Length: -1\r\n\r\n" + GOOD,
    "a length with a sign": HEAD + b"Content-Length: +%d\r\n\r\n" % len(GOOD) + GOOD,
    "a length that is not a number": HEAD + b"Content-Length: all\r\n\r\n" + GOOD,
    "an empty length": HEAD + b"Content-Length:\r\n\r\n" + GOOD,
    "a length of 30 digits": HEAD + b"Content-Length: " + b"9" * 30 + b"\r\n\r\n" + GOOD,
    "two lengths": HEAD + LENGTH + b"Content-Length: 5\r\n\r\n" + GOOD,
    "two equal lengths": HEAD + LENGTH + LENGTH + b"\r\n" + GOOD,
    "a list of lengths": HEAD + b"Content-Length: 5, 5\r\n\r\n" + GOOD,
    "a length and chunks": HEAD + LENGTH + b"Transfer-Encoding: chunked\r\n\r\n" + CHUNK + b"0\r\n\r\n",
    "an encoding that is not chunked": HEAD + b"Transfer-Encoding: gzip\r\n\r\n" + GOOD,
    "chunked twice": HEAD + b"Transfer-Encoding: chunked, chunked\r\n\r\n" + CHUNK + b"0\r\n\r\n",
    "chunked, then something else": HEAD + b"Transfer-Encoding: chunked, gzip\r\n\r\n" + CHUNK + b"0\r\n\r\n",
    "an invalid chunk size": CHUNKED + b"\r\nzz\r\n" + GOOD,
    "a negative chunk size": CHUNKED + b"\r\n-1\r\n" + GOOD,
    "a chunk size of 30 digits": CHUNKED + b"\r\n" + b"f" * 30 + b"\r\n" + GOOD,
    "a chunk size too short": CHUNKED + b"\r\n5\r\n" + GOOD + b"\r\n0\r\n\r\n",
    "a chunk without an end": CHUNKED + b"\r\n%x\r\n" % len(GOOD) + GOOD + b"0\r\n\r\n\r\n",
    "an unknown method": b"EMBED /v1/embeddings HTTP/1.1\r\nHost: a\r\n\r\n",
    "a method in lower case": b"post /v1/embeddings HTTP/1.1\r\nHost: a\r\n\r\n",
    "an invalid version": b"GET /health HTTP/x.y\r\nHost: a\r\n\r\n",
    "a version of another protocol": b"GET /health FTP/1.1\r\nHost: a\r\n\r\n",
    "HTTP/2": b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes(100),
    "TLS": b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(range(256)),
    "every byte value": bytes(range(256)) * 20,
    "zeros": bytes(10_000),
    "a header without a colon": b"GET /health HTTP/1.1\r\nHost a\r\n\r\n",
    "a header without a name": b"GET /health HTTP/1.1\r\nHost: a\r\n: b\r\n\r\n",
    "a blank before the colon": b"GET /health HTTP/1.1\r\nHost : a\r\n\r\n",
    "a folded header": b"GET /health HTTP/1.1\r\nHost: a\r\nX: b\r\n c\r\n\r\n",
    "a NUL in a header": b"GET /health HTTP/1.1\r\nHost: a\r\nX: b\x00c\r\n\r\n",
    "a carriage return in a header": b"GET /health HTTP/1.1\r\nHost: a\r\nX: b\rc\r\n\r\n",
    "a raw byte in the path": b"GET /v1/models/\xff HTTP/1.1\r\nHost: a\r\n\r\n",
    "a blank in the path": b"GET /v1/ models HTTP/1.1\r\nHost: a\r\n\r\n",
    "100,000 headers": b"GET /health HTTP/1.1\r\nHost: a\r\n" + b"a: b\r\n" * 100_000 + b"\r\n",
    "a header of 5 MB": b"GET /health HTTP/1.1\r\nHost: a\r\nX: " + b"a" * 5_000_000 + b"\r\n\r\n",
    "a header's name of 5 MB": b"GET /health HTTP/1.1\r\nHost: a\r\n" + b"a" * 5_000_000 + b": b\r\n\r\n",
    "a path of 5 MB": b"GET /" + b"a" * 5_000_000 + b" HTTP/1.1\r\nHost: a\r\n\r\n",
    "a header without an end": b"GET /health HTTP/1.1\r\nHost: a\r\nX: " + b"a" * 5_000_000,
    "a chunk's extension of 5 MB": CHUNKED + b"\r\n5;" + b"a" * 5_000_000 + b"\r\n",
    "trailers of 5 MB": CHUNKED + b"\r\n" + CHUNK + b"0\r\n" + b"a: b\r\n" * 800_000 + b"\r\n",
}


@pytest.mark.parametrize("name", INVALID_HTTP)
def test_invalid_http_is_rejected(stack: Stack, name: str) -> None:
    """Check for an error and a closed connection; a complete request before the invalid bytes is answered too."""
    responses = exchange(stack, INVALID_HTTP[name])
    assert len(responses) <= 2
    for response in responses:
        assert response.status in (400, 413, 414, 431)
        assert response.error["message"]
        assert response.headers["content-length"] == str(len(response.body))


UNUSUAL_HTTP = {
    "plain": post(GOOD),
    "HTTP/1.0": post(GOOD).replace(b"HTTP/1.1", b"HTTP/1.0", 1),
    "HTTP/1.0 without a host": b"POST /v1/embeddings HTTP/1.0\r\n" + LENGTH + b"\r\n" + GOOD,
    "an absolute address": post(GOOD, "http://169.254.169.254/v1/embeddings"),
    "a query": post(GOOD, "/v1/embeddings?a=b&a=%ff&"),
    "chunks": CHUNKED + b"\r\n" + CHUNK + b"0\r\n\r\n",
    "chunks of a byte": CHUNKED + b"\r\n" + b"".join(b"1\r\n%c\r\n" % byte for byte in GOOD) + b"0\r\n\r\n",
    "a chunk's extension and trailers": CHUNKED
    + b"\r\n"
    + CHUNK.replace(b"\r\n", b";a=b\r\n", 1)
    + b"0\r\nX: y\r\n\r\n",
    "line breaks before": b"\r\n\r\n" + post(GOOD),
    "a form's type": post(GOOD, "/v1/embeddings", b"Content-Type: application/x-www-form-urlencoded"),
    "an invalid type": post(GOOD, "/v1/embeddings", b"Content-Type: \xff;;="),
    "a wrong charset": post(GOOD, "/v1/embeddings", b"Content-Type: application/json; charset=utf-16"),
    "an unknown expectation": post(GOOD, "/v1/embeddings", b"Expect: 200-ok"),
    "bytes in a header": post(GOOD, "/v1/embeddings", b"X-Name: \xff\xfe", b"Accept-Language: \xe4"),
    "an invalid host": post(GOOD).replace(b"Host: example.org", b"Host: a b:c:d/\xff"),
    "an upgrade to HTTP/2": UPGRADE
    + LENGTH
    + b"Upgrade: h2c\r\nHTTP2-Settings: AAMAAABkAAQCAAAAAAIAAAAA\r\n\r\n"
    + GOOD,
    "an upgrade with chunks": UPGRADE + b"Upgrade: h2c\r\nTransfer-Encoding: chunked\r\n\r\n" + CHUNK + b"0\r\n\r\n",
    "an upgrade to a web socket": UPGRADE + LENGTH + b"Upgrade: websocket\r\nSec-WebSocket-Version: 13\r\n\r\n" + GOOD,
}


@pytest.mark.parametrize("name", UNUSUAL_HTTP)
def test_unusual_http_is_accepted(stack: Stack, expected: np.ndarray, name: str) -> None:
    (response,) = exchange(stack, UNUSUAL_HTTP[name])
    assert response.is_correct(expected)


@pytest.mark.parametrize("name", UNUSUAL_HTTP)
def test_unusual_http_in_pieces_is_accepted(stack: Stack, expected: np.ndarray, name: str) -> None:
    data = UNUSUAL_HTTP[name]
    cuts = [0, *range(1, len(data), max(1, len(data) // 20)), len(data)]
    pieces = [data[start:end] for start, end in pairwise(cuts)]
    (response,) = exchange(stack, *pieces, pause=0.002)
    assert response.is_correct(expected)


def test_connection_stays_usable_after_an_upgrade_offer(stack: Stack, expected: np.ndarray) -> None:
    """Send HTTP/2 upgrade offers but continue with HTTP/1.1, as JDK's HttpClient does."""
    offer = HEAD + b"Connection: Upgrade, HTTP2-Settings\r\nUpgrade: h2c\r\nHTTP2-Settings: AAMA\r\n" + LENGTH
    responses = exchange(stack, offer + b"\r\n" + GOOD, offer + b"\r\n" + GOOD, post(GOOD), pause=0.1)
    assert [response.is_correct(expected) for response in responses] == [True] * 3


def test_2000_upgrade_offers_on_one_connection(stack: Stack) -> None:
    offer = b"GET /nowhere HTTP/1.1\r\nHost: a\r\nConnection: Upgrade\r\nUpgrade: h2c\r\n\r\n"
    responses = exchange(stack, offer * 2_000 + get("/nowhere"))
    assert [response.status for response in responses] == [404] * 2_001


def test_pipelined_requests_are_answered_in_order(stack: Stack, expected: np.ndarray) -> None:
    more = HEAD + LENGTH + b"\r\n" + GOOD
    bad = HEAD + b"Content-Length: 1\r\n\r\n{"
    responses = exchange(stack, more + bad + more + bad + post(GOOD))
    assert [response.status for response in responses] == [200, 400, 200, 400, 200]
    assert all(response.is_correct(expected) for response in responses[::2])


def test_invalid_http_after_a_valid_request(stack: Stack, expected: np.ndarray) -> None:
    """Accept a response to the valid request or none; responses must not be mixed."""
    responses = exchange(stack, HEAD + LENGTH + b"\r\n" + GOOD + b"EMBED nonsense\r\n\r\n")
    assert len(responses) <= 2
    for response in responses:
        assert response.status == 400 or response.is_correct(expected)


def test_http_0_9(stack: Stack) -> None:
    """Accept no response or one of HTTP/1.1, because HTTP/0.9 is not supported."""
    with open_to(stack) as connection:
        connection.sendall(b"GET /health\r\n")
        connection.shutdown(socket.SHUT_WR)
        for response in read_responses(connection):
            assert response.status in (200, 400)


def test_100_continue(stack: Stack, expected: np.ndarray) -> None:
    with open_to(stack) as connection:
        connection.sendall(request(b"POST", b"/v1/embeddings", LENGTH.strip(), b"Expect: 100-continue"))
        assert connection.recv(100).startswith(b"HTTP/1.1 100 Continue\r\n\r\n")
        connection.sendall(GOOD)
        (response,) = read_responses(connection)
    assert response.is_correct(expected)


def test_too_large_body_gets_no_100_continue(stack: Stack) -> None:
    with open_to(stack) as connection:
        length = b"Content-Length: %d" % (LIMIT + 1)
        connection.sendall(request(b"POST", b"/v1/embeddings", length, b"Expect: 100-continue"))
        (response,) = read_responses(connection)
    assert response.status == 413
    assert response.error["code"] == "body_too_large"


@pytest.mark.parametrize("chunked", [False, True])
@pytest.mark.parametrize("excess", [0, 1])
def test_body_limit(stack: Stack, expected: np.ndarray, excess: int, chunked: bool) -> None:
    body = GOOD + b" " * (LIMIT + excess - len(GOOD))
    data = CHUNKED + b"\r\n%x\r\n" % len(body) + body + b"\r\n0\r\n\r\n" if chunked else post(body)
    (response,) = exchange(stack, data)
    if excess:
        assert response.status == 413
        assert response.error["code"] == "body_too_large"
    else:
        assert response.is_correct(expected)


def test_decompression_bomb_is_rejected(stack: Stack) -> None:
    bomb = gzip.compress(GOOD + bytes(50_000_000))
    for encoding, status in ((b"gzip", 413), (b"deflate", 413), (b"br", 400), (b"zstd", 400), (b"nonsense", 400)):
        (response,) = exchange(stack, post(bomb, "/v1/embeddings", b"Content-Encoding: " + encoding))
        assert response.status == status
        assert response.error["message"]


INCOMPLETE_REQUESTS = {
    "in its head": HEAD + b"Content-Le",
    "before its body": HEAD + LENGTH + b"\r\n",
    "in its body": HEAD + LENGTH + b"\r\n" + GOOD[:10],
    "one byte before its end": HEAD + LENGTH + b"\r\n" + GOOD[:-1],
    "in a chunk's size": CHUNKED + b"\r\n1",
    "in a chunk": CHUNKED + b"\r\n%x\r\n" % len(GOOD) + GOOD[:10],
    "between chunks": CHUNKED + b"\r\n" + CHUNK,
    "before the last line break": CHUNKED + b"\r\n" + CHUNK + b"0\r\n",
}


@pytest.mark.parametrize("name", INCOMPLETE_REQUESTS)
def test_incomplete_request_leaves_nothing_in_flight(stack: Stack, name: str) -> None:
    """Close or reset the connection. `unharmed` checks that nothing stays in flight."""
    for reset in (False, True):
        connection = open_to(stack)
        connection.sendall(INCOMPLETE_REQUESTS[name])
        time.sleep(0.05)
        if reset:
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        connection.close()


def test_body_that_never_arrives_gets_408(stack: Stack) -> None:
    connections = {name: open_to(stack) for name in INCOMPLETE_REQUESTS if name != "in its head"}
    start = time.monotonic()
    for name, connection in connections.items():
        connection.sendall(INCOMPLETE_REQUESTS[name])
    for name, connection in connections.items():
        (response,) = read_responses(connection)
        connection.close()
        assert response.status == 408, name
        assert response.error["message"], name
    assert BODY_SECONDS - 0.5 < time.monotonic() - start < BODY_SECONDS + 6


def test_slow_senders_get_408_and_do_not_block_others(stack: Stack, expected: np.ndarray) -> None:
    """Send a byte every 0.25 s on forty connections. Other requests succeed, and these get a 408."""
    body = [HEAD + LENGTH + b"\r\n", *(b"%c" % byte for byte in GOOD)]
    connections = [open_to(stack) for _ in range(40)]
    try:
        start = time.monotonic()
        for i in range(6):
            for connection in connections:
                with contextlib.suppress(ConnectionError):
                    connection.sendall(body[i])
            assert exchange(stack, post(GOOD))[0].is_correct(expected)
            time.sleep(0.25)
        for connection in connections:
            (response,) = read_responses(connection)
            assert response.status == 408
        assert time.monotonic() - start < BODY_SECONDS + 8
    finally:
        for connection in connections:
            connection.close()


def test_300_silent_connections_do_not_block_others(stack: Stack, expected: np.ndarray) -> None:
    connections = [open_to(stack) for _ in range(300)]
    for connection in connections[::2]:
        connection.sendall(b"GET / HT")
    start = time.monotonic()
    assert exchange(stack, post(GOOD))[0].is_correct(expected)
    assert time.monotonic() - start < 5
    for connection in connections:
        connection.close()


def test_client_that_does_not_read_is_throttled(stack: Stack, expected: np.ndarray) -> None:
    """Send requests without reading responses: the server must stop reading, not pile up responses."""
    body = json.dumps({"model": "minilm", "input": [TEXT] * 100}).encode()
    data = HEAD + b"Content-Length: %d\r\n\r\n" % len(body) + body
    with open_to(stack) as connection:
        connection.setblocking(False)
        sent = 0
        deadline = time.monotonic() + 4
        while time.monotonic() < deadline and sent < 3_000:
            try:
                connection.send(data)
                sent += 1
            except BlockingIOError:
                time.sleep(0.05)
            except ConnectionError:
                break
        assert exchange(stack, post(GOOD))[0].is_correct(expected)


def test_valid_and_invalid_requests_at_once(stack: Stack, expected: np.ndarray) -> None:
    """Check that no request gets the response of another."""
    bad = [post(field("input", value)) for value in (b'""', b"[101, -1]", b"{}", b"[1.5]")]

    def valid_request(_: int) -> bool:
        return exchange(stack, post(GOOD))[0].is_correct(expected)

    def invalid_request(i: int) -> bool:
        return exchange(stack, bad[i % len(bad)])[0].status == 400

    with ThreadPoolExecutor(8) as pool:
        outcomes = [pool.submit(valid_request if i % 2 else invalid_request, i) for i in range(200)]
        assert all(outcome.result() for outcome in outcomes)


@pytest.mark.parametrize("path", ROUTES)
@pytest.mark.parametrize(
    "method", ["GET", "PUT", "PATCH", "DELETE", "HEAD", "OPTIONS", "TRACE", "PROPFIND", "M-SEARCH"]
)
def test_wrong_method_is_405(stack: Stack, path: str, method: str) -> None:
    (response,) = exchange(stack, request(method.encode(), path.encode()))
    assert response.status == 405
    assert "POST" in response.headers["allow"]
    if method != "HEAD":
        assert response.error["code"] == "method_not_allowed"


@pytest.mark.parametrize(
    "path", ["/health", "/v1/models", "/metrics", "/get_model_info", "/", "/docs", "/openapi.json"]
)
def test_post_to_a_get_route_is_405(stack: Stack, path: str) -> None:
    for body in (b"", GOOD, bytes(100_000)):
        (response,) = exchange(stack, post(body, path))
        assert response.status == 405
        assert response.error["message"]


STATIC = (
    "/",
    "/docs/",
    "/static/",
    "/assets/",
    "/v1/models/",
    "/docs/swagger-ui.css/",
    "/favicon.ico/",
    "/openapi.json/",
)
TRAVERSALS = (
    *("../../../../../../etc/passwd", "..%2f..%2f..%2f..%2fetc%2fpasswd", "%2e%2e/%2e%2e/%2e%2e/etc/passwd"),
    *("..%252f..%252fetc%252fpasswd", "....//....//etc/passwd", "..\\..\\..\\etc\\passwd", "..%5c..%5cetc%5cpasswd"),
    *("/etc/passwd", "//etc/passwd", "%2fetc%2fpasswd", "..;/..;/etc/passwd", "file:///etc/passwd", "page.html%00.css"),
    *("..%c0%af..%c0%afetc/passwd", "~root/.bashrc", ".git/config", "settings.py", "../settings.py", "%2e%2e%2fapp.py"),
)


@pytest.mark.parametrize("prefix", STATIC)
def test_path_traversal_is_rejected(stack: Stack, prefix: str) -> None:
    for traversal in TRAVERSALS:
        (response,) = exchange(stack, get(prefix + traversal))
        assert response.status in (400, 404), traversal
        assert response.error["message"], traversal
        assert b"root:" not in response.body, traversal


def test_invalid_paths_are_rejected(stack: Stack) -> None:
    paths = (
        "/%",
        "/%zz",
        "/%00",
        "/%ff",
        "/v1/models/%ff%fe",
        "/v1/models/%00",
    )
    paths += (
        "/a" * 2_000,
        "/v1/models/" + "a" * 10_000,
        "/%0d%0aX-Evil:%20yes",
        "/v1/models/%0d%0aX-Evil:%20yes",
        "/;/",
        "*",
    )
    paths += ("//evil.example/%2f..", "/\\evil.example", "/v1//embedding", "/V1/EMBEDDINGS", "/v1/models/..")
    for path in paths:
        (response,) = exchange(stack, get(path))
        assert response.status in (400, 404), path[:100]
        assert response.error["message"], path[:100]
        assert len(response.body) < 1000, path[:100]
        assert "x-evil" not in response.headers
        assert "location" not in response.headers


def test_invalid_query_is_404(stack: Stack) -> None:
    for query in ("model=%ff", "model=%ed%a0%80", "model=%00", "model=" + "a" * 10_000, "model=..%2f", "model=nowhere"):
        (response,) = exchange(stack, get(f"/get_model_info?{query}"))
        assert response.status == 404, query[:100]
        assert len(response.body) < 1000


MALFORMED_HEADERS = {
    "x-request-id": (b"", b"a b", b"\xff\xfe", b"<script>", b"a" * 10_000, b"a\tb", b"../../x", b"a,b", b'"'),
    "traceparent": (b"", b"00", b"\xff", b"00-" + b"0" * 32 + b"-" + b"0" * 16 + b"-01", b"z" * 55, b"a" * 10_000),
    "tracestate": (b"", b"\xff", b"a" * 10_000, b"a=b," * 100),
    "x-forwarded-for": (b"\xff", b"1.1.1.1, " * 1000),
    "accept": (b"text/html", b"\xff", b"image/*;q=x"),
    "accept-encoding": (b"gzip;q=nonsense", b"\xff", b"br, zstd, identity;q=0"),
    "origin": (b"null", b"http://evil.example", b"\xff"),
    "range": (b"bytes=0-1", b"bytes=-1,99-0"),
    "if-none-match": (b"*", b"\xff"),
    "cookie": (b"a=\xff; " * 100,),
    "authorization": (b"", b"Bearer", b"Bearer \xff", b"Basic " + b"a" * 10_000, b"Negotiate"),
}


@pytest.mark.parametrize("name", MALFORMED_HEADERS)
def test_malformed_header_is_ignored(stack: Stack, expected: np.ndarray, name: str) -> None:
    """Check that the request succeeds and the header's value is not returned."""
    for value in MALFORMED_HEADERS[name]:
        (response,) = exchange(stack, post(GOOD, "/v1/embeddings", name.encode() + b": " + value))
        assert response.is_correct(expected), value[:100]
        assert re.fullmatch(r"[A-Za-z0-9._-]{1,128}", response.headers["x-request-id"])
        assert "access-control-allow-origin" not in response.headers


def test_request_id_is_returned(stack: Stack) -> None:
    (response,) = exchange(stack, get("/health", b"X-Request-Id: my-own.id_7"))
    assert response.headers["x-request-id"] == "my-own.id_7"


def test_invalid_timeout_is_400(stack: Stack) -> None:
    for value in (b"", b"soon", b"0", b"-1", b"nan", b"inf", b"-inf", b"1e999", b"\xff", b"1,5", b"0x10", b"9" * 5_000):
        (response,) = exchange(stack, post(GOOD, "/v1/embeddings", b"X-Request-Timeout: " + value))
        assert response.status == 400, value[:100]
        assert response.error["param"] == "x-request-timeout"


@pytest.fixture(scope="module")
def triton(stack: Stack) -> Iterator[service_pb2_grpc.GRPCInferenceServiceStub]:
    """Connect to tritonserver's gRPC port."""
    with grpc.insecure_channel(stack.grpc) as channel:
        yield service_pb2_grpc.GRPCInferenceServiceStub(channel)


def infer_request(inputs: Any, contents: list[bytes], outputs: Any = None, **parameters: Any) -> Any:
    """Return a ModelInferRequest. Inputs are (name, type, shape); values of `outputs` are parameters by output."""
    message = service_pb2.ModelInferRequest(model_name="minilm", raw_input_contents=contents)
    for name, datatype, shape in inputs:
        message.inputs.add(name=name, datatype=datatype, shape=shape)
    for name, values in ({"EMBEDDING": {}} if outputs is None else outputs).items():
        _set_parameters(message.outputs.add(name=name).parameters, values)
    _set_parameters(message.parameters, parameters)
    return message


def _set_parameters(target: Any, values: dict[str, Any]) -> None:
    fields = {bool: "bool_param", int: "int64_param", str: "string_param", float: "double_param"}
    for name, value in values.items():
        setattr(target[name], fields[type(value)], value)


def cells(*values: bytes) -> bytes:
    return b"".join(struct.pack("<I", len(value)) + value for value in values)


SHAPES = ((), (0,), (0, 1), (1,), (-1, 1), (2, -1), (1, 1, 1), (2**31, 1), (2**62, 4), (2**63 - 1,) * 2, (-(2**63), 1))
LYING_BYTES = {
    "a length cut short": b"\x01",
    "a cell cut short": b"\x05\0\0\0ab",
    "a length of 4 GB": b"\xff\xff\xff\xffab",
    "a negative length": b"\0\0\0\x80ab",
    "a length that wraps": struct.pack("<I", 2**32 - 4) + b"abcd",
    "a cell too many": cells(b"a", b"b", b"c"),
    "a cell too few": cells(b"a"),
    "nothing": b"",
    "a byte too many": cells(b"a", b"b") + b"\1",
}
RESERVED = (
    *("sequence_id", "sequence_start", "sequence_end", "priority", "timeout", "headers", "binary_data_output"),
    *("shared_memory_region", "shared_memory_offset", "shared_memory_byte_size", "binary_data_size", "classification"),
    *("triton_enable_empty_final_response", "triton_final_response", "", "id"),
)
PARAMETER_VALUES = ("a", "", 0, 1, -1, 2**63 - 1, -(2**63), True, 1.5, float("nan"), "x" * 100_000)
TWO_TEXTS, TWO_CELLS = ("TEXT", "BYTES", (2, 1)), cells(b"a", b"b")


def hostile_infer_requests() -> Iterator[tuple[str, Any]]:
    for shape in SHAPES:
        yield f"TEXT of {shape}", infer_request([("TEXT", "BYTES", shape)], [TWO_CELLS])
        yield f"INPUT_IDS of {shape}", infer_request([("INPUT_IDS", "INT32", shape)], [bytes(8)])
        yield f"no ids of {shape}", infer_request([("INPUT_IDS", "INT32", shape)], [b""], {"INFO": {}})
    for name, content in LYING_BYTES.items():
        yield name, infer_request([TWO_TEXTS], [content])
    yield "no content", infer_request([TWO_TEXTS], [])
    yield "two contents", infer_request([TWO_TEXTS], [TWO_CELLS] * 2)
    yield "one content of two", infer_request([TWO_TEXTS, ("INPUT_IDS", "INT32", (2, 1))], [TWO_CELLS])
    yield "no inputs", infer_request([], [])
    yield "two TEXTs", infer_request([TWO_TEXTS] * 2, [TWO_CELLS] * 2)
    yield "an unknown output", infer_request([TWO_TEXTS], [TWO_CELLS], {"X" * 100_000: {}})
    for datatype in ("", "INT64", "BOOL", "FP32", "bytes", "X" * 100_000):
        yield f"type {datatype[:9]}", infer_request([("TEXT", datatype, (2, 1))], [TWO_CELLS])
    for name in RESERVED:
        for value in PARAMETER_VALUES:
            yield f"{name} {value!r:.20}", infer_request([TWO_TEXTS], [TWO_CELLS], **{name: value})
            yield (
                f"output's {name} {value!r:.20}",
                infer_request([TWO_TEXTS], [TWO_CELLS], {"EMBEDDING": {name: value}}),
            )
    yield "many parameters", infer_request([TWO_TEXTS], [TWO_CELLS], **{f"p{i}": i for i in range(10_000)})


@pytest.fixture
def unended(stack: Stack) -> Iterator[None]:
    """Check that neither tritonserver nor the process of a model ended, which the supervisor would start again."""
    before = {process.pid for process in stack.processes() if "triton" in process.name()}
    yield
    assert {process.pid for process in stack.processes() if "triton" in process.name()} == before


@pytest.mark.usefixtures("unended")
def test_hostile_infer_request_to_triton(triton: Any, expected: np.ndarray) -> None:
    """Check after each request that the model answers another one."""
    good = infer_request([("TEXT", "BYTES", (1, 1))], [cells(TEXT.encode())])
    for name, message in hostile_infer_requests():
        with contextlib.suppress(grpc.RpcError):
            triton.ModelInfer(message, timeout=20)
        answer = triton.ModelInfer(good, timeout=20)
        assert _is_close(np.frombuffer(answer.raw_output_contents[0], np.float32), expected), name


@pytest.mark.usefixtures("unended")
def test_hostile_stream_to_triton(triton: Any) -> None:
    good = infer_request([TWO_TEXTS], [TWO_CELLS])
    for requests in (
        [],
        [good] * 50,
        [infer_request([], [])] * 3,
        [infer_request([TWO_TEXTS], [TWO_CELLS], {"X": {}})],
    ):
        assert len(list(triton.ModelStreamInfer(iter(requests), timeout=20))) == len(requests)


@pytest.mark.usefixtures("unended")
def test_closed_apis_of_triton_do_not_parse_what_they_get(stack: Stack) -> None:
    """Send JSON that ends Triton's parser."""
    for path in ("systemsharedmemory/region/x/register", "trace/setting", "models/minilm/trace/setting", "logging"):
        response = exchange_with_triton(stack, post(b"[" * 500_000, f"/v2/{path}"))
        assert response.startswith(b"HTTP/1.1 403 ") or not response, path


def input_of(name: bytes, shape: bytes, data: bytes) -> bytes:
    return b'{"inputs":[{"name":"TEXT","datatype":"%s","shape":%s,"data":%s}]}' % (name, shape, data)


HTTP_BODIES = {
    "nothing": b"",
    "cut short": b'{"inputs":[{"name":"TEXT"',
    "null": b"null",
    "inputs are null": b'{"inputs":null}',
    "an input is a number": b'{"inputs":[1]}',
    "a number of a million digits": b'{"inputs":[' + b"9" * 1_000_000 + b"]}",
    "a shape of text": input_of(b"BYTES", b'"x"', b'["a"]'),
    "a shape beyond 64 bits": input_of(b"BYTES", b"[18446744073709551617,1]", b'["a"]'),
    "a number beyond 64 bits": input_of(b"INT32", b"[1,1]", b"[18446744073709551617]"),
    "more numbers than the shape": input_of(b"INT32", b"[1,1]", b"[1,2,3,4,5]"),
    "fewer numbers than the shape": input_of(b"INT32", b"[1,9]", b"[1]"),
    "lists in lists": input_of(b"BYTES", b"[1,1]", b"[" * 1000 + b"]" * 1000),
}


@pytest.mark.usefixtures("unended")
def test_hostile_http_to_triton(stack: Stack) -> None:
    lengths = (b"-1", b"0", b"5", b"99999", b"4294967296", b"18446744073709551616", b"x", b"")
    for name, body in HTTP_BODIES.items():
        for path in ("infer", "generate", "generate_stream"):
            response = exchange_with_triton(stack, post(body, f"/v2/models/minilm/{path}"))
            assert re.match(rb"HTTP/1.1 [45]", response), name
    for length in lengths:
        header = b"Inference-Header-Content-Length: " + length
        assert b"error" in exchange_with_triton(stack, post(b"{}", "/v2/models/minilm/infer", header)), length


def exchange_with_triton(stack: Stack, data: bytes) -> bytes:
    host, port = stack.triton_http.split(":")
    received = b""
    with socket.create_connection((host, int(port)), timeout=20) as connection, contextlib.suppress(ConnectionError):
        connection.sendall(data)
        while piece := connection.recv(2**16):
            received += piece
    return received
