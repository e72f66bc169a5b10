"""Fault benchmark: kill -9 the Python backend stub, then tritonserver, under load, and measure what callers see.

In addition to the callers, a probe is sent every 0.1 s without waiting for earlier ones. Measured from the kill: when
the first request sent after it succeeds, when the last error arrives, the longest request, the statuses. After the
stop: whether processes or shared-memory entries of the server remain.
"""

import argparse
import asyncio
import collections
import itertools
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, NamedTuple

import psutil
import uvloop

from benchmarks import report, workloads
from benchmarks.clients import Http
from benchmarks.processes import Stack, exit_on_signal, role, serving_minilm, stop, tree

CONCURRENCY = 8
SHARED_MEMORY = Path("/dev/shm")  # noqa: S108
CALM_SECONDS = 5.0  # error-free load before each kill


class Response(NamedTuple):
    """When a request was sent and completed (monotonic seconds), and its status."""

    sent: float
    completed: float
    status: str


class FaultBenchmark:
    """Load on a stack whose processes are killed one after the other."""

    def __init__(self, stack: Stack, texts: list[str], timeout: float) -> None:
        self.stack, self.texts, self.timeout = stack, texts, timeout
        self.responses: list[Response] = []
        self.in_flight: list[float] = []  # send time of each request in flight
        self.processes: set[psutil.Process] = set()  # every process that the stack has ever had
        self.done = False

    async def run(self) -> list[dict[str, Any]]:
        """Generate load, kill both processes and return the outcome of each kill."""
        client = Http(self.stack.port, deadline=2 * self.timeout)
        numbers = itertools.count()

        async def call() -> str:
            texts = [self.texts[next(numbers) % len(self.texts)] for _ in range(4)]
            sent = time.monotonic()
            self.in_flight.append(sent)
            status, _ = await client.call(client.prepare(texts))
            self.in_flight.remove(sent)
            self.responses.append(Response(sent, time.monotonic(), status))
            return status

        async def caller() -> None:
            while not self.done:
                if await call() != "200":
                    await asyncio.sleep(0.05)

        async def probe() -> None:
            while not self.done:
                tasks.create_task(call())
                await asyncio.sleep(0.1)

        async def kills() -> list[dict[str, Any]]:
            try:
                return [await self.kill("stub"), await self.kill("tritonserver")]
            finally:
                self.done = True

        async with asyncio.TaskGroup() as tasks:
            outcomes = tasks.create_task(kills())
            for _ in range(CONCURRENCY):
                tasks.create_task(caller())
            tasks.create_task(probe())
        return outcomes.result()

    async def kill(self, name: str) -> dict[str, Any]:
        """Kill the process whose role starts with `name`, wait for recovery and return the outcome."""
        await asyncio.sleep(CALM_SECONDS)
        self.processes.update(tree(self.stack.process.pid))
        victim = next(p for p in tree(self.stack.process.pid) if role(p).startswith(name))
        victim.kill()
        killed_at = time.monotonic()
        while not self.recovered(killed_at) and time.monotonic() - killed_at < self.timeout:
            await asyncio.sleep(0.2)
            self.processes.update(tree(self.stack.process.pid))
        after = [r for r in self.responses if r.completed >= killed_at]
        successes = [r.completed - killed_at for r in after if r.sent >= killed_at and r.status == "200"]
        errors = [r.completed - killed_at for r in after if r.status != "200"]
        outcome = {
            "killed": name,
            "answers_again_after_s": min(successes, default=None),
            "last_error_after_s": max(errors, default=None),
            "longest_request_s": max((r.completed - r.sent for r in after), default=None),
            "statuses": dict(collections.Counter(r.status for r in after)),
        }
        print(outcome, flush=True)
        return outcome

    def recovered(self, killed_at: float) -> bool:
        """Return whether all requests sent before the kill have completed and CALM_SECONDS passed without an error."""
        since = max(killed_at, time.monotonic() - CALM_SECONDS)
        recent = {r.status for r in self.responses if r.completed >= since}
        settled = all(sent >= killed_at for sent in self.in_flight)
        return settled and time.monotonic() - killed_at > CALM_SECONDS and recent == {"200"}


def shared_memory() -> set[str]:
    """Return the entries of /dev/shm that no running process has mapped."""
    maps = []
    for process in Path("/proc").glob("[0-9]*/maps"):
        try:
            maps.append(process.read_text(errors="replace"))
        except OSError:
            continue
    all_maps = "".join(maps)
    return {entry.name for entry in SHARED_MEMORY.iterdir() if str(entry) not in all_maps}


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.faults", description=__doc__)
    parser.add_argument(
        "--patience", type=float, default=90, help="seconds to wait for recovery after each kill (default: %(default)s)"
    )
    parser.add_argument(
        "--out", type=Path, default=report.RESULTS / "faults.json", help="result file (default: %(default)s)"
    )
    options = parser.parse_args()
    exit_on_signal()
    result = report.header()
    texts = workloads.texts(256)["short"]
    before = shared_memory()
    with tempfile.TemporaryDirectory() as folder, serving_minilm(Path(folder)) as stack:
        print(f"ready after {stack.start_seconds:.1f} s", flush=True)
        benchmark = FaultBenchmark(stack, texts, options.patience)
        outcomes = uvloop.run(benchmark.run())
        benchmark.processes.update(tree(stack.process.pid))
        stop_seconds = stop(stack.process)
    remaining = [f"{role(p)} {p.pid}" for p in benchmark.processes if p.is_running() and p.status() != "zombie"]
    figures = {
        "kills": outcomes,
        "stop_seconds": stop_seconds,
        "processes_left": remaining,
        "shared_memory_left": sorted(shared_memory() - before),
    }
    print({key: value for key, value in figures.items() if key != "kills"})
    report.write(options.out, result | figures)
    recovered = all(outcome["answers_again_after_s"] is not None for outcome in outcomes)
    sys.exit(0 if recovered and not remaining and not figures["shared_memory_left"] else 1)


if __name__ == "__main__":
    main()
