"""Clients with low CPU cost: HTTP over raw keep-alive connections, gRPC with tritonclient."""

import asyncio
import base64
import time
from typing import Any, NamedTuple

import numpy as np
import orjson
import tritonclient.grpc.aio as triton
from tritonclient.utils import InferenceServerException

from benchmarks.processes import MODEL
from benchmarks.worker import Vectors

# Seconds after which an idle connection is not reused. Servers close idle connections (often after 5 s), and a request
# sent at that moment would fail.
KEEP_ALIVE_SECONDS = 2.0


# Raised by a closed connection or an invalid response.
CONNECTION_ERRORS = (EOFError, OSError, ValueError)


def content_length(head: bytes) -> int:
    """Return the size of the body that follows the head of a response."""
    return int(head.lower().partition(b"\r\ncontent-length:")[2].partition(b"\r\n")[0])


class HttpConnection:
    """One HTTP/1.1 connection to a loopback server."""

    def __init__(self, port: int) -> None:
        self.port = port
        self.reader: asyncio.StreamReader
        self.writer: asyncio.StreamWriter | None = None
        self.last_used = 0.0
        self.keep_alive = True

    async def open(self) -> asyncio.StreamWriter:
        """Connect unless a connection is open that can be used; return where to write the request."""
        if self.writer is None or time.monotonic() - self.last_used > KEEP_ALIVE_SECONDS:
            self.close()
            self.reader, self.writer = await asyncio.open_connection("127.0.0.1", self.port)
        return self.writer

    async def receive(self) -> tuple[bytes, bytes]:
        """Read one response; return its head and body."""
        head = await self.reader.readuntil(b"\r\n\r\n")
        body = await self.reader.readexactly(content_length(head))
        self.last_used = time.monotonic()
        self.keep_alive = b"\r\nconnection: close" not in head.lower()
        return head, body

    async def exchange(self, request: bytes) -> tuple[bytes, bytes]:
        """Send a request; return the head and body of the response.

        Raises:
            ConnectionError: No complete response arrived. The next call opens a new connection.
        """
        try:
            (await self.open()).write(request)
            head, body = await self.receive()
        except CONNECTION_ERRORS as error:
            self.close()
            raise ConnectionError(repr(error)) from error
        if not self.keep_alive:
            self.close()
        return head, body

    def close(self) -> None:
        """Close the connection if it is open."""
        if self.writer is not None:
            self.writer.close()
        self.writer = None


class HttpReply(NamedTuple):
    """The head and body of a response; both empty if none arrived."""

    head: bytes = b""
    body: bytes = b""


class Http:
    """Client of POST /v1/embeddings, with one connection per call in flight."""

    def __init__(self, port: int, deadline: float = 600) -> None:
        self.port, self.deadline = port, deadline
        self.idle: list[HttpConnection] = []

    @staticmethod
    def prepare(texts: list[str], priority: str = "", deadline: int = 0) -> bytes:
        """Encode an HTTP request for base64 vectors. `deadline` in seconds; 0 keeps the server's default."""
        fields: dict[str, Any] = {"model": MODEL, "input": texts, "encoding_format": "base64"}
        body = orjson.dumps(fields | ({"priority": priority} if priority else {}))
        lines = ["POST /v1/embeddings HTTP/1.1", "Host: localhost", "Content-Type: application/json"]
        lines += [f"X-Request-Timeout: {deadline}"] if deadline else []
        return "\r\n".join([*lines, f"Content-Length: {len(body)}", "", ""]).encode() + body

    async def call(self, request: bytes) -> tuple[str, HttpReply]:
        """Return the status, "connection" or "timeout", and the response."""
        connection = self.idle.pop() if self.idle else HttpConnection(self.port)
        try:
            async with asyncio.timeout(self.deadline):
                head, body = await connection.exchange(request)
        except TimeoutError:
            connection.close()
            return "timeout", HttpReply()
        except ConnectionError:
            return "connection", HttpReply()
        finally:
            self.idle.append(connection)
        return head[9:12].decode(), HttpReply(head, body)

    @staticmethod
    def vectors(reply: HttpReply) -> Vectors:
        """Decode the vectors of a response."""
        items = orjson.loads(reply.body)["data"]
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
        """Return the vectors of a response."""
        return np.asarray(reply.as_numpy("EMBEDDING"), np.float32)


Client = Http | Grpc
CLIENTS: dict[str, type[Http] | type[Grpc]] = {"http": Http, "grpc": Grpc}
