"""Requests that other servers take and that mean only one thing: the answer is that of the usual spelling."""

import codecs
import gzip
import http.client
import json
import zlib
from typing import Any

import numpy as np
import openai
import pytest
import requests
from sentence_transformers import SentenceTransformer
from test_app import Served, error_of, locked, served, vectors_of

from conftest import MINILM

__all__ = ["locked", "served"]  # fixtures
BODY = {"model": "minilm", "input": "a cat"}
RAW = json.dumps(BODY).encode()
GZIP = gzip.compress(RAW, mtime=0)  # without the time, because bodies are part of the names of tests


@pytest.fixture(scope="module")
def expected() -> np.ndarray:
    return SentenceTransformer(str(MINILM), device="cpu").encode(["a cat"])


def ask(served: Served, method: str, path: str, body: bytes | None = None, **headers: str) -> tuple[int, bytes]:
    """Send a request whose path is not normalized by the client; return the status and the body."""
    connection = http.client.HTTPConnection("127.0.0.1", served.port, timeout=30)
    connection.request(method, path, body, {name.replace("_", "-"): value for name, value in headers.items()})
    response = connection.getresponse()
    answer = response.status, response.read()
    connection.close()
    return answer


def is_right(answer: tuple[int, bytes], expected: np.ndarray) -> bool:
    status, body = answer
    assert status == 200, body
    vectors = np.array([item["embedding"] for item in json.loads(body)["data"]])
    return bool(np.abs(vectors - expected).max() < 2e-5)


@pytest.mark.parametrize(
    "path",
    [
        "/v1/embeddings/",
        "//v1/embeddings",
        "/v1//embeddings",
        "/embeddings/",
        "/openai/deployments/minilm/embeddings?api-version=2024-02-01",
        "/openai/deployments/sentence-transformers/all-MiniLM-L6-v2/embeddings",
    ],
)
def test_path(served: Served, expected: np.ndarray, path: str) -> None:
    body = {**BODY, "model": None} if "deployments" in path else BODY
    assert is_right(ask(served, "POST", path, json.dumps(body).encode()), expected)


def test_azure_client(locked: Served, expected: np.ndarray) -> None:
    with openai.AzureOpenAI(azure_endpoint=locked.url, api_key="k3y", api_version="2024-02-01") as client:
        response = client.embeddings.create(model="minilm", input="a cat")
    assert np.abs(np.array([response.data[0].embedding]) - expected).max() < 2e-5
    wrong = openai.AzureOpenAI(azure_endpoint=locked.url, api_key="k3", api_version="2024-02-01")
    with wrong, pytest.raises(openai.AuthenticationError):
        wrong.embeddings.create(model="minilm", input="a cat")


@pytest.mark.parametrize("path", ["/models", "/models/", "/v1/models/", "//v1/models", "/health/", "/metrics/"])
def test_path_of_a_get(served: Served, path: str) -> None:
    assert ask(served, "GET", path)[0] == 200


@pytest.mark.parametrize(
    "path", ["/", "/health", "/ready", "/ping", "/v1/models", "/docs", "/metrics", "/openapi.json"]
)
def test_head_has_the_status_of_a_get_and_no_body(served: Served, path: str) -> None:
    assert ask(served, "HEAD", path) == (200, b"")
    assert ask(served, "GET", path)[0] == 200


def test_head_of_a_post_route_is_405(served: Served) -> None:
    assert ask(served, "HEAD", "/v1/embeddings") == (405, b"")


@pytest.mark.parametrize("path", ["/v1/v1/embeddings", "/v1/v1/v1/embeddings"])
def test_repeated_version_is_404_with_the_right_path(served: Served, path: str) -> None:
    response = requests.post(served.url + path, json=BODY, timeout=30)
    assert response.status_code == 404
    assert error_of(response)["message"].endswith("; this server has /v1/embeddings: let the base URL end in /v1 once")


def test_normalized_path_needs_the_key(locked: Served) -> None:
    for path in ("//v1/models", "/v1/models/", "/models", "/docs//../v1/models"):
        assert ask(locked, "GET", path)[0] == (404 if ".." in path else 401)
        assert ask(locked, "GET", path, api_key="no")[0] == (404 if ".." in path else 401)
    assert ask(locked, "GET", "//v1/models", api_key="k3y")[0] == 200


