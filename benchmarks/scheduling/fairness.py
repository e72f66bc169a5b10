"""Single queries alone and under bulk load, for several token budgets per forward pass."""

import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from benchmarks.processes import (
    Stack,
)
from benchmarks.scheduling.results import LoadResult, OtherCpu, log_progress
from benchmarks.scheduling.stack import Config, Plan, Row, serving_config
from benchmarks.worker import Worker

BULK = 2_048  # inputs of a bulk request
SMALL_BUDGETS = (512, 256)  # additional tokens per forward pass for which fairness is measured
MAX_P99_RATIO = 3.0  # target: p99 of a query under bulk load, divided by its idle p50


def bulk_texts(texts: Sequence[str]) -> list[str]:
    """Return 2 × BULK distinct texts of the same lengths: rotations of the words of each text."""
    rotated = []
    for turn in range(-(-2 * BULK // len(texts))):
        for text in texts:
            words = text.split()
            start = turn % len(words)
            rotated.append(" ".join(words[start:] + words[:start]))
    return rotated[: 2 * BULK]


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


def measure_fairness(load: Worker, bulk_load: Worker, plan: Plan, folder: Path, begin: float) -> list[Row]:
    """Run the stage "fairness" and return its rows."""
    rows: list[Row] = []

    def add(row: Row) -> None:
        rows.append(row)
        log_progress(begin, format_fairness(row))

    for config in (Config(), *map(Config, SMALL_BUDGETS)):
        with serving_config(config, folder) as stack:
            queries = Fairness(load, bulk_load, stack, config, plan)
            add(queries.idle(1))
            add(queries.bulk_alone())
            add(queries.under_bulk("interactive", 1))
            if config == Config():
                add(queries.under_bulk("batch", 1))
                add(queries.idle(8))
                add(queries.under_bulk("interactive", 8))
    return rows


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
