"""The families end to end at their real shapes with random weights, beside transformers on the same weights.

A row a model and figure. Our side is the engine as a server has it, from rows of token ids or pictures to vectors on
the host; theirs gets padded batches, sorted by length as sentence-transformers does it, and pixel values made
beforehand. Both sides leave tokenising and decoding out. Times are the wall clock's, host work included. Utilisation:
the operations of the model without padding, over the time and over 800 TFLOP/s.
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
from benchmarks.gpu_ops import mixed
from benchmarks.gpu_run import Row, Run, attempt
from benchmarks.gpu_shapes import MODELS, Model

checkout.importable()

from triton_embed.kernels import ops  # noqa: E402
from triton_embed.python_backend.checkpoint.config import ServingConfig  # noqa: E402
from triton_embed.python_backend.execution.embedder import Embedder  # noqa: E402
from triton_embed.python_backend.inputs.row import NO_IDS  # noqa: E402
from triton_embed.python_backend.inputs.row import Row as Input  # noqa: E402
from triton_embed.python_backend.networks import weights  # noqa: E402

DENSE_TFLOPS = 800  # bf16: what the utilisation is a share of
BATCH = 32  # rows, of the padded side
OTHER_BATCHES = (8, 128)  # of which the best counts, if it is better
SECONDS = 5.0  # for a figure of the padded side, three repeats at least
# 1 - cosine of ours to transformers in fp32, or so many times what transformers' own bf16 is away: through random
# weights either can be further off than through trained ones.
MOST_DISTANCE, MORE_THAN_THEIRS, NOTHING = 5e-4, 1.25, 3e-5
MOST_BETWEEN_BF16 = 3e-3  # where only two roundings can be compared
VARIANT_SECONDS = 20  # left, or a variant is not begun
QUERY_TOKENS, PREFIX_TOKENS = 32, 20
Vectors = npt.NDArray[np.float32]
# What an operator can switch off -> what is then measured under the name. A setting this engine lacks is left out.
VARIANTS: dict[str, dict[str, Any]] = {
    "torch kernels": {"kernels": "torch"},
    "no graphs": {"cuda_graphs": False},
    "no prefix reuse": {"prefix_reuse": False},
}


class Batch(NamedTuple):
    """Rows as either side takes them: token ids, or pictures with the ids around them."""

    rows: list[Input]
    lengths: list[int]  # tokens of the text side


@dataclass(frozen=True)
class _Held:
    """A tensor in the place of one in a file: see `weights._Stored`."""

    tensor: Tensor
    key: str
    path: Path = Path("memory")

    def copy_to(self, place: Tensor, name: str) -> None:
        if self.tensor.shape != place.shape:
            raise ValueError(f"tensor '{name}' has shape {list(self.tensor.shape)}, not {list(place.shape)}")
        place.copy_(self.tensor)


def models(run: Run) -> Iterator[Row]:
    for model in MODELS:
        about = {"model": model.name}
        needed = 0.0 if run.dry else model.parameters_b * 1e9 * (6.5 if model.large else 11)
        if run.seconds_left < run.size(model.seconds, 0):
            yield about | {"metric": "all", "skipped": f"{run.seconds_left:.0f} s left, {model.seconds} wanted"}
        elif run.free_memory() < needed:
            yield about | {"metric": "all", "skipped": f"{needed / 1e9:.0f} GB of memory wanted"}
        else:
            yield from _guarded(about, _model(run, model))
        gc.collect()
        run.free_memory()


def _guarded(about: Row, rows: Iterator[Row]) -> Iterator[Row]:
    """The rows until one cannot be made, and why."""
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
        rivals = _Padded(run, model, network)
        compared = _Compared(run, model, network, directory, rivals, work)
        yield from _guarded({"engine": "ours"}, _ours_measured(compared))
        yield from _padded_measured(compared, BATCH)
        for name, changed in VARIANTS.items():
            if not changed.keys() <= {field.name for field in fields(ServingConfig)}:
                yield {"metric": "variant", "engine": name, "skipped": "the engine has no such setting"}
            elif name in _variants(model):
                yield from _guarded({"engine": name}, _variant_measured(compared, name, changed))
        if not model.large:
            for size in OTHER_BATCHES:
                yield from _padded_measured(compared, size)


def _variants(model: Model) -> set[str]:
    """What makes a difference to a model, or to the large ones, for which there is little time, most of one."""
    found = {"torch kernels"}
    if model.text and not model.large:
        found |= {"no graphs"} | ({"no prefix reuse"} if model.prefix else set())
    return found


def _ours_measured(compared: "_Compared") -> Iterator[Row]:
    run, model = compared.run, compared.model
    with _ours(compared) as embedder:
        yield {"metric": "load", "seconds": embedder.seconds, "kernels": embedder.kernels}
        yield attempt({"metric": "correctness"}, lambda: _correctness(compared, embedder))
        yield from _speed(compared, embedder)
        if model.prefix:
            yield attempt({"metric": "queries"}, lambda: _queries(compared, embedder, _prefixed(run, model)))


def _variant_measured(compared: "_Compared", name: str, changed: dict[str, Any]) -> Iterator[Row]:
    run, model = compared.run, compared.model
    if run.seconds_left < run.size(VARIANT_SECONDS, 0):
        yield {"metric": "variant", "skipped": "no time left"}
        return
    with _ours(compared, **changed) as embedder:
        if name == "no prefix reuse":
            yield attempt({"metric": "queries"}, lambda: _queries(compared, embedder, _prefixed(run, model)))
        else:
            yield from _speed(compared, embedder)


def _speed(compared: "_Compared", embedder: "_Ours") -> Iterator[Row]:
    """The corpus, and one query."""
    run, model, work = compared.run, compared.model, compared.work
    yield attempt(
        {"metric": "corpus"},
        lambda: _throughput(model, work, run.timer.wall_ms(lambda: embedder(work), seconds=SECONDS)),
    )
    if model.text:
        query = _texts(run, model, [QUERY_TOKENS], seed=5)
        about = {"metric": "one query", "tokens": QUERY_TOKENS}
        yield attempt(about, lambda: run.timer.wall_ms(lambda: embedder(query), run.size(200, 5), SECONDS))


def _padded_measured(compared: "_Compared", size: int) -> Iterator[Row]:
    """transformers at a batch size; at the first, one query too."""
    run, model, work, rivals = compared.run, compared.model, compared.work, compared.rivals
    about = {"metric": "corpus", "engine": "transformers", "batch": size}
    if run.seconds_left < run.size(VARIANT_SECONDS, 0):
        yield about | {"skipped": "no time left"}
        return
    yield attempt(
        about, lambda: _throughput(model, work, run.timer.wall_ms(lambda: rivals(work, size), seconds=SECONDS))
    )
    if model.text and size == BATCH:
        query = _texts(run, model, [QUERY_TOKENS], seed=5)
        about = {"metric": "one query", "engine": "transformers", "tokens": QUERY_TOKENS}
        yield attempt(about, lambda: run.timer.wall_ms(lambda: rivals(query, 1), run.size(50, 3), SECONDS))


def _throughput(model: Model, work: Batch, times: Row) -> Row:
    seconds = times["median_ms"] / 1e3
    if model.text:
        flop = sum(model.flop(length) for length in work.lengths)
        rate = {"unit": "tokens/s", "rate": sum(work.lengths) / seconds}
    else:
        flop = model.gflop_per_image * 1e9 * len(work.rows)
        rate = {"unit": "images/s", "rate": len(work.rows) / seconds}
    return times | rate | {"rows": len(work.rows), "utilisation": flop / seconds / DENSE_TFLOPS / 1e12}


def _queries(compared: "_Compared", embedder: "_Ours", work: Batch) -> Row:
    """Queries a second that begin with one instruction, and whether reusing it gives what transformers gives."""
    run, rivals = compared.run, compared.rivals
    some = Batch(work.rows[: run.size(24, 4)], work.lengths[: run.size(24, 4)])
    apart = float(_distances(embedder(some), rivals(some, 8)).max())
    times = run.timer.wall_ms(lambda: embedder(work), seconds=SECONDS)
    rate = len(work.rows) / times["median_ms"] * 1e3
    found = times | {"unit": "queries/s", "rate": rate, "rows": len(work.rows), "shared": PREFIX_TOKENS}
    return found | {"distance_to_bf16": apart, "right": apart <= MOST_BETWEEN_BF16}


def _correctness(compared: "_Compared", embedder: "_Ours") -> Row:
    """Distances, 1 - cosine, to transformers in fp32 on some rows: ours, and transformers' own in bf16."""
    run, rivals, work = compared.run, compared.rivals, compared.work
    some = Batch(work.rows[: run.size(24, 4)], work.lengths[: run.size(24, 4)])
    ours, theirs = embedder(some), rivals(some, 8)
    if compared.model.large:  # there is no memory, nor time, for fp32
        apart = float(_distances(ours, theirs).max())
        return {"rows": len(some.rows), "distance_to_bf16": apart, "right": apart <= MOST_BETWEEN_BF16}
    exact = rivals.in_fp32()(some, 8)
    mine, other = _distances(ours, exact), _distances(theirs, exact)
    different = float((exact @ exact.T - 2 * np.eye(len(exact), dtype=np.float32)).max())
    near = mine.max() <= max(MOST_DISTANCE, MORE_THAN_THEIRS * other.max())
    return {
        "rows": len(some.rows),
        "cosine": 1 - float(mine.max()),
        "distance": float(mine.mean()),
        "transformers_distance": float(other.mean()),
        "of_different_rows": different,
        "right": bool(near and mine.mean() <= max(MORE_THAN_THEIRS * other.mean(), NOTHING)),
    }


