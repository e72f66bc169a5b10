"""Load of which every answer is kept: `python -m benchmarks.scheduling_load TEXTS.json` is a worker.

Each question is one client's: so many callers of requests of a kind, back to back. What comes back is every latency,
and what the gateway says of each request's stages (Server-Timing), so that answers to several questions can be put
together before a percentile is taken.
"""

import asyncio
import collections
import itertools
import json
import re
import sys
import time
from pathlib import Path
from typing import Any

import orjson
import uvloop

from benchmarks.processes import MODEL
from benchmarks.soak_http import Http
from benchmarks.worker import answer

DEADLINE = 600  # seconds, the most a gateway grants: bulk on a slow machine takes longer than the usual minute
STAGE = re.compile(r"(\w+);dur=([\d.]+)")


class Load:
    """Clients, and requests encoded before the clock starts."""

    def __init__(self, pools: dict[str, list[str]]) -> None:
        self.pools = pools
        self.clients: dict[int, Http] = {}
        self.requests: dict[tuple[str, int, str], list[bytes]] = {}
        self.numbers = itertools.count()

    async def handle(
        self,
        *,
        port: int,
        workload: str,
        inputs: int,
        callers: int,
        seconds: float = 0.0,
        count: int = 0,
        priority: str = "interactive",
    ) -> dict[str, Any]:
        """No request starts once `seconds` have passed and `count` have started; those in flight are waited for."""
        client = self.clients.setdefault(port, Http(port, DEADLINE))
        requests = self._encoded(client, workload, inputs, priority)
        latencies: list[float] = []
        stages: dict[str, list[float]] = collections.defaultdict(list)
        failures: collections.Counter[str] = collections.Counter()
        started = itertools.count()
        begin = time.perf_counter()

        async def caller() -> None:
            while (sent := time.perf_counter()) - begin < seconds or next(started) < count:
                try:
                    reply = await client.whole(requests[next(self.numbers) % len(requests)])
                except (ConnectionError, TimeoutError) as error:
                    failures[type(error).__name__] += 1
                    continue
                if reply.status != 200:
                    failures[str(reply.status)] += 1
                    await asyncio.sleep(0.05)
                    continue
                latencies.append(1_000 * (time.perf_counter() - sent))
                for name, taken in STAGE.findall(reply.headers["server-timing"]):
                    stages[name].append(float(taken))

        await asyncio.gather(*(caller() for _ in range(callers)))
        taken = time.perf_counter() - begin
        answered = {"latencies_ms": latencies, "stages_ms": stages, "seconds": taken, "failures": failures}
        return answered | {"inputs_per_s": inputs * len(latencies) / taken}

    def _encoded(self, client: Http, workload: str, inputs: int, priority: str) -> list[bytes]:
        key = workload, inputs, priority
        if key not in self.requests:
            pool = self.pools[workload]
            asked = {"model": MODEL, "encoding_format": "base64", "priority": priority}
            bodies = [
                orjson.dumps(asked | {"input": pool[i] if inputs == 1 else pool[i : i + inputs]})
                for i in range(0, len(pool) - inputs + 1, inputs)
            ]
            where = "POST", "/v1/embeddings"
            self.requests[key] = [client.request(*where, body, x_request_timeout=str(DEADLINE)) for body in bodies]
        return self.requests[key]


def main() -> None:
    load = Load(json.loads(Path(sys.argv[1]).read_text()))
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        answer(lambda **question: runner.run(load.handle(**question)))


if __name__ == "__main__":
    main()
