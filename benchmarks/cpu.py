"""This machine's CPU: our stack beside sentence-transformers, on the same weights and texts, in one run.

Every engine runs in a process of its own, all of them loaded, one measured at a time; load on the served ones
comes from another process. A round measures every cell once, engine after engine, in an order that turns from
round to round; a figure is the median of the rounds. Cosines to sentence-transformers fp32 are taken first.
"""

import argparse
import itertools
import json
import os
import sys
import tempfile
import time
from collections import defaultdict
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from benchmarks import record, report, workloads
from benchmarks.processes import cpu_seconds_elsewhere, free_port, leave_on_signal, memory, our_stack, running, wait_for
from benchmarks.report import BASELINE, MANY, Cell, Place, Row
from benchmarks.worker import Vectors, Worker, worker

ENGINES = {
    "st": Place(BASELINE, "bare"),
    "padded": Place("padded-fastapi", "http"),
    "bare": Place("ours", "bare"),
    "http": Place("ours", "http"),
    "grpc": Place("ours", "grpc"),
}


class Engine(NamedTuple):
    place: Place
    worker: Worker  # the process that does the asking
    target: dict[str, Any]  # what it has to know to reach the engine
    pid: int  # the root of the engine's own processes

    def vectors(self, texts: list[str]) -> Vectors:
        return self.worker.vectors(texts, **self.target)

    def measure(self, cell: Cell, seconds: float, start: int) -> dict[str, Any]:
        return self.worker.ask(**cell._asdict(), seconds=seconds, start=start, **self.target)


class Plan(NamedTuple):
    rounds: int
    seconds: float
    workloads: tuple[str, ...]
    concurrencies: tuple[int, ...]
    texts: int  # a workload; more than are ever in flight, so that no two of those are the same

    def cells(self, place: Place) -> list[Cell]:
        if place.where == "bare":
            singles = [Cell(w, 1, 1) for w in self.workloads if w != "mixed"]
            return [Cell(w, MANY, 1) for w in self.workloads] + singles
        return [Cell(w, n, c) for w in self.workloads for n in (1, 32) for c in self.concurrencies]


FULL = Plan(4, 3.0, ("short", "mixed", "long"), (1, 8, 32), 1280)
QUICK = Plan(3, 0.5, ("short", "mixed"), (1, 8), 512)


def start(stack: ExitStack, keys: list[str], pools: Path, logs: Path) -> list[Engine]:
    """The engines asked for, ready to answer; `stack` ends them."""
    engines = []
    for key, name in (("st", "sentence-transformers"), ("bare", "ours")):
        if key in keys:
            bare = stack.enter_context(worker("benchmarks.bare", name, str(pools), logs=logs))
            engines.append(Engine(ENGINES[key], bare, {}, bare.process.pid))
    load = stack.enter_context(worker("benchmarks.loadgen", str(pools), logs=logs))
    if "padded" in keys:
        port, log = free_port(), logs / "padded.log"
        command = [sys.executable, "-m", "uvicorn", "benchmarks.padded_server:app", "--port", str(port)]
        server = stack.enter_context(running([*command, "--no-access-log"], log))
        wait_for(f"http://127.0.0.1:{port}/ready", server, log)
        engines.append(Engine(ENGINES["padded"], load, {"protocol": "http", "port": port}, server.pid))
    if "http" in keys or "grpc" in keys:
        ours = stack.enter_context(our_stack(logs))
        for protocol, port in (("http", ours.port), ("grpc", ours.grpc_port)):
            if protocol in keys:
                target = {"protocol": protocol, "port": port}
                engines.append(Engine(ENGINES[protocol], load, target, ours.process.pid))
    return sorted(engines, key=lambda engine: list(ENGINES.values()).index(engine.place))


def correctness(engines: list[Engine], texts: list[str]) -> list[Row]:
    """Cosine of each vector to sentence-transformers' of the same text."""
    vectors = {engine.place: engine.vectors(texts).astype(np.float64) for engine in engines}
    if ENGINES["st"] not in vectors:
        return []
    reference = vectors[ENGINES["st"]]
    rows = []
    for place, found in vectors.items():
        norms = np.linalg.norm(found, axis=1) * np.linalg.norm(reference, axis=1)
        cosines = (found * reference).sum(axis=1) / norms
        least, mean = float(cosines.min()), float(cosines.mean())
        print(f"  {', '.join(place)}: cosine {least:.7f} at least, {mean:.7f} mean")
        rows.append(report.row(place, "cosine_least", [least], texts=len(texts)))
        rows.append(report.row(place, "cosine_mean", [mean], texts=len(texts)))
    return rows


def weigh(engines: list[Engine]) -> list[Row]:
    """Peak resident memory since the start, MB, and the proportional share now, of every process."""
    rows = []
    weighed: set[int] = set()
    for engine in engines:
        if engine.pid in weighed:  # gRPC reaches the same processes as HTTP
            continue
        weighed.add(engine.pid)
        weights = memory(engine.pid)
        for name, weight in weights.items():
            rows.append(report.row(engine.place, "peak_rss_mb", [weight["peak_rss"]], process=name))
            rows.append(report.row(engine.place, "pss_mb", [weight["pss"]], process=name))
        total = sum(weight["peak_rss"] for weight in weights.values())
        rows.append(report.row(engine.place, "peak_rss_mb_total", [total]))
        parts = ", ".join(f"{name} {w['peak_rss']:.0f} ({w['pss']:.0f})" for name, w in weights.items())
        print(f"  {', '.join(engine.place)}: {parts}")
    return rows