def _distances(a: Vectors, b: Vectors) -> npt.NDArray[np.float64]:
    a, b = (x.astype(np.float64) for x in (a, b))
    found: npt.NDArray[np.float64] = 1 - (a * b).sum(axis=1) / np.linalg.norm(a, axis=1) / np.linalg.norm(b, axis=1)
    return found


def _work(run: Run, model: Model) -> Batch:
    if model.text:
        return _texts(run, model, mixed(run.size(16_384 if model.large else 32_768, 96), longest=run.size(512, 40)))
    side, count = model.side(run.dry), run.size(model.images, 3)
    rng = np.random.default_rng(0)
    pictures = [rng.integers(0, 256, (side, side, 3), dtype=np.uint8) for _ in range(count)]
    ids, tokens = model.picture_ids(run.dry)
    rows = [Input(ids if len(ids) else NO_IDS, (picture,), tokens) for picture in pictures]
    return Batch(rows, [max(len(ids), 1)] * count)


def _texts(run: Run, model: Model, lengths: list[int], seed: int = 0) -> Batch:
    """In no order of length, as requests come."""
    rng = np.random.default_rng(seed)
    shuffled = [lengths[i] for i in rng.permutation(len(lengths))]
    high = model.vocabulary(run.dry)
    return Batch([Input(rng.integers(5, high, n).astype(np.int32)) for n in shuffled], shuffled)


