"""The families at their real shapes, with random weights, on this machine's CPU: our engine beside transformers.

Each engine runs in a process of its own, all of a shape loaded, one measured at a time. Every workload is computed
once unmeasured, for the cosines to transformers fp32 on the same rows; then a round measures every workload once,
engine after engine, in an order that turns from round to round. Load time: from the start of a process, its imports
included, to its first vector, the weights in the page cache. Memory: VmHWM, of which the libraries are a part.
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

from benchmarks import families_report as report
from benchmarks import record, workloads
from benchmarks.families_report import BASELINE, Engine, Row
from benchmarks.processes import cpu_seconds_elsewhere, leave_on_signal
from benchmarks.report import amount
from benchmarks.shapes import SHAPES
from benchmarks.worker import Vectors, Worker, worker

ENGINES = [Engine(name, dtype) for dtype in ("float32", "bfloat16") for name in ("transformers", "ours")]
FAST_BF16 = {"avx512_bf16", "amx_bf16"}  # without either, bf16 is emulated and nobody would serve in it
GME_TEXT = (
    "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n"
    "<|vision_start|><|image_pad|><|vision_end|><|im_end|>\n<|im_start|>assistant\n<|endoftext|>"
)
Rng = np.random.Generator
Rows = dict[str, list[Any]]  # engines.Work's fields


class Cell(NamedTuple):
    """`full`, `quick`: rows a call. `make`: that many seeded rows, files of theirs in a folder."""

    workload: str
    unit: str
    full: int
    quick: int
    make: Callable[[Rng, int, Path], Rows]


def token_ids(
    lengths: Callable[[int], list[int]], first: tuple[int, ...], last: int
) -> Callable[[Rng, int, Path], Rows]:
    """Rows of ordinary ids between special ones, which count."""

    def make(rng: Rng, count: int, _: Path) -> Rows:
        sizes = [length - len(first) - 1 for length in lengths(count)]
        return {"ids": [[*first, *rng.integers(1_000, 30_000, size).tolist(), last] for size in sizes], "images": []}

    return make


def jpegs(width: int, height: int) -> Callable[[Rng, int, Path], Rows]:
    """Photographs' like: soft shapes and some grain, about 1.5 bits a pixel."""

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
    """Evenly spaced quantiles of the mix: 8 to 256 tokens, mean about 67."""
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
FIRST = "first"  # the row that a load ends with


class Plan(NamedTuple):
    rounds: int
    seconds: float  # a cell is measured at least so long
    quick: bool

    def work(self, cells: list[Cell], folder: Path) -> dict[str, Rows]:
        """Each workload's rows, and the first row of all."""
        rng = np.random.default_rng(0)
        made = {c.workload: c.make(rng, c.quick if self.quick else c.full, folder) for c in cells}
        first = cells[0].make(rng, 1, folder)
        return {FIRST: {key: rows[:1] for key, rows in first.items()}, **made}


FULL = Plan(3, 1.0, False)
QUICK = Plan(1, 0.2, True)


@contextmanager
def checkpoint(name: str, keep: Path | None) -> Iterator[Path]:
    """The shape's checkpoint: one found under `keep`, or a new one, which is gone with the block unless kept."""
    with tempfile.TemporaryDirectory() as temporary:
        folder = keep or Path(temporary)
        directory = folder / name
        if not (directory / "tokenizer.json").is_file():  # what is written last
            folder.mkdir(parents=True, exist_ok=True)
            needed, free = SHAPES[name].parameters_m * 4e6 * 1.1, shutil.disk_usage(folder).free
            if free < needed:
                sys.exit(f"{name} needs {needed / 1e9:.1f} GB in {folder}, which has {free / 1e9:.1f} GB left")
            start = time.monotonic()
            command = [sys.executable, "-m", "benchmarks.shapes", name, str(directory)]
            subprocess.run(command, cwd=record.ROOT, check=True, stderr=subprocess.DEVNULL)
            print(f"  written in {time.monotonic() - start:.0f} s", flush=True)
        yield directory


def parameters(directory: Path) -> int:
    """How many numbers the checkpoint holds."""
    with (directory / "model.safetensors").open("rb") as file:
        header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
    return sum(int(np.prod(tensor["shape"])) for key, tensor in header.items() if key != "__metadata__")


def task(name: str, engine: Engine, directory: Path, work: dict[str, Rows]) -> dict[str, Any]:
    """What `benchmarks.engines` needs to know; `arguments` as tritonserver gives them to a stub."""
    from triton_embed.python_backend.checkpoint.repository import read_config

    family, repository = SHAPES[name].family, record.ROOT / "model_repository"
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
    engine: Engine
    worker: Worker
    load_s: float
    memory: dict[str, float]  # MB, just after that

    def vectors(self, workload: str) -> Vectors:
        file = self.worker.log.with_suffix(".npy")
        self.worker.ask(workload=workload, save=str(file))
        found: Vectors = np.load(file)
        return found


