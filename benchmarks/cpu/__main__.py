"""CPU benchmark: our stack and common alternatives on the same weights and texts, in one run.

Each engine runs in a separate process. All engines stay loaded and are measured one at a time; a separate process
generates the load for servers. A round measures every cell once, engine by engine, and the order rotates from round to
round. Figures are medians over the rounds; ratios are medians of the per-round ratios.
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

from benchmarks import report, workloads
from benchmarks.ceiling.gemm import DTYPES, TOKENS
from benchmarks.cpu import accuracy, tables, targets
from benchmarks.cpu.contenders import BARE, CONTENDERS, RIVALS, SERVED, Engine, Launcher
from benchmarks.cpu.tables import BASELINE, MACHINE, SMALL_CALL, Cell, Contender, Row
from benchmarks.processes import cpu_seconds_elsewhere, exit_on_signal, memory, serving_minilm
from benchmarks.worker import worker

VECTORS_BATCH = 250  # texts per call when vectors are requested
SETTLE_SECONDS = 0.05  # pause between cells: thread pools spin for a while after their last task
ONE_CALL_SECONDS = 0.001  # short enough to measure a single call


class Plan(NamedTuple):
    """What a run measures and for how long."""

    rounds: int
    seconds: float
    workloads: tuple[str, ...]
    singles: tuple[str, ...]  # workloads also measured with one text per call, in-process
    concurrencies: tuple[int, ...]  # requests in flight, each of one short text
    texts: int  # per workload; more than are ever in flight, so that no text is in flight twice
    compared: int  # texts whose vectors are compared
    starts: int  # timed cold starts of the whole stack

    def cells(self, contender: Contender) -> list[Cell]:
        """Return the cells in which a contender is measured."""
        if contender == MACHINE:
            return [Cell(dtype, TOKENS, 1) for dtype in DTYPES]
        if contender.where == "bare":
            return [tables.throughput_cell(contender, w) for w in self.workloads] + [
                Cell(w, 1, 1) for w in self.singles
            ]
        # Servers load the checkpoint unchanged; it is limited to 256 tokens.
        batches = [tables.throughput_cell(contender, w) for w in self.workloads if w != "full"]
        return batches + [Cell("short", 1, c) for c in self.concurrencies]


FULL = Plan(3, 1.5, ("short", "mixed", "long", "full"), ("short", "long"), (1, 8, 32), workloads.MAX_TEXTS, 1000, 3)
QUICK = Plan(3, 0.5, ("short", "mixed"), ("short",), (1, 8), 512, 256, 1)


def create_texts(plan: Plan) -> dict[str, list[str]]:
    """Return the texts of each workload."""
    pools = workloads.texts(plan.texts)
    # "full" is not sent to servers, so few distinct texts suffice.
    return pools | (workloads.texts(workloads.BLOCK, names=["full"]) if "full" in plan.workloads else {})


def correctness(engines: list[Engine], texts: list[str]) -> list[Row]:
    """Compare the vectors of each engine with those of sentence-transformers for the same texts."""
    compared = [engine for engine in engines if engine.contender != MACHINE]
    reference = next((engine for engine in compared if engine.contender.engine == BASELINE), None)
    if reference is None:
        return []
    expected = reference.worker.batched_vectors(texts, VECTORS_BATCH, **reference.target)
    rows = []
    for engine in compared:
        vectors = engine.worker.batched_vectors(texts, VECTORS_BATCH, **engine.target)
        result = accuracy.compare(vectors, expected)
        print(
            f"  {', '.join(engine.contender)}: cosine mean {result.cosine_mean:.7f}, lowest {result.cosine_min:.7f};"
            f" {result.neighbors:.4f} of the {accuracy.NEIGHBORS} nearest neighbors agree",
            flush=True,
        )
        for metric, value in zip(("cosine_mean", "cosine_least", "neighbours_10"), result, strict=True):
            rows.append(tables.make_row(engine.contender, metric, [value], texts=len(texts)))
    return rows


def measure_memory(engines: list[Engine], when: str) -> list[Row]:
    """Measure every process: peak RSS since its start and current PSS, in MB."""
    rows = []
    measured: set[int] = set()
    for engine in engines:
        if engine.pid in measured or engine.contender == MACHINE:  # HTTP and gRPC use the same processes
            continue
        measured.add(engine.pid)
        processes = memory(engine.pid)
        for name, usage in processes.items():
            rows.append(tables.make_row(engine.contender, "peak_rss_mb", [usage["peak_rss"]], process=name, when=when))
            rows.append(tables.make_row(engine.contender, "pss_mb", [usage["pss"]], process=name, when=when))
        total = sum(usage["peak_rss"] for usage in processes.values())
        rows.append(tables.make_row(engine.contender, "peak_rss_mb_total", [total], when=when))
        parts = ", ".join(f"{name} {usage['peak_rss']:.0f} ({usage['pss']:.0f})" for name, usage in processes.items())
        print(f"  {', '.join(engine.contender)}: {total:.0f}: {parts}", flush=True)
    return rows


def warm_up(engines: list[Engine], plan: Plan) -> None:
    """Run each workload once unmeasured: first calls of a shape are slower, and engines with several modes pick one."""
    for engine in engines:
        begin = time.monotonic()
        for workload in dict.fromkeys(cell.workload for cell in plan.cells(engine.contender)):
            engine.measure(Cell(workload, SMALL_CALL, 1), ONE_CALL_SECONDS, 0)
        print(f"  {', '.join(engine.contender)}: warmed up in {time.monotonic() - begin:.1f} s", flush=True)


def measure(engines: list[Engine], plan: Plan) -> tuple[tables.Rounds, list[float]]:
    """Run all rounds. Return the results and, per round, the CPU usage of other processes in percent of all cores."""
    begin = time.monotonic()
    rounds: tables.Rounds = defaultdict(list)
    other_cpu = []
    cells = dict.fromkeys(cell for engine in engines for cell in plan.cells(engine.contender))
    for turn in range(plan.rounds):
        wall, cpu = time.monotonic(), cpu_seconds_elsewhere()
        order = engines[turn % len(engines) :] + engines[: turn % len(engines)]
        for cell, engine in itertools.product(cells, order):
            if cell in plan.cells(engine.contender):
                time.sleep(SETTLE_SECONDS)
                result = engine.measure(cell, plan.seconds, turn * workloads.BLOCK)
                rounds[engine.contender, cell].append(result)
                progress = f"{time.monotonic() - begin:5.0f} s  round {turn + 1}/{plan.rounds}"
                print(progress, progress_line(engine.contender, cell, result), flush=True)
        wall, cpu = time.monotonic() - wall, cpu_seconds_elsewhere() - cpu
        other_cpu.append(round(100 * cpu / wall / len(os.sched_getaffinity(0)), 1))
    return rounds, other_cpu


def progress_line(contender: Contender, cell: Cell, result: dict[str, Any]) -> str:
    """Format the result of one cell as a line of progress output."""
    if contender == MACHINE:
        return f" linears of {cell.inputs} tokens, {cell.workload}: {result['gflop_per_s']:.0f} GFLOP/s"
    label = f"{cell.workload:5} {cell.inputs:3} inputs, {cell.concurrency:2} in flight"
    speed = f"{result['sentences_per_s']:8.1f} sentences/s"
    times = f"p50 {result['p50_ms']:8.2f}  p99 {result['p99_ms']:8.2f} ms"
    failed = f"  FAILED {failures}" if (failures := result.get("failures")) else ""
    return f" {label}  {', '.join(contender):32} {speed}  {times}{failed}"


def cold_starts(count: int, pools: Path, logs: Path) -> list[Row]:
    """Measure the seconds from `triton-embed serve` to the first vector, on an idle machine with a warm page cache."""
    seconds = []
    with worker("benchmarks.loadgen", str(pools), logs=logs) as load:
        load.call()  # wait until its imports are done
        for _ in range(count):
            with serving_minilm(logs) as stack:
                begin = time.monotonic()
                load.vectors(["one"], protocol="http", port=stack.port)
                seconds.append(stack.start_seconds + time.monotonic() - begin)
    print(f"cold start to the first vector, s: {', '.join(f'{s:.2f}' for s in seconds)}", flush=True)
    return [tables.make_row(SERVED["http"], "cold_start_s", seconds)]


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.cpu", description=__doc__)
    add = parser.add_argument
    add("--quick", action="store_true", help="short and mixed texts, up to 8 in flight: about 5 minutes instead of 18")
    add("--out", type=Path, default=report.RESULTS / "cpu.json", help="result file (default: %(default)s)")
    add("--rounds", type=int, help=f"rounds, 3 or more (default: {FULL.rounds}, quick: {QUICK.rounds})")
    add("--seconds", type=float, help=f"seconds per cell (default: {FULL.seconds}, quick: {QUICK.seconds})")
    add("--engines", default="*", help=f"comma-separated engines or glob patterns: {', '.join(CONTENDERS)}")
    add("--plots", action=argparse.BooleanOptionalAction, default=True, help="draw PNGs next to the result file")
    options = parser.parse_args()
    patterns = options.engines.split(",")
    if unknown := [pattern for pattern in patterns if not fnmatch.filter(CONTENDERS, pattern)]:
        parser.error(f"unknown engine {', '.join(unknown)}; available: {', '.join(CONTENDERS)}")
    options.engines = [key for key in CONTENDERS if any(fnmatch.fnmatch(key, pattern) for pattern in patterns)]
    plan = QUICK if options.quick else FULL
    options.plan = plan._replace(rounds=options.rounds or plan.rounds, seconds=options.seconds or plan.seconds)
    if options.plan.rounds < 3:
        parser.error("--rounds must be at least 3, so that the median is meaningful")
    return options


def versions(keys: list[str]) -> dict[str, dict[str, str]]:
    """Return the package versions of every environment in use, by folder."""
    names = {BARE[key].environment for key in keys if key in BARE} | ({"infinity"} if "infinity" in keys else set())
    pythons = {f".venv/rivals/{name}": RIVALS / name / "bin/python" for name in sorted(names - {""})}
    rivals = {folder: report.installed(python) for folder, python in pythons.items() if python.exists()}
    return {".venv": report.versions()} | rivals


def main() -> None:
    options = arguments()
    plan: Plan = options.plan
    exit_on_signal()

    begin = time.monotonic()
    result = report.header() | {"versions": versions(options.engines)}
    print(f"{result['machine']}\ncreating {plan.texts} texts per workload …", flush=True)
    pools = create_texts(plan)
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "texts.json"
        file.write_text(json.dumps(pools))
        with ExitStack() as stack:
            print("starting the engines …", flush=True)
            launcher = Launcher(stack, file, Path(folder))
            engines = launcher.engines(options.engines)
            ours = [engine for engine in engines if engine.contender == SERVED["http"]]
            for engine in ours:
                engine.vectors(["one"])
            print("memory before the load: peak RSS (current PSS) of each process, MB", flush=True)
            rows = measure_memory(ours, "before")
            print("accuracy compared with sentence-transformers fp32:", flush=True)
            half = plan.compared // 2
            rows += correctness(engines, pools["short"][:half] + pools["mixed"][:half])
            print("warming up …", flush=True)
            warm_up(engines, plan)
            rounds, other_cpu = measure(engines, plan)
            rows = tables.make_rows(rounds) + rows
            print("memory after the load: peak RSS (current PSS) of each process, MB")
            rows += measure_memory(engines, "after")
        if ours:
            rows += cold_starts(plan.starts, file, Path(folder))
    print(f"\n{tables.table(rows)}\n\n{tables.served_table(rows)}\n")
    for dtype in DTYPES:
        if ceiling := tables.find_row(rows, MACHINE, "gflop_per_s", workload=dtype):
            print(f"the machine's linears, {dtype}: {ceiling['median']:.0f} GFLOP/s")
    print("\n".join(targets.expectations(rows, result["machine"])))
    print(
        "\n".join(f"NOT MEASURED: {', '.join(CONTENDERS[key])}: {reason}" for key, reason in launcher.missing.items())
    )
    if median(other_cpu) > 5:
        print(f"warning: unrelated processes used {other_cpu} % of the cores in the rounds")
    metadata = {"texts": {"per_workload": plan.texts, "digest": workloads.digest(pools)}}
    metadata |= {"rounds": plan.rounds, "seconds_a_cell": plan.seconds, "cpu_percent_elsewhere": other_cpu}
    metadata |= {"not_measured": launcher.missing, "wall_s": round(time.monotonic() - begin)}
    report.write(options.out, result | metadata | {"rows": rows})
    if options.plots:
        from benchmarks.cpu.plots import PLOTS
        from benchmarks.plots import draw

        draw(options.out, PLOTS)


if __name__ == "__main__":
    main()
