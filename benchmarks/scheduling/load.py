"""Load generator that returns every latency: `python -m benchmarks.scheduling.load TEXTS.json` is a worker.

Each worker request starts a number of callers that send the same kind of request back to back. The reply holds all
latencies and the gateway's stage times (Server-Timing), so that replies can be combined before percentiles are taken.
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
from benchmarks.soak.http import Http
from benchmarks.worker import serve_requests

# The maximum that a gateway accepts: bulk requests on a slow machine take longer than the default of one minute.
DEADLINE_SECONDS = 600
STAGE = re.compile(r"(\w+);dur=([\d.]+)")


class Load:
    """Clients, and requests encoded before the clock starts, cached across worker requests."""

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
        """Generate load until `seconds` have passed and `count` requests have started; requests in flight finish."""
        client = self.clients.setdefault(port, Http(port, DEADLINE_SECONDS))
        requests = self._encoded_requests(client, workload, inputs, priority)
        latencies: list[float] = []
        stages: dict[str, list[float]] = collections.defaultdict(list)
        failures: collections.Counter[str] = collections.Counter()
        started = itertools.count()
        begin = time.perf_counter()

        async def caller() -> None:
            while (sent := time.perf_counter()) - begin < seconds or next(started) < count:
                try:
                    response = await client.send(requests[next(self.numbers) % len(requests)])
                except (ConnectionError, TimeoutError) as error:
                    failures[type(error).__name__] += 1
                    continue
                if response.status != 200:
                    failures[str(response.status)] += 1
                    await asyncio.sleep(0.05)
                    continue
                latencies.append(1_000 * (time.perf_counter() - sent))
                for name, milliseconds in STAGE.findall(response.headers["server-timing"]):
                    stages[name].append(float(milliseconds))

        await asyncio.gather(*(caller() for _ in range(callers)))
        elapsed = time.perf_counter() - begin
        reply = {"latencies_ms": latencies, "stages_ms": stages, "seconds": elapsed, "failures": failures}
        return reply | {"inputs_per_s": inputs * len(latencies) / elapsed}

    def _encoded_requests(self, client: Http, workload: str, inputs: int, priority: str) -> list[bytes]:
        key = workload, inputs, priority
        if key not in self.requests:
            pool = self.pools[workload]
            fields = {"model": MODEL, "encoding_format": "base64", "priority": priority}
            bodies = [
                orjson.dumps(fields | {"input": pool[i] if inputs == 1 else pool[i : i + inputs]})
                for i in range(0, len(pool) - inputs + 1, inputs)
            ]
            target = "POST", "/v1/embeddings"
            self.requests[key] = [
                client.request(*target, body, x_request_timeout=str(DEADLINE_SECONDS)) for body in bodies
            ]
        return self.requests[key]


def main() -> None:
    load = Load(json.loads(Path(sys.argv[1]).read_text()))
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        serve_requests(lambda **request: runner.run(load.handle(**request)))


if __name__ == "__main__":
    main()
