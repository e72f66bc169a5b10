"""End-to-end benchmark of the families at their real shapes with random weights, compared with transformers.

One row per model and metric. Our side is the engine as the server runs it, from rows of token ids or images to vectors
on the host. transformers runs the same weights on padded batches, sorted by length as sentence-transformers does, with
pixel values computed beforehand. Neither side tokenizes text or decodes images. Times are wall-clock times and include
host work. Utilization is the model's operations without padding, divided by the time and by 800 TFLOP/s.
"""

import copy
import gc
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, NamedTuple
from unittest.mock import patch

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from benchmarks import checkout
from benchmarks.gpu.kernels.ops import mixed
from benchmarks.gpu.models.shapes import MODELS, Model
from benchmarks.gpu.run import Row, Run, attempt

checkout.importable()

from triton_embed.kernels import ops  # noqa: E402
from triton_embed.python_backend.checkpoint.config import ServingConfig  # noqa: E402
from triton_embed.python_backend.execution.embedder import Embedder  # noqa: E402
from triton_embed.python_backend.inputs.row import NO_IDS  # noqa: E402
from triton_embed.python_backend.inputs.row import Row as Input  # noqa: E402
from triton_embed.python_backend.networks import weights  # noqa: E402

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
QUERY_TOKENS, PREFIX_TOKENS = 32, 20
Vectors = npt.NDArray[np.float32]
# Variant name -> the settings that an operator changes for it. A setting that this engine lacks is skipped.
VARIANTS: dict[str, dict[str, Any]] = {
    "torch kernels": {"kernels": "reference"},
    "no graphs": {"cuda_graphs": False},
    "no prefix reuse": {"prefix_reuse": False},
}


class Batch(NamedTuple):
    """Input rows for both sides: token ids, or images with the token ids around them."""

    rows: list[Input]
    lengths: list[int]  # tokens of the text side


@dataclass(frozen=True)
class _TensorInMemory:
    """A tensor in memory that replaces a tensor in a file; see `weights._Stored`."""

    tensor: Tensor
    key: str
    path: Path = Path("memory")

    def copy_to(self, target: Tensor, name: str) -> None:
        if self.tensor.shape != target.shape:
            raise ValueError(f"tensor '{name}' has shape {list(self.tensor.shape)}, expected {list(target.shape)}")
        target.copy_(self.tensor)


def models(run: Run) -> Iterator[Row]:
    for model in MODELS:
        about = {"model": model.name}
        needed = 0.0 if run.dry else model.parameters_b * 1e9 * (6.5 if model.large else 11)
        if run.seconds_left < run.size(model.seconds, 0):
            yield about | {"metric": "all", "skipped": f"{run.seconds_left:.0f} s left, {model.seconds} s needed"}
        elif run.free_memory() < needed:
            yield about | {"metric": "all", "skipped": f"{needed / 1e9:.0f} GB of free memory needed"}
        else:
            yield from _guarded(about, _model(run, model))
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
def _model(run: Run, model: Model) -> Iterator[Row]:
    with tempfile.TemporaryDirectory() as folder:
        directory = Path(folder)
        begin = time.perf_counter()
        network = _random_network(run, model, directory)
        run.timer.wait()
        yield {"metric": "baseline load", "seconds": time.perf_counter() - begin}
        work = _work(run, model)
        baseline = _Padded(run, model, network)
        comparison = _Comparison(run, model, network, directory, baseline, work)
        yield from _guarded({"engine": "ours"}, _ours_measured(comparison))
        yield from _padded_measured(comparison, BATCH)
        for name, settings in VARIANTS.items():
            if not settings.keys() <= {field.name for field in fields(ServingConfig)}:
                yield {"metric": "variant", "engine": name, "skipped": "this engine does not have the setting"}
            elif name in _variants(model):
                yield from _guarded({"engine": name}, _variant_measured(comparison, name, settings))
        if not model.large:
            for size in OTHER_BATCHES:
                yield from _padded_measured(comparison, size)


def _variants(model: Model) -> set[str]:
    """Return the variants that matter for a model; large models get only the most important one to save time."""
    variants = {"torch kernels"}
    if model.text and not model.large:
        variants |= {"no graphs"} | ({"no prefix reuse"} if model.prefix else set())
    return variants


def _ours_measured(comparison: "_Comparison") -> Iterator[Row]:
    run, model = comparison.run, comparison.model
    with _ours(comparison) as embedder:
        yield {"metric": "load", "seconds": embedder.seconds, "kernels": embedder.kernels}
        yield attempt({"metric": "correctness"}, lambda: _correctness(comparison, embedder))
        yield from _speed(comparison, embedder)
        if model.prefix:
            yield attempt({"metric": "queries"}, lambda: _queries(comparison, embedder, _prefixed(run, model)))


