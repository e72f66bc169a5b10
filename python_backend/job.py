"""Job: the rows of one request between their admission and the one reply, and what makes two rows the same."""

import hashlib
import logging
import math
import time
from collections import deque
from collections.abc import Sequence
from typing import Protocol

import numpy as np
import numpy.typing as npt

from triton_embed.python_backend.row import Row

log = logging.getLogger(__name__)

CANCEL_SECONDS = 0.05
COMPUTED, IN_FLIGHT, CACHED = range(3)  # where a row's vector came from: the output REUSED

Key = tuple[int, bytes, bytes]


class Reply(Protocol):
    """Where the outcome of a job goes: exactly one of `done`, `failed` and `dropped`, exactly once.

    `reused` int32 [rows]: COMPUTED, IN_FLIGHT or CACHED.
    """

    def cancelled(self) -> bool: ...
    def done(self, vectors: npt.NDArray[np.float32], reused: npt.NDArray[np.int32]) -> None: ...
    def failed(self, reason: str) -> None: ...
    def dropped(self, reason: str) -> None: ...


class Flight:
    """A vector on its way, and the places of all jobs that wait for it. `taken`: by a forward pass."""

    __slots__ = ("dims", "jobs", "key", "row", "taken")

    def __init__(self, key: Key, row: Row, dims: int) -> None:
        self.key = key
        self.row = row
        self.dims = dims
        self.jobs: dict[Job, list[int]] = {}
        self.taken = False


class Job:
    """The rows of one request: they may be spread over several forward passes, the reply is one.

    `places`: where each distinct row stands, the shortest first, so that equal lengths are computed as neighbours;
    `cost`: tokens of the distinct rows; `vectors`: fp32 [rows, dims]. `deadline`, on the monotonic clock: a job that
    has not begun by then is dropped.
    """

    def __init__(self, rows: Sequence[Row], dims: int, reply: Reply, deadline: float = math.inf) -> None:
        self.rows = rows
        self.dims = dims
        self.reply = reply
        self.deadline = deadline
        self.places: dict[Key, list[int]] = {}
        for i in sorted(range(len(rows)), key=lambda i: rows[i].cost):
            self.places.setdefault(identity(rows[i], dims), []).append(i)
        self.cost = sum(rows[places[0]].cost for places in self.places.values())
        self.vectors = np.empty((len(rows), dims), dtype=np.float32)
        self.reused = np.full(len(rows), IN_FLIGHT, dtype=np.int32)
        self.left = len(rows)  # without a vector
        self.flights: list[Flight] = []  # of every row that was not in the cache
        self.waiting: deque[Flight] = deque()  # those that its turn has not come to
        self.submitted = time.monotonic()
        self.told = False  # how long it waited

    @property
    def begun(self) -> bool:
        """Whether a forward pass has taken any of it."""
        return any(flight.taken for flight in self.flights)

    def fill(self, places: Sequence[int], vector: npt.NDArray[np.float32]) -> None:
        """Take the vector of these rows, which are one and the same."""
        for i in places:
            self.vectors[i] = vector
        self.left -= len(places)

    def given_up(self) -> str | None:
        """Why nobody waits for it any more, if so.

        Asking costs tens of microseconds: only where it may have waited long.
        """
        now = time.monotonic()
        if now > self.deadline:
            return "The request's deadline passed before its computation began"
        if now - self.submitted < CANCEL_SECONDS:
            return None
        try:
            return "The request was cancelled" if self.reply.cancelled() else None
        except Exception:
            log.exception("a request could not be asked whether it was cancelled")
            return None

    def finish(self, reason: str | None = None) -> None:
        """One reply, whatever happens: a caller without one would wait for ever."""
        if reason is None and not np.isfinite(self.vectors).all():
            reason = "The model computed a vector that is not finite"
        if reason is None:
            try:
                self.reply.done(self.vectors, self.reused)
                return
            except Exception:
                log.exception("a reply could not be sent")
                reason = "The reply could not be sent"
        self.reply.failed(reason)


def identity(row: Row, dims: int) -> Key:
    """What decides a vector: its size, the ids, in which the prompt is written, and the pictures by SHA-256, which
    callers cannot make collide."""
    pictures = b""
    if row.pictures:
        digest = hashlib.sha256()
        for pixels in row.pictures:
            digest.update(repr(pixels.shape).encode())
            digest.update(pixels.tobytes())
        pictures = digest.digest()
    return dims, row.ids.tobytes(), pictures