def measure(engines: list[Engine], plan: Plan) -> tuple[report.Rounds, list[float]]:
    """The rounds, and the share of all cores that something else took during each, in percent."""
    begin = time.monotonic()
    rounds: report.Rounds = defaultdict(list)
    elsewhere = []
    cells = dict.fromkeys(cell for engine in engines for cell in plan.cells(engine.place))
    for turn in range(plan.rounds):
        wall, cpu = time.monotonic(), cpu_seconds_elsewhere()
        order = engines[turn % len(engines) :] + engines[: turn % len(engines)]
        for cell, engine in itertools.product(cells, order):
            if cell in plan.cells(engine.place):
                result = engine.measure(cell, plan.seconds, turn * workloads.BLOCK)
                rounds[engine.place, cell].append(result)
                passed = f"{time.monotonic() - begin:5.0f} s  round {turn + 1}/{plan.rounds}"
                print(passed, line(engine.place, cell, result), flush=True)
        wall, cpu = time.monotonic() - wall, cpu_seconds_elsewhere() - cpu
        elsewhere.append(round(100 * cpu / wall / len(os.sched_getaffinity(0)), 1))
    return rounds, elsewhere


def line(place: Place, cell: Cell, result: dict[str, Any]) -> str:
    what = f"{cell.workload:5} {cell.inputs:3} inputs, {cell.concurrency:2} in flight"
    speed = f"{result['sentences_per_s']:8.1f} sentences/s"
    times = f"p50 {result['p50_ms']:8.2f}  p99 {result['p99_ms']:8.2f} ms"
    failed = f"  FAILED {failures}" if (failures := result.get("failures")) else ""
    return f" {what}  {', '.join(place):32} {speed}  {times}{failed}"


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.cpu", description=__doc__)
    add = parser.add_argument
    add("--quick", action="store_true", help="minutes, not half an hour: short and mixed texts, 8 in flight")
    add("--out", type=Path, default=record.RESULTS / "cpu.json", help="result file (%(default)s)")
    add("--rounds", type=int, help=f"3 or more (default {FULL.rounds}, quick {QUICK.rounds})")
    add("--seconds", type=float, help=f"seconds a cell (default {FULL.seconds}, quick {QUICK.seconds})")
    add("--engines", default=",".join(ENGINES), help="comma-separated, of %(default)s")
    add("--plots", action="store_true", help="also draw PNGs beside the result file")
    options = parser.parse_args()
    options.engines = options.engines.split(",")
    if unknown := set(options.engines) - set(ENGINES):
        parser.error(f"unknown engine {', '.join(sorted(unknown))}; known are {', '.join(ENGINES)}")
    plan = QUICK if options.quick else FULL
    options.plan = plan._replace(rounds=options.rounds or plan.rounds, seconds=options.seconds or plan.seconds)
    if options.plan.rounds < 3:
        parser.error("a median needs at least 3 rounds")
    return options


def main() -> None:
    options = arguments()
    plan: Plan = options.plan
    leave_on_signal()

    result = record.header()
    print(f"{result['machine']}\ncutting {plan.texts} texts a workload …", flush=True)
    pools = workloads.texts(plan.texts)
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        file = folder / "texts.json"
        file.write_text(json.dumps(pools))
        print("starting the engines …", flush=True)
        engines = start(stack, options.engines, file, folder)
        print("correctness, against sentence-transformers fp32 in-process:")
        mixture = [text for trio in zip(*pools.values(), strict=True) for text in trio][:64]
        rows = correctness(engines, mixture)
        for engine in engines:  # once unmeasured: the first calls of a size cost more
            for workload in plan.workloads:
                engine.measure(Cell(workload, 32, 1), plan.seconds / 4, 0)
        rounds, elsewhere = measure(engines, plan)
        rows = report.rows(rounds) + rows
        print("memory: peak resident MB of each process (proportional share now)")
        rows += weigh(engines)
    print(f"\nsentences/s: in-process {MANY} texts a call; served 32 texts a request, 8 requests in flight")
    print(f"{report.table(rows)}\n")
    print("\n".join(report.expectations(rows)))
    if max(elsewhere) > 5:
        print(f"judge with care: something else took {elsewhere} % of the cores in the rounds")
    texts = {"per_workload": plan.texts, "digest": workloads.digest(pools)}
    about = {"texts": texts, "rounds": plan.rounds, "seconds_a_cell": plan.seconds}
    about["cpu_percent_elsewhere"] = elsewhere
    record.write(options.out, result | about | {"rows": rows})
    if options.plots:
        from benchmarks.plots import draw

        draw(options.out)


if __name__ == "__main__":
    main()
