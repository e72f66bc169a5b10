"""Clients with low CPU cost: HTTP over raw keep-alive connections, gRPC with tritonclient."""

import asyncio
import base64
import time
from typing import Any

import numpy as np
import orjson
import tritonclient.grpc.aio as triton
from tritonclient.utils import InferenceServerException

from benchmarks.processes import MODEL
from benchmarks.worker import Vectors

# Seconds after which an idle connection is not reused. Servers close idle connections (often after 5 s), and a request
# sent at that moment would fail.
KEEP_ALIVE_SECONDS = 2.0


class HttpConnection:
    """One HTTP/1.1 connection to a loopback server, opened on demand."""

    def __init__(self, port: int) -> None:
        self.port = port
        self.last_used = 0.0
        self.writer: asyncio.StreamWriter | None = None

    async def exchange(self, request: bytes) -> tuple[int, bytes]:
        """Send a request and return the status and body.

        Raises:
            ConnectionError: No complete response arrived. The next call opens a new connection.
        """
        if time.monotonic() - self.last_used > KEEP_ALIVE_SECONDS:
            self.close()
        try:
            if self.writer is None:
                self.reader, self.writer = await asyncio.open_connection("127.0.0.1", self.port)
            self.writer.write(request)
            head = (await self.reader.readuntil(b"\r\n\r\n")).lower()
            length = int(head.partition(b"\r\ncontent-length:")[2].partition(b"\r\n")[0])
            body = await self.reader.readexactly(length)
        except (EOFError, OSError, ValueError) as error:
            self.close()
            raise ConnectionError(repr(error)) from error
        if b"\r\nconnection: close" in head:
            self.close()
        self.last_used = time.monotonic()
        return int(head[9:12]), body

    def close(self) -> None:
        if self.writer is not None:
            self.writer.close()
        self.writer = None


class Http:
    """Client of POST /v1/embeddings, with one connection per call in flight."""

    def __init__(self, port: int, deadline: float = 600) -> None:
        self.port, self.deadline = port, deadline
        self.idle: list[HttpConnection] = []

    @staticmethod
    def prepare(texts: list[str]) -> bytes:
        """Encode an HTTP request for base64 vectors."""
        body = orjson.dumps({"model": MODEL, "input": texts, "encoding_format": "base64"})
        head = "POST /v1/embeddings HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json"
        return f"{head}\r\nContent-Length: {len(body)}\r\n\r\n".encode() + body

    async def call(self, request: bytes) -> tuple[str, bytes]:
        """Return ("200", body), or (error, body or b"") where error is another status, "connection" or "timeout"."""
        connection = self.idle.pop() if self.idle else HttpConnection(self.port)
        try:
            async with asyncio.timeout(self.deadline):
                status, body = await connection.exchange(request)
        except TimeoutError:
            connection.close()
            return "timeout", b""
        except ConnectionError:
            return "connection", b""
        finally:
            self.idle.append(connection)
        return str(status), body

    @staticmethod
    def vectors(body: bytes) -> Vectors:
        """Decode the vectors of a response body."""
        items = orjson.loads(body)["data"]
        return np.stack([np.frombuffer(base64.b64decode(item["embedding"]), "<f4") for item in items])


class Grpc:
    """Client of Triton's gRPC endpoint. Calls are never canceled: that can crash tritonserver 2.51."""

    def __init__(self, port: int) -> None:
        self.client = triton.InferenceServerClient(f"127.0.0.1:{port}")
        self.outputs = [triton.InferRequestedOutput("EMBEDDING")]

    @staticmethod
    def prepare(texts: list[str]) -> triton.InferInput:
        """Create the TEXT input tensor."""
        rows = np.array([[text.encode()] for text in texts], dtype=np.object_)
        return triton.InferInput("TEXT", rows.shape, "BYTES").set_data_from_numpy(rows)

    async def call(self, request: triton.InferInput) -> tuple[str, Any]:
        """Return ("200", result), or (status, None) on an error."""
        try:
            return "200", await self.client.infer(MODEL, [request], outputs=self.outputs)
        except InferenceServerException as error:
            return error.status() or "unknown", None

    @staticmethod
    def vectors(reply: triton.InferResult) -> Vectors:
        return np.asarray(reply.as_numpy("EMBEDDING"), np.float32)


Client = Http | Grpc
CLIENTS: dict[str, type[Http] | type[Grpc]] = {"http": Http, "grpc": Grpc}
