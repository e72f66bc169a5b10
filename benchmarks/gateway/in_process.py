"""Time that the gateway spends per request, measured on the ASGI app without a socket."""

import asyncio
import re
import statistics
import time
from typing import Any

import orjson

from benchmarks import clients
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
            app.state.gateway.registry.refresh_soon()
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