def test_byte_order_mark(served: Served, expected: np.ndarray) -> None:
    assert is_right(ask(served, "POST", "/v1/embeddings", codecs.BOM_UTF8 + RAW), expected)


@pytest.mark.parametrize(
    ("coding", "body"),
    [
        ("gzip", GZIP),
        ("x-gzip", GZIP),
        ("deflate", zlib.compress(RAW)),
        ("GZIP", GZIP),
        ("identity", RAW),
    ],
)
def test_compressed_body(served: Served, expected: np.ndarray, coding: str, body: bytes) -> None:
    assert is_right(ask(served, "POST", "/v1/embeddings", body, content_encoding=coding), expected)


@pytest.mark.parametrize(
    ("coding", "body", "status", "message"),
    [
        ("br", RAW, 400, "must be one of gzip, x-gzip, deflate, got 'br'"),
        ("gzip", RAW, 400, "is not valid gzip"),
        ("gzip", GZIP[:-9], 400, "is not complete gzip"),
        ("gzip", gzip.compress(bytes(10_000_000), mtime=0), 413, "larger than 2000 bytes"),
        ("deflate", zlib.compress(b" " * 2001), 413, "larger than 2000 bytes"),
    ],
)
def test_compressed_body_that_is_refused(locked: Served, coding: str, body: bytes, status: int, message: str) -> None:
    answer = ask(locked, "POST", "/v1/embeddings", body, content_encoding=coding, api_key="k3y")
    assert answer[0] == status
    assert message in json.loads(answer[1])["error"]["message"]


@pytest.mark.parametrize("priority", [0, -3, 1, 7, "batch"])
def test_numeric_priority(served: Served, expected: np.ndarray, priority: Any) -> None:
    vectors = vectors_of(served.post({**BODY, "priority": priority}))
    assert np.abs(vectors - expected).max() < 2e-5


def test_dimensions_as_digits(served: Served) -> None:
    body = {"model": "tiny", "input": "a cat"}
    as_number, as_digits = (vectors_of(served.post({**body, "dimensions": value})) for value in (20, "20"))
    assert as_digits.shape == (1, 20)
    assert np.array_equal(as_number, as_digits)
    for value in ("20.0", "-20", "twenty", "", "٢٠", "9" * 5_000):
        response = served.post({**body, "dimensions": value})
        assert (response.status_code, error_of(response)["param"]) == (400, "dimensions"), value[:10]


HALF = "\ud83c"
REASON = "holds half of a character: a lone surrogate, as when an emoji is cut in two"


def test_half_a_character_is_the_fault_of_its_input_alone(served: Served, expected: np.ndarray) -> None:
    texts = ["a cat", f"cut {HALF}", "a cat"]
    for inputs in (texts, [{"text": text} for text in texts], [[{"type": "text", "text": text}] for text in texts]):
        body = {**BODY, "input": inputs}
        refused = served.post(body)
        error = error_of(refused)
        assert (refused.status_code, error["param"]) == (400, "input")
        assert error["message"].startswith("Input at index 1")
        assert error["message"].endswith(REASON)
        data = served.post({**body, "on_error": "report"}).json()["data"]
        assert data[1]["error"]["message"] == error["message"]
        vectors = np.array([data[i]["embedding"] for i in (0, 2)])
        assert np.abs(vectors - expected).max() < 2e-5


@pytest.mark.parametrize("name", ["model", "instruction", "prompt_name", "encoding_format", "truncate"])
def test_half_a_character_in_a_field_is_refused_by_its_name(served: Served, name: str) -> None:
    response = served.post({**BODY, name: f"a {HALF}"})
    assert (response.status_code, error_of(response)["param"]) == (400, name)


def test_half_a_character_in_a_field_that_nobody_reads_is_harmless(served: Served, expected: np.ndarray) -> None:
    for body in ({**BODY, "user": HALF}, {**BODY, HALF: 1}, {**BODY, "metadata": {"a": [HALF]}}):
        assert np.abs(vectors_of(served.post(body)) - expected).max() < 2e-5


def test_half_a_character_beside_another_fault(served: Served) -> None:
    for body in (b'{"input": ["\\ud83c", NaN]}', b'{"input": "\\ud83c"', b'{"input": "\\ud83c\xff"}'):
        status, answer = ask(served, "POST", "/v1/embeddings", body)
        assert status == 400
        assert json.loads(answer)["error"]["message"].startswith("The request body is not valid JSON")
