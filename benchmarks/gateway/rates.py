"""Requests per second of gateway workers over HTTP, with the load in a child process."""

import asyncio
import contextlib
import itertools
import json
import multiprocessing
import socket
import statistics
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import uvloop

from benchmarks import clients, loadgen
from benchmarks.gateway.in_process import body_of
from benchmarks.processes import free_port, running


@contextlib.contextmanager
def workers(count: int, grpc_port: int, logs: Path) -> Iterator[int]:
    """Run `count` gateway workers on one port, started as by the supervisor; yield the port."""
    port = free_port()
    settings = json.dumps({"port": port, "triton_grpc": f"127.0.0.1:{grpc_port}", "workers": count})
    with contextlib.ExitStack() as stack:
        for number in range(count):
            listener = stack.enter_context(socket.socket())
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
            listener.bind(("127.0.0.1", port))
            listener.listen(2048)
            command = [sys.executable, "-m", "triton_embed.gateway.process.server", str(listener.fileno())]
            stdin = stack.enter_context((logs / "settings").open("w+"))
            stdin.write(settings)
            stdin.seek(0)
            log = logs / f"worker-{count}-{number}.log"
            stack.enter_context(running(command, log, pass_fds=(listener.fileno(),), stdin=stdin))
            listener.close()  # the worker holds a copy of the descriptor; this one must not accept connections
        asyncio.run(wait_until_ready(port))
        yield port


async def wait_until_ready(port: int) -> None:
    """Wait until the gateway answers embedding requests."""
    client = clients.Http(port)
    for _ in range(200):
        if (await client.call(request(body_of("echo-1"))))[0] == "200":
            return
        await asyncio.sleep(0.05)
    raise RuntimeError("the gateway did not become ready")


def request(body: bytes) -> bytes:
    """Return the bytes of an HTTP request."""
    head = f"POST /v1/embeddings HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(body)}\r\n\r\n"
    return head.encode() + body


def load(port: int, model: str, callers: int, seconds: float, results: Any) -> None:
    """Generate load; put requests per second and the median latency in ms on the queue. Runs in a child process."""

    async def run() -> tuple[float, float]:
        client, requests = clients.Http(port), [request(body_of(model))]
        await loadgen.measure(client, requests, itertools.count(), callers, 0.5)  # warm-up
        sample = await loadgen.measure(client, requests, itertools.count(), callers, seconds)
        assert not sample.failures, sample.failures
        return len(sample.latencies) / sample.seconds, 1_000 * statistics.median(sample.latencies)

    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        results.put(runner.run(run()))


def rate(port: int, model: str, callers: int, seconds: float) -> dict[str, float]:
    """Measure requests per second and the median latency, with the load in a child process."""
    results: Any = multiprocessing.get_context("spawn").Queue()
    process = multiprocessing.get_context("spawn").Process(target=load, args=(port, model, callers, seconds, results))
    process.start()
    per_second, p50 = results.get(timeout=60 + seconds)
    process.join()
    return {"requests_per_s": per_second, "p50_ms": p50}
