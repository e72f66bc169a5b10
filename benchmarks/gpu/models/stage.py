"""End-to-end benchmark of the families at their real shapes with random weights, compared with transformers.

One row per model and metric: our side of all models first, then the others, for which time may run out. Our side is the
engine as the server runs it, from rows of token ids or images to vectors on the host. transformers runs the same
weights on padded batches, sorted by length as sentence-transformers does, with pixel values computed beforehand.
Neither side tokenizes text or decodes images. Times are wall-clock times and include host work. Utilization is the
model's operations without padding, divided by the time and by 800 TFLOP/s.
"""

import gc
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from benchmarks.gpu.models.model import MODELS, Model
from benchmarks.gpu.models.ours import Ours, loaded
from benchmarks.gpu.models.padded import Padded, random_network
from benchmarks.gpu.models.work import (
    PREFIX_TOKENS,
    QUERY_TOKENS,
    Batch,
    Vectors,
    prefixed_queries,
    random_texts,
    work_of,
)
from benchmarks.gpu.run import Row, Run, attempt
from triton_embed.python_backend.checkpoint.config import ServingConfig

DENSE_TFLOPS = 800  # bf16 rate that counts as 100 % utilization
BATCH = 32  # rows per padded batch of transformers
OTHER_BATCHES = (8, 128)  # also tried; the best batch size counts
SECONDS = 5.0  # per measurement, but at least three repeats
# Limits for 1 - cosine between our vectors and transformers in fp32. With random weights both sides can be further off
# than with trained ones, so the distance may also be MAX_RATIO times that of transformers in bf16. A mean
# distance below NEGLIGIBLE_DISTANCE always passes.
MAX_DISTANCE, MAX_RATIO, NEGLIGIBLE_DISTANCE = 5e-4, 1.25, 3e-5
MAX_BF16_DISTANCE = 3e-3  # limit where only two bf16 results can be compared
VARIANT_SECONDS = 20  # a variant is skipped if less time remains
# Variant name -> the settings that an operator changes for it. A setting that this engine lacks is skipped.
VARIANTS: dict[str, dict[str, Any]] = {
    "torch kernels": {"kernels": "reference"},
    "no graphs": {"cuda_graphs": False},
    "no prefix reuse": {"prefix_reuse": False},
}


@dataclass(frozen=True)
class _Comparison:
    """A model under measurement: transformers' network, whose weights our engine uses, and the work for both sides."""

    run: Run
    model: Model
    network: nn.Module
    directory: Path
    baseline: Padded
    work: Batch


def models(run: Run) -> Iterator[Row]:
    for part, measured in {"ours": _ours_measured, "others": _others_measured}.items():
        for model in MODELS:
            about = {"model": model.name}
            needed = 0.0 if run.dry else model.parameters_b * 1e9 * (6.5 if model.large else 11)
            seconds = model.seconds / 2
            if run.seconds_left < run.size(1, 0) * seconds:
                yield about | {"metric": part, "skipped": f"{run.seconds_left:.0f} s left, {seconds:.0f} s needed"}
            elif run.free_memory() < needed:
                yield about | {"metric": part, "skipped": f"{needed / 1e9:.0f} GB of free memory needed"}
            else:
                yield from _guarded(about, _model(run, model, measured))
            gc.collect()
            run.free_memory()


def _guarded(about: Row, rows: Iterator[Row]) -> Iterator[Row]:
    """Yield the rows; if computing one fails, yield a row with the error and stop."""
    while True:
        row = attempt({}, lambda: next(rows, None) or {"end": True})
        if "end" in row:
            return
        yield about | row
        if "error" in row and "metric" not in row:
            return


@torch.inference_mode()
def _model(run: Run, model: Model, measured: Callable[[_Comparison], Iterator[Row]]) -> Iterator[Row]:
    with tempfile.TemporaryDirectory() as folder:
        directory = Path(folder)
        begin = time.perf_counter()
        network = random_network(run, model, directory)
        run.timer.wait()
        yield {"metric": "baseline load", "seconds": time.perf_counter() - begin}
        comparison = _Comparison(run, model, network, directory, Padded(run, model, network), work_of(run, model))
        yield from measured(comparison)


def _others_measured(comparison: _Comparison) -> Iterator[Row]:
    """Measure transformers, and our engine with other settings."""
    yield from _padded_measured(comparison, BATCH)
    for name, settings in VARIANTS.items():
        if not settings.keys() <= {field.name for field in fields(ServingConfig)}:
            yield {"metric": "variant", "engine": name, "skipped": "this engine does not have the setting"}
        elif name in _variants(comparison.model):
            yield from _guarded({"engine": name}, _variant_measured(comparison, name, settings))
    if not comparison.model.large:
        for size in OTHER_BATCHES:
            yield from _padded_measured(comparison, size)


def _variants(model: Model) -> set[str]:
    """Return the variants that matter for a model; large models get only the most important one to save time."""
    variants = {"torch kernels"}
    if model.text and not model.large:
        variants |= {"no graphs"} | ({"no prefix reuse"} if model.prefix else set())
    return variants


def _ours_measured(comparison: _Comparison) -> Iterator[Row]:
    yield from _guarded({"engine": "ours"}, _engine_measured(comparison))


