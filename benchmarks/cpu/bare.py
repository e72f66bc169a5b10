"""sentence-transformers or the server's own forward pass in-process, tokenization included.

`python -m benchmarks.cpu.bare sentence-transformers|ours DTYPE CHECKPOINT TEXTS.json` is a worker, so that the memory
of each engine can be measured separately.
"""

import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from benchmarks.cpu.calls import Encode, read_pools, serve
from benchmarks.processes import MODEL
from benchmarks.report import ROOT
from benchmarks.worker import Vectors


def sentence_transformers(dtype: str, checkpoint: Path) -> Encode:
    """Encode as its README shows: batches of 32, sorted by length within a call."""
    import torch
    from sentence_transformers import SentenceTransformer

    kwargs = {"torch_dtype": getattr(torch, dtype)}
    model = SentenceTransformer(str(checkpoint), device="cpu", model_kwargs=kwargs)
    return lambda texts: model.encode(texts, normalize_embeddings=True, show_progress_bar=False)


def ours(dtype: str, checkpoint: Path) -> Encode:
    """Encode with the server's forward pass, configured by config.pbtxt but without the scheduler.

    Rows are sorted by length; each pass holds up to the token budget.
    """
    from google.protobuf.json_format import MessageToJson

    from triton_embed.python_backend.checkpoint.config import ServingConfig
    from triton_embed.python_backend.checkpoint.repository import read_config
    from triton_embed.python_backend.execution.embedder import Embedder
    from triton_embed.python_backend.inputs.tokenizer import Tokenizer
    from triton_embed.python_backend.spec import EncoderSpec

    repository = ROOT / "model_repository"
    config = read_config(repository, MODEL)
    config.name = MODEL
    config.parameters["checkpoint"].string_value = str(checkpoint)
    config.parameters["dtype"].string_value = dtype
    as_json = MessageToJson(config, preserving_proto_field_name=True)
    serving = ServingConfig.from_triton({"model_config": as_json, "model_repository": str(repository / MODEL)})
    embedder = Embedder(EncoderSpec(), checkpoint, serving)
    tokenizer = Tokenizer(checkpoint, embedder.model, None)
    dimensions = embedder.model.dimensions

    def encode(texts: list[str]) -> Vectors:
        rows = [tokenizer.truncate_text(ids, "end", i) for i, ids in enumerate(tokenizer.encode(texts))]
        vectors = np.empty((len(rows), dimensions), np.float32)
        for batch in _passes([row.cost for row in rows], embedder.budget.pass_tokens):
            vectors[batch] = embedder.embed([rows[i] for i in batch], [dimensions] * len(batch))
        return vectors

    return encode


def _passes(lengths: list[int], budget: int) -> Iterator[list[int]]:
    """Yield the row indices of each forward pass, shortest rows first."""
    batch: list[int] = []
    tokens = 0
    for i in sorted(range(len(lengths)), key=lengths.__getitem__):
        if batch and tokens + lengths[i] > budget:
            yield batch
            batch, tokens = [], 0
        batch.append(i)
        tokens += lengths[i]
    yield batch


def main() -> None:
    name, dtype, checkpoint, pools = sys.argv[1:]
    encode = {"sentence-transformers": sentence_transformers, "ours": ours}[name](dtype, Path(checkpoint))
    serve(lambda workload, inputs: (encode, ""), read_pools(pools))


if __name__ == "__main__":
    main()
