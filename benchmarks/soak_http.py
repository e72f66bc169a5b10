"""HTTP by hand, well-behaved and not: whole requests, dripping ones, half ones, and callers that hang up."""

import asyncio
import time
from collections.abc import Awaitable, Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

import orjson

from benchmarks.clients import KEPT

KEY = "soak-key"
BROKEN = (EOFError, OSError, ValueError)  # what a connection that ends raises, or an answer that is none


@dataclass(frozen=True)
class Answer:
    """What came back: of HTTP, or from Triton, whose tensors stand in `tensors`."""

    status: int
    headers: dict[str, str] = field(default_factory=dict)
    body: bytes = b""
    tensors: dict[str, Any] = field(default_factory=dict)

    def json(self) -> Any:
        return orjson.loads(self.body)


@dataclass(frozen=True)
class Ask:
    """A request, and what is right for each status that its answer may have: none at all where none can come."""

    form: str
    send: Callable[[], Awaitable[Answer | None]]
    answers: dict[int, Callable[[Answer], str]]
    inputs: int = 0
    request: bytes = b""


class Connection:
    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader, self.writer = reader, writer
        self.used = time.monotonic()

    async def answer(self) -> Answer:
        head = (await self.reader.readuntil(b"\r\n\r\n")).decode("latin-1")
        first, *lines = head.strip().split("\r\n")
        headers = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
        body = await self.reader.readexactly(int(headers["content-length"]))
        self.used = time.monotonic()
        return Answer(int(first.split()[1]), headers, body)

    def close(self) -> None:
        self.writer.close()


class Http:
    """One gateway. ConnectionError: there was no whole answer; TimeoutError: none within `deadline` seconds."""

    def __init__(self, port: int, deadline: float = 330) -> None:
        self.port, self.deadline = port, deadline
        self._idle: list[Connection] = []

    def request(self, method: str, path: str, body: bytes = b"", **headers: str) -> bytes:
        given = {"Host": "localhost", "Authorization": f"Bearer {KEY}", "Content-Length": str(len(body))}
        given |= {name.replace("_", "-"): value for name, value in headers.items()}
        lines = "".join(f"{name}: {value}\r\n" for name, value in given.items() if value)
        return f"{method} {path} HTTP/1.1\r\n{lines}\r\n".encode() + body

    async def whole(self, request: bytes) -> Answer:
        """Over a kept connection, as clients do."""
        while self._idle and time.monotonic() - self._idle[-1].used > KEPT:
            self._idle.pop().close()
        connection = self._idle.pop() if self._idle else await self._connect()
        return await self._exchange(connection, [(request, 0.0)])

    async def pieces(self, pieces: Iterable[tuple[bytes, float]]) -> Answer:
        """Each piece and the seconds to wait after it, over a connection of their own; the answer may come before."""
        return await self._exchange(await self._connect(), pieces)

    async def drip(self, request: bytes, seconds: float, count: int = 6) -> Answer:
        size = max(1, -(-len(request) // count))
        drops = [request[i : i + size] for i in range(0, len(request), size)]
        return await self.pieces([(drop, seconds / len(drops)) for drop in drops])

    async def hang_up(self, sent: bytes, after: float) -> None:
        """No more than `sent`, and gone after so many seconds."""
        connection = await self._connect()
        with suppress(*BROKEN):
            connection.writer.write(sent)
            await connection.writer.drain()
            await asyncio.sleep(after)
        connection.close()

    async def _connect(self) -> Connection:
        try:
            return Connection(*await asyncio.open_connection("127.0.0.1", self.port))
        except OSError as error:
            raise ConnectionError(repr(error)) from error

    async def _exchange(self, connection: Connection, pieces: Iterable[tuple[bytes, float]]) -> Answer:
        sending = asyncio.create_task(_send(connection.writer, list(pieces)))
        kept = False
        try:
            async with asyncio.timeout(self.deadline):
                answer = await connection.answer()
            kept = sending.done() and answer.headers.get("connection") != "close"
            return answer
        except TimeoutError:  # one of OSError's own
            raise
        except BROKEN as error:
            raise ConnectionError(repr(error)) from error
        finally:
            sending.cancel()
            if kept:
                self._idle.append(connection)
            else:
                connection.close()


async def _send(writer: asyncio.StreamWriter, pieces: Sequence[tuple[bytes, float]]) -> None:
    with suppress(*BROKEN):  # it was answered before it was all sent
        for piece, pause in pieces:
            writer.write(piece)
            await writer.drain()
            if pause:
                await asyncio.sleep(pause)
