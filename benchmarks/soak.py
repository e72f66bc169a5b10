"""Does it stay up, right and the same size? Good and bad traffic of every form, mixed, through a freshly started stack.

Three models in one repository: minilm with its real weights, a tiny Qwen3 and a tiny GME. Every vector is compared
with the one that sentence-transformers or transformers computed in fp32 before the start, every refusal with the form
and the field it must name. A 504 is right only where the request brought a deadline too short, a 429 only while a burst
of more than may wait is under way. Exit code 1: anything was wrong, was not answered, or memory grew.
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

from benchmarks import record, soak_judge, workloads
from benchmarks.processes import Stack, free_port, leave_on_signal, role, running, tree, wait_for
from benchmarks.soak_bad import Bad
from benchmarks.soak_good import Good
from benchmarks.soak_http import KEY, Answer, Ask, Http
from benchmarks.soak_inputs import Inputs
from benchmarks.soak_judge import Judge
from benchmarks.soak_memory import JUDGED, RULE, Memory
from benchmarks.soak_models import NAMES, write_repository
from benchmarks.soak_site import Site
from benchmarks.soak_triton import Triton
from benchmarks.summary import percentile, summary
from benchmarks.worker import worker

BAD_SHARE = 0.2  # of all requests
BURST = 10  # requests at once, each of 300 texts
BODY_LIMIT = 32 * 2**20  # the gateway's default
WAITING_TOKENS = 60_000  # that may wait: a few requests of a burst, and far more than all callers send
BODY_SECONDS = 5  # the gateway's patience with a body
KEPT_FAILURES = 40
HOURS = 2.0  # of a server's day that the whole soak stands for


class Soak:
    def __init__(self, http: Http, good: Good, bad: Bad, triton: Triton, judge: Judge, only: Sequence[str]) -> None:
        self.http, self.good, self.judge, self.only = http, good, judge, only
        shares = ((1 - BAD_SHARE, (*good.forms, *triton.forms)), (BAD_SHARE, (*bad.forms, *triton.bad_forms)))
        self.forms = [
            (share * weight / sum(weight for weight, *_ in forms), name, make)
            for share, forms in shares
            for weight, name, make in forms
            if not only or name in only
        ]
        if not self.forms:
            sys.exit(f"no such form; there are: {', '.join(name for _, forms in shares for _, name, _ in forms)}")
        self.latencies: list[float] = []  # of answers 200
        self.statuses: dict[str, collections.Counter[str]] = collections.defaultdict(collections.Counter)
        self.seconds: dict[str, list[float]] = collections.defaultdict(list)
        self.failures: collections.Counter[str] = collections.Counter()
        self.examples: list[dict[str, str]] = []
        self.inputs = 0
        self.bursts: list[list[float]] = []  # when each began and ended

    async def caller(self, rng: random.Random, end: float) -> None:
        weights = [weight for weight, *_ in self.forms]
        while time.monotonic() < end:
            _, name, make = rng.choices(self.forms, weights)[0]
            if not await self.ask(make(rng, name)):
                await asyncio.sleep(0.1)

    async def burst(self, rng: random.Random, end: float, every: float) -> None:
        """Now and then more at once than may wait."""
        while (pause := min(every, end - time.monotonic() - 5)) > 0:
            await asyncio.sleep(pause)
            asks = [self.good.burst(rng) for _ in range(BURST)]
            window = [time.monotonic(), float("inf")]
            self.bursts.append(window)
            await asyncio.gather(*map(self.ask, asks))
            window[1] = time.monotonic()

    async def ask(self, ask: Ask) -> bool:
        """Send it, judge and count what comes back; whether all was right."""
        sent = time.monotonic()
        status = "none"
        try:
            answer = await ask.send()
            status = str(answer.status) if answer else "none"
            problem = self.judged(ask, answer, sent)
            told = answer.body.decode(errors="replace") if answer else ""
        except TimeoutError:
            problem, told = "no answer in time", ""
        except ConnectionError as error:
            problem, told = "connection ended", str(error)
        passed = time.monotonic() - sent
        self.statuses[ask.form][status] += 1
        self.seconds[ask.form].append(passed)
        if status == "200" and not problem:
            self.latencies.append(passed)
            self.inputs += ask.inputs
        if problem:
            self.fail(ask.form, problem, ask.request, told)
        return not problem

    def fail(self, form: str, problem: str, request: bytes = b"", answer: str = "") -> None:
        # One kind of failure whatever its numbers, but for the status.
        kind = re.sub(r"<\d+>|\d+(\.\d+)?(e-?\d+)?", lambda found: found[0] if found[0][0] == "<" else "#", problem)
        self.failures[f"{form}: {kind[:160]}"] += 1
        if len(self.examples) < KEPT_FAILURES:
            sent = request[:1_000].decode(errors="replace")
            self.examples.append({"form": form, "problem": problem, "request": sent, "answer": answer[:600]})

    def judged(self, ask: Ask, answer: Answer | None, sent: float) -> str:
        """What is wrong with an answer; empty when nothing is."""
        if answer is None:
            return "no answer" if ask.answers else ""
        check = ask.answers.get(answer.status)
        if check is None and answer.status == 429 and any(sent <= end for _, end in self.bursts):
            check = soak_judge.full
        if check is None:
            return f"{'unprovoked ' if answer.status >= 500 else ''}status <{answer.status}>"
        if answer.headers and "x-request-id" not in answer.headers and ask.form != "no HTTP":
            return "no x-request-id"
        try:
            return check(answer)
        except (ValueError, KeyError, IndexError, TypeError, AttributeError) as error:
            return f"cannot be read: {error!r}"

    async def tell(self, memory: Memory, end: float, every: float) -> None:
        while time.monotonic() + every < end:
            await asyncio.sleep(every)
            statuses = sum(self.statuses.values(), collections.Counter[str]())
            passed = f"{time.monotonic() - memory.begin:5.0f} s  {statuses.total():7} requests"
            counts = " ".join(f"{status}:{count}" for status, count in sorted(statuses.items()))
            print(f"{passed}  {self.failures.total()} failures  {counts}  RSS {memory.latest}", flush=True)

    async def run(self, memory: Memory, seconds: float, callers: int, seed: int) -> None:
        end = time.monotonic() + seconds
        asking = [self.caller(random.Random(f"{seed}/{i}"), end) for i in range(callers)]
        every = max(10.0, min(60.0, seconds / 4))
        bursts = () if self.only else (self.burst(random.Random(f"{seed}/burst"), end, every),)
        await asyncio.gather(memory.watch(end), self.tell(memory, end, every / 2), *bursts, *asking)

    async def counts(self) -> collections.Counter[str]:
        """The gateway's own: answers by status, and requests in flight."""
        text = (await self.http.whole(self.http.request("GET", "/metrics"))).body.decode()
        found = collections.Counter[str]()
        for status, count in re.findall(r'^triton_embed_requests_total\{.*status="(\d+)"\} (\S+)', text, re.MULTILINE):
            found[status] += int(float(count))
        for count in re.findall(r"^triton_embed_requests_in_flight (\S+)", text, re.MULTILINE):
            found["in flight"] += int(float(count))
        return found

    async def settle(self, before: collections.Counter[str]) -> None:
        """Once all is answered: errors that nobody saw, requests that never ended. `before`: counts at the start."""
        await asyncio.sleep(2)
        try:
            counted = await self.counts()
        except (ConnectionError, TimeoutError) as error:
            self.fail("the gateway", f"does not answer any more: {error}")
            return
        seen = sum(self.statuses.values(), collections.Counter[str]())
        for status in counted:
            if status.startswith("5") and (count := counted[status] - before[status]) != seen[status]:
                self.fail("the gateway", f"counts {count} answers <{status}>, callers saw {seen[status]}")
        if counted["in flight"] > 1:  # the question itself
            self.fail("the gateway", f"counts {counted['in flight'] - 1} requests in flight after the end")

    def table(self) -> list[str]:
        rows = [f"{'form':34} {'requests':>8} {'p50 ms':>8} {'p99 ms':>8}  statuses"]
        for name, counts in sorted(self.statuses.items()):
            times = [1_000 * percentile(self.seconds[name], q) for q in (0.5, 0.99)]
            told = " ".join(f"{status}:{count}" for status, count in sorted(counts.items()))
            rows.append(f"{name:34} {counts.total():8} {times[0]:8.1f} {times[1]:8.1f}  {told}")
        return rows


