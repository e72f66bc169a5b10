"""Raw HTTP client for the soak: complete, slow and partial requests, and callers that disconnect."""

import asyncio
from collections.abc import Awaitable, Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

import orjson

from benchmarks.clients import CONNECTION_ERRORS, HttpConnection

KEY = "soak-key"


@dataclass(frozen=True)
class Response:
    """A response: of HTTP, or of Triton with its output in `tensors`."""

    status: int
    headers: dict[str, str] = field(default_factory=dict)
    body: bytes = b""
    tensors: dict[str, Any] = field(default_factory=dict)

    def json(self) -> Any:
        """Parse the body."""
        return orjson.loads(self.body)


@dataclass(frozen=True)
class SoakCase:
    """One request and the check for each acceptable status. `checks` is empty if no response can arrive.

    `form` is the kind of traffic. A check returns a description of the problem, or "" if the response is correct.
    """

    form: str
    send: Callable[[], Awaitable[Response | None]]
    checks: dict[int, Callable[[Response], str]]
    inputs: int = 0
    request: bytes = b""


class Http:
    """A client of one gateway.

    Methods raise ConnectionError if no complete response arrives, and TimeoutError if none arrives within `deadline`
    seconds.
    """

    def __init__(self, port: int, deadline: float = 330) -> None:
        self.port, self.deadline = port, deadline
        self._idle: list[HttpConnection] = []

    def request(self, method: str, path: str, body: bytes = b"", **headers: str) -> bytes:
        """Encode a request. Underscores in header names become hyphens; headers with an empty value are omitted."""
        fields = {"Host": "localhost", "Authorization": f"Bearer {KEY}", "Content-Length": str(len(body))}
        fields |= {name.replace("_", "-"): value for name, value in headers.items()}
        lines = "".join(f"{name}: {value}\r\n" for name, value in fields.items() if value)
        return f"{method} {path} HTTP/1.1\r\n{lines}\r\n".encode() + body

    async def send(self, request: bytes) -> Response:
        """Send a complete request over a keep-alive connection."""
        connection = self._idle.pop() if self._idle else HttpConnection(self.port)
        return await self._exchange(connection, [(request, 0.0)])

    async def send_pieces(self, pieces: Iterable[tuple[bytes, float]]) -> Response:
        """Send pieces (bytes, seconds to wait afterwards) over a new connection. The response may arrive early."""
        return await self._exchange(HttpConnection(self.port), pieces)

    async def send_slowly(self, request: bytes, seconds: float, count: int = 6) -> Response:
        """Send a request in `count` pieces over `seconds`."""
        size = max(1, -(-len(request) // count))
        pieces = [request[i : i + size] for i in range(0, len(request), size)]
        return await self.send_pieces([(piece, seconds / len(pieces)) for piece in pieces])

    async def disconnect(self, request: bytes, delay: float) -> None:
        """Send `request`, which may be incomplete, and close the connection after `delay` seconds."""
        connection = HttpConnection(self.port)
        writer = await _open(connection)
        with suppress(*CONNECTION_ERRORS):
            writer.write(request)
            await writer.drain()
            await asyncio.sleep(delay)
        connection.close()

    async def _exchange(self, connection: HttpConnection, pieces: Iterable[tuple[bytes, float]]) -> Response:
        sending = asyncio.create_task(_send(await _open(connection), list(pieces)))
        reusable = False
        try:
            async with asyncio.timeout(self.deadline):
                response = _parse(*await connection.receive())
            reusable = sending.done() and connection.keep_alive
            return response
        except TimeoutError:  # a subclass of OSError
            raise
        except CONNECTION_ERRORS as error:
            raise ConnectionError(repr(error)) from error
        finally:
            sending.cancel()
            if reusable:
                self._idle.append(connection)
            else:
                connection.close()


async def _open(connection: HttpConnection) -> asyncio.StreamWriter:
    try:
        return await connection.open()
    except OSError as error:
        raise ConnectionError(repr(error)) from error


def _parse(head: bytes, body: bytes) -> Response:
    first, *lines = head.decode("latin-1").strip().split("\r\n")
    headers = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
    return Response(int(first.split()[1]), headers, body)


async def _send(writer: asyncio.StreamWriter, pieces: Sequence[tuple[bytes, float]]) -> None:
    with suppress(*CONNECTION_ERRORS):  # the server may respond and close before everything is sent
        for piece, pause in pieces:
            writer.write(piece)
            await writer.drain()
            if pause:
                await asyncio.sleep(pause)
