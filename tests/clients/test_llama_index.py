"""Conformance of LlamaIndex's OpenAIEmbedding, whose `model` accepts only OpenAI's model names."""

import asyncio
from typing import Any

import pytest
from llama_index.embeddings.openai import OpenAIEmbedding
from words import MATRYOSHKA, PARAGRAPHS, QWEN3, TEXT, TEXTS

from conftest import Expected, Stack

CLIENT, PACKAGE = "LlamaIndex `OpenAIEmbedding`", "llama-index-embeddings-openai"


@pytest.fixture(params=[{"model": "text-embedding-ada-002"}, {"model_name": "minilm"}], ids=["alias", "model_name"])
def embedding(stack: Stack, request: pytest.FixtureRequest) -> OpenAIEmbedding:
    return OpenAIEmbedding(**request.param, api_base=stack.base_url, api_key="EMPTY", max_retries=0)


def test_query(embedding: OpenAIEmbedding, expected: Expected) -> None:
    """Call `get_query_embedding` with an OpenAI model name as alias, and with `model_name`."""
    expected.check([embedding.get_query_embedding(TEXT)], [TEXT])


def test_texts(embedding: OpenAIEmbedding, expected: Expected) -> None:
    """Call `get_text_embedding`, and `get_text_embedding_batch` in several batches."""
    expected.check([embedding.get_text_embedding(TEXT)], [TEXT])
    embedding.embed_batch_size = 2
    expected.check(embedding.get_text_embedding_batch(TEXTS), TEXTS)


def test_line_breaks(embedding: OpenAIEmbedding, expected: Expected) -> None:
    """Embed texts with line breaks."""
    keys = [text.replace("\n", " ") for text in PARAGRAPHS]
    expected.check(embedding.get_text_embedding_batch(PARAGRAPHS), keys)


def test_async(embedding: OpenAIEmbedding, expected: Expected) -> None:
    """Call `aget_query_embedding` and `aget_text_embedding_batch`."""

    async def embed() -> None:
        expected.check([await embedding.aget_query_embedding(TEXT)], [TEXT])
        expected.check(await embedding.aget_text_embedding_batch(TEXTS), TEXTS)

    asyncio.run(embed())


def test_dimensions(stack: Stack, expected: Expected) -> None:
    """Set `dimensions`."""
    embedding: Any = OpenAIEmbedding(model_name=QWEN3, api_base=stack.base_url, api_key="EMPTY", dimensions=512)
    expected.check([embedding.get_text_embedding(MATRYOSHKA)], [MATRYOSHKA], "qwen3_embedding")
