"""Conformance of Chroma's embedding function for OpenAI, with a real in-memory collection."""

import chromadb
import numpy as np
import pytest
from chromadb.utils.embedding_functions import OpenAIEmbeddingFunction
from words import DOCUMENTS, MATRYOSHKA, QUESTION, TEXTS

from conftest import Expected, Stack

CLIENT, PACKAGE = "Chroma `OpenAIEmbeddingFunction`", "chromadb"


@pytest.fixture
def function(stack: Stack, monkeypatch: pytest.MonkeyPatch) -> OpenAIEmbeddingFunction:
    monkeypatch.setenv("CHROMA_OPENAI_API_KEY", "EMPTY")
    return OpenAIEmbeddingFunction(model_name="minilm", api_base=stack.base_url)


def test_embedding_function(function: OpenAIEmbeddingFunction, expected: Expected) -> None:
    """Call the embedding function."""
    expected.check(function(TEXTS), TEXTS)


def test_dimensions(stack: Stack, expected: Expected, monkeypatch: pytest.MonkeyPatch) -> None:
    """Set `dimensions`; Chroma sends it only if the model name, here an alias, starts with text-embedding-3."""
    monkeypatch.setenv("CHROMA_OPENAI_API_KEY", "EMPTY")
    function = OpenAIEmbeddingFunction(model_name="text-embedding-3-small", api_base=stack.base_url, dimensions=512)
    expected.check(function([MATRYOSHKA]), [MATRYOSHKA], "qwen3_embedding")


def test_collection_query(function: OpenAIEmbeddingFunction, expected: Expected) -> None:
    """Compare order and distances of the nearest texts in a collection."""
    collection = chromadb.EphemeralClient().create_collection(
        "texts", embedding_function=function, configuration={"hnsw": {"space": "cosine"}}
    )
    collection.add(ids=[str(i) for i in range(len(DOCUMENTS))], documents=DOCUMENTS)
    result = collection.query(query_texts=[QUESTION], n_results=len(DOCUMENTS), include=["documents", "distances"])
    vectors = expected.vectors["minilm"]
    distances = {text: 1 - float(np.dot(vectors[QUESTION], vectors[text])) for text in DOCUMENTS}
    nearest = sorted(distances, key=distances.__getitem__)
    assert nearest[0] == DOCUMENTS[1]
    assert result["documents"] == [nearest]
    np.testing.assert_allclose(result["distances"][0], sorted(distances.values()), atol=1e-4)
