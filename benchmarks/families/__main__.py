"""CPU benchmark of the model families at their real shapes with random weights: our engine and transformers.

Each engine runs in a separate process. All engines of a shape stay loaded and are measured one at a time. Each workload
is computed once unmeasured, for the cosines to transformers fp32 on the same rows. A round then measures every workload
once, engine by engine, and the order rotates from round to round. Load time runs from the start of the process,
including imports, to its first vector, with the weights in the page cache. Memory is VmHWM, including the libraries.
"""

import argparse
import json
import os
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path
from typing import NamedTuple

import numpy as np

from benchmarks import report
from benchmarks.families import tables
from benchmarks.families.tables import BASELINE, Engine, Row
from benchmarks.families.tasks import checkpoint, parameters, task
from benchmarks.families.work import CELLS, FIRST, FULL, QUICK, Cell, Plan, Rows
from benchmarks.processes import cpu_seconds_elsewhere, exit_on_signal
from benchmarks.report import format_number
from benchmarks.shapes import CHECKPOINTS
from benchmarks.worker import Vectors, Worker, worker

ENGINES = [Engine(name, dtype) for dtype in ("float32", "bfloat16") for name in ("transformers", "ours")]
FAST_BF16 = {"avx512_bf16", "amx_bf16"}  # without either, bf16 is emulated and too slow to serve


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
