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
import tempfile
import time
from pathlib import Path

from benchmarks import report, workloads
from benchmarks.processes import (
    exit_on_signal,
)
from benchmarks.scheduling.budget import measure_budget
from benchmarks.scheduling.fairness import BULK, bulk_texts, measure_fairness
from benchmarks.scheduling.results import log_progress
from benchmarks.scheduling.single import measure_single
from benchmarks.scheduling.stack import FULL, QUICK, Plan, Row
from benchmarks.scheduling.tables import tables
from benchmarks.worker import worker

STAGES = ("fairness", "single", "budget")


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
                rows += measure_fairness(load, bulk_load, plan, folder, begin)
            if "single" in options.only:
                rows += measure_single(load, texts, plan, folder, begin)
            if "budget" in options.only:
                rows += measure_budget(load, plan, folder, begin)
    print("\n".join(tables(rows)))
    metadata = {"texts_digest": workloads.digest(pools), **plan._asdict(), "bulk_inputs": BULK}
    report.write(options.out, result | metadata | {"rows": rows})
    from benchmarks.plots import draw  # imported here: only the plots need matplotlib
    from benchmarks.scheduling.plots import PLOTS

    draw(options.out, PLOTS)


if __name__ == "__main__":
    main()
