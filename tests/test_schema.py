"""The OpenAPI document, held against the real stack by schemathesis.

Whatever it makes up, good or bad, is answered with a status, a content type, headers and a body that the document
states, and never with a server's error. The same requests each time.
"""

from collections import Counter
from collections.abc import Iterator
from typing import Any

import pytest
import requests
import schemathesis
from checkpoints import write_decoder
from hypothesis import HealthCheck, Phase, settings
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_headers_conformance,
    response_schema_conformance,
    status_code_conformance,
    unsupported_method,
)

from conftest import Stack
from triton_embed.gateway.app import create_app
from triton_embed.gateway.settings import read_settings

DOCUMENT: dict[str, Any] = create_app(read_settings()).openapi()
EXAMPLES = 60  # a route, beside those of the document and those at the bounds of each field
CHECKED = [
    not_a_server_error,
    status_code_conformance,
    content_type_conformance,
    response_headers_conformance,
    response_schema_conformance,
    unsupported_method,
]
# What is made up is nearly always bad: every other request gets these, so that good answers are seen as well.
FITTING: dict[str, dict[str, Any]] = {
    "/v1/embeddings": {"input": ["a cat", "hello world"]},
    "/encode": {"text": ["a cat", "hello world"], "image_data": None, "input_ids": None},
    "/tokenize": {"prompt": ["a cat", "hello world"], "input": None, "text": None},
    "/v1/rerank": {"query": "a cat", "documents": ["hello", "a dog"]},
    "/v1/score": {"text_1": "a cat", "text_2": ["hello", "a dog"]},
}
SIZE = 52  # of the vectors of the model that is served
schema = schemathesis.openapi.from_dict(DOCUMENT)
schema.config.seed = 1


@pytest.fixture(scope="module")
def stack(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    """One model, which takes instructions and dimensions."""
    directory = tmp_path_factory.mktemp("schema")
    checkpoint = write_decoder(directory / "qwen3", "qwen3")
    server = Stack(directory / "log", f"--model-path={checkpoint}", "--served-model-name=qwen3")
    yield server
    assert "Traceback" not in server.output()
    server.stop()


@pytest.fixture(scope="module")
def seen(stack: Stack) -> Iterator[Counter[tuple[str, int]]]:
    """How often each route was answered with each status."""
    counts: Counter[tuple[str, int]] = Counter()
    yield counts
    assert {path for path, status in counts if status == 200} == set(DOCUMENT["paths"])
    assert all(counts[path, 200] > 15 for path in FITTING)


def test_it_is_what_the_gateway_serves(stack: Stack) -> None:
    assert requests.get(f"{stack.url}/openapi.json", timeout=30).json() == DOCUMENT


def test_every_endpoint_is_in_it() -> None:
    """But for pages, and for other names of those that are."""
    posts = {"/v1/embeddings", "/encode", "/tokenize", "/v1/rerank", "/v1/score"}
    gets = {"/v1/models", "/v1/models/{model}", "/get_model_info", "/get_server_info", "/metrics"}
    gets |= {"/health", "/health_generate"}
    found = {(method, path) for path, methods in DOCUMENT["paths"].items() for method in methods}
    assert found == {("post", path) for path in posts} | {("get", path) for path in gets}


@schema.parametrize()
@settings(
    max_examples=EXAMPLES,
    deadline=None,
    derandomize=True,
    database=None,
    phases=[Phase.explicit, Phase.generate],
    suppress_health_check=list(HealthCheck),
)
def test_answers_are_as_stated(case: schemathesis.Case, stack: Stack, seen: Counter[tuple[str, int]]) -> None:
    if case.path in FITTING and isinstance(case.body, dict) and sum(seen.values()) % 2:
        fit(case.body, case.path)
    if len(case.path_parameters.get("model", "")) == 1:
        case.path_parameters["model"] = "qwen3"
    response = case.call(base_url=stack.url)
    seen[case.path, response.status_code] += 1
    case.validate_response(response, checks=CHECKED)


def fit(body: dict[str, Any], path: str) -> None:
    body |= FITTING[path]
    if isinstance(body.get("model"), str):
        body["model"] = "qwen3"
    if isinstance(body.get("dimensions"), int):
        body["dimensions"] = 1 + body["dimensions"] % SIZE
    elif isinstance(body.get("dimensions"), list):
        body["dimensions"] = [1 + size % SIZE if isinstance(size, int) else size for size in body["dimensions"]]
    if body.get("prompt_name"):
        body["prompt_name"] = "query"
        body["instruction"] = body["input_type"] = None
    if body.get("instruction"):
        body["input_type"] = None
    body["token_encoding"] = None