def _prefixed(run: Run, model: Model) -> Batch:
    """Queries of 34 tokens, of which the first 20 are the same."""
    work = _texts(run, model, [PREFIX_TOKENS + 14] * run.size(448, 4), seed=3)
    shared = work.rows[0].ids[:PREFIX_TOKENS]
    ids = [np.concatenate([shared, row.ids[PREFIX_TOKENS:]]) for row in work.rows]
    return Batch([Input(one, shared=PREFIX_TOKENS) for one in ids], work.lengths)


class _Ours:
    """The engine: forward passes of as many rows as its token budget takes, one after the other."""

    def __init__(self, run: Run, model: Model, serving: ServingConfig, directory: Path) -> None:
        begin = time.perf_counter()
        self._embedder = Embedder(model.spec, directory, serving)
        run.timer.wait()
        self.seconds = time.perf_counter() - begin
        self.kernels = str(self._embedder.kernels)
        self._budget = self._embedder.budget.whole
        self._size = self._embedder.model.dimensions

    def __call__(self, work: Batch) -> Vectors:
        found: list[Vectors] = []
        waiting: list[Input] = []
        cost = 0
        for row in work.rows:
            if waiting and cost + row.cost > self._budget:
                found.append(self._pass(waiting))
                waiting, cost = [], 0
            waiting.append(row)
            cost += row.cost
        found.append(self._pass(waiting))
        return np.concatenate(found)

    def _pass(self, rows: list[Input]) -> Vectors:
        """Sorted by cost, as the scheduler does."""
        order = sorted(range(len(rows)), key=lambda i: rows[i].cost)
        vectors = self._embedder.embed([rows[i] for i in order], [self._size] * len(rows))
        return vectors[np.argsort(order)]


