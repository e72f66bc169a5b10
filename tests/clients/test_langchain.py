"""LangChain's OpenAIEmbeddings."""

import asyncio

import openai
import pytest
from langchain_core.vectorstores import InMemoryVectorStore
from langchain_openai import OpenAIEmbeddings
from words import DOCUMENTS, MATRYOSHKA, QUESTION, QWEN3, TEXT, TEXTS

from conftest import Expected, Stack

CLIENT, PACKAGE = "LangChain `OpenAIEmbeddings`", "langchain-openai"
# What cl100k_base makes of "antidisestablishmentarianism" and of お誕生日おめでとう, as OpenAI's cookbook prints it.
CL100K = [[519, 85342, 34500, 479, 8997, 2191], [33334, 45918, 243, 21990, 9080, 33334, 62004, 16556, 78699]]


@pytest.fixture
def embeddings(stack: Stack) -> OpenAIEmbeddings:
    return OpenAIEmbeddings(
        model="minilm", base_url=stack.base_url, api_key="EMPTY", check_embedding_ctx_length=False, max_retries=0
    )


def test_a_query(embeddings: OpenAIEmbeddings, expected: Expected) -> None:
    """`embed_query` with `check_embedding_ctx_length=False`."""
    expected.check([embeddings.embed_query(TEXT)], [TEXT])


def test_documents(embeddings: OpenAIEmbeddings, expected: Expected) -> None:
    """`embed_documents`, in several batches."""
    expected.check(embeddings.embed_documents(TEXTS), TEXTS)
    expected.check(embeddings.embed_documents(TEXTS, chunk_size=2), TEXTS)


def test_asynchronously(embeddings: OpenAIEmbeddings, expected: Expected) -> None:
    """`aembed_query` and `aembed_documents`."""

    async def ask() -> None:
        expected.check([await embeddings.aembed_query(TEXT)], [TEXT])
        expected.check(await embeddings.aembed_documents(TEXTS), TEXTS)

    asyncio.run(ask())


def test_a_vector_store(embeddings: OpenAIEmbeddings, expected: Expected) -> None:
    """A vector store filled and searched."""
    store = InMemoryVectorStore.from_texts(DOCUMENTS, embeddings)
    assert store.similarity_search(QUESTION, k=1)[0].page_content == DOCUMENTS[1]


def test_dimensions(stack: Stack, expected: Expected) -> None:
    """`dimensions`."""
    embeddings = OpenAIEmbeddings(
        model=QWEN3, base_url=stack.base_url, api_key="EMPTY", check_embedding_ctx_length=False, dimensions=512
    )
    expected.check([embeddings.embed_query(MATRYOSHKA)], [MATRYOSHKA], "qwen3_embedding")


def test_foreign_ids(embeddings: OpenAIEmbeddings) -> None:
    """Token ids of OpenAI's tokenizer, which it sends with `check_embedding_ctx_length` left on: the error names it."""
    for ids in CL100K:
        with pytest.raises(openai.BadRequestError, match="check_embedding_ctx_length=False"):
            embeddings.embed_documents([ids])  # type: ignore[list-item]


def test_the_setting_left_on(stack: Stack) -> None:
    """`check_embedding_ctx_length` left on: an error that names it, never a wrong vector."""
    embeddings = OpenAIEmbeddings(model="minilm", base_url=stack.base_url, api_key="EMPTY", max_retries=0)
    with pytest.raises(openai.BadRequestError, match="check_embedding_ctx_length=False"):
        embeddings.embed_query("antidisestablishmentarianism")


def test_a_declared_encoding(stack: Stack, expected: Expected) -> None:
    """`check_embedding_ctx_length` left on, and `token_encoding` sent along: the right vector."""
    embeddings = OpenAIEmbeddings(
        model="minilm",
        base_url=stack.base_url,
        api_key="EMPTY",
        tiktoken_model_name="text-embedding-3-small",
        model_kwargs={"extra_body": {"token_encoding": "cl100k_base"}},
    )
    expected.check(embeddings.embed_documents(TEXTS), TEXTS)
