"""Conformance of Haystack's embedders, alone and in a retrieval pipeline."""

import asyncio

import pytest
from haystack import Document, Pipeline
from haystack.components.embedders import OpenAIDocumentEmbedder, OpenAITextEmbedder
from haystack.components.retrievers.in_memory import InMemoryEmbeddingRetriever
from haystack.document_stores.in_memory import InMemoryDocumentStore
from haystack.utils import Secret
from words import DOCUMENTS, MATRYOSHKA, QUESTION, QWEN3, TEXT, TEXTS

from conftest import Expected, Stack

CLIENT, PACKAGE = "Haystack", "haystack-ai"


@pytest.fixture
def text_embedder(stack: Stack) -> OpenAITextEmbedder:
    return OpenAITextEmbedder(api_key=Secret.from_token("EMPTY"), model="minilm", api_base_url=stack.base_url)


@pytest.fixture
def document_embedder(stack: Stack) -> OpenAIDocumentEmbedder:
    return OpenAIDocumentEmbedder(
        api_key=Secret.from_token("EMPTY"),
        model="minilm",
        api_base_url=stack.base_url,
        batch_size=2,
        progress_bar=False,
    )


def test_text(text_embedder: OpenAITextEmbedder, expected: Expected) -> None:
    """Run `OpenAITextEmbedder`."""
    response = text_embedder.run(TEXT)
    expected.check([response["embedding"]], [TEXT])
    assert response["meta"]["usage"]["prompt_tokens"] == len(expected.ids["minilm"][TEXT])


def test_documents(document_embedder: OpenAIDocumentEmbedder, expected: Expected) -> None:
    """Run `OpenAIDocumentEmbedder`, in several batches."""
    response = document_embedder.run([Document(content=text) for text in TEXTS])
    expected.check([document.embedding for document in response["documents"]], TEXTS)


def test_async(
    text_embedder: OpenAITextEmbedder, document_embedder: OpenAIDocumentEmbedder, expected: Expected
) -> None:
    """Run both embedders asynchronously."""

    async def embed() -> None:
        expected.check([(await text_embedder.run_async(TEXT))["embedding"]], [TEXT])
        response = await document_embedder.run_async([Document(content=text) for text in TEXTS])
        expected.check([document.embedding for document in response["documents"]], TEXTS)

    asyncio.run(embed())


def test_dimensions(stack: Stack, expected: Expected) -> None:
    """Set `dimensions`."""
    embedder = OpenAITextEmbedder(
        api_key=Secret.from_token("EMPTY"), model=QWEN3, api_base_url=stack.base_url, dimensions=512
    )
    expected.check([embedder.run(MATRYOSHKA)["embedding"]], [MATRYOSHKA], "qwen3_embedding")


def test_retrieval_pipeline(text_embedder: OpenAITextEmbedder, document_embedder: OpenAIDocumentEmbedder) -> None:
    """Store documents and search them with a pipeline."""
    store = InMemoryDocumentStore(embedding_similarity_function="cosine")
    store.write_documents(document_embedder.run([Document(content=text) for text in DOCUMENTS])["documents"])
    pipeline = Pipeline()
    pipeline.add_component("text_embedder", text_embedder)
    pipeline.add_component("retriever", InMemoryEmbeddingRetriever(document_store=store))
    pipeline.connect("text_embedder.embedding", "retriever.query_embedding")
    result = pipeline.run({"text_embedder": {"text": QUESTION}})
    assert result["retriever"]["documents"][0].content == DOCUMENTS[1]
