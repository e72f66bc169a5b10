"""Throughput of a forward pass as a share of the throughput of oneDNN's matrix products, at 512 tokens per text.

    python -m benchmarks.ceiling [--quick] [--checkpoints DIRECTORY]

The engine with random weights of each shape (see `benchmarks.families`) and the linears of the same layers (see
`benchmarks.ceiling.gemm`) run in separate processes, in turns. The share counts only products with weights; a second
figure includes the products of attention.
"""

import argparse
import json
import statistics
import tempfile
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from benchmarks import report
from benchmarks.ceiling.gemm import NETWORKS
from benchmarks.families.tables import Engine
from benchmarks.families.tasks import checkpoint, task
from benchmarks.families.work import CELLS, FULL, QUICK, Plan
from benchmarks.processes import exit_on_signal
from benchmarks.worker import worker

LENGTH = 512
CELL = f"{LENGTH} tokens"
TARGET = 0.85
DTYPE = ("bfloat16", "bf16")
WIDTHS = {"bge-large": 1_024, "qwen3-0.6b": 2_048}  # sum over all query heads: the width of attention's products
CAUSAL = {"bge-large": False, "qwen3-0.6b": True}


def measure(name: str, plan: Plan, keep: Path | None) -> dict[str, Any]:
    """Measure one shape and return its result row."""
    cells = [cell for cell in CELLS[name] if cell.workload == CELL]
    engine_dtype, gemm_dtype = DTYPE
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        directory = stack.enter_context(checkpoint(name, keep))
        work = plan.work(cells, folder)
        file = folder / "task.json"
        file.write_text(json.dumps(task(name, Engine("ours", engine_dtype), directory, work)))
        engine = stack.enter_context(worker("benchmarks.families.engines", "ours", str(file), logs=folder))
        gemm = stack.enter_context(worker("benchmarks.ceiling.gemm", logs=folder))
        tokens = sum(map(len, work[CELL]["ids"]))
        engine.call(workload=CELL)
        gemm.call(workload=gemm_dtype, network=name)
        rounds = []
        for _ in range(plan.rounds):
            ceiling = gemm.call(workload=gemm_dtype, network=name, seconds=plan.seconds)["gflop_per_s"]
            seconds = engine.call(workload=CELL, seconds=plan.seconds)["seconds"]
            rounds.append({"gemm_gflop_per_s": ceiling, "tokens_per_s": tokens / seconds})
    network = NETWORKS[name]
    attention = 4 * network.layers * WIDTHS[name] * LENGTH * (0.5 if CAUSAL[name] else 1.0)
    for figures in rounds:
        figures["share"] = figures["tokens_per_s"] * network.flop_per_token / 1e9 / figures["gemm_gflop_per_s"]
        figures["share_with_attention"] = figures["share"] * (1 + attention / network.flop_per_token)
    row: dict[str, Any] = {"shape": name, "workload": CELL, "dtype": gemm_dtype, "tokens_a_call": tokens}
    for key in rounds[0]:
        values = [figures[key] for figures in rounds]
        row[key] = {"median": statistics.median(values), "min": min(values), "max": max(values)}
    share, share_with_attention = row["share"], row["share_with_attention"]
    print(
        f"{name}: {row['tokens_per_s']['median']:.0f} tokens/s, linears alone {row['gemm_gflop_per_s']['median']:.0f}"
        f" GFLOP/s: share {share['median']:.2f} ({share['min']:.2f} to {share['max']:.2f}), with attention"
        f" {share_with_attention['median']:.2f}; {'met' if share['median'] >= TARGET else f'below {TARGET}'}",
        flush=True,
    )
    return row


def main() -> None:
    exit_on_signal()
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.ceiling",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--quick", action="store_true", help="one round of one text")
    parser.add_argument(
        "--checkpoints", type=Path, metavar="DIRECTORY", help="write the checkpoints to DIRECTORY and keep them"
    )
    parser.add_argument("--out", type=Path, default=report.RESULTS / "ceiling.json")
    options = parser.parse_args()
    header = report.header()
    plan = QUICK if options.quick else FULL._replace(rounds=5, seconds=3.0)
    rows = [measure(name, plan, options.checkpoints) for name in WIDTHS]
    report.write(options.out, header | {"rows": rows})


if __name__ == "__main__":
    main()
