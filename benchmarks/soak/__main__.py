"""Soak test for stability, correctness and memory growth: mixed valid and invalid traffic on a freshly started stack.

Three models in one repository: minilm with its real weights, a tiny Qwen3 and a tiny GME. Every vector is compared with
the one that sentence-transformers or transformers computed in fp32 before the start, and every error with the expected
format and field. A 504 is acceptable only if the request had a short deadline, and a 429 only during a burst that
exceeds the limit of pending tokens. Exit code 1: a response was wrong or missing, or memory grew.
"""

import argparse
import asyncio
import collections
import json
import os
import random
import re
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import uvloop

from benchmarks import report, workloads
from benchmarks.processes import Stack, exit_on_signal, free_port, role, running, tree, wait_until_ready
from benchmarks.report import percentile, summary
from benchmarks.soak import judge as soak_judge
from benchmarks.soak.client import KEY, Http, Response, SoakCase
from benchmarks.soak.inputs import Inputs
from benchmarks.soak.invalid import InvalidTraffic
from benchmarks.soak.judge import Checker
from benchmarks.soak.memory import MIN_SECONDS, RULE, MemoryMonitor
from benchmarks.soak.models import NAMES, write_repository
from benchmarks.soak.site import ImageSite
from benchmarks.soak.triton import TritonTraffic
from benchmarks.soak.valid import ValidTraffic
from benchmarks.worker import worker

INVALID_SHARE = 0.2  # of all requests
BURST = 10  # requests at once, each of 300 texts
BODY_LIMIT = 32 * 2**20  # bytes; the gateway's default
MAX_PENDING_TOKENS = 60_000  # room for a few requests of a burst and far more than all callers send
BODY_TIMEOUT_SECONDS = 5  # the gateway's timeout for a request body
MAX_EXAMPLES = 40  # failures recorded with request and response
HOURS = 2.0  # server time that the number of requests is compared to


