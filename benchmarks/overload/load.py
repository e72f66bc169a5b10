"""Open-loop load of requests of four sizes: requests are sent at their time, however many wait for an answer."""

import asyncio
import random
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from benchmarks.clients import CONNECTION_ERRORS, Http, HttpConnection, content_length

SLOW_BYTES, SLOW_SECONDS = 4_096, 0.1  # what a slow reader reads, and how long it waits then


class Kind(NamedTuple):
    """One size of requests."""

    name: str
    inputs: int
    workload: str
    share: float  # of the requests


KINDS = (
    Kind("query", 1, "short", 0.60),
    Kind("page", 8, "mixed", 0.25),
    Kind("document", 65, "mixed", 0.12),
    Kind("bulk", 512, "mixed", 0.03),
)
SLOW_SHARE = 0.02  # of the requests whose readers are slow
DISTINCT = 200  # requests of each kind, sent in turn


class Reply(NamedTuple):
    """One request and its answer. Times are in seconds since the load began."""

    kind: str
    sent: float
    answered: float
    status: str


@dataclass
class Requests:
    """The encoded requests of each kind, and the order in which they are sent."""

    kinds: Sequence[Kind]
    encoded: dict[str, list[bytes]]
    rng: random.Random
    sent: dict[str, int] = field(default_factory=dict)

    def next(self) -> tuple[str, bytes]:
        """Return the kind and the bytes of the next request."""
        (kind,) = self.rng.choices(self.kinds, [kind.share for kind in self.kinds])
        return kind.name, self.of(kind.name)

    def of(self, kind: str) -> bytes:
        """Return the next request of a kind."""
        number = self.sent[kind] = self.sent.get(kind, -1) + 1
        return self.encoded[kind][number % DISTINCT]


def prepare(kinds: Sequence[Kind], texts: dict[str, list[str]]) -> Requests:
    """Encode requests. No two inputs are alike, so that the server computes each of them."""
    rng = random.Random(0)

    def request(kind: Kind, number: int) -> bytes:
        chosen = rng.choices(texts[kind.workload], k=kind.inputs)
        return Http.prepare([f"{number} {place} {text}" for place, text in enumerate(chosen)])

    encoded = {kind.name: [request(kind, number) for number in range(DISTINCT)] for kind in kinds}
    return Requests(kinds, encoded, rng)


class Load:
    """Callers of one server."""

    def __init__(self, port: int, requests: Requests) -> None:
        self._http = Http(port, deadline=120)
        self.requests = requests
        self._begin = time.perf_counter()
        self.replies: list[Reply] = []

    async def closed(self, callers: int, seconds: float, kind: str = "") -> None:
        """Keep a number of requests in flight, of one kind or of all."""
        until = time.perf_counter() + seconds

        async def caller() -> None:
            while time.perf_counter() < until:
                await self._send(*((kind, self.requests.of(kind)) if kind else self.requests.next()))

        await asyncio.gather(*(caller() for _ in range(callers)))

    async def open(self, rate: float, seconds: float) -> list[asyncio.Task[None]]:
        """Start requests at random times, `rate` per second; return those that wait for their answer."""
        rng = random.Random(rate)
        at = time.perf_counter()
        until = at + seconds
        tasks: set[asyncio.Task[None]] = set()
        while (at := at + rng.expovariate(rate)) < until:
            await asyncio.sleep(max(0.0, at - time.perf_counter()))
            send = self._send_slowly if rng.random() < SLOW_SHARE else self._send
            tasks.add(task := asyncio.create_task(send(*self.requests.next())))
            task.add_done_callback(tasks.discard)
        return list(tasks)

    async def queries(self, seconds: float) -> None:
        """Send one query after the other."""
        until = time.perf_counter() + seconds
        while time.perf_counter() < until:
            await self._send("query", self.requests.of("query"))

    async def _send(self, kind: str, request: bytes) -> None:
        sent = time.perf_counter() - self._begin
        status, _ = await self._http.call(request)
        self._add(kind, sent, status)

    async def _send_slowly(self, kind: str, request: bytes) -> None:
        """Read the answer a few bytes at a time. It counts when its last byte has arrived."""
        sent, body = time.perf_counter() - self._begin, b""
        connection = HttpConnection(self._http.port)
        try:
            (await connection.open()).write(request)
            while chunk := await connection.reader.read(SLOW_BYTES):
                body += chunk
                head, _, rest = body.partition(b"\r\n\r\n")
                if len(rest) == content_length(head):
                    break
                await asyncio.sleep(SLOW_SECONDS)
            self._add(kind, sent, body[9:12].decode())
        except CONNECTION_ERRORS:
            self._add(kind, sent, "connection")
        finally:
            connection.close()

    def _add(self, kind: str, sent: float, status: str) -> None:
        self.replies.append(Reply(kind, sent, time.perf_counter() - self._begin, status))

    def since(self, begin: float, end: float) -> Sequence[Reply]:
        """Return the answers to what was sent from `begin` until `end`."""
        return [reply for reply in self.replies if begin <= reply.sent < end]

    def now(self) -> float:
        """Return the seconds since the load began."""
        return time.perf_counter() - self._begin
