"""What callers see when a process dies: under load, kill -9 of the stub, later of tritonserver.

Besides the callers, a probe is sent every 0.1 s whether or not earlier ones are answered. Measured from the kill:
when a request sent after it is answered, when the last error arrives, the longest request, the statuses.
After the stop: whether a process or a shared-memory entry of ours is left.
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

from benchmarks import record, workloads
from benchmarks.clients import Http
from benchmarks.processes import Stack, leave_on_signal, our_stack, role, stop, tree

CONCURRENCY = 8
SHARED_MEMORY = Path("/dev/shm")  # noqa: S108
CALM = 5.0  # seconds of load before a kill, and without an error before the next


class Answer(NamedTuple):
    sent: float
    answered: float
    status: str


class Faults:
    def __init__(self, stack: Stack, texts: list[str], patience: float) -> None:
        self.stack, self.texts, self.patience = stack, texts, patience
        self.answers: list[Answer] = []
        self.flying: list[float] = []  # when each request now in flight was sent
        self.seen: set[psutil.Process] = set()  # every process the stack ever had
        self.done = False

    async def run(self) -> list[dict[str, Any]]:
        client = Http(self.stack.port, deadline=2 * self.patience)
        numbers = itertools.count()

        async def call() -> str:
            some = [self.texts[next(numbers) % len(self.texts)] for _ in range(4)]
            sent = time.monotonic()
            self.flying.append(sent)
            status, _ = await client.call(client.prepare(some))
            self.flying.remove(sent)
            self.answers.append(Answer(sent, time.monotonic(), status))
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
        await asyncio.sleep(CALM)
        self.seen.update(tree(self.stack.process.pid))
        victim = next(p for p in tree(self.stack.process.pid) if role(p).startswith(name))
        victim.kill()
        at = time.monotonic()
        while not self.calm_since(at) and time.monotonic() - at < self.patience:
            await asyncio.sleep(0.2)
            self.seen.update(tree(self.stack.process.pid))
        after = [a for a in self.answers if a.answered >= at]
        good = [a.answered - at for a in after if a.sent >= at and a.status == "200"]
        bad = [a.answered - at for a in after if a.status != "200"]
        outcome = {
            "killed": name,
            "answers_again_after_s": min(good, default=None),
            "last_error_after_s": max(bad, default=None),
            "longest_request_s": max((a.answered - a.sent for a in after), default=None),
            "statuses": dict(collections.Counter(a.status for a in after)),
        }
        print(outcome, flush=True)
        return outcome

    def calm_since(self, at: float) -> bool:
        """Every request sent before is answered, and for CALM seconds all answers were good."""
        since = max(at, time.monotonic() - CALM)
        recent = {a.status for a in self.answers if a.answered >= since}
        settled = all(sent >= at for sent in self.flying)
        return settled and time.monotonic() - at > CALM and recent == {"200"}


def shared_memory() -> set[str]:
    """Entries of /dev/shm that no living process has mapped."""
    maps = []
    for process in Path("/proc").glob("[0-9]*/maps"):
        try:
            maps.append(process.read_text(errors="replace"))
        except OSError:
            continue
    everything = "".join(maps)
    return {entry.name for entry in SHARED_MEMORY.iterdir() if str(entry) not in everything}


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.faults", description=__doc__)
    parser.add_argument("--patience", type=float, default=90, help="seconds until given up (%(default)s)")
    parser.add_argument("--out", type=Path, default=record.RESULTS / "faults.json", help="file (%(default)s)")
    options = parser.parse_args()
    leave_on_signal()
    result = record.header()
    texts = workloads.texts(256)["short"]
    before = shared_memory()
    with tempfile.TemporaryDirectory() as folder, our_stack(Path(folder)) as stack:
        print(f"ready after {stack.start_seconds:.1f} s", flush=True)
        faults = Faults(stack, texts, options.patience)
        outcomes = uvloop.run(faults.run())
        faults.seen.update(tree(stack.process.pid))
        stop_seconds = stop(stack.process)
    left = [f"{role(p)} {p.pid}" for p in faults.seen if p.is_running() and p.status() != "zombie"]
    report = {
        "kills": outcomes,
        "stop_seconds": stop_seconds,
        "processes_left": left,
        "shared_memory_left": sorted(shared_memory() - before),
    }
    print({key: value for key, value in report.items() if key != "kills"})
    record.write(options.out, result | report)
    recovered = all(outcome["answers_again_after_s"] is not None for outcome in outcomes)
    sys.exit(0 if recovered and not left and not report["shared_memory_left"] else 1)


if __name__ == "__main__":
    main()
