"""LiteLLM as its page on OpenAI-compatible endpoints shows: the openai/ prefix and an api_base."""

import asyncio
import base64

import litellm
import numpy as np
import pytest
from words import MATRYOSHKA, QWEN3, TEXT, TEXTS

from conftest import KEY, Expected, Stack

CLIENT, PACKAGE = "LiteLLM", "litellm"


def vectors(answer: litellm.EmbeddingResponse) -> list[list[float] | str]:
    assert [item["index"] for item in answer.data] == list(range(len(answer.data)))
    return [item["embedding"] for item in answer.data]


def test_texts(stack: Stack, expected: Expected) -> None:
    """`embedding` of a text and of a list, model `openai/minilm`."""
    answer = litellm.embedding(model="openai/minilm", input=TEXT, api_base=stack.base_url, api_key="EMPTY")
    expected.check(vectors(answer), [TEXT])
    answer = litellm.embedding(model="openai/minilm", input=TEXTS, api_base=stack.base_url, api_key="EMPTY")
    expected.check(vectors(answer), TEXTS)
    assert answer.usage.prompt_tokens == answer.usage.total_tokens > 0


def test_asynchronously(stack: Stack, expected: Expected) -> None:
    """`aembedding`."""
    call = litellm.aembedding(model="openai/minilm", input=TEXTS, api_base=stack.base_url, api_key="EMPTY")
    expected.check(vectors(asyncio.run(call)), TEXTS)


def test_an_id_with_a_slash(stack: Stack, expected: Expected) -> None:
    """A Hugging Face id behind the prefix, with `dimensions` allowed through."""
    answer = litellm.embedding(
        model=f"openai/{QWEN3}",
        input=[MATRYOSHKA],
        api_base=stack.base_url,
        api_key="EMPTY",
        dimensions=512,
        allowed_openai_params=["dimensions"],
    )
    expected.check(vectors(answer), [MATRYOSHKA], "qwen3_embedding")


@pytest.mark.parametrize("encoding", ["float", "base64", None])
def test_encodings(stack: Stack, expected: Expected, encoding: str | None) -> None:
    """`encoding_format` float, base64 and none."""
    answer = litellm.embedding(
        model="openai/minilm",
        input=[TEXT],
        api_base=stack.base_url,
        api_key="EMPTY",
        encoding_format=encoding,
    )
    (found,) = vectors(answer)
    expected.check([np.frombuffer(base64.b64decode(found), "<f4") if isinstance(found, str) else found], [TEXT])
    assert isinstance(found, str) == (encoding == "base64")


def test_errors(stack: Stack, strict: Stack) -> None:
    """Errors as its own classes: BadRequestError, NotFoundError, AuthenticationError."""
    with pytest.raises(litellm.BadRequestError, match="index 1 cannot be empty"):
        litellm.embedding(model="openai/minilm", input=["a", " "], api_base=stack.base_url, api_key="EMPTY")
    with pytest.raises(litellm.NotFoundError, match="nowhere"):
        litellm.embedding(model="openai/nowhere", input=["a"], api_base=stack.base_url, api_key="EMPTY")
    with pytest.raises(litellm.AuthenticationError):
        litellm.embedding(model="openai/minilm", input=["a"], api_base=strict.base_url, api_key="wrong")
    answer = litellm.embedding(model="openai/minilm", input=["a"], api_base=strict.base_url, api_key=KEY)
    assert len(answer.data) == 1