@contextmanager
def serving(models: Path, logs: Path, site: Site) -> Iterator[tuple[Stack, int]]:
    """`triton-embed serve` with all models of a repository; and Triton's HTTP port."""
    port, http, grpc, metrics = (free_port() for _ in range(4))
    command = [
        *(str(Path(sys.executable).with_name("triton-embed")), "serve", "--model-repository", str(models)),
        *("--port", str(port), "--triton-http-port", str(http), "--triton-grpc-port", str(grpc)),
        *("--triton-metrics-port", str(metrics)),
    ]
    settings = {
        "api_key": KEY,
        "media_allowed_hosts": f"127.0.0.1:{site.port}",
        "max_waiting_tokens": WAITING_TOKENS,
        "body_timeout": BODY_SECONDS,
    }
    stated = {f"TRITON_EMBED_{name.upper()}": str(value) for name, value in settings.items()}
    log = logs / "triton-embed.log"
    with running(command, log, env=os.environ | stated) as process:
        seconds = wait_for(f"http://127.0.0.1:{port}/health_generate", process, log)
        yield Stack(process, port, grpc, seconds), http


async def soaked(
    stack: Stack, triton_http: int, inputs: Inputs, site: Site, options: argparse.Namespace
) -> tuple[Soak, Memory, float]:
    judge = Judge()
    http = Http(stack.port)
    good = Good(http, inputs, site, judge)
    triton = Triton(triton_http, stack.grpc_port, inputs, judge)
    soak = Soak(http, good, Bad(good, BODY_LIMIT), triton, judge, options.only)
    before = {(process.pid, role(process)) for process in tree(stack.process.pid)}
    counts = await soak.counts()
    memory = Memory(stack.process.pid)
    async with site.open():
        await soak.run(memory, 60 * options.minutes, options.callers, options.seed)
        seconds = time.monotonic() - memory.begin
        await soak.settle(counts)
    await triton.close()
    for pid, name in before - {(process.pid, role(process)) for process in tree(stack.process.pid)}:
        soak.fail(name, f"process {pid} ended")
    if site.trespasses:
        soak.fail("the forbidden site", f"reached {site.trespasses} times")
    if not options.only and options.minutes > 1:
        for status in ("429", "504"):
            if not sum(counts[status] for counts in soak.statuses.values()):
                soak.fail("the soak", f"provoked no <{status}>")
    return soak, memory, seconds


