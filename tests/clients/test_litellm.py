"""Conformance of LiteLLM, used as documented for OpenAI-compatible endpoints: the openai/ prefix and an api_base."""

import asyncio
import base64

import litellm
import numpy as np
import pytest
from words import MATRYOSHKA, QWEN3, TEXT, TEXTS

from conftest import KEY, Expected, Stack

CLIENT, PACKAGE = "LiteLLM", "litellm"


def vectors(response: litellm.EmbeddingResponse) -> list[list[float] | str]:
    assert [item["index"] for item in response.data] == list(range(len(response.data)))
    return [item["embedding"] for item in response.data]


def test_texts(stack: Stack, expected: Expected) -> None:
    """Call `embedding` with a text and with a list, model `openai/minilm`."""
    response = litellm.embedding(model="openai/minilm", input=TEXT, api_base=stack.base_url, api_key="EMPTY")
    expected.check(vectors(response), [TEXT])
    response = litellm.embedding(model="openai/minilm", input=TEXTS, api_base=stack.base_url, api_key="EMPTY")
    expected.check(vectors(response), TEXTS)
    assert response.usage.prompt_tokens == response.usage.total_tokens > 0


def test_async(stack: Stack, expected: Expected) -> None:
    """Call `aembedding`."""
    call = litellm.aembedding(model="openai/minilm", input=TEXTS, api_base=stack.base_url, api_key="EMPTY")
    expected.check(vectors(asyncio.run(call)), TEXTS)


def test_model_id_with_slash(stack: Stack, expected: Expected) -> None:
    """Send a Hugging Face id after the prefix, with `dimensions` in `allowed_openai_params`."""
    response = litellm.embedding(
        model=f"openai/{QWEN3}",
        input=[MATRYOSHKA],
        api_base=stack.base_url,
        api_key="EMPTY",
        dimensions=512,
        allowed_openai_params=["dimensions"],
    )
    expected.check(vectors(response), [MATRYOSHKA], "qwen3_embedding")


@pytest.mark.parametrize("encoding", ["float", "base64", None])
def test_encodings(stack: Stack, expected: Expected, encoding: str | None) -> None:
    """Set `encoding_format` to float or base64, or leave it unset."""
    response = litellm.embedding(
        model="openai/minilm",
        input=[TEXT],
        api_base=stack.base_url,
        api_key="EMPTY",
        encoding_format=encoding,
    )
    (embedding,) = vectors(response)
    expected.check(
        [np.frombuffer(base64.b64decode(embedding), "<f4") if isinstance(embedding, str) else embedding], [TEXT]
    )
    assert isinstance(embedding, str) == (encoding == "base64")


def test_errors(stack: Stack, strict: Stack) -> None:
    """Raise LiteLLM's exceptions: BadRequestError, NotFoundError, AuthenticationError."""
    with pytest.raises(litellm.BadRequestError, match="index 1 cannot be empty"):
        litellm.embedding(model="openai/minilm", input=["a", " "], api_base=stack.base_url, api_key="EMPTY")
    with pytest.raises(litellm.NotFoundError, match="nowhere"):
        litellm.embedding(model="openai/nowhere", input=["a"], api_base=stack.base_url, api_key="EMPTY")
    with pytest.raises(litellm.AuthenticationError):
        litellm.embedding(model="openai/minilm", input=["a"], api_base=strict.base_url, api_key="wrong")
    response = litellm.embedding(model="openai/minilm", input=["a"], api_base=strict.base_url, api_key=KEY)
    assert len(response.data) == 1