def _engine_measured(comparison: _Comparison) -> Iterator[Row]:
    run, model = comparison.run, comparison.model
    with loaded(run, model, comparison.network, comparison.directory) as embedder:
        yield {"metric": "load", "seconds": embedder.seconds, "kernels": embedder.kernels}
        yield attempt({"metric": "correctness"}, lambda: _correctness(comparison, embedder))
        yield from _speed(comparison, embedder)
        if model.prefix:
            yield attempt({"metric": "queries"}, lambda: _queries(comparison, embedder, prefixed_queries(run, model)))


def _variant_measured(comparison: _Comparison, name: str, settings: dict[str, Any]) -> Iterator[Row]:
    run, model = comparison.run, comparison.model
    if run.seconds_left < run.size(VARIANT_SECONDS, 0):
        yield {"metric": "variant", "skipped": "no time left"}
        return
    with loaded(run, model, comparison.network, comparison.directory, **settings) as embedder:
        if name == "no prefix reuse":
            yield attempt({"metric": "queries"}, lambda: _queries(comparison, embedder, prefixed_queries(run, model)))
        else:
            yield from _speed(comparison, embedder)


def _speed(comparison: _Comparison, embedder: Ours) -> Iterator[Row]:
    """Measure the corpus and, for text models, one query."""
    run, model, work = comparison.run, comparison.model, comparison.work
    yield attempt(
        {"metric": "corpus"},
        lambda: _throughput(model, work, run.timer.wall_ms(lambda: embedder(work), seconds=SECONDS)),
    )
    if model.text:
        query = random_texts(run, model, [QUERY_TOKENS], seed=5)
        about = {"metric": "one query", "tokens": QUERY_TOKENS}
        yield attempt(about, lambda: run.timer.wall_ms(lambda: embedder(query), run.size(200, 5), SECONDS))


def _padded_measured(comparison: _Comparison, size: int) -> Iterator[Row]:
    """Measure transformers at one batch size; at the default batch size also one query."""
    run, model, work, baseline = comparison.run, comparison.model, comparison.work, comparison.baseline
    about = {"metric": "corpus", "engine": "transformers", "batch": size}
    if run.seconds_left < run.size(VARIANT_SECONDS, 0):
        yield about | {"skipped": "no time left"}
        return
    yield attempt(
        about, lambda: _throughput(model, work, run.timer.wall_ms(lambda: baseline(work, size), seconds=SECONDS))
    )
    if model.text and size == BATCH:
        query = random_texts(run, model, [QUERY_TOKENS], seed=5)
        about = {"metric": "one query", "engine": "transformers", "tokens": QUERY_TOKENS}
        yield attempt(about, lambda: run.timer.wall_ms(lambda: baseline(query, 1), run.size(50, 3), SECONDS))


def _throughput(model: Model, work: Batch, times: Row) -> Row:
    seconds = times["median_ms"] / 1e3
    if model.text:
        flop = sum(model.flop(length) for length in work.lengths)
        rate = {"unit": "tokens/s", "rate": sum(work.lengths) / seconds}
    else:
        flop = model.gflop_per_image * 1e9 * len(work.rows)
        rate = {"unit": "images/s", "rate": len(work.rows) / seconds}
    return times | rate | {"rows": len(work.rows), "utilisation": flop / seconds / DENSE_TFLOPS / 1e12}


def _queries(comparison: _Comparison, embedder: Ours, work: Batch) -> Row:
    """Measure queries per second that share an instruction prefix, and check them against transformers."""
    run, baseline = comparison.run, comparison.baseline
    sample = Batch(work.rows[: run.size(24, 4)], work.lengths[: run.size(24, 4)])
    distance = float(_distances(embedder(sample), baseline(sample, 8)).max())
    times = run.timer.wall_ms(lambda: embedder(work), seconds=SECONDS)
    rate = len(work.rows) / times["median_ms"] * 1e3
    row = times | {"unit": "queries/s", "rate": rate, "rows": len(work.rows), "shared": PREFIX_TOKENS}
    return row | {"distance_to_bf16": distance, "right": distance <= MAX_BF16_DISTANCE}


def _correctness(comparison: _Comparison, embedder: Ours) -> Row:
    """Compare some rows with transformers in fp32 by 1 - cosine: our vectors, and those of transformers in bf16."""
    run, baseline, work = comparison.run, comparison.baseline, comparison.work
    sample = Batch(work.rows[: run.size(24, 4)], work.lengths[: run.size(24, 4)])
    ours, theirs = embedder(sample), baseline(sample, 8)
    if comparison.model.large:  # fp32 does not fit in memory and time
        distance = float(_distances(ours, theirs).max())
        return {"rows": len(sample.rows), "distance_to_bf16": distance, "right": distance <= MAX_BF16_DISTANCE}
    exact = baseline.in_fp32()(sample, 8)
    mine, other = _distances(ours, exact), _distances(theirs, exact)
    different = float((exact @ exact.T - 2 * np.eye(len(exact), dtype=np.float32)).max())
    near = mine.max() <= max(MAX_DISTANCE, MAX_RATIO * other.max())
    return {
        "rows": len(sample.rows),
        "cosine": 1 - float(mine.max()),
        "distance": float(mine.mean()),
        "transformers_distance": float(other.mean()),
        "of_different_rows": different,
        "right": bool(near and mine.mean() <= max(MAX_RATIO * other.mean(), NEGLIGIBLE_DISTANCE)),
    }


def _distances(a: Vectors, b: Vectors) -> npt.NDArray[np.float64]:
    a, b = (x.astype(np.float64) for x in (a, b))
    distances: npt.NDArray[np.float64] = 1 - (a * b).sum(axis=1) / np.linalg.norm(a, axis=1) / np.linalg.norm(b, axis=1)
    return distances
