"""This machine's CPU: our stack beside the ways that people embed on one, on the same weights and texts, in one run.

Every engine runs in a process of its own, all of them loaded, one measured at a time; load on the served ones
comes from another process. A round measures every cell once, engine after engine, in an order that turns from
round to round; a figure is the median of the rounds, a ratio that of the ratios of each round.
"""

import argparse
import fnmatch
import itertools
import json
import os
import tempfile
import time
from collections import defaultdict
from contextlib import ExitStack
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

from benchmarks import accuracy, record, report, targets, workloads
from benchmarks.contenders import BARE, PLACES, RIVALS, SERVED, Engine, Start
from benchmarks.gemm import DTYPES, TOKENS
from benchmarks.processes import cpu_seconds_elsewhere, leave_on_signal, memory, our_stack
from benchmarks.report import BASELINE, FEW, MACHINE, Cell, Place, Row
from benchmarks.worker import worker

AT_A_TIME = 250  # texts a call where vectors are asked for
SETTLED = 0.05  # seconds between cells: thread pools spin for a while after their last work
A_CALL = 0.001  # seconds: one call


class Plan(NamedTuple):
    rounds: int
    seconds: float
    workloads: tuple[str, ...]
    singles: tuple[str, ...]  # workloads of which one text at a time is measured, in-process
    concurrencies: tuple[int, ...]  # of short texts, one a request
    texts: int  # a workload; more than are ever in flight, so that no two of those are the same
    compared: int  # texts whose vectors are compared
    starts: int  # of the whole stack, timed

    def cells(self, place: Place) -> list[Cell]:
        if place == MACHINE:
            return [Cell(dtype, TOKENS, 1) for dtype in DTYPES]
        if place.where == "bare":
            return [report.many(place, w) for w in self.workloads] + [Cell(w, 1, 1) for w in self.singles]
        # As shipped, which servers take it, the checkpoint ends at 256 tokens.
        many = [report.many(place, w) for w in self.workloads if w != "full"]
        return many + [Cell("short", 1, c) for c in self.concurrencies]


FULL = Plan(3, 1.5, ("short", "mixed", "long", "full"), ("short", "long"), (1, 8, 32), workloads.MOST, 1000, 3)
QUICK = Plan(3, 0.5, ("short", "mixed"), ("short",), (1, 8), 512, 256, 1)


def texts_of(plan: Plan) -> dict[str, list[str]]:
    usual = workloads.texts(plan.texts)
    # Of the longest a few will do: no server is asked for them.
    return usual | (workloads.texts(workloads.BLOCK, names=["full"]) if "full" in plan.workloads else {})


def correctness(engines: list[Engine], texts: list[str]) -> list[Row]:
    """Of each engine's vectors to sentence-transformers' of the same texts."""
    asked = [engine for engine in engines if engine.place != MACHINE]
    reference = next((engine for engine in asked if engine.place.engine == BASELINE), None)
    if reference is None:
        return []
    truth = reference.worker.many_vectors(texts, AT_A_TIME, **reference.target)
    rows = []
    for engine in asked:
        found = accuracy.judge(engine.worker.many_vectors(texts, AT_A_TIME, **engine.target), truth)
        print(
            f"  {', '.join(engine.place)}: cosine {found.cosine_mean:.7f} mean, {found.cosine_least:.7f} least,"
            f" {found.neighbours:.4f} of the nearest {accuracy.NEIGHBOURS} the same",
            flush=True,
        )
        for metric, value in zip(("cosine_mean", "cosine_least", "neighbours_10"), found, strict=True):
            rows.append(report.row(engine.place, metric, [value], texts=len(texts)))
    return rows


def weigh(engines: list[Engine], when: str) -> list[Row]:
    """Peak resident memory since the start, MB, and the proportional share now, of every process."""
    rows = []
    weighed: set[int] = set()
    for engine in engines:
        if engine.pid in weighed or engine.place == MACHINE:  # gRPC reaches the same processes as HTTP
            continue
        weighed.add(engine.pid)
        weights = memory(engine.pid)
        for name, weight in weights.items():
            rows.append(report.row(engine.place, "peak_rss_mb", [weight["peak_rss"]], process=name, when=when))
            rows.append(report.row(engine.place, "pss_mb", [weight["pss"]], process=name, when=when))
        total = sum(weight["peak_rss"] for weight in weights.values())
        rows.append(report.row(engine.place, "peak_rss_mb_total", [total], when=when))
        parts = ", ".join(f"{name} {w['peak_rss']:.0f} ({w['pss']:.0f})" for name, w in weights.items())
        print(f"  {', '.join(engine.place)}: {total:.0f}: {parts}", flush=True)
    return rows


def warm(engines: list[Engine], plan: Plan) -> None:
    """Once unmeasured: the first calls of a size cost more, and engines with several ways try them."""
    for engine in engines:
        begin = time.monotonic()
        for workload in dict.fromkeys(cell.workload for cell in plan.cells(engine.place)):
            engine.measure(Cell(workload, FEW, 1), A_CALL, 0)
        print(f"  {', '.join(engine.place)}: warm after {time.monotonic() - begin:.1f} s", flush=True)


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
                time.sleep(SETTLED)
                result = engine.measure(cell, plan.seconds, turn * workloads.BLOCK)
                rounds[engine.place, cell].append(result)
                passed = f"{time.monotonic() - begin:5.0f} s  round {turn + 1}/{plan.rounds}"
                print(passed, line(engine.place, cell, result), flush=True)
        wall, cpu = time.monotonic() - wall, cpu_seconds_elsewhere() - cpu
        elsewhere.append(round(100 * cpu / wall / len(os.sched_getaffinity(0)), 1))
    return rounds, elsewhere


