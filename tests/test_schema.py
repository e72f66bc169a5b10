"""The OpenAPI document, checked against the real stack by schemathesis.

Every generated request, valid or not, gets a status, content type, headers and body that the document declares, and
never a server error. The requests are the same in every run.
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
EXAMPLES = 60  # per route, in addition to those of the document and those at the bounds of each field
CHECKED = [
    not_a_server_error,
    status_code_conformance,
    content_type_conformance,
    response_headers_conformance,
    response_schema_conformance,
    unsupported_method,
]
# Generated requests are nearly always invalid. Every other request gets these fields, so that some succeed.
VALID_FIELDS: dict[str, dict[str, Any]] = {
    "/v1/embeddings": {"input": ["a cat", "hello world"]},
    "/encode": {"text": ["a cat", "hello world"], "image_data": None, "input_ids": None},
    "/tokenize": {"prompt": ["a cat", "hello world"], "input": None, "text": None},
    "/v1/rerank": {"query": "a cat", "documents": ["hello", "a dog"]},
    "/v1/score": {"text_1": "a cat", "text_2": ["hello", "a dog"]},
}
DIMENSIONS = 52  # of the served model
schema = schemathesis.openapi.from_dict(DOCUMENT)
schema.config.seed = 1


@pytest.fixture(scope="module")
def stack(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    """Start a stack with one model, which supports instructions and dimensions."""
    directory = tmp_path_factory.mktemp("schema")
    checkpoint = write_decoder(directory / "qwen3", "qwen3")
    server = Stack(directory / "log", f"--model-path={checkpoint}", "--served-model-name=qwen3")
    yield server
    assert "Traceback" not in server.output()
    server.stop()


@pytest.fixture(scope="module")
def counts(stack: Stack) -> Iterator[Counter[tuple[str, int]]]:
    """Count responses by route and status, which must include a 200 for every route."""
    counts: Counter[tuple[str, int]] = Counter()
    yield counts
    assert {path for path, status in counts if status == 200} == set(DOCUMENT["paths"])
    assert all(counts[path, 200] > 15 for path in VALID_FIELDS)


def test_gateway_serves_the_document(stack: Stack) -> None:
    assert requests.get(f"{stack.url}/openapi.json", timeout=30).json() == DOCUMENT


def test_document_has_every_endpoint() -> None:
    """Check the routes, which exclude pages and aliases."""
    posts = {"/v1/embeddings", "/encode", "/tokenize", "/v1/rerank", "/v1/score"}
    gets = {"/v1/models", "/v1/models/{model}", "/get_model_info", "/get_server_info", "/metrics"}
    gets |= {"/health", "/health_generate"}
    operations = {(method, path) for path, methods in DOCUMENT["paths"].items() for method in methods}
    assert operations == {("post", path) for path in posts} | {("get", path) for path in gets}


@schema.parametrize()
@settings(
    max_examples=EXAMPLES,
    deadline=None,
    derandomize=True,
    database=None,
    phases=[Phase.explicit, Phase.generate],
    suppress_health_check=list(HealthCheck),
)
def test_responses_conform_to_the_document(
    case: schemathesis.Case, stack: Stack, counts: Counter[tuple[str, int]]
) -> None:
    if case.path in VALID_FIELDS and isinstance(case.body, dict) and sum(counts.values()) % 2:
        make_valid(case.body, case.path)
    if len(case.path_parameters.get("model", "")) == 1:
        case.path_parameters["model"] = "qwen3"
    response = case.call(base_url=stack.url)
    counts[case.path, response.status_code] += 1
    case.validate_response(response, checks=CHECKED)


def make_valid(body: dict[str, Any], path: str) -> None:
    """Replace fields of a generated body, so that the request is likely to succeed."""
    body |= VALID_FIELDS[path]
    if isinstance(body.get("model"), str):
        body["model"] = "qwen3"
    if isinstance(body.get("dimensions"), int):
        body["dimensions"] = 1 + body["dimensions"] % DIMENSIONS
    elif isinstance(body.get("dimensions"), list):
        body["dimensions"] = [1 + size % DIMENSIONS if isinstance(size, int) else size for size in body["dimensions"]]
    if body.get("prompt_name"):
        body["prompt_name"] = "query"
        body["instruction"] = body["input_type"] = None
    if body.get("instruction"):
        body["input_type"] = None
    body["token_encoding"] = None
