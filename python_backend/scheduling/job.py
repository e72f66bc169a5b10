"""Jobs: the rows of one request from admission to its reply, and the identity of rows."""

import hashlib
import logging
import math
import time
from collections import deque
from collections.abc import Sequence
from typing import Protocol

import numpy as np
import numpy.typing as npt

from triton_embed.python_backend.inputs.row import Row
from triton_embed.python_backend.wire import Reused

log = logging.getLogger(__name__)

CANCEL_SECONDS = 0.05  # age of a job from which on its cancellation is checked

Key = tuple[int, bytes, bytes]  # see `identity`


class Reply(Protocol):
    """Receives the outcome of a job: exactly one call of `done`, `failed`, `dropped` or `unavailable`.

    `failed` reports an error of the engine. `dropped` reports a job that was cancelled or missed its deadline before it
    started. `unavailable` reports that the engine ends; another one can compute the job. `reused` int32 [rows] has a
    code of `Reused` for each vector.
    """

    def cancelled(self) -> bool: ...
    def done(self, vectors: npt.NDArray[np.float32], reused: npt.NDArray[np.int32]) -> None: ...
    def failed(self, reason: str) -> None: ...
    def dropped(self, reason: str) -> None: ...
    def unavailable(self) -> None: ...


class PendingRow:
    """A row without a vector.

    Attributes:
        jobs: The jobs that need the vector, with the indices of the row in each.
        started: Whether a forward pass includes the row.
    """

    __slots__ = ("dims", "jobs", "key", "row", "started")

    def __init__(self, key: Key, row: Row, dims: int) -> None:
        self.key = key
        self.row = row
        self.dims = dims
        self.jobs: dict[Job, list[int]] = {}
        self.started = False


class Job:
    """The rows of one request. They may be spread over several forward passes; there is one reply.

    Attributes:
        indices: Key -> indices of each distinct row, shortest row first, so that rows of similar length share a pass.
        cost: Tokens of the distinct rows.
        vectors: fp32 [rows, dims].
        deadline: On the monotonic clock; a job that has not started by then is dropped.
    """

    def __init__(self, rows: Sequence[Row], dims: int, reply: Reply, deadline: float = math.inf) -> None:
        self.rows = rows
        self.dims = dims
        self.reply = reply
        self.deadline = deadline
        self.indices: dict[Key, list[int]] = {}
        for i in sorted(range(len(rows)), key=lambda i: rows[i].cost):
            self.indices.setdefault(identity(rows[i], dims), []).append(i)
        self.cost = sum(rows[indices[0]].cost for indices in self.indices.values())
        self.vectors = np.empty((len(rows), dims), dtype=np.float32)
        self.reused = np.full(len(rows), Reused.IN_FLIGHT, dtype=np.int32)
        self.missing = len(rows)  # rows without a vector
        self.pending: list[PendingRow] = []  # every distinct row that was not cached
        self.queue: deque[PendingRow] = deque()  # pending rows not yet considered for a pass
        self.submitted = time.monotonic()
        self.wait_reported = False

    @property
    def started(self) -> bool:
        """Whether a forward pass includes any row of the job."""
        return any(pending.started for pending in self.pending)

    def fill(self, indices: Sequence[int], vector: npt.NDArray[np.float32]) -> None:
        """Set the vector of these rows, which are identical."""
        for i in indices:
            self.vectors[i] = vector
        self.missing -= len(indices)

    def drop_reason(self) -> str | None:
        """Return why the job should be dropped, or None.

        Cancellation is checked only after a while, because the check takes tens of microseconds.
        """
        now = time.monotonic()
        if now > self.deadline:
            return "The request's deadline passed before its computation started"
        if now - self.submitted < CANCEL_SECONDS:
            return None
        try:
            return "The request was cancelled" if self.reply.cancelled() else None
        except Exception:
            log.exception("Could not check whether a request was cancelled")
            return None

    def finish(self, reason: str | None = None) -> None:
        """Send exactly one reply in any case: a caller without one would wait forever."""
        if reason is None and not np.isfinite(self.vectors).all():
            reason = "The model computed a vector that is not finite"
        if reason is None:
            try:
                self.reply.done(self.vectors, self.reused)
                return
            except Exception:
                log.exception("A reply could not be sent")
                reason = "The reply could not be sent"
        self.reply.failed(reason)


def identity(row: Row, dims: int) -> Key:
    """Return a key of everything that determines a vector: its dimensions, the token ids (prompt included), the images.

    Images are hashed with SHA-256, for which callers cannot construct collisions.
    """
    images = b""
    if row.images:
        digest = hashlib.sha256()
        for pixels in row.images:
            digest.update(repr(pixels.shape).encode())
            digest.update(pixels.tobytes())
        images = digest.digest()
    return dims, row.ids.tobytes(), images