def reported(soak: Soak, memory: Memory, seconds: float, log: Path, options: argparse.Namespace) -> dict[str, Any]:
    """The figures, the judgement on memory among them."""
    if traces := log.read_text(errors="replace").count("Traceback"):
        soak.fail("the server's log", f"{traces} tracebacks")
    sizes = memory.verdict()
    judged = seconds >= JUDGED - 1
    for name, found in sizes.items():
        if judged and not found.get("flat", False):
            soak.fail(name, "memory is not flat")
    figures = summary(soak.latencies, 1, seconds)
    statuses = sum(soak.statuses.values(), collections.Counter())
    return {
        "seconds": round(seconds, 1),
        "callers": options.callers,
        "seed": options.seed,
        "models": NAMES,
        "requests": statuses.total(),
        "stands_for": f"{HOURS:g} hours of {statuses.total() / (3_600 * HOURS):.2f} requests a second",
        "statuses": dict(sorted(statuses.items())),
        "bursts": len(soak.bursts),
        "inputs_per_s": soak.inputs / seconds,
        "vectors_checked": soak.judge.vectors,
        "worst_cosine": soak.judge.worst,
        "least_cosine_allowed": soak_judge.COSINE,
        "failures": dict(soak.failures),
        "failed": soak.examples,
        "p50_ms": figures["p50_ms"],
        "p99_ms": figures["p99_ms"],
        "slowest_ms": 1_000 * max(soak.latencies, default=0.0),
        "memory_rule": RULE,
        "memory_judged": judged,
        "memory_mb": sizes,
        "forms": {name: dict(sorted(counts.items())) for name, counts in sorted(soak.statuses.items())},
    }


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.soak", description=__doc__)
    parser.add_argument("--minutes", type=float, help="how long (15; 1 with --quick)")
    parser.add_argument("--callers", type=int, default=16, help="requests in flight (%(default)s)")
    parser.add_argument("--quick", action="store_true", help="a minute, and no file unless --out names one")
    parser.add_argument(
        "--only", action="append", default=[], metavar="FORM", help="only this form, no bursts; repeatable"
    )
    parser.add_argument("--seed", type=int, default=0, help="of all that is drawn (%(default)s)")
    parser.add_argument("--out", type=Path, help=f"file ({record.RESULTS.name}/soak.json)")
    options = parser.parse_args()
    options.minutes = options.minutes or (1.0 if options.quick else 15.0)
    out = options.out or (None if options.quick else record.RESULTS / "soak.json")
    leave_on_signal()
    result = record.header()
    pools = workloads.texts(256)
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        models = write_repository(folder, pools["mixed"])
        with worker("benchmarks.soak_expected", scratch, logs=folder) as reference:
            inputs = Inputs(reference, folder, pools)
        print(f"expected vectors: {inputs.count()}", flush=True)
        pictures = {name: stored for name, (_, stored) in inputs.pictures.items()}
        site = Site(pictures, free_port(), free_port())
        with serving(models, folder, site) as (stack, triton_http):
            print(f"ready after {stack.start_seconds:.1f} s", flush=True)
            soak, memory, seconds = uvloop.run(soaked(stack, triton_http, inputs, site, options))
        report = reported(soak, memory, seconds, folder / "triton-embed.log", options)
    print("\n".join(soak.table()))
    print(json.dumps({key: value for key, value in report.items() if key != "forms"}, indent=1))
    if out:
        record.write(out, result | report | {"samples": memory.samples})
    sys.exit(1 if soak.failures else 0)


if __name__ == "__main__":
    main()
