"""Throughput for several token budgets per forward pass and values of max_queue_delay."""

import statistics
from pathlib import Path
from typing import Any

from benchmarks.scheduling.results import LoadResult, OtherCpu, log_progress
from benchmarks.scheduling.stack import Config, Plan, Row, serving_config
from benchmarks.worker import Worker

BUDGETS = (256, 512, 1_024, 2_048, 4_096)  # tokens per forward pass
QUEUE_DELAYS_US = (500, 2_000)  # max_queue_delay_microseconds; budgets are measured with 0
CALLERS = (1, 8, 32, 128)
MAX_IN_FLIGHT = 128 * 32  # inputs in flight: a cell this large takes many seconds, so it is measured in one round only


def configs() -> list[Config]:
    """Return the configurations of the stage "budget"."""
    return [Config(budget) for budget in BUDGETS] + [Config(wait_us=delay) for delay in QUEUE_DELAYS_US]


def measure_budget(load: Worker, plan: Plan, folder: Path, begin: float) -> list[Row]:
    """Run the stage "budget" and return its rows."""
    replies_by_cell: dict[tuple[Config, str, int, int], list[dict[str, Any]]] = {}
    other_cpu: dict[Config, list[float]] = {}
    for turn in range(plan.rounds):
        order = configs()
        for config in order[turn % len(order) :] + order[: turn % len(order)]:
            with serving_config(config, folder) as stack:
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
