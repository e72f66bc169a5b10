"""Closed-loop load generator: a fixed number of callers, each sending its next request after the last response.

`python -m benchmarks.loadgen TEXTS.json` is a worker. To keep client CPU time low, requests are encoded before the
clock starts and only the status of each response is checked.
"""

import asyncio
import collections
import itertools
import json
import re
import sys
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import uvloop

from benchmarks.clients import CLIENTS, Client, Http
from benchmarks.report import summary
from benchmarks.worker import serve_requests, vectors_reply

# The maximum that a gateway accepts: bulk requests on a slow machine take longer than the default of one minute.
DEADLINE_SECONDS = 600
STAGE = re.compile(r"(\w+);dur=([\d.]+)")
SERVER_TIMING = re.compile(r"\r\nserver-timing:([^\r]*)", re.IGNORECASE)


@dataclass
class Sample:
    """What a number of callers measured."""

    latencies: list[float] = field(default_factory=list)  # seconds per successful call
    heads: list[bytes] = field(default_factory=list)  # of the responses to successful calls, if they are kept
    failures: collections.Counter[str] = field(default_factory=collections.Counter)  # by status
    seconds: float = 0.0  # from the first call to the last response


async def measure(
    client: Client,
    requests: list[Any],
    numbers: Iterator[int],
    concurrency: int,
    seconds: float,
    count: int = 0,
    keep_heads: bool = False,
) -> Sample:
    """Generate load until `seconds` have passed and `count` calls have started; calls in flight finish and count.

    Args:
        requests: Encoded requests, sent in turn.
        numbers: Index of each next request, modulo their number.
        concurrency: Callers.
        keep_heads: Whether the sample holds the heads of HTTP responses.
    """
    sample = Sample()
    started = itertools.count()
    begin = time.perf_counter()

    async def caller() -> None:
        while (sent := time.perf_counter()) - begin < seconds or next(started) < count:
            status, reply = await client.call(requests[next(numbers) % len(requests)])
            if status == "200":
                sample.latencies.append(time.perf_counter() - sent)
                if keep_heads:
                    sample.heads.append(reply.head)
            else:
                sample.failures[status] += 1
                await asyncio.sleep(0.05)

    await asyncio.gather(*(caller() for _ in range(concurrency)))
    sample.seconds = time.perf_counter() - begin
    return sample


class Load:
    """Clients and encoded requests, cached across worker requests."""

    def __init__(self, pools: dict[str, list[str]]) -> None:
        self.pools = pools
        self.numbers = itertools.count()
        self.clients: dict[tuple[str, int], Client] = {}
        self.requests: dict[tuple[str, str, int, str], list[Any]] = {}

    async def handle(self, *, protocol: str = "", port: int = 0, **request: Any) -> dict[str, Any]:
        """Return {} (ping), the vectors of texts, all latencies of some callers, or the figures of a cell."""
        if not protocol:
            return {}
        if (protocol, port) not in self.clients:
            self.clients[protocol, port] = CLIENTS[protocol](port)
        client = self.clients[protocol, port]
        if "texts" in request:
            status, reply = await client.call(client.prepare(request["texts"]))
            if status != "200":
                raise RuntimeError(f"{protocol} request failed with status {status}: {reply!r}")
            return vectors_reply(client.vectors(reply))
        if "callers" in request:
            assert isinstance(client, Http)
            return await self.latencies(client, **request)
        return await self.figures(client, protocol, **request)

    async def figures(
        self, client: Client, protocol: str, workload: str, inputs: int, concurrency: int, seconds: float, start: int
    ) -> dict[str, Any]:
        """Measure one cell, beginning with text `start`; return throughput and percentiles."""
        key = protocol, workload, inputs, ""
        if key not in self.requests:
            self.requests[key] = [client.prepare(texts) for texts in self._calls(workload, inputs)]
        sample = await measure(client, self.requests[key], itertools.count(start // inputs), concurrency, seconds)
        return summary(sample.latencies, inputs, sample.seconds) | {"failures": dict(sample.failures)}

    async def latencies(
        self,
        client: Http,
        workload: str,
        inputs: int,
        callers: int,
        seconds: float = 0.0,
        count: int = 0,
        priority: str = "interactive",
    ) -> dict[str, Any]:
        """Return all latencies and the gateway's stage times, so that replies can be combined before percentiles."""
        key = "http", workload, inputs, priority
        if key not in self.requests:
            calls = self._calls(workload, inputs)
            self.requests[key] = [client.prepare(texts, priority, DEADLINE_SECONDS) for texts in calls]
        sample = await measure(client, self.requests[key], self.numbers, callers, seconds, count, keep_heads=True)
        return {
            "latencies_ms": [1_000 * latency for latency in sample.latencies],
            "stages_ms": _stages(sample.heads),
            "seconds": sample.seconds,
            "failures": dict(sample.failures),
            "inputs_per_s": inputs * len(sample.latencies) / sample.seconds,
        }

    def _calls(self, workload: str, inputs: int) -> list[list[str]]:
        """Split the texts of a workload into calls of `inputs` texts."""
        pool = self.pools[workload]
        return [pool[i : i + inputs] for i in range(0, max(1, len(pool) - inputs + 1), inputs)]


def _stages(heads: Iterable[bytes]) -> dict[str, list[float]]:
    """Return the times of each stage, in milliseconds, from the Server-Timing headers."""
    stages: dict[str, list[float]] = collections.defaultdict(list)
    for head in heads:
        timing = SERVER_TIMING.search(head.decode("latin-1"))
        assert timing is not None
        for name, milliseconds in STAGE.findall(timing[1]):
            stages[name].append(float(milliseconds))
    return stages


def main() -> None:
    load = Load(json.loads(Path(sys.argv[1]).read_text()))
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        serve_requests(lambda **request: runner.run(load.handle(**request)))


if __name__ == "__main__":
    main()
