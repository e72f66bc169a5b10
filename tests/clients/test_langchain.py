"""Conformance of LangChain's OpenAIEmbeddings."""

import asyncio

import openai
import pytest
from langchain_core.vectorstores import InMemoryVectorStore
from langchain_openai import OpenAIEmbeddings
from words import DOCUMENTS, MATRYOSHKA, QUESTION, QWEN3, TEXT, TEXTS

from conftest import Expected, Stack

CLIENT, PACKAGE = "LangChain `OpenAIEmbeddings`", "langchain-openai"
# The cl100k_base token ids of "antidisestablishmentarianism" and of お誕生日おめでとう, from OpenAI's cookbook.
CL100K = [[519, 85342, 34500, 479, 8997, 2191], [33334, 45918, 243, 21990, 9080, 33334, 62004, 16556, 78699]]


@pytest.fixture
def embeddings(stack: Stack) -> OpenAIEmbeddings:
    return OpenAIEmbeddings(
        model="minilm", base_url=stack.base_url, api_key="EMPTY", check_embedding_ctx_length=False, max_retries=0
    )


def test_query(embeddings: OpenAIEmbeddings, expected: Expected) -> None:
    """Call `embed_query` with `check_embedding_ctx_length=False`."""
    expected.check([embeddings.embed_query(TEXT)], [TEXT])


def test_documents(embeddings: OpenAIEmbeddings, expected: Expected) -> None:
    """Call `embed_documents`, in several batches."""
    expected.check(embeddings.embed_documents(TEXTS), TEXTS)
    expected.check(embeddings.embed_documents(TEXTS, chunk_size=2), TEXTS)


def test_async(embeddings: OpenAIEmbeddings, expected: Expected) -> None:
    """Call `aembed_query` and `aembed_documents`."""

    async def embed() -> None:
        expected.check([await embeddings.aembed_query(TEXT)], [TEXT])
        expected.check(await embeddings.aembed_documents(TEXTS), TEXTS)

    asyncio.run(embed())


def test_vector_store(embeddings: OpenAIEmbeddings, expected: Expected) -> None:
    """Store texts and search them."""
    store = InMemoryVectorStore.from_texts(DOCUMENTS, embeddings)
    assert store.similarity_search(QUESTION, k=1)[0].page_content == DOCUMENTS[1]


def test_dimensions(stack: Stack, expected: Expected) -> None:
    """Set `dimensions`."""
    embeddings = OpenAIEmbeddings(
        model=QWEN3, base_url=stack.base_url, api_key="EMPTY", check_embedding_ctx_length=False, dimensions=512
    )
    expected.check([embeddings.embed_query(MATRYOSHKA)], [MATRYOSHKA], "qwen3_embedding")


def test_openai_token_ids_are_rejected(embeddings: OpenAIEmbeddings) -> None:
    """Reject OpenAI token ids with an error that names `check_embedding_ctx_length`."""
    for ids in CL100K:
        with pytest.raises(openai.BadRequestError, match="check_embedding_ctx_length=False"):
            embeddings.embed_documents([ids])  # type: ignore[list-item]


def test_ctx_length_check_is_rejected(stack: Stack) -> None:
    """Keep `check_embedding_ctx_length` on: an error that names the setting, never a wrong vector."""
    embeddings = OpenAIEmbeddings(model="minilm", base_url=stack.base_url, api_key="EMPTY", max_retries=0)
    with pytest.raises(openai.BadRequestError, match="check_embedding_ctx_length=False"):
        embeddings.embed_query("antidisestablishmentarianism")


def test_declared_token_encoding(stack: Stack, expected: Expected) -> None:
    """Keep `check_embedding_ctx_length` on and send `token_encoding`: the correct vector."""
    embeddings = OpenAIEmbeddings(
        model="minilm",
        base_url=stack.base_url,
        api_key="EMPTY",
        tiktoken_model_name="text-embedding-3-small",
        model_kwargs={"extra_body": {"token_encoding": "cl100k_base"}},
    )
    expected.check(embeddings.embed_documents(TEXTS), TEXTS)
