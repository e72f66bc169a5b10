"""Conformance of LlamaIndex's OpenAILikeEmbedding, which accepts any model name."""

import asyncio

import openai
import pytest
from llama_index.embeddings.openai_like import OpenAILikeEmbedding
from words import MATRYOSHKA, QWEN3, TEXT, TEXTS

from conftest import Expected, Stack

CLIENT, PACKAGE = "LlamaIndex `OpenAILikeEmbedding`", "llama-index-embeddings-openai-like"


@pytest.fixture
def embedding(stack: Stack) -> OpenAILikeEmbedding:
    return OpenAILikeEmbedding(model_name="minilm", api_base=stack.base_url, api_key="fake", embed_batch_size=10)


def test_texts(embedding: OpenAILikeEmbedding, expected: Expected) -> None:
    """Call `get_query_embedding` and `get_text_embedding_batch`."""
    expected.check([embedding.get_query_embedding(TEXT)], [TEXT])
    expected.check(embedding.get_text_embedding_batch(TEXTS), TEXTS)


def test_async(embedding: OpenAILikeEmbedding, expected: Expected) -> None:
    """Call `aget_text_embedding_batch`."""
    expected.check(asyncio.run(embedding.aget_text_embedding_batch(TEXTS)), TEXTS)


def test_dimensions(stack: Stack, expected: Expected) -> None:
    """Set `dimensions`."""
    embedding = OpenAILikeEmbedding(model_name=QWEN3, api_base=stack.base_url, dimensions=512)
    expected.check([embedding.get_text_embedding(MATRYOSHKA)], [MATRYOSHKA], "qwen3_embedding")


def test_error_message(embedding: OpenAILikeEmbedding) -> None:
    """Report the server's message for invalid input."""
    with pytest.raises(openai.BadRequestError, match="index 0 cannot be empty"):
        embedding.get_text_embedding_batch([" "])
