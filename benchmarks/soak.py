"""Does it stay up, right and the same size? Mixed lengths through a freshly started stack, for minutes.

Every vector is compared with sentence-transformers' fp32 vector of the same text, computed before the start.
"""

import argparse
import asyncio
import collections
import json
import random
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import uvloop

from benchmarks import record, workloads
from benchmarks.clients import Http
from benchmarks.processes import Stack, leave_on_signal, memory, our_stack
from benchmarks.summary import summary
from benchmarks.worker import Vectors, worker

SIZES = (1, 2, 4, 8, 16)  # inputs a request, drawn evenly


class Soak:
    def __init__(self, texts: list[str], expected: Vectors, least: float) -> None:
        self.texts = texts
        self.expected = expected / np.linalg.norm(expected, axis=1, keepdims=True)
        self.least = least
        self.worst = 1.0
        self.latencies: list[float] = []
        self.sentences = 0
        self.failures: collections.Counter[str] = collections.Counter()
        self.samples: list[dict[str, Any]] = []

    async def caller(self, client: Http, rng: random.Random, end: float) -> None:
        while (sent := time.monotonic()) < end:
            some = rng.sample(range(len(self.texts)), rng.choice(SIZES))
            status, body = await client.call(client.prepare([self.texts[i] for i in some]))
            self.latencies.append(time.monotonic() - sent)
            if problem := self.judge(client, some, status, body):
                self.failures[problem] += 1
                await asyncio.sleep(0.1)
            else:
                self.sentences += len(some)

    def judge(self, client: Http, some: list[int], status: str, body: bytes) -> str:
        """What is wrong with an answer; empty when nothing is."""
        if status != "200":
            return status
        vectors = client.vectors(body)
        if vectors.shape != self.expected[some].shape:
            return "wrong shape"
        cosine = (vectors * self.expected[some]).sum(axis=1) / np.linalg.norm(vectors, axis=1)
        self.worst = min(self.worst, float(cosine.min()))
        return "" if cosine.min() >= self.least else "wrong vector"

    async def watch(self, pid: int, begin: float, end: float) -> None:
        """A sample of every process's memory each 5 s, a line each 30 s."""
        while time.monotonic() < end:
            weights = {name: round(w["rss"], 1) for name, w in memory(pid).items()}
            self.samples.append({"seconds": round(time.monotonic() - begin, 1), "rss_mb": weights})
            if len(self.samples) % 6 == 1:
                passed = f"{time.monotonic() - begin:5.0f} s  {len(self.latencies):7} requests"
                print(f"{passed}  {sum(self.failures.values())} failures  {weights}", flush=True)
            await asyncio.sleep(5)

    async def run(self, stack: Stack, seconds: float, concurrency: int) -> None:
        client = Http(stack.port, deadline=120)
        begin = time.monotonic()
        end = begin + seconds
        callers = [self.caller(client, random.Random(seed), end) for seed in range(concurrency)]
        await asyncio.gather(self.watch(stack.process.pid, begin, end), *callers)


def sizes(samples: list[dict[str, Any]]) -> dict[str, dict[str, float | None]]:
    """MB resident of each process: before the load, once settled (a tenth of the way in), at the end."""
    when = {"start": samples[0], "settled": samples[len(samples) // 10 + 1], "end": samples[-1]}
    names = dict.fromkeys(name for sample in samples for name in sample["rss_mb"])
    return {name: {at: sample["rss_mb"].get(name) for at, sample in when.items()} for name in names}


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.soak", description=__doc__)
    parser.add_argument("--minutes", type=float, default=10, help="how long (%(default)s)")
    parser.add_argument("--concurrency", type=int, default=32, help="requests in flight (%(default)s)")
    parser.add_argument("--cosine", type=float, default=0.9999, help="least cosine of a vector (%(default)s)")
    parser.add_argument("--out", type=Path, default=record.RESULTS / "soak.json", help="file (%(default)s)")
    options = parser.parse_args()
    leave_on_signal()
    result = record.header()
    texts = workloads.texts(512)["mixed"]
    with tempfile.TemporaryDirectory() as folder:
        logs = Path(folder)
        (logs / "texts.json").write_text(json.dumps({}))
        names = "benchmarks.bare", "sentence-transformers", str(logs / "texts.json")
        with worker(*names, logs=logs) as reference:
            soak = Soak(texts, reference.vectors(texts), options.cosine)
        with our_stack(logs) as stack:
            print(f"ready after {stack.start_seconds:.1f} s", flush=True)
            begin = time.monotonic()
            uvloop.run(soak.run(stack, 60 * options.minutes, options.concurrency))
            seconds = time.monotonic() - begin
    figures = summary(soak.latencies, 1, seconds)
    report = {
        "seconds": round(seconds, 1),
        "concurrency": options.concurrency,
        "requests": len(soak.latencies),
        "sentences_per_s": soak.sentences / seconds,
        "failures": dict(soak.failures),
        "worst_cosine": soak.worst,
        "p50_ms": figures["p50_ms"],
        "p99_ms": figures["p99_ms"],
        "slowest_ms": 1000 * max(soak.latencies),
        "memory_mb": sizes(soak.samples),
    }
    print(json.dumps(report, indent=1))
    record.write(options.out, result | report | {"samples": soak.samples})
    sys.exit(1 if soak.failures else 0)


if __name__ == "__main__":
    main()
