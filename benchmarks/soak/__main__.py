"""Soak test for stability, correctness and memory growth: mixed valid and invalid traffic on a freshly started stack.

Three models in one repository: minilm with its real weights, a tiny Qwen3 and a tiny GME. Every vector is compared with
the one that sentence-transformers or transformers computed in fp32 before the start, and every error with the expected
format and field. A 504 is acceptable only if the request had a short deadline, and a 429 only then or during a burst
that exceeds the limit of pending tokens. Exit code 1: a response was wrong or missing, or memory grew.
"""

import argparse
import collections
import json
import sys
import tempfile
import time
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import uvloop

from benchmarks import report, workloads
from benchmarks.processes import Stack, exit_on_signal, free_port, role, serving, tree
from benchmarks.report import summary
from benchmarks.soak import judge
from benchmarks.soak.client import KEY, Http
from benchmarks.soak.inputs import Inputs
from benchmarks.soak.judge import Checker
from benchmarks.soak.memory import MIN_SECONDS, RULE, MemoryMonitor
from benchmarks.soak.models import NAMES, write_repository
from benchmarks.soak.run import Soak
from benchmarks.soak.site import ImageSite
from benchmarks.soak.traffic.invalid import InvalidTraffic
from benchmarks.soak.traffic.triton import TritonTraffic
from benchmarks.soak.traffic.valid import ValidTraffic
from benchmarks.worker import worker

BODY_LIMIT = 32 * 2**20  # bytes; the gateway's default
MAX_PENDING_TOKENS = 60_000  # room for a few requests of a burst and far more than all callers send
BODY_TIMEOUT_SECONDS = 5  # the gateway's timeout for a request body
HOURS = 2.0  # server time that the number of requests is compared to


def serving_soak(models: Path, logs: Path, site: ImageSite) -> AbstractContextManager[Stack]:
    """Run `triton-embed serve` with all models of a repository."""
    settings = {
        "api_key": KEY,
        "media_allowed_hosts": f"127.0.0.1:{site.port}",
        "max_waiting_tokens": MAX_PENDING_TOKENS,
        "body_timeout": BODY_TIMEOUT_SECONDS,
    }
    environment = {f"TRITON_EMBED_{name.upper()}": str(value) for name, value in settings.items()}
    flags = ("--model-repository", str(models))
    return serving(*flags, logs=logs, ready="/health_generate", environment=environment)


async def run_soak(
    stack: Stack, inputs: Inputs, site: ImageSite, options: argparse.Namespace
) -> tuple[Soak, MemoryMonitor, float]:
    """Run the soak on a started stack. Return it, the memory monitor and the duration in seconds."""
    checker = Checker()
    http = Http(stack.port)
    valid = ValidTraffic(http, inputs, site, checker)
    triton = TritonTraffic(stack.triton_http_port, stack.grpc_port, inputs, checker)
    soak = Soak(http, valid, InvalidTraffic(valid, BODY_LIMIT), triton, checker, options.only)
    before = {(process.pid, role(process)) for process in tree(stack.process.pid)}
    counts = await soak.counts()
    memory = MemoryMonitor(stack.process.pid)
    async with site.open():
        await soak.run(memory, 60 * options.minutes, options.callers, options.seed)
        seconds = time.monotonic() - memory.begin
        await soak.settle(counts)
    await triton.close()
    for pid, name in before - {(process.pid, role(process)) for process in tree(stack.process.pid)}:
        soak.fail(name, f"process {pid} ended")
    if site.forbidden_connections:
        soak.fail("the forbidden site", f"received {site.forbidden_connections} connections")
    if not options.only and options.minutes > 1:
        for status in ("429", "504"):
            if not sum(counts[status] for counts in soak.statuses.values()):
                soak.fail("the soak", f"caused no response with status <{status}>")
    return soak, memory, seconds


def build_result(
    soak: Soak, memory: MemoryMonitor, seconds: float, log: Path, options: argparse.Namespace
) -> dict[str, Any]:
    """Return the content of the result file, including the verdict on memory."""
    if traces := log.read_text(errors="replace").count("Traceback"):
        soak.fail("the server's log", f"contains {traces} tracebacks")
    memory_verdict = memory.verdict()
    long_enough = seconds >= MIN_SECONDS - 1
    for name, process_verdict in memory_verdict.items():
        if long_enough and not process_verdict.get("flat", False):
            soak.fail(name, "memory is not flat")
    figures = summary(soak.latencies, 1, seconds)
    statuses = sum(soak.statuses.values(), collections.Counter())
    return {
        "seconds": round(seconds, 1),
        "callers": options.callers,
        "seed": options.seed,
        "models": NAMES,
        "requests": statuses.total(),
        "stands_for": f"{HOURS:g} hours of {statuses.total() / (3_600 * HOURS):.2f} requests per second",
        "statuses": dict(sorted(statuses.items())),
        "bursts": len(soak.bursts),
        "inputs_per_s": soak.inputs / seconds,
        "vectors_checked": soak.checker.vectors,
        "worst_cosine": soak.checker.min_cosine,
        "least_cosine_allowed": judge.MIN_COSINE,
        "failures": dict(soak.failures),
        "failed": soak.examples,
        "p50_ms": figures["p50_ms"],
        "p99_ms": figures["p99_ms"],
        "slowest_ms": 1_000 * max(soak.latencies, default=0.0),
        "memory_rule": RULE,
        "memory_judged": long_enough,
        "memory_mb": memory_verdict,
        "forms": {name: dict(sorted(counts.items())) for name, counts in sorted(soak.statuses.items())},
    }


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.soak", description=__doc__)
    parser.add_argument("--minutes", type=float, help="duration (default: 15; 1 with --quick)")
    parser.add_argument("--callers", type=int, default=16, help="requests in flight (default: %(default)s)")
    parser.add_argument(
        "--quick", action="store_true", help="run for one minute and write no file unless --out is given"
    )
    parser.add_argument(
        "--only",
        action="append",
        default=[],
        metavar="FORM",
        help="only this form of traffic, without bursts; repeatable",
    )
    parser.add_argument("--seed", type=int, default=0, help="seed of all random choices (default: %(default)s)")
    parser.add_argument("--out", type=Path, help=f"result file (default: {report.RESULTS.name}/soak.json)")
    options = parser.parse_args()
    options.minutes = options.minutes or (1.0 if options.quick else 15.0)
    out = options.out or (None if options.quick else report.RESULTS / "soak.json")
    exit_on_signal()
    result = report.header()
    pools = workloads.texts(256)
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        models = write_repository(folder, pools["mixed"])
        with worker("benchmarks.soak.expected", scratch, logs=folder) as reference:
            inputs = Inputs(reference, folder, pools)
        print(f"expected vectors: {inputs.count()}", flush=True)
        images = {name: file_bytes for name, (_, file_bytes) in inputs.image_files.items()}
        site = ImageSite(images, free_port(), free_port())
        with serving_soak(models, folder, site) as stack:
            print(f"ready after {stack.start_seconds:.1f} s", flush=True)
            soak, memory, seconds = uvloop.run(run_soak(stack, inputs, site, options))
        figures = build_result(soak, memory, seconds, stack.log, options)
    print("\n".join(soak.table()))
    print(json.dumps({key: value for key, value in figures.items() if key != "forms"}, indent=1))
    if out:
        report.write(out, result | figures | {"samples": memory.samples})
    sys.exit(1 if soak.failures else 0)


if __name__ == "__main__":
    main()