def _variant_measured(comparison: "_Comparison", name: str, settings: dict[str, Any]) -> Iterator[Row]:
    run, model = comparison.run, comparison.model
    if run.seconds_left < run.size(VARIANT_SECONDS, 0):
        yield {"metric": "variant", "skipped": "no time left"}
        return
    with _ours(comparison, **settings) as embedder:
        if name == "no prefix reuse":
            yield attempt({"metric": "queries"}, lambda: _queries(comparison, embedder, _prefixed(run, model)))
        else:
            yield from _speed(comparison, embedder)


def _speed(comparison: "_Comparison", embedder: "_Ours") -> Iterator[Row]:
    """Measure the corpus and, for text models, one query."""
    run, model, work = comparison.run, comparison.model, comparison.work
    yield attempt(
        {"metric": "corpus"},
        lambda: _throughput(model, work, run.timer.wall_ms(lambda: embedder(work), seconds=SECONDS)),
    )
    if model.text:
        query = _texts(run, model, [QUERY_TOKENS], seed=5)
        about = {"metric": "one query", "tokens": QUERY_TOKENS}
        yield attempt(about, lambda: run.timer.wall_ms(lambda: embedder(query), run.size(200, 5), SECONDS))


def _padded_measured(comparison: "_Comparison", size: int) -> Iterator[Row]:
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
        query = _texts(run, model, [QUERY_TOKENS], seed=5)
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


def _queries(comparison: "_Comparison", embedder: "_Ours", work: Batch) -> Row:
    """Measure queries per second that share an instruction prefix, and check them against transformers."""
    run, baseline = comparison.run, comparison.baseline
    sample = Batch(work.rows[: run.size(24, 4)], work.lengths[: run.size(24, 4)])
    distance = float(_distances(embedder(sample), baseline(sample, 8)).max())
    times = run.timer.wall_ms(lambda: embedder(work), seconds=SECONDS)
    rate = len(work.rows) / times["median_ms"] * 1e3
    row = times | {"unit": "queries/s", "rate": rate, "rows": len(work.rows), "shared": PREFIX_TOKENS}
    return row | {"distance_to_bf16": distance, "right": distance <= MAX_BF16_DISTANCE}


def _correctness(comparison: "_Comparison", embedder: "_Ours") -> Row:
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


def _work(run: Run, model: Model) -> Batch:
    if model.text:
        return _texts(run, model, mixed(run.size(16_384 if model.large else 32_768, 96), longest=run.size(512, 40)))
    side, count = model.side(run.dry), run.size(model.images, 3)
    rng = np.random.default_rng(0)
    images = [rng.integers(0, 256, (side, side, 3), dtype=np.uint8) for _ in range(count)]
    ids, tokens = model.image_ids(run.dry)
    rows = [Input(ids if len(ids) else NO_IDS, (image,), tokens) for image in images]
    return Batch(rows, [max(len(ids), 1)] * count)


def _texts(run: Run, model: Model, lengths: list[int], seed: int = 0) -> Batch:
    """Return random token ids, shuffled by length like real requests."""
    rng = np.random.default_rng(seed)
    shuffled = [lengths[i] for i in rng.permutation(len(lengths))]
    high = model.vocabulary(run.dry)
    return Batch([Input(rng.integers(5, high, n).astype(np.int32)) for n in shuffled], shuffled)


def _prefixed(run: Run, model: Model) -> Batch:
    """Return queries of 34 tokens that share their first 20 tokens."""
    work = _texts(run, model, [PREFIX_TOKENS + 14] * run.size(448, 4), seed=3)
    shared = work.rows[0].ids[:PREFIX_TOKENS]
    ids = [np.concatenate([shared, row.ids[PREFIX_TOKENS:]]) for row in work.rows]
    return Batch([Input(row_ids, shared_prefix_tokens=PREFIX_TOKENS) for row_ids in ids], work.lengths)


class _Ours:
    """Our engine: sequential forward passes, each with as many rows as the token budget admits."""

    def __init__(self, run: Run, model: Model, serving: ServingConfig, directory: Path) -> None:
        begin = time.perf_counter()
        self._embedder = Embedder(model.spec, directory, serving)
        run.timer.wait()
        self.seconds = time.perf_counter() - begin
        self.kernels = str(self._embedder.kernels)
        self._budget = self._embedder.budget.pass_tokens
        self._size = self._embedder.model.dimensions

    def __call__(self, work: Batch) -> Vectors:
        parts: list[Vectors] = []
        pending: list[Input] = []
        cost = 0
        for row in work.rows:
            if pending and cost + row.cost > self._budget:
                parts.append(self._pass(pending))
                pending, cost = [], 0
            pending.append(row)
            cost += row.cost
        parts.append(self._pass(pending))
        return np.concatenate(parts)

    def _pass(self, rows: list[Input]) -> Vectors:
        """Run one forward pass with rows sorted by cost, as the scheduler does; return vectors in input order."""
        order = sorted(range(len(rows)), key=lambda i: rows[i].cost)
        vectors = self._embedder.embed([rows[i] for i in order], [self._size] * len(rows))
        return vectors[np.argsort(order)]


