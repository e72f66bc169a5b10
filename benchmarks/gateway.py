"""What the gateway itself costs: its share of a request, and how many a worker answers, against an echo model.

    python -m benchmarks.gateway [--seconds 5] [--workers 1 2]

The share is measured in one process, by the ASGI app without a socket: the whole request less the wait for the model
(the stage `triton` of Server-Timing), next to the same question asked by tritonclient alone, in turns. The rates are
over HTTP, load, gateway and echo in processes of their own.
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
from benchmarks.processes import free_port, leave_on_signal, running
from triton_embed.gateway.app import create_app
from triton_embed.gateway.settings import read_settings

SHAPES = {"echo-1": 1, "echo-32": 32}
BUDGET_MS = {"echo-1": 0.6, "echo-32": 2.0}
TEXT = "The quick brown fox jumps over the lazy dog, and the dog sleeps on."
WARM = 200


def body_of(model: str) -> bytes:
    texts: Any = TEXT if SHAPES[model] == 1 else [TEXT] * SHAPES[model]
    return orjson.dumps({"model": model, "input": texts, "encoding_format": "base64"})


class InProcess:
    """Requests handed to the app as a server would, one after the other."""

    def __init__(self, app: Any) -> None:
        self.app = app

    async def post(self, body: bytes) -> tuple[float, float]:
        """(milliseconds of the whole, those of waiting for the model)."""
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

        began = time.perf_counter()
        await self.app(scope, receive, send)
        took = time.perf_counter() - began
        assert sent[0]["status"] == 200, sent
        timing = dict(sent[0]["headers"])[b"server-timing"].decode()
        found = re.search(r"triton;dur=([\d.]+)", timing)
        assert found is not None
        return 1_000 * took, float(found[1])


async def shares(grpc_port: int, count: int) -> dict[str, Any]:
    app = create_app(read_settings(triton_grpc=f"127.0.0.1:{grpc_port}"))
    bare = clients.Grpc(grpc_port)
    result: dict[str, Any] = {}
    async with app.router.lifespan_context(app):
        while not app.state.gateway.registry.ready:  # the echo is on its way up
            app.state.gateway.registry.suspect()
            await asyncio.sleep(0.05)
        gateway = InProcess(app)
        for model, rows in SHAPES.items():
            body, question = body_of(model), bare.prepare([TEXT] * rows)
            own, whole, alone = [], [], []
            for i in range(WARM + count):
                total, waited = await gateway.post(body)
                began = time.perf_counter()
                await bare.client.infer(model, [question], outputs=bare.outputs)
                asked = 1_000 * (time.perf_counter() - began)
                if i >= WARM:
                    own.append(total - waited)
                    whole.append(total)
                    alone.append(asked)
            result[model] = {
                "inputs": rows,
                "own_ms": statistics.median(own),
                "own_p99_ms": sorted(own)[int(0.99 * count)],
                "whole_ms": statistics.median(whole),
                "bare_tritonclient_ms": statistics.median(alone),
                "budget_ms": BUDGET_MS[model],
            }
    await bare.client.close()
    return result


@contextlib.contextmanager
def workers(count: int, grpc_port: int, logs: Path) -> Iterator[int]:
    """So many processes of the gateway on one port, as the supervisor starts them."""
    port = free_port()
    settings = json.dumps({"port": port, "triton_grpc": f"127.0.0.1:{grpc_port}", "workers": count})
    with contextlib.ExitStack() as held:
        for number in range(count):
            listener = held.enter_context(socket.socket())
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
            listener.bind(("127.0.0.1", port))
            listener.listen(2048)
            command = [sys.executable, "-m", "triton_embed.gateway.process.server", str(listener.fileno())]
            given = held.enter_context((logs / "settings").open("w+"))
            given.write(settings)
            given.seek(0)
            log = logs / f"worker-{count}-{number}.log"
            held.enter_context(running(command, log, pass_fds=(listener.fileno(),), stdin=given))
            listener.close()  # the worker's own is left: none may come here
        asyncio.run(ready(port))
        yield port


async def ready(port: int) -> None:
    client = clients.Http(port)
    for _ in range(200):
        if (await client.call(request(body_of("echo-1"))))[0] == "200":
            return
        await asyncio.sleep(0.05)
    raise RuntimeError("the gateway does not answer")


def request(body: bytes) -> bytes:
    head = f"POST /v1/embeddings HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(body)}\r\n\r\n"
    return head.encode() + body


def load(port: int, model: str, callers: int, seconds: float, told: Any) -> None:
    """Run in a process of its own; answers requests a second and the median latency."""

    async def run() -> tuple[float, float]:
        client, latencies = clients.Http(port), []
        sent = request(body_of(model))

        async def caller(end: float) -> None:
            while (began := time.perf_counter()) < end:
                status, _ = await client.call(sent)
                assert status == "200", status
                latencies.append(time.perf_counter() - began)

        await asyncio.gather(*(caller(time.perf_counter() + 0.5) for _ in range(callers)))  # warm
        latencies.clear()
        began = time.perf_counter()
        await asyncio.gather(*(caller(began + seconds) for _ in range(callers)))
        return len(latencies) / (time.perf_counter() - began), 1_000 * statistics.median(latencies)

    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        told.put(runner.run(run()))


def rate(port: int, model: str, callers: int, seconds: float) -> dict[str, float]:
    told: Any = multiprocessing.get_context("spawn").Queue()
    process = multiprocessing.get_context("spawn").Process(target=load, args=(port, model, callers, seconds, told))
    process.start()
    per_second, p50 = told.get(timeout=60 + seconds)
    process.join()
    return {"requests_per_s": per_second, "p50_ms": p50}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, default=1_000, help="requests whose share is measured")
    parser.add_argument("--seconds", type=float, default=5.0)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--callers", type=int, default=32)
    parser.add_argument("--workers", type=int, nargs="*", default=[1, 2])
    parser.add_argument("--out", type=Path, default=record.RESULTS / "gateway.json")
    options = parser.parse_args()
    leave_on_signal()
    result = record.header()
    with tempfile.TemporaryDirectory() as folder:
        logs, port = Path(folder), free_port()
        with running([sys.executable, "-m", "benchmarks.echo", str(port)], logs / "echo.log"):
            print("the gateway's own share, in process", flush=True)
            with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
                result["share"] = runner.run(shares(port, options.count))
            for model, row in result["share"].items():
                own = f"own {row['own_ms']:.2f} ms (p99 {row['own_p99_ms']:.2f}, budget {row['budget_ms']})"
                bare = f"bare tritonclient {row['bare_tritonclient_ms']:.2f}"
                print(f"  {model}: {own}, whole {row['whole_ms']:.2f}, {bare}", flush=True)
            result["rates"] = []
            for count in options.workers:
                with workers(count, port, logs) as http:
                    for model in SHAPES:
                        found = [rate(http, model, options.callers, options.seconds) for _ in range(options.rounds)]
                        row = {"workers": count, "model": model, "callers": options.callers} | {
                            key: statistics.median(one[key] for one in found) for key in found[0]
                        }
                        result["rates"].append(row)
                        told = f"{row['requests_per_s']:,.0f} requests/s, p50 {row['p50_ms']:.1f} ms"
                        print(f"  {count} worker(s), {model}: {told}", flush=True)
    record.write(options.out, result)
    return 0


if __name__ == "__main__":
    sys.exit(main())
