"""Embed a text file, one text per line, into a .npy file of float32 vectors: bulk.py texts.txt vectors.npy

The requests have low priority, so that interactive queries go first. When the server is busy, it answers 429 with
Retry-After, and openai-python waits and sends the request again.
"""

import os
import sys
from pathlib import Path

import numpy as np
import openai

BATCH = 256  # texts per request


def main(source: Path, target: Path) -> None:
    client = openai.Client(
        base_url=os.environ.get("EMBED_URL", "http://127.0.0.1:30000") + "/v1", api_key="EMPTY", max_retries=10
    )
    vectors: list[np.ndarray] = []
    texts = [line.strip() for line in source.read_text("utf-8").splitlines() if line.strip()]
    for start in range(0, len(texts), BATCH):
        batch = texts[start : start + BATCH]
        response = client.embeddings.create(model="minilm", input=batch, extra_body={"priority": "batch"}, timeout=600)
        vectors += [np.array(item.embedding, np.float32) for item in response.data]
        print(f"{len(vectors)} of {len(texts)}", flush=True)
    np.save(target, np.stack(vectors))


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
