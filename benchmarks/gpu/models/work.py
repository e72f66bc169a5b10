"""Input rows of a measured model: token ids or images."""

from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from benchmarks.gpu.kernels.cases import mixed
from benchmarks.gpu.models.model import Model
from benchmarks.gpu.run import Run
from triton_embed.python_backend.inputs.row import NO_IDS
from triton_embed.python_backend.inputs.row import Row as Input

QUERY_TOKENS, PREFIX_TOKENS = 32, 20


Vectors = npt.NDArray[np.float32]  # [rows, dimensions]


class Batch(NamedTuple):
    """Input rows for both sides: token ids, or images with the token ids around them."""

    rows: list[Input]
    lengths: list[int]  # tokens of the text side


def work_of(run: Run, model: Model) -> Batch:
    """Return the rows that throughput is measured on."""
    if model.text:
        return random_texts(
            run, model, mixed(run.size(16_384 if model.large else 32_768, 96), longest=run.size(512, 40))
        )
    side, count = model.side(run.dry), run.size(model.images, 3)
    rng = np.random.default_rng(0)
    images = [rng.integers(0, 256, (side, side, 3), dtype=np.uint8) for _ in range(count)]
    ids, tokens = model.image_ids(run.dry)
    rows = [Input(ids if len(ids) else NO_IDS, (image,), tokens) for image in images]
    return Batch(rows, [max(len(ids), 1)] * count)


def random_texts(run: Run, model: Model, lengths: list[int], seed: int = 0) -> Batch:
    """Return random token ids, shuffled by length like real requests."""
    rng = np.random.default_rng(seed)
    shuffled = [lengths[i] for i in rng.permutation(len(lengths))]
    high = model.sizes(run.dry)["vocab_size"]
    return Batch([Input(rng.integers(5, high, n).astype(np.int32)) for n in shuffled], shuffled)


def prefixed_queries(run: Run, model: Model) -> Batch:
    """Return queries of 34 tokens that share their first 20 tokens."""
    work = random_texts(run, model, [PREFIX_TOKENS + 14] * run.size(448, 4), seed=3)
    shared = work.rows[0].ids[:PREFIX_TOKENS]
    ids = [np.concatenate([shared, row.ids[PREFIX_TOKENS:]]) for row in work.rows]
    return Batch([Input(row_ids, shared_prefix_tokens=PREFIX_TOKENS) for row_ids in ids], work.lengths)