def memory(pid: int) -> dict[str, float]:
    """MB of a process: at its peak, and what it holds now that no file backs."""
    status = dict(line.split(":", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines())
    return {ours: int(status[key].split()[0]) / 1024 for ours, key in (("peak", "VmHWM"), ("anonymous", "RssAnon"))}


def load(stack: ExitStack, name: str, engine: Engine, directory: Path, work: dict[str, Rows], folder: Path) -> Loaded:
    file = folder / f"{name}-{engine.name}-{engine.dtype}.json"
    file.write_text(json.dumps(task(name, engine, directory, work)))
    start = time.monotonic()
    process = stack.enter_context(worker("benchmarks.engines", engine.name, str(file), logs=folder))
    process.ask(workload=FIRST)
    loaded = Loaded(engine, process, time.monotonic() - start, memory(process.process.pid))
    print(f"  {engine.label:18} loaded in {loaded.load_s:5.1f} s, peak {loaded.memory['peak']:6,.0f} MB", flush=True)
    return loaded


def measure(name: str, plan: Plan, engines: list[Engine], keep: Path | None) -> list[Row]:
    """All rows of a shape."""
    rows: list[Row] = []
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        directory = stack.enter_context(checkpoint(name, keep))
        work = plan.work(CELLS[name], folder)
        loaded = [load(stack, name, engine, directory, work, folder) for engine in engines]
        for cell in CELLS[name]:
            rows += compute(name, cell, plan, loaded, work[cell.workload])
        count = parameters(directory)
        for one in loaded:
            now = memory(one.worker.process.pid)
            rows.append(report.weights(name, one.engine, count, one.load_s, one.memory, now))
    return rows


def compute(name: str, cell: Cell, plan: Plan, loaded: list[Loaded], rows: Rows) -> list[Row]:
    """Cosines, then the rounds of one workload."""
    vectors = {one.engine: one.vectors(cell.workload) for one in loaded}
    size = sum(map(len, rows["ids"])) if cell.unit == "tokens/s" else len(rows["ids"] or rows["images"])
    rates: dict[Engine, list[float]] = {one.engine: [] for one in loaded}
    for turn in range(plan.rounds):
        shift = turn % len(loaded)
        for one in loaded[shift:] + loaded[:shift]:
            taken = one.worker.ask(workload=cell.workload, seconds=plan.seconds)["seconds"]
            rates[one.engine].append(size / taken)
            passed = f"  round {turn + 1}/{plan.rounds}  {cell.workload:12}  {one.engine.label:17}"
            print(f"{passed} {amount(rates[one.engine][-1]):>6} {cell.unit}", flush=True)
    return report.speeds(name, cell.workload, cell.unit, size, rates, vectors)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.families", description=__doc__)
    add = parser.add_argument
    add("--quick", action="store_true", help="one round of few rows: does it work, not how fast is it")
    add("--only", action="append", choices=list(SHAPES), help="this shape; may be given again")
    add("--out", type=Path, default=record.RESULTS, help="folder of the result file (%(default)s)")
    add("--keep", type=Path, metavar="DIR", help="write the checkpoints here and leave them; use those found here")
    add("--plots", action="store_true", help="also draw PNGs beside the result file")
    return parser.parse_args()


def main() -> None:
    options = arguments()
    plan = QUICK if options.quick else FULL
    names = options.only or list(SHAPES)
    leave_on_signal()
    begin, cpu = time.monotonic(), cpu_seconds_elsewhere()

    result = record.header()
    print(result["machine"])
    fast = FAST_BF16 & set(result["machine"]["features"])
    if not fast:
        print("bf16 is left out: this CPU computes it in fp32 anyway")
    engines = [engine for engine in ENGINES if engine.dtype == "float32" or fast]
    rows: list[Row] = []
    for name in names:
        print(f"{time.monotonic() - begin:5.0f} s  {name}", flush=True)
        rows += measure(name, plan, engines, options.keep and options.keep.absolute())
    elsewhere = 100 * (cpu_seconds_elsewhere() - cpu) / (time.monotonic() - begin) / len(os.sched_getaffinity(0))

    print(f"\n{report.speed_table(rows)}\n\n{report.weight_table(rows)}\n")
    print("images/s: from JPEG files on, so decoding, resizing and normalising are part of both sides' figures")
    print("\n".join(report.expectations(rows)))
    if elsewhere > 5:
        print(f"judge with care: something else took {elsewhere:.0f} % of the cores")
    about = {"quick": plan.quick, "rounds": plan.rounds, "baseline": BASELINE.label}
    about["cpu_percent_elsewhere"] = round(elsewhere, 1)
    file = options.out / ("-".join(["families", *(options.only or [])]) + ".json")
    record.write(file, result | about | {"rows": rows})
    if options.plots:
        from benchmarks.families_plots import draw

        draw(file)


if __name__ == "__main__":
    main()
