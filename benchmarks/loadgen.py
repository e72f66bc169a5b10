"""Load from a process of its own: a fixed number of callers, each sending its next request when answered.

`python -m benchmarks.loadgen TEXTS.json` is a worker. Requests are encoded before the clock starts, and only
the status of an answer is looked at, so that the client costs the machine little.
"""

import asyncio
import collections
import itertools
import json
import sys
import time
from pathlib import Path
from typing import Any

import uvloop

from benchmarks.clients import CLIENTS, Client
from benchmarks.summary import summary
from benchmarks.worker import answer, vectors_reply


async def measure(
    client: Client, requests: list[Any], inputs: int, concurrency: int, seconds: float, start: int
) -> dict[str, Any]:
    """No request starts after `seconds`; those in flight then are waited for, and count."""
    latencies: list[float] = []
    failures: collections.Counter[str] = collections.Counter()
    numbers = itertools.count(start // inputs)
    begin = time.perf_counter()

    async def caller() -> None:
        while (sent := time.perf_counter()) - begin < seconds:
            status, _ = await client.call(requests[next(numbers) % len(requests)])
            if status == "200":
                latencies.append(time.perf_counter() - sent)
            else:
                failures[status] += 1
                await asyncio.sleep(0.05)

    await asyncio.gather(*(caller() for _ in range(concurrency)))
    return summary(latencies, inputs, time.perf_counter() - begin) | {"failures": dict(failures)}


class Load:
    """Clients and encoded requests, kept between questions."""

    def __init__(self, pools: dict[str, list[str]]) -> None:
        self.pools = pools
        self.clients: dict[tuple[str, int], Client] = {}
        self.requests: dict[tuple[str, str, int], list[Any]] = {}

    async def handle(
        self, *, protocol: str = "", port: int = 0, texts: list[str] | None = None, workload: str = "", **cell: Any
    ) -> dict[str, Any]:
        if not protocol:  # whether it is there
            return {}
        if (protocol, port) not in self.clients:
            self.clients[protocol, port] = CLIENTS[protocol](port)
        client = self.clients[protocol, port]
        if texts is not None:
            status, reply = await client.call(client.prepare(texts))
            if status != "200":
                raise RuntimeError(f"{protocol}: {status}: {reply!r}")
            return vectors_reply(client.vectors(reply))
        return await measure(client, self._encoded(client, protocol, workload, cell["inputs"]), **cell)

    def _encoded(self, client: Client, protocol: str, workload: str, inputs: int) -> list[Any]:
        key = protocol, workload, inputs
        if key not in self.requests:
            pool = self.pools[workload]
            groups = (pool[i : i + inputs] for i in range(0, len(pool), inputs))
            self.requests[key] = [client.prepare(group) for group in groups]
        return self.requests[key]


def main() -> None:
    load = Load(json.loads(Path(sys.argv[1]).read_text()))
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        answer(lambda **question: runner.run(load.handle(**question)))


if __name__ == "__main__":
    main()
