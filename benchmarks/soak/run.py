"""Send the traffic of the soak, check every response and record the results."""

import asyncio
import collections
import random
import re
import sys
import time
from collections.abc import Sequence

from benchmarks.report import percentile
from benchmarks.soak import judge
from benchmarks.soak.client import Http, Response, SoakCase
from benchmarks.soak.judge import Checker
from benchmarks.soak.memory import MemoryMonitor
from benchmarks.soak.traffic.invalid import InvalidTraffic
from benchmarks.soak.traffic.triton import TritonTraffic
from benchmarks.soak.traffic.valid import ValidTraffic

INVALID_SHARE = 0.2  # of all requests
BURST = 10  # requests at once, each of 300 texts
MAX_EXAMPLES = 40  # failures recorded with request and response


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
            check = judge.queue_full
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
