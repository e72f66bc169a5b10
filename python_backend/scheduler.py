"""Admission, the token budget, and the engine thread that computes while others tokenise and send.

`submit` blocks while two forward passes' worth of tokens are waiting: that is what makes Triton's own batcher
hold requests back, so that its queue limits, priorities and timeouts mean something.
"""

import logging
import math
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Executor
from functools import partial
from typing import Protocol

import numpy as np
import numpy.typing as npt

from triton_embed.python_backend.delivery import Delivery
from triton_embed.python_backend.row import Row

log = logging.getLogger(__name__)

CANCEL_SECONDS = 0.05

Compute = Callable[[Sequence[Row], Sequence[int]], npt.NDArray[np.float32]]
# Told of each forward pass: seconds that the requests it began had waited, its own seconds, its tokens.
Watch = Callable[[Sequence[float], float, int], None]


class Reply(Protocol):
    """Where the outcome of a job goes: exactly one of `done`, `failed` and `dropped`, exactly once."""

    def cancelled(self) -> bool: ...
    def done(self, vectors: npt.NDArray[np.float32]) -> None: ...
    def failed(self, reason: str) -> None: ...
    def dropped(self, reason: str) -> None: ...


class Job:
    """The rows of one request: they may be spread over several forward passes, the reply is one.

    `vectors` is fp32 [rows, dims]; rows are computed shortest first, so that equal lengths are neighbours.
    `deadline`, on the monotonic clock: a job that has not begun by then is dropped.
    """

    def __init__(self, rows: Sequence[Row], dims: int, reply: Reply, deadline: float = math.inf) -> None:
        self.rows = rows
        self.dims = dims
        self.reply = reply
        self.deadline = deadline
        self.vectors = np.empty((len(rows), dims), dtype=np.float32)
        self.cost = sum(row.cost for row in rows)
        self.waiting = deque(sorted(range(len(rows)), key=lambda i: rows[i].cost))
        self.left = len(rows)
        self.submitted = time.monotonic()
        self.begun = False


class Scheduler:
    """Runs on the engine, an executor of one thread; `close` lets everything admitted be computed first.

    The engine is given, because torch should be used on no other thread: each thread that runs it gets a pool of
    OpenMP workers of its own, and with more workers than cores they stop spinning and sleep between operations
    (a short query then takes about half as long again).
    """

    def __init__(
        self, compute: Compute, batch_tokens: int, delivery: Delivery, engine: Executor, watch: Watch | None = None
    ) -> None:
        self._compute = compute
        self._watch = watch
        self._delivery = delivery
        self._budget = batch_tokens
        self._queue: deque[Job] = deque()
        self._admitted = 0
        self._closing = False
        self._change = threading.Condition()
        self._running = engine.submit(self._run_engine)

    def submit(self, job: Job) -> None:
        """Admit a job; blocks while twice the token budget is admitted already."""
        with self._change:
            self._change.wait_for(lambda: self._admitted < 2 * self._budget)
            self._admitted += job.cost
            self._queue.append(job)
            self._change.notify_all()

    def close(self) -> None:
        """Compute what was admitted, then stop."""
        with self._change:
            self._closing = True
            self._change.notify_all()
        self._running.result()

    def _run_engine(self) -> None:
        while rows := self._take():
            jobs = {job for job, _ in rows}
            began = time.monotonic()
            try:
                vectors = self._compute([job.rows[i] for job, i in rows], [job.dims for job, _ in rows])
                for (job, i), vector in zip(rows, vectors, strict=True):
                    job.vectors[i] = vector[: job.dims]
            except Exception:
                log.exception("a forward pass over %d rows failed", len(rows))
                self._abandon(jobs, "The model failed to compute this request")
                continue
            for job, _ in rows:
                job.left -= 1
            ended = time.monotonic()
            self._settle([job for job in jobs if not job.left])
            if self._watch is not None:  # after the replies, which should not wait for it
                waits = [began - job.submitted for job in jobs if not job.begun]
                tokens = sum(job.rows[i].cost for job, i in rows)
                self._delivery.put(partial(self._watch, waits, ended - began, tokens))
            for job in jobs:
                job.begun = True

    def _take(self) -> list[tuple[Job, int]]:
        """The next rows to compute, up to the token budget and at least one; none: the scheduler is closing."""
        with self._change:
            while True:
                self._change.wait_for(lambda: self._queue or self._closing)
                if not self._queue:
                    return []
                rows: list[tuple[Job, int]] = []
                tokens = 0
                while self._queue:
                    job = self._queue[0]
                    if len(job.waiting) == len(job.rows) and (reason := _given_up(job)):
                        self._queue.popleft()
                        self._admitted -= job.cost
                        self._delivery.put(partial(job.reply.dropped, reason))
                        continue
                    while job.waiting and (not rows or tokens + job.rows[job.waiting[0]].cost <= self._budget):
                        i = job.waiting.popleft()
                        rows.append((job, i))
                        tokens += job.rows[i].cost
                    if job.waiting:
                        break
                    self._queue.popleft()
                self._change.notify_all()
                if rows:
                    return sorted(rows, key=lambda row: row[0].rows[row[1]].cost)

    def _settle(self, jobs: Sequence[Job]) -> None:
        with self._change:
            self._admitted -= sum(job.cost for job in jobs)
            self._change.notify_all()
        for job in jobs:
            self._delivery.put(partial(self._finish, job))

    def _abandon(self, jobs: set[Job], reason: str) -> None:
        with self._change:
            self._queue = deque(job for job in self._queue if job not in jobs)
            self._admitted -= sum(job.cost for job in jobs)
            self._change.notify_all()
        for job in jobs:
            self._delivery.put(partial(self._finish, job, reason))

    def _finish(self, job: Job, reason: str | None = None) -> None:
        """One reply, whatever happens: a caller without one would wait for ever."""
        if reason is None and not np.isfinite(job.vectors).all():
            reason = "The model computed a vector that is not finite"
        if reason is None:
            try:
                job.reply.done(job.vectors)
                return
            except Exception:
                log.exception("a reply could not be sent")
                reason = "The reply could not be sent"
        job.reply.failed(reason)


def _given_up(job: Job) -> str | None:
    """Why nobody waits for it any more, if so.

    Asking costs tens of microseconds: only where it may have waited long.
    """
    now = time.monotonic()
    if now > job.deadline:
        return "The request's deadline passed before its computation began"
    if now - job.submitted < CANCEL_SECONDS:
        return None
    try:
        return "The request was cancelled" if job.reply.cancelled() else None
    except Exception:
        log.exception("a request could not be asked whether it was cancelled")
        return None