def line(place: Place, cell: Cell, result: dict[str, Any]) -> str:
    if place == MACHINE:
        return f" linears of {cell.inputs} tokens, {cell.workload}: {result['gflop_per_s']:.0f} GFLOP/s"
    what = f"{cell.workload:5} {cell.inputs:3} inputs, {cell.concurrency:2} in flight"
    speed = f"{result['sentences_per_s']:8.1f} sentences/s"
    times = f"p50 {result['p50_ms']:8.2f}  p99 {result['p99_ms']:8.2f} ms"
    failed = f"  FAILED {failures}" if (failures := result.get("failures")) else ""
    return f" {what}  {', '.join(place):32} {speed}  {times}{failed}"


def cold_starts(count: int, pools: Path, logs: Path) -> list[Row]:
    """Seconds from `triton-embed serve` to the first vector, with nothing else running and the files in memory."""
    seconds = []
    with worker("benchmarks.loadgen", str(pools), logs=logs) as load:
        load.ask()  # it has imported what it needs
        for _ in range(count):
            with our_stack(logs) as stack:
                begin = time.monotonic()
                load.vectors(["one"], protocol="http", port=stack.port)
                seconds.append(stack.start_seconds + time.monotonic() - begin)
    print(f"cold start to the first vector, s: {', '.join(f'{s:.2f}' for s in seconds)}", flush=True)
    return [report.row(SERVED["http"], "cold_start_s", seconds)]


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.cpu", description=__doc__)
    add = parser.add_argument
    add("--quick", action="store_true", help="some 5 minutes, not 18: short and mixed texts, 8 in flight")
    add("--out", type=Path, default=record.RESULTS / "cpu.json", help="result file (%(default)s)")
    add("--rounds", type=int, help=f"3 or more (default {FULL.rounds}, quick {QUICK.rounds})")
    add("--seconds", type=float, help=f"seconds a cell (default {FULL.seconds}, quick {QUICK.seconds})")
    add("--engines", default="*", help=f"comma-separated, * and ? as in file names, of {', '.join(PLACES)}")
    add("--plots", action=argparse.BooleanOptionalAction, default=True, help="draw PNGs beside the result file")
    options = parser.parse_args()
    asked = options.engines.split(",")
    if unknown := [pattern for pattern in asked if not fnmatch.filter(PLACES, pattern)]:
        parser.error(f"unknown engine {', '.join(unknown)}; known are {', '.join(PLACES)}")
    options.engines = [key for key in PLACES if any(fnmatch.fnmatch(key, pattern) for pattern in asked)]
    plan = QUICK if options.quick else FULL
    options.plan = plan._replace(rounds=options.rounds or plan.rounds, seconds=options.seconds or plan.seconds)
    if options.plan.rounds < 3:
        parser.error("a median needs at least 3 rounds")
    return options


def versions(keys: list[str]) -> dict[str, dict[str, str]]:
    """Of every environment that takes part, by its folder."""
    names = {BARE[key].environment for key in keys if key in BARE} | ({"infinity"} if "infinity" in keys else set())
    pythons = {f".venv/rivals/{name}": RIVALS / name / "bin/python" for name in sorted(names - {""})}
    found = {where: record.installed(python) for where, python in pythons.items() if python.exists()}
    return {".venv": record.versions()} | found


def main() -> None:
    options = arguments()
    plan: Plan = options.plan
    leave_on_signal()

    begin = time.monotonic()
    result = record.header() | {"versions": versions(options.engines)}
    print(f"{result['machine']}\ncutting {plan.texts} texts a workload …", flush=True)
    pools = texts_of(plan)
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "texts.json"
        file.write_text(json.dumps(pools))
        with ExitStack() as stack:
            print("starting the engines …", flush=True)
            start = Start(stack, file, Path(folder))
            engines = start.engines(options.engines)
            ours = [engine for engine in engines if engine.place == SERVED["http"]]
            for engine in ours:
                engine.vectors(["one"])
            print("memory before the load: peak resident MB of each process (proportional share now)", flush=True)
            rows = weigh(ours, "before")
            print("accuracy, against sentence-transformers fp32 in-process:", flush=True)
            half = plan.compared // 2
            rows += correctness(engines, pools["short"][:half] + pools["mixed"][:half])
            print("warming …", flush=True)
            warm(engines, plan)
            rounds, elsewhere = measure(engines, plan)
            rows = report.rows(rounds) + rows
            print("memory: peak resident MB of each process (proportional share now)")
            rows += weigh(engines, "after")
        if ours:
            rows += cold_starts(plan.starts, file, Path(folder))
    print(f"\n{report.table(rows)}\n\n{report.served_table(rows)}\n")
    for dtype in DTYPES:
        if ceiling := report.find(rows, MACHINE, "gflop_per_s", workload=dtype):
            print(f"the machine's linears, {dtype}: {ceiling['median']:.0f} GFLOP/s")
    print("\n".join(targets.expectations(rows, result["machine"])))
    print("\n".join(f"NOT MEASURED: {', '.join(PLACES[key])}: {why}" for key, why in start.missing.items()))
    if median(elsewhere) > 5:
        print(f"judge with care: something else took {elsewhere} % of the cores in the rounds")
    about = {"texts": {"per_workload": plan.texts, "digest": workloads.digest(pools)}}
    about |= {"rounds": plan.rounds, "seconds_a_cell": plan.seconds, "cpu_percent_elsewhere": elsewhere}
    about |= {"not_measured": start.missing, "wall_s": round(time.monotonic() - begin)}
    record.write(options.out, result | about | {"rows": rows})
    if options.plots:
        from benchmarks.plots import draw

        draw(options.out)


if __name__ == "__main__":
    main()