@dataclass(frozen=True)
class _Compared:
    """A model under measurement: transformers' network, whose weights ours takes, and the work for both."""

    run: Run
    model: Model
    network: nn.Module
    directory: Path
    rivals: "_Padded"
    work: Batch


@contextmanager
def _ours(compared: _Compared, **changed: Any) -> Iterator[_Ours]:
    """The engine on the network's own weights, which no file holds."""
    run, model, directory = compared.run, compared.model, compared.directory
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
        **changed,
    )
    state = compared.network.state_dict()

    def index(_: Path, naming: weights.Naming) -> dict[str, _Held]:
        return {weights._rename(key, naming.renames): _Held(tensor, key) for key, tensor in state.items()}

    try:
        with patch.object(weights, "_index", index):
            embedder = _Ours(run, model, serving, directory)
        yield embedder
    finally:
        if hasattr(ops, "use"):
            ops.use("auto")  # the operator's choice is the process's


def _random_network(run: Run, model: Model, directory: Path) -> nn.Module:
    """transformers' network in bf16 on the device, every weight drawn so that what it multiplies keeps its size."""
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
    """transformers, with batches sorted by length and padded."""

    def __init__(self, run: Run, model: Model, network: nn.Module) -> None:
        self._run, self._model, self._network = run, model, network
        self._pixels: dict[int, Tensor] = {}

    def in_fp32(self) -> "_Padded":
        return _Padded(self._run, self._model, copy.deepcopy(self._network).float())

    def __call__(self, work: Batch, size: int) -> Vectors:
        order = sorted(range(len(work.rows)), key=lambda i: -work.lengths[i])
        found: dict[int, Vectors] = {}
        for start in range(0, len(order), size):
            some = order[start : start + size]
            pooled = self._forward([work.rows[i] for i in some])
            vectors = nn.functional.normalize(pooled.float(), dim=-1).cpu().numpy()
            found |= zip(some, vectors, strict=True)
        return np.stack([found[i] for i in range(len(order))])

    def _forward(self, rows: Sequence[Input]) -> Tensor:
        model: Any = self._network
        left = self._model.pooling == "last"
        if self._model.text:
            padded = _pad([row.ids for row in rows], left, self._run.device)
            options = {"use_cache": False} if left else {}
            states: Tensor = model(**padded, **options).last_hidden_state
            return states[:, -1 if left else 0]
        pixels = torch.cat([self._pixel_values(row) for row in rows])
        return self._model.see(model, pixels, _pad([row.ids for row in rows], True, self._run.device), len(rows))

    def _pixel_values(self, row: Input) -> Tensor:
        """Made once: their way from a picture to pixel values is not what is measured."""
        key = id(row.pictures[0])
        if key not in self._pixels:
            image = torch.from_numpy(row.pictures[0]).to(self._run.device)
            self._pixels[key] = self._model.pixels(image).to(next(self._network.parameters()).dtype)
        return self._pixels[key]


def _pad(rows: Sequence[npt.NDArray[np.int32]], left: bool, device: torch.device) -> dict[str, Tensor]:
    size = max(map(len, rows))
    ids = np.zeros((len(rows), size), dtype=np.int64)
    mask = np.zeros_like(ids)
    for i, row in enumerate(rows):
        place = slice(size - len(row), size) if left else slice(0, len(row))
        ids[i, place], mask[i, place] = row, 1
    return {"input_ids": torch.from_numpy(ids).to(device), "attention_mask": torch.from_numpy(mask).to(device)}