@dataclass(frozen=True)
class _Comparison:
    """A model under measurement: transformers' network, whose weights our engine uses, and the work for both sides."""

    run: Run
    model: Model
    network: nn.Module
    directory: Path
    baseline: "_Padded"
    work: Batch


@contextmanager
def _ours(comparison: _Comparison, **settings: Any) -> Iterator[_Ours]:
    """Load the engine with the network's weights directly from memory."""
    run, model, directory = comparison.run, comparison.model, comparison.directory
    gc.collect()
    run.free_memory()
    serving = ServingConfig(
        name=model.name,
        checkpoint=str(directory),
        checkpoint_root=directory,
        model_types=(model.model_type,),
        device="cpu" if run.device.type == "cpu" else "cuda:0",
        dtype="bfloat16",
        pooling=model.pooling,
        threads=run.size(0, 1),
        **settings,
    )
    state = comparison.network.state_dict()

    def index(_: Path, naming: weights.Naming) -> dict[str, _TensorInMemory]:
        return {weights._rename(key, naming.renames): _TensorInMemory(tensor, key) for key, tensor in state.items()}

    try:
        with patch.object(weights, "_index", index):
            embedder = _Ours(run, model, serving, directory)
        yield embedder
    finally:
        if hasattr(ops, "use"):
            ops.use("auto")  # the choice is global to the process, so restore it


def _random_network(run: Run, model: Model, directory: Path) -> nn.Module:
    """Create transformers' bf16 network with random weights, scaled so that activations keep their magnitude."""
    config = model.config(run.dry)
    config.save_pretrained(directory)
    model.write_processor(directory)
    with torch.device(run.device):
        network: nn.Module = model.network(config)
    network = network.to(torch.bfloat16).eval()
    generator = torch.Generator(run.device).manual_seed(0)
    for name, parameter in network.named_parameters():
        if parameter.dim() > 1:
            parameter.data.normal_(std=(parameter.numel() / len(parameter)) ** -0.5, generator=generator)
        else:
            parameter.data.normal_(mean=0.0 if name.endswith("bias") else 1.0, std=0.02, generator=generator)
    return network


class _Padded:
    """transformers baseline with padded batches sorted by length."""

    def __init__(self, run: Run, model: Model, network: nn.Module) -> None:
        self._run, self._model, self._network = run, model, network
        self._pixels: dict[int, Tensor] = {}

    def in_fp32(self) -> "_Padded":
        return _Padded(self._run, self._model, copy.deepcopy(self._network).float())

    def __call__(self, work: Batch, size: int) -> Vectors:
        order = sorted(range(len(work.rows)), key=lambda i: -work.lengths[i])
        vectors_by_row: dict[int, Vectors] = {}
        for start in range(0, len(order), size):
            sample = order[start : start + size]
            pooled = self._forward([work.rows[i] for i in sample])
            vectors = nn.functional.normalize(pooled.float(), dim=-1).cpu().numpy()
            vectors_by_row |= zip(sample, vectors, strict=True)
        return np.stack([vectors_by_row[i] for i in range(len(order))])

    def _forward(self, rows: Sequence[Input]) -> Tensor:
        model: Any = self._network
        pad_left = self._model.pooling == "last"
        if self._model.text:
            padded = _pad([row.ids for row in rows], pad_left, self._run.device)
            options = {"use_cache": False} if pad_left else {}
            states: Tensor = model(**padded, **options).last_hidden_state
            return states[:, -1 if pad_left else 0]
        pixels = torch.cat([self._pixel_values(row) for row in rows])
        return self._model.image_vectors(
            model, pixels, _pad([row.ids for row in rows], True, self._run.device), len(rows)
        )

    def _pixel_values(self, row: Input) -> Tensor:
        """Return cached pixel values; transformers' image preprocessing is not measured."""
        key = id(row.images[0])
        if key not in self._pixels:
            image = torch.from_numpy(row.images[0]).to(self._run.device)
            self._pixels[key] = self._model.pixels(image).to(next(self._network.parameters()).dtype)
        return self._pixels[key]


def _pad(rows: Sequence[npt.NDArray[np.int32]], pad_left: bool, device: torch.device) -> dict[str, Tensor]:
    size = max(map(len, rows))
    ids = np.zeros((len(rows), size), dtype=np.int64)
    mask = np.zeros_like(ids)
    for i, row in enumerate(rows):
        span = slice(size - len(row), size) if pad_left else slice(0, len(row))
        ids[i, span], mask[i, span] = row, 1
    return {"input_ids": torch.from_numpy(ids).to(device), "attention_mask": torch.from_numpy(mask).to(device)}
