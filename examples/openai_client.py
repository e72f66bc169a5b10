"""openai-python against the gateway: how similar two texts are to a third."""

import os

import numpy as np
import openai

client = openai.Client(base_url=os.environ.get("EMBED_URL", "http://127.0.0.1:30000") + "/v1", api_key="EMPTY")
texts = ["A man is eating food.", "A man is eating a piece of bread.", "A cheetah chases its prey."]
response = client.embeddings.create(model="minilm", input=texts)
vectors = np.array([item.embedding for item in response.data])  # of unit length: a dot product is the cosine
for text, similarity in zip(texts, vectors @ vectors[0], strict=True):
    print(f"{similarity:.3f}  {text}")
print(f"{response.usage.prompt_tokens} tokens")
