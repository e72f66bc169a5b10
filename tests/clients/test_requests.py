"""Conformance of requests, called as in SGLang's documentation, which sets no timeout."""
# ruff: noqa: S113

import numpy as np
import pytest
import requests
from words import GTE, IMAGE_TASK, LONG, MATRYOSHKA, TEXT

from conftest import Expected, Stack

CLIENT, PACKAGE = "requests", "requests"


def test_text(stack: Stack, expected: Expected) -> None:
    """Embed a text with `encoding_format` float."""
    url = stack.url
    payload = {"model": "Qwen/Qwen3-Embedding-4B", "input": "法国的首都是什么?", "encoding_format": "float"}
    response = requests.post(url + "/v1/embeddings", json=payload).json()
    expected.check([response["data"][0]["embedding"]], ["法国的首都是什么?"], "qwen3_embedding")


def test_text_by_hugging_face_id(stack: Stack, expected: Expected) -> None:
    """Embed a text with a Hugging Face id as the model."""
    response = requests.post(f"http://localhost:{stack.port}/v1/embeddings", json={"model": GTE, "input": TEXT})
    expected.check([response.json()["data"][0]["embedding"]], [TEXT], "gte_qwen2")


def test_text_and_image(stack: Stack, expected: Expected, image_url: str) -> None:
    """Embed a text and an image URL with GME, named by its chat template."""
    url = stack.url
    text_input = "在嵌入空间中表示此图像。"
    image_path = image_url
    payload = {"model": "gme-qwen2-vl", "input": [{"text": text_input}, {"image": image_path}]}
    response = requests.post(url + "/v1/embeddings", json=payload).json()
    vectors = [x.get("embedding") for x in response.get("data", [])]
    expected.check(vectors, [IMAGE_TASK, "picture"], "gme_qwen2_vl")


def test_dimensions(stack: Stack, expected: Expected) -> None:
    """Set `dimensions`."""
    url = stack.url
    payload = {"model": "Qwen/Qwen3-Embedding-0.6B", "input": "简单解释一下扩散模型。", "dimensions": 512}
    response = requests.post(url + "/v1/embeddings", json=payload).json()
    assert payload["input"] == MATRYOSHKA
    expected.check([response["data"][0]["embedding"]], [MATRYOSHKA], "qwen3_embedding")


def test_sglang_native_endpoints(stack: Stack, expected: Expected) -> None:
    """Call SGLang's native endpoints `/encode` and `/get_model_info`."""
    payload = {"model": "minilm", "text": [TEXT, LONG]}
    response = requests.post(stack.url + "/encode", json=payload).json()
    expected.check([item["embedding"] for item in response], [TEXT, LONG])
    info = requests.get(stack.url + "/get_model_info", params={"model": "minilm"}).json()
    assert info["is_generation"] is False


def test_truncation_header(stack: Stack) -> None:
    """Read the `x-truncated-inputs` header."""
    payload = {"model": "minilm", "input": [TEXT, LONG]}
    assert requests.post(stack.url + "/v1/embeddings", json=payload).headers["x-truncated-inputs"] == "1"


@pytest.mark.parametrize("wrap", [list, tuple])
def test_connection_reuse(stack: Stack, expected: Expected, wrap: type) -> None:
    """Send many requests over one connection of a `Session`."""
    with requests.Session() as session:
        for _ in range(20):
            response = session.post(stack.url + "/v1/embeddings", json={"model": "minilm", "input": wrap([TEXT])})
            expected.check([np.array(response.json()["data"][0]["embedding"])], [TEXT])
