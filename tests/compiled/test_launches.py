"""No request compiles a kernel: loading a model compiles every one that any request of its family can launch."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from test_networks import CHECKPOINTS, embedder, rows_and_vectors

from triton_embed.kernels.gpu.launch import bound_count
from triton_embed.python_backend.execution import embedder as embedder_file
from triton_embed.python_backend.inputs.row import Row

Batch = tuple[list[Row], list[int]]


def batches(rows: list[Row], dims: int) -> Iterator[Batch]:
    """Yield batches of every form: one row and many, one size and several, texts, images and both, shared prefixes."""
    texts, images = [row for row in rows if not row.images], [row for row in rows if row.images]
    for chosen in ([texts[0]], [texts[1]], texts, images, rows, texts * 9, texts * 40):
        if chosen:
            yield chosen, [dims] * len(chosen)
            yield chosen, [dims // 2] * len(chosen)
            yield chosen, [dims // 2 + i % 3 for i in range(len(chosen))]
    long = max(texts, key=lambda row: len(row.ids))
    sharing = Row(long.ids, shared_prefix_tokens=len(long.ids) // 2)
    yield [sharing], [dims]
    yield [sharing, sharing], [dims, dims]
    yield [sharing, *texts, sharing], [dims] * (len(texts) + 2)


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_no_request_compiles_a_kernel(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(embedder_file, "_min_cosine", lambda *_: 1.0)  # nothing is computed
    directory = CHECKPOINTS[name](tmp_path / "checkpoint")
    model = embedder(name, directory, dtype="bfloat16")
    with torch.inference_mode():
        model._compile_linears()  # done on a GPU only
    compiled = bound_count()
    assert compiled > 4
    rows, vectors = rows_and_vectors(name, directory)
    for batch, dims in batches(rows, vectors.shape[1]):
        model.embed(batch, dims)
        assert bound_count() == compiled, f"{len(batch)} rows of {dims} compile {bound_count() - compiled} kernels"
