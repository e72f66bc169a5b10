"""Workloads of each shape: rows of token ids, or JPEG files."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from benchmarks import workloads

Rng = np.random.Generator
Rows = dict[str, list[Any]]  # the fields of engines.Work


class Cell(NamedTuple):
    """A workload of a shape. `full`, `quick`: rows per call. `make(rng, count, folder)`: creates the rows."""

    workload: str
    unit: str
    full: int
    quick: int
    make: Callable[[Rng, int, Path], Rows]


def token_ids(
    lengths: Callable[[int], list[int]], first: tuple[int, ...], last: int
) -> Callable[[Rng, int, Path], Rows]:
    """Return a `Cell.make` for rows of random ids between special tokens, which count towards the length."""

    def make(rng: Rng, count: int, _: Path) -> Rows:
        counts = [length - len(first) - 1 for length in lengths(count)]
        return {"ids": [[*first, *rng.integers(1_000, 30_000, n).tolist(), last] for n in counts], "images": []}

    return make


def jpegs(width: int, height: int) -> Callable[[Rng, int, Path], Rows]:
    """Return a `Cell.make` for photo-like JPEG files: soft shapes and some grain, about 1.5 bits per pixel."""

    def make(rng: Rng, count: int, folder: Path) -> Rows:
        files = [folder / f"{width}x{height}-{i}.jpg" for i in range(count)]
        for file in files:
            shapes = Image.fromarray(rng.integers(0, 255, (height // 40, width // 40, 3), dtype=np.uint8))
            soft = np.asarray(shapes.resize((width, height), Image.Resampling.BICUBIC), dtype=np.float32)
            grain = rng.normal(0, 6, (height, width, 1))
            Image.fromarray((soft + grain).clip(0, 255).astype(np.uint8)).save(file, quality=85)
        return {"ids": [], "images": [str(file) for file in files]}

    return make


def mixed(count: int) -> list[int]:
    """Return evenly spaced quantiles of the workload "mixed": 8 to 256 tokens, mean about 67."""
    block = workloads.lengths("mixed")
    return [block[(2 * i + 1) * len(block) // (2 * count)] for i in range(count)]


BGE, QWEN3, CLIP = ((101,), 102), ((), 151_643), ((49_406,), 49_407)
CELLS = {
    "bge-large": [
        Cell("mixed", "tokens/s", 32, 8, token_ids(mixed, *BGE)),
        Cell("512 tokens", "tokens/s", 4, 1, token_ids(lambda n: [512] * n, *BGE)),
    ],
    "qwen3-0.6b": [
        Cell("32 tokens", "tokens/s", 32, 8, token_ids(lambda n: [32] * n, *QWEN3)),
        Cell("mixed", "tokens/s", 32, 8, token_ids(mixed, *QWEN3)),
        Cell("512 tokens", "tokens/s", 4, 1, token_ids(lambda n: [512] * n, *QWEN3)),
    ],
    "clip-vit-b-32": [
        Cell("JPEG 640x480", "images/s", 64, 16, jpegs(640, 480)),
        Cell("8-24 tokens", "texts/s", 128, 32, token_ids(lambda n: [8 + 17 * i // n for i in range(n)], *CLIP)),
    ],
    "gme-tower": [Cell("JPEG 448x448", "images/s", 2, 1, jpegs(448, 448))],
}
FIRST = "first"  # workload of one row: loading ends with its vector


class Plan(NamedTuple):
    """How long a run measures."""

    rounds: int
    seconds: float  # minimum duration of a measurement
    quick: bool

    def work(self, cells: list[Cell], folder: Path) -> dict[str, Rows]:
        """Create the rows of each workload, and the workload FIRST."""
        rng = np.random.default_rng(0)
        work = {c.workload: c.make(rng, c.quick if self.quick else c.full, folder) for c in cells}
        first = cells[0].make(rng, 1, folder)
        return {FIRST: {key: rows[:1] for key, rows in first.items()}, **work}


FULL = Plan(3, 1.0, False)
QUICK = Plan(1, 0.2, True)
