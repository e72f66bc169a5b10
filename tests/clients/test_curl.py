"""Conformance of curl, called as in SGLang's documentation: without a Content-Type, for which curl sends a form's."""

import json
import shlex
import subprocess
from typing import Any

import pytest
from words import GTE, TEXT

from conftest import KEY, Expected, Stack

CLIENT, PACKAGE = "curl", "curl"


def curl(command: str) -> Any:
    return json.loads(subprocess.check_output(["bash", "-c", command]))


def test_text(stack: Stack, expected: Expected) -> None:
    """Send a text without setting a Content-Type."""
    text = TEXT
    port = stack.port
    curl_text = f"""curl -s http://localhost:{port}/v1/embeddings \
-d '{{"model": "Alibaba-NLP/gte-Qwen2-1.5B-instruct", "input": "{text}"}}'"""
    text_embedding = json.loads(subprocess.check_output(curl_text, shell=True))["data"][0]["embedding"]  # noqa: S602
    expected.check([text_embedding], [TEXT], "gte_qwen2")


def test_token_ids(stack: Stack, expected: Expected) -> None:
    """Send token ids."""
    input_ids = expected.ids["gte_qwen2"][TEXT]
    port = stack.port
    curl_ids = f"""curl -s http://localhost:{port}/v1/embeddings \
-d '{{"model": "Alibaba-NLP/gte-Qwen2-1.5B-instruct", "input": {json.dumps(input_ids)}}}'"""
    input_ids_embedding = json.loads(subprocess.check_output(curl_ids, shell=True))["data"][0]["embedding"]  # noqa: S602
    expected.check([input_ids_embedding], ["ids"], "gte_qwen2")


def test_health(stack: Stack) -> None:
    """Get `/health`."""
    assert curl(f"curl -s http://localhost:{stack.port}/health") == {"status": "healthy"}


@pytest.mark.parametrize(
    "option", ["--http1.0", "--http2", "--compressed", "-H 'Expect: 100-continue'", "-H 'Content-Type:'"]
)
def test_curl_options(stack: Stack, expected: Expected, option: str) -> None:
    """Send a text with `--http1.0`, `--http2`, `--compressed`, `Expect: 100-continue` or no Content-Type header."""
    body = shlex.quote(json.dumps({"model": GTE, "input": TEXT}))
    response = curl(f"curl -s {option} {stack.url}/v1/embeddings -d {body}")
    expected.check([response["data"][0]["embedding"]], [TEXT], "gte_qwen2")


def test_chunked_body(stack: Stack, expected: Expected) -> None:
    """Send a chunked body from a pipe, `-T -`."""
    body = shlex.quote(json.dumps({"model": GTE, "input": TEXT}))
    response = curl(f"echo {body} | curl -s -X POST -T - {stack.url}/v1/embeddings")
    expected.check([response["data"][0]["embedding"]], [TEXT], "gte_qwen2")


def test_api_key(strict: Stack) -> None:
    """Send a valid and an invalid API key."""
    body = shlex.quote(json.dumps({"model": "minilm", "input": TEXT}))
    call = f"curl -s {strict.url}/v1/embeddings -d {body} -H 'Authorization: Bearer"
    assert len(curl(f"{call} {KEY}'")["data"][0]["embedding"]) == 384
    assert curl(f"{call} wrong'")["error"]["code"] == "invalid_api_key"
