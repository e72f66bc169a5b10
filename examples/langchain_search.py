"""LangChain: fill a vector store and search it."""

import os

from langchain_core.vectorstores import InMemoryVectorStore
from langchain_openai import OpenAIEmbeddings

embeddings = OpenAIEmbeddings(
    model="minilm",
    base_url=os.environ.get("EMBED_URL", "http://127.0.0.1:30000") + "/v1",
    api_key="EMPTY",
    check_embedding_ctx_length=False,  # send texts: left on, it sends ids of OpenAI's tokenizer
)
store = InMemoryVectorStore(embeddings)
store.add_texts(["Paris is the capital of France.", "Cats sleep most of the day.", "Python is a programming language."])
for document in store.similarity_search("Which city governs France?", k=1):
    print(document.page_content)
