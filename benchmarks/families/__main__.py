"""CPU benchmark of the model families at their real shapes with random weights: our engine and transformers.

Each engine runs in a separate process. All engines of a shape stay loaded and are measured one at a time. Each workload
is computed once unmeasured, for the cosines to transformers fp32 on the same rows. A round then measures every workload
once, engine by engine, and the order rotates from round to round. Load time runs from the start of the process,
including imports, to its first vector, with the weights in the page cache. Memory is VmHWM, including the libraries.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from google.protobuf.json_format import MessageToJson
from PIL import Image

from benchmarks import report, workloads
from benchmarks.families import tables
from benchmarks.families.tables import BASELINE, Engine, Row
from benchmarks.processes import cpu_seconds_elsewhere, exit_on_signal
from benchmarks.report import format_number
from benchmarks.shapes import CHECKPOINTS
from benchmarks.worker import Vectors, Worker, worker

ENGINES = [Engine(name, dtype) for dtype in ("float32", "bfloat16") for name in ("transformers", "ours")]
FAST_BF16 = {"avx512_bf16", "amx_bf16"}  # without either, bf16 is emulated and too slow to serve
GME_TEXT = (
    "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n"
    "<|vision_start|><|image_pad|><|vision_end|><|im_end|>\n<|im_start|>assistant\n<|endoftext|>"
)
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


@contextmanager
def checkpoint(name: str, keep: Path | None) -> Iterator[Path]:
    """Yield the checkpoint directory of a shape: under `keep`, reused if present, or temporary."""
    with tempfile.TemporaryDirectory() as temporary:
        folder = keep or Path(temporary)
        directory = folder / name
        if not (directory / "tokenizer.json").is_file():  # written last
            folder.mkdir(parents=True, exist_ok=True)
            needed, free = CHECKPOINTS[name].parameters_m * 4e6 * 1.1, shutil.disk_usage(folder).free
            if free < needed:
                sys.exit(
                    f"not enough disk space in {folder}: {name} needs {needed / 1e9:.1f} GB, {free / 1e9:.1f} are free"
                )
            start = time.monotonic()
            command = [sys.executable, "-m", "benchmarks.shapes", name, str(directory)]
            subprocess.run(command, cwd=report.ROOT, check=True, stderr=subprocess.DEVNULL)
            print(f"  checkpoint written in {time.monotonic() - start:.0f} s", flush=True)
        yield directory


def parameters(directory: Path) -> int:
    """Count the parameters of the checkpoint."""
    with (directory / "model.safetensors").open("rb") as file:
        header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
    return sum(int(np.prod(tensor["shape"])) for key, tensor in header.items() if key != "__metadata__")


def task(name: str, engine: Engine, directory: Path, work: dict[str, Rows]) -> dict[str, Any]:
    """Return the task of `benchmarks.families.engines`.

    `arguments` are those that tritonserver passes to a Python model.
    """
    from triton_embed.python_backend.checkpoint.repository import read_config

    family, repository = CHECKPOINTS[name].family, report.ROOT / "model_repository"
    config = read_config(repository, family)
    config.name = family
    config.parameters["checkpoint"].string_value = str(directory)
    config.parameters["dtype"].string_value = engine.dtype
    return {
        "family": family,
        "directory": str(directory),
        "dtype": engine.dtype,
        "text": GME_TEXT,
        "arguments": {
            "model_config": MessageToJson(config, preserving_proto_field_name=True),
            "model_repository": str(repository / family),
            "model_instance_kind": "CPU",
            "model_instance_device_id": "0",
        },
        "work": work,
    }


class Loaded(NamedTuple):
    """A loaded engine."""

    engine: Engine
    worker: Worker
    load_s: float
    memory: dict[str, float]  # MB, right after loading

    def vectors(self, workload: str) -> Vectors:
        """Return the vectors of a workload."""
        file = self.worker.log.with_suffix(".npy")
        self.worker.call(workload=workload, save=str(file))
        vectors: Vectors = np.load(file)
        return vectors


def memory(pid: int) -> dict[str, float]:
    """Return the peak RSS and the current anonymous memory of a process, in MB."""
    status = dict(line.split(":", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines())
    return {name: int(status[key].split()[0]) / 1024 for name, key in (("peak", "VmHWM"), ("anonymous", "RssAnon"))}


def load(stack: ExitStack, name: str, engine: Engine, directory: Path, work: dict[str, Rows], folder: Path) -> Loaded:
    """Start an engine and wait for its first vector."""
    file = folder / f"{name}-{engine.name}-{engine.dtype}.json"
    file.write_text(json.dumps(task(name, engine, directory, work)))
    start = time.monotonic()
    process = stack.enter_context(worker("benchmarks.families.engines", engine.name, str(file), logs=folder))
    process.call(workload=FIRST)
    loaded = Loaded(engine, process, time.monotonic() - start, memory(process.process.pid))
    print(f"  {engine.label:18} loaded in {loaded.load_s:5.1f} s, peak {loaded.memory['peak']:6,.0f} MB", flush=True)
    return loaded


def measure(name: str, plan: Plan, engines: list[Engine], keep: Path | None) -> list[Row]:
    """Measure a shape and return its result rows."""
    rows: list[Row] = []
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        directory = stack.enter_context(checkpoint(name, keep))
        work = plan.work(CELLS[name], folder)
        loaded = [load(stack, name, engine, directory, work, folder) for engine in engines]
        for cell in CELLS[name]:
            rows += compute(name, cell, plan, loaded, work[cell.workload])
        count = parameters(directory)
        for running in loaded:
            now = memory(running.worker.process.pid)
            rows.append(tables.weights(name, running.engine, count, running.load_s, running.memory, now))
    return rows


def compute(name: str, cell: Cell, plan: Plan, loaded: list[Loaded], rows: Rows) -> list[Row]:
    """Compute the vectors of a workload, then measure its rounds."""
    vectors = {running.engine: running.vectors(cell.workload) for running in loaded}
    size = sum(map(len, rows["ids"])) if cell.unit == "tokens/s" else len(rows["ids"] or rows["images"])
    rates: dict[Engine, list[float]] = {running.engine: [] for running in loaded}
    for turn in range(plan.rounds):
        shift = turn % len(loaded)
        for running in loaded[shift:] + loaded[:shift]:
            seconds = running.worker.call(workload=cell.workload, seconds=plan.seconds)["seconds"]
            rates[running.engine].append(size / seconds)
            progress = f"  round {turn + 1}/{plan.rounds}  {cell.workload:12}  {running.engine.label:17}"
            print(f"{progress} {format_number(rates[running.engine][-1]):>6} {cell.unit}", flush=True)
    return tables.speeds(name, cell.workload, cell.unit, size, rates, vectors)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.families", description=__doc__)
    add = parser.add_argument
    add("--quick", action="store_true", help="one round of few rows: a functional test, not a measurement")
    add("--only", action="append", choices=list(CHECKPOINTS), help="only this shape; repeatable")
    add("--out", type=Path, default=report.RESULTS, help="folder of the result file (default: %(default)s)")
    add("--keep", type=Path, metavar="DIR", help="keep the checkpoints in DIR and reuse those already there")
    add("--plots", action="store_true", help="also draw PNGs next to the result file")
    return parser.parse_args()


def main() -> None:
    options = arguments()
    plan = QUICK if options.quick else FULL
    names = options.only or list(CHECKPOINTS)
    exit_on_signal()
    begin, cpu = time.monotonic(), cpu_seconds_elsewhere()

    result = report.header()
    print(result["machine"])
    fast = FAST_BF16 & set(result["machine"]["features"])
    if not fast:
        print("skipping bf16: this CPU emulates it in fp32")
    engines = [engine for engine in ENGINES if engine.dtype == "float32" or fast]
    rows: list[Row] = []
    for name in names:
        print(f"{time.monotonic() - begin:5.0f} s  {name}", flush=True)
        rows += measure(name, plan, engines, options.keep and options.keep.absolute())
    other_cpu = 100 * (cpu_seconds_elsewhere() - cpu) / (time.monotonic() - begin) / len(os.sched_getaffinity(0))

    print(f"\n{tables.speed_table(rows)}\n\n{tables.weight_table(rows)}\n")
    print("images/s start from JPEG files: both engines' figures include decoding, resizing and normalization")
    print("\n".join(tables.expectations(rows)))
    if other_cpu > 5:
        print(f"warning: unrelated processes used {other_cpu:.0f} % of the cores")
    metadata = {"quick": plan.quick, "rounds": plan.rounds, "baseline": BASELINE.label}
    metadata["cpu_percent_elsewhere"] = round(other_cpu, 1)
    file = options.out / ("-".join(["families", *(options.only or [])]) + ".json")
    report.write(file, result | metadata | {"rows": rows})
    if options.plots:
        from benchmarks.families.plots import PLOTS
        from benchmarks.plots import draw

        draw(file, PLOTS)


if __name__ == "__main__":
    main()
