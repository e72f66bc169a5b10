"""Benchmark of the gateway alone, with an echo model: time spent in the gateway per request, and requests per second.

    python -m benchmarks.gateway [--seconds 5] [--workers 1 2]

The gateway's own time is measured in one process, on the ASGI app without a socket: the total time of a request minus
the wait for the model (stage `triton` of Server-Timing). The same request is sent by tritonclient alone, in turns.
Rates are measured over HTTP, with load, gateway and echo model in separate processes.
"""

import argparse
import asyncio
import contextlib
import json
import multiprocessing
import re
import socket
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import orjson
import uvloop

from benchmarks import clients, record
from benchmarks.processes import exit_on_signal, free_port, running
from triton_embed.gateway.app import create_app
from triton_embed.gateway.settings import read_settings

SHAPES = {"echo-1": 1, "echo-32": 32}
BUDGET_MS = {"echo-1": 0.6, "echo-32": 2.0}
TEXT = "The quick brown fox jumps over the lazy dog, and the dog sleeps on."
WARM_UP = 200  # requests per model that are not measured


def body_of(model: str) -> bytes:
    """Return the body of an embedding request to an echo model."""
    texts: Any = TEXT if SHAPES[model] == 1 else [TEXT] * SHAPES[model]
    return orjson.dumps({"model": model, "input": texts, "encoding_format": "base64"})


class InProcess:
    """Calls the ASGI app as a server would, one request at a time."""

    def __init__(self, app: Any) -> None:
        self.app = app

    async def post(self, body: bytes) -> tuple[float, float]:
        """Send a request and return its total time and its wait for the model, in milliseconds."""
        scope = {
            "type": "http",
            "asgi": {"version": "3.0"},
            "http_version": "1.1",
            "method": "POST",
            "scheme": "http",
            "path": "/v1/embeddings",
            "raw_path": b"/v1/embeddings",
            "query_string": b"",
            "headers": [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())],
            "client": ("127.0.0.1", 1),
            "server": ("127.0.0.1", 2),
        }
        sent: list[Any] = []

        async def receive() -> dict[str, Any]:
            return {"type": "http.request", "body": body, "more_body": False}

        async def send(message: Any) -> None:
            sent.append(message)

        start = time.perf_counter()
        await self.app(scope, receive, send)
        seconds = time.perf_counter() - start
        assert sent[0]["status"] == 200, sent
        timing = dict(sent[0]["headers"])[b"server-timing"].decode()
        match = re.search(r"triton;dur=([\d.]+)", timing)
        assert match is not None
        return 1_000 * seconds, float(match[1])


async def shares(grpc_port: int, count: int) -> dict[str, Any]:
    """Measure the gateway's own time with `count` requests per model."""
    app = create_app(read_settings(triton_grpc=f"127.0.0.1:{grpc_port}"))
    bare_client = clients.Grpc(grpc_port)
    result: dict[str, Any] = {}
    async with app.router.lifespan_context(app):
        while not app.state.gateway.registry.ready:  # the echo model is starting
            app.state.gateway.registry.suspect()
            await asyncio.sleep(0.05)
        gateway = InProcess(app)
        for model, rows in SHAPES.items():
            body, tensor = body_of(model), bare_client.prepare([TEXT] * rows)
            own_ms, total_ms, bare_ms = [], [], []
            for i in range(WARM_UP + count):
                total, waited = await gateway.post(body)
                start = time.perf_counter()
                await bare_client.client.infer(model, [tensor], outputs=bare_client.outputs)
                bare = 1_000 * (time.perf_counter() - start)
                if i >= WARM_UP:
                    own_ms.append(total - waited)
                    total_ms.append(total)
                    bare_ms.append(bare)
            result[model] = {
                "inputs": rows,
                "own_ms": statistics.median(own_ms),
                "own_p99_ms": sorted(own_ms)[int(0.99 * count)],
                "whole_ms": statistics.median(total_ms),
                "bare_tritonclient_ms": statistics.median(bare_ms),
                "budget_ms": BUDGET_MS[model],
            }
    await bare_client.client.close()
    return result


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
        client, latencies = clients.Http(port), []
        request_bytes = request(body_of(model))

        async def caller(end: float) -> None:
            while (start := time.perf_counter()) < end:
                status, _ = await client.call(request_bytes)
                assert status == "200", status
                latencies.append(time.perf_counter() - start)

        await asyncio.gather(*(caller(time.perf_counter() + 0.5) for _ in range(callers)))  # warm-up
        latencies.clear()
        start = time.perf_counter()
        await asyncio.gather(*(caller(start + seconds) for _ in range(callers)))
        return len(latencies) / (time.perf_counter() - start), 1_000 * statistics.median(latencies)

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


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--count", type=int, default=1_000, help="requests per model that measure the gateway's own time"
    )
    parser.add_argument("--seconds", type=float, default=5.0)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--callers", type=int, default=32)
    parser.add_argument("--workers", type=int, nargs="*", default=[1, 2])
    parser.add_argument("--out", type=Path, default=record.RESULTS / "gateway.json")
    options = parser.parse_args()
    exit_on_signal()
    result = record.header()
    with tempfile.TemporaryDirectory() as folder:
        logs, port = Path(folder), free_port()
        with running([sys.executable, "-m", "benchmarks.echo", str(port)], logs / "echo.log"):
            print("the gateway's own time, in process:", flush=True)
            with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
                result["share"] = runner.run(shares(port, options.count))
            for model, row in result["share"].items():
                own = f"own {row['own_ms']:.2f} ms (p99 {row['own_p99_ms']:.2f}, budget {row['budget_ms']})"
                bare = f"bare tritonclient {row['bare_tritonclient_ms']:.2f}"
                print(f"  {model}: {own}, total {row['whole_ms']:.2f}, {bare}", flush=True)
            result["rates"] = []
            for count in options.workers:
                with workers(count, port, logs) as http:
                    for model in SHAPES:
                        rounds = [rate(http, model, options.callers, options.seconds) for _ in range(options.rounds)]
                        row = {"workers": count, "model": model, "callers": options.callers} | {
                            key: statistics.median(figures[key] for figures in rounds) for key in rounds[0]
                        }
                        result["rates"].append(row)
                        figures = f"{row['requests_per_s']:,.0f} requests/s, p50 {row['p50_ms']:.1f} ms"
                        print(f"  {count} worker(s), {model}: {figures}", flush=True)
    record.write(options.out, result)
    return 0


if __name__ == "__main__":
    sys.exit(main())