class Soak:
    """Sends the traffic and records the results."""

    def __init__(
        self,
        http: Http,
        valid: ValidTraffic,
        invalid: InvalidTraffic,
        triton: TritonTraffic,
        checker: Checker,
        only: Sequence[str],
    ) -> None:
        self.http, self.valid, self.checker, self.only = http, valid, checker, only
        shares = (
            (1 - INVALID_SHARE, (*valid.forms, *triton.forms)),
            (INVALID_SHARE, (*invalid.forms, *triton.invalid_forms)),
        )
        self.forms = [
            (share * weight / sum(weight for weight, *_ in forms), name, make)
            for share, forms in shares
            for weight, name, make in forms
            if not only or name in only
        ]
        if not self.forms:
            sys.exit(
                f"unknown form {', '.join(only)}; "
                f"available: {', '.join(name for _, forms in shares for _, name, _ in forms)}"
            )
        self.latencies: list[float] = []  # seconds, of responses with status 200
        self.statuses: dict[str, collections.Counter[str]] = collections.defaultdict(collections.Counter)
        self.seconds: dict[str, list[float]] = collections.defaultdict(list)
        self.failures: collections.Counter[str] = collections.Counter()
        self.examples: list[dict[str, str]] = []
        self.inputs = 0
        self.bursts: list[list[float]] = []  # [start, end] of each

    async def caller(self, rng: random.Random, end: float) -> None:
        """Send random requests one after the other until `end`."""
        weights = [weight for weight, *_ in self.forms]
        while time.monotonic() < end:
            _, name, make = rng.choices(self.forms, weights)[0]
            if not await self.run_case(make(rng, name)):
                await asyncio.sleep(0.1)

    async def burst(self, rng: random.Random, end: float, interval: float) -> None:
        """Exceed the limit of pending tokens every `interval` seconds."""
        while (pause := min(interval, end - time.monotonic() - 5)) > 0:
            await asyncio.sleep(pause)
            cases = [self.valid.burst(rng) for _ in range(BURST)]
            window = [time.monotonic(), float("inf")]
            self.bursts.append(window)
            await asyncio.gather(*map(self.run_case, cases))
            window[1] = time.monotonic()

    async def run_case(self, case: SoakCase) -> bool:
        """Send a request, check and record the response; return whether it was correct."""
        sent = time.monotonic()
        status = "none"
        try:
            response = await case.send()
            status = str(response.status) if response else "none"
            problem = self.find_problem(case, response, sent)
            details = response.body.decode(errors="replace") if response else ""
        except TimeoutError:
            problem, details = "no response within the timeout", ""
        except ConnectionError as error:
            problem, details = "connection closed", str(error)
        seconds = time.monotonic() - sent
        self.statuses[case.form][status] += 1
        self.seconds[case.form].append(seconds)
        if status == "200" and not problem:
            self.latencies.append(seconds)
            self.inputs += case.inputs
        if problem:
            self.fail(case.form, problem, case.request, details)
        return not problem

    def fail(self, form: str, problem: str, request: bytes = b"", response: str = "") -> None:
        """Record a failure. Failures that differ only in numbers other than the status <N> are counted together."""
        kind = re.sub(r"<\d+>|\d+(\.\d+)?(e-?\d+)?", lambda match: match[0] if match[0][0] == "<" else "#", problem)
        self.failures[f"{form}: {kind[:160]}"] += 1
        if len(self.examples) < MAX_EXAMPLES:
            sent = request[:1_000].decode(errors="replace")
            self.examples.append({"form": form, "problem": problem, "request": sent, "answer": response[:600]})

    def find_problem(self, case: SoakCase, response: Response | None, sent: float) -> str:
        """Return a description of the problem of a response, or "" if it is correct."""
        if response is None:
            return "no response" if case.checks else ""
        check = case.checks.get(response.status)
        if check is None and response.status == 429 and any(sent <= end for _, end in self.bursts):
            check = soak_judge.queue_full
        if check is None:
            return f"unexpected status <{response.status}>"
        if response.headers and "x-request-id" not in response.headers and case.form != "no HTTP":
            return "no x-request-id header"
        try:
            return check(response)
        except (ValueError, KeyError, IndexError, TypeError, AttributeError) as error:
            return f"malformed response: {error!r}"

    async def log_progress(self, memory: MemoryMonitor, end: float, interval: float) -> None:
        """Print a line every `interval` seconds."""
        while time.monotonic() + interval < end:
            await asyncio.sleep(interval)
            statuses = sum(self.statuses.values(), collections.Counter[str]())
            progress = f"{time.monotonic() - memory.begin:5.0f} s  {statuses.total():7} requests"
            counts = " ".join(f"{status}:{count}" for status, count in sorted(statuses.items()))
            print(f"{progress}  {self.failures.total()} failures  {counts}  RSS {memory.latest}", flush=True)

    async def run(self, memory: MemoryMonitor, seconds: float, callers: int, seed: int) -> None:
        """Send traffic and bursts and sample memory for `seconds`."""
        end = time.monotonic() + seconds
        tasks = [self.caller(random.Random(f"{seed}/{i}"), end) for i in range(callers)]
        interval = max(10.0, min(60.0, seconds / 4))
        bursts = () if self.only else (self.burst(random.Random(f"{seed}/burst"), end, interval),)
        await asyncio.gather(memory.watch(end), self.log_progress(memory, end, interval / 2), *bursts, *tasks)

    async def counts(self) -> collections.Counter[str]:
        """Return the gateway's metrics: responses by status, and requests in flight."""
        text = (await self.http.send(self.http.request("GET", "/metrics"))).body.decode()
        counts = collections.Counter[str]()
        for status, count in re.findall(r'^triton_embed_requests_total\{.*status="(\d+)"\} (\S+)', text, re.MULTILINE):
            counts[status] += int(float(count))
        for count in re.findall(r"^triton_embed_requests_in_flight (\S+)", text, re.MULTILINE):
            counts["in flight"] += int(float(count))
        return counts

    async def settle(self, before: collections.Counter[str]) -> None:
        """Compare the gateway's metrics with the responses received. `before`: the result of `counts` at the start."""
        await asyncio.sleep(2)
        try:
            counted = await self.counts()
        except (ConnectionError, TimeoutError) as error:
            self.fail("the gateway", f"no longer answers: {error}")
            return
        received = sum(self.statuses.values(), collections.Counter[str]())
        for status in counted:
            if status.startswith("5") and (count := counted[status] - before[status]) != received[status]:
                self.fail("the gateway", f"counted {count} responses <{status}>, callers received {received[status]}")
        if counted["in flight"] > 1:  # the request for the metrics counts
            self.fail("the gateway", f"counted {counted['in flight'] - 1} requests in flight after the end")

    def table(self) -> list[str]:
        """Return the lines of a table: requests, latency and statuses of each form."""
        rows = [f"{'form':34} {'requests':>8} {'p50 ms':>8} {'p99 ms':>8}  statuses"]
        for name, counts in sorted(self.statuses.items()):
            times = [1_000 * percentile(self.seconds[name], q) for q in (0.5, 0.99)]
            status_counts = " ".join(f"{status}:{count}" for status, count in sorted(counts.items()))
            rows.append(f"{name:34} {counts.total():8} {times[0]:8.1f} {times[1]:8.1f}  {status_counts}")
        return rows


