"""Closed-loop load generator: a fixed number of callers, each sending its next request after the last response.

`python -m benchmarks.loadgen TEXTS.json` is a worker. To keep client CPU time low, requests are encoded before the
clock starts and only the status of each response is checked.
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
from benchmarks.worker import serve_requests, vectors_reply


async def measure(
    client: Client, requests: list[Any], inputs: int, concurrency: int, seconds: float, start: int
) -> dict[str, Any]:
    """Measure one cell. No request starts after `seconds`; requests in flight at that time finish and count."""
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
    """Clients and encoded requests, cached across worker requests."""

    def __init__(self, pools: dict[str, list[str]]) -> None:
        self.pools = pools
        self.clients: dict[tuple[str, int], Client] = {}
        self.requests: dict[tuple[str, str, int], list[Any]] = {}

    async def handle(
        self, *, protocol: str = "", port: int = 0, texts: list[str] | None = None, workload: str = "", **cell: Any
    ) -> dict[str, Any]:
        """Handle one worker request: return {} (ping), the vectors of `texts`, or the figures of a cell."""
        if not protocol:
            return {}
        if (protocol, port) not in self.clients:
            self.clients[protocol, port] = CLIENTS[protocol](port)
        client = self.clients[protocol, port]
        if texts is not None:
            status, reply = await client.call(client.prepare(texts))
            if status != "200":
                raise RuntimeError(f"{protocol} request failed with status {status}: {reply!r}")
            return vectors_reply(client.vectors(reply))
        return await measure(client, self._encoded_requests(client, protocol, workload, cell["inputs"]), **cell)

    def _encoded_requests(self, client: Client, protocol: str, workload: str, inputs: int) -> list[Any]:
        key = protocol, workload, inputs
        if key not in self.requests:
            pool = self.pools[workload]
            groups = (pool[i : i + inputs] for i in range(0, len(pool), inputs))
            self.requests[key] = [client.prepare(group) for group in groups]
        return self.requests[key]


def main() -> None:
    load = Load(json.loads(Path(sys.argv[1]).read_text()))
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        serve_requests(lambda **request: runner.run(load.handle(**request)))


if __name__ == "__main__":
    main()