@contextmanager
def serving(models: Path, logs: Path, site: ImageSite) -> Iterator[tuple[Stack, int]]:
    """Run `triton-embed serve` with all models of a repository; yield the stack and Triton's HTTP port."""
    port, http, grpc, metrics = (free_port() for _ in range(4))
    command = [
        *(str(Path(sys.executable).with_name("triton-embed")), "serve", "--model-repository", str(models)),
        *("--port", str(port), "--triton-http-port", str(http), "--triton-grpc-port", str(grpc)),
        *("--triton-metrics-port", str(metrics)),
    ]
    settings = {
        "api_key": KEY,
        "media_allowed_hosts": f"127.0.0.1:{site.port}",
        "max_waiting_tokens": MAX_PENDING_TOKENS,
        "body_timeout": BODY_TIMEOUT_SECONDS,
    }
    environment = {f"TRITON_EMBED_{name.upper()}": str(value) for name, value in settings.items()}
    log = logs / "triton-embed.log"
    with running(command, log, env=os.environ | environment) as process:
        seconds = wait_until_ready(f"http://127.0.0.1:{port}/health_generate", process, log)
        yield Stack(process, port, grpc, seconds), http


async def run_soak(
    stack: Stack, triton_http: int, inputs: Inputs, site: ImageSite, options: argparse.Namespace
) -> tuple[Soak, MemoryMonitor, float]:
    """Run the soak on a started stack. Return it, the memory monitor and the duration in seconds."""
    checker = Checker()
    http = Http(stack.port)
    valid = ValidTraffic(http, inputs, site, checker)
    triton = TritonTraffic(triton_http, stack.grpc_port, inputs, checker)
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
        "least_cosine_allowed": soak_judge.MIN_COSINE,
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
        with serving(models, folder, site) as (stack, triton_http):
            print(f"ready after {stack.start_seconds:.1f} s", flush=True)
            soak, memory, seconds = uvloop.run(run_soak(stack, triton_http, inputs, site, options))
        figures = build_result(soak, memory, seconds, folder / "triton-embed.log", options)
    print("\n".join(soak.table()))
    print(json.dumps({key: value for key, value in figures.items() if key != "forms"}, indent=1))
    if out:
        report.write(out, result | figures | {"samples": memory.samples})
    sys.exit(1 if soak.failures else 0)


if __name__ == "__main__":
    main()
