"""Admission, the token budget, two lanes, and the engine thread that computes while others tokenise and send.

`submit` blocks while a lane has eight forward passes' worth of tokens: that is what makes Triton's own batcher hold
requests back, so that its queue limits, priorities and timeouts mean something. Each lane counts its own: what a bulk
request has left to compute keeps no small one out.
"""

import logging
import math
import threading
import time
from collections import deque
from collections.abc import Callable, Collection, Sequence
from concurrent.futures import Executor
from functools import partial
from typing import Protocol

import numpy as np
import numpy.typing as npt

from triton_embed.python_backend.budget import Budget
from triton_embed.python_backend.delivery import Delivery
from triton_embed.python_backend.job import COMPUTED, Flight, Job
from triton_embed.python_backend.reuse import Reuse
from triton_embed.python_backend.row import Row

log = logging.getLogger(__name__)

ADMITTED = 8  # budgets a lane
# Tokens of a job, below which to read and answer it costs about as much as to compute it: several of them leave a core
# to that. Measured with MiniLM on two cores: 128 callers of 12 tokens each are served a sixth faster, and 32 of 100
# tokens a fifth slower.
LIGHT = 32
# That small jobs are taken to keep coming. Meanwhile passes over large ones are smaller, and leave a core to what reads
# and answers.
RECENT_SECONDS = 0.1

Between = Callable[[], None]


class Compute(Protocol):
    """Rows -> fp32 [rows, at least max(dims)]. `between` is to be called now and then on the way; it may compute.
    `spare`: others need a core meanwhile."""

    def __call__(
        self, rows: Sequence[Row], dims: Sequence[int], between: Between | None, spare: bool
    ) -> npt.NDArray[np.float32]: ...


class Watch(Protocol):
    """Told of what was done, on the delivery thread."""

    def passed(self, waits: Sequence[float], seconds: float, tokens: int) -> None:
        """One forward pass, its own seconds, and how long each request that began with it had waited."""

    def answered(self, computed: int, in_flight: int, cached: int, cache_bytes: int) -> None:
        """Rows that got their vector, by where it came from, and what the cache holds now."""


class Lane:
    """Jobs in the order they came, and the tokens of those that have no reply yet."""

    def __init__(self) -> None:
        self.queue: deque[Job] = deque()
        self.admitted = 0


class Scheduler:
    """Runs on the engine, an executor of one thread; `close` lets everything admitted be computed first.

    Small jobs go before the others: the lanes take turns where both wait, and a pass over rows of large jobs pauses
    for what came in the meantime, a little at a time until that is as much as the pass may hold itself, so that a
    stream of small jobs cannot stop it. They never share a pass, for the small ones would wait for all of it.

    The engine is given, because torch should be used on no other thread: each thread that runs it gets a pool of
    OpenMP workers of its own, and with more workers than cores they stop spinning and sleep between operations
    (a short query then takes about half as long again).
    """

    def __init__(
        self,
        compute: Compute,
        budget: Budget,
        delivery: Delivery,
        engine: Executor,
        watch: Watch | None = None,
        cache_bytes: int = 0,
    ) -> None:
        self._compute = compute
        self._watch = watch
        self._delivery = delivery
        self._budget = budget
        self._small, self._large = Lane(), Lane()
        self._yielded = False  # large jobs have let small ones go first
        self._paused = 0.0  # seconds of passes in the pauses of others
        self._room = 0  # tokens that small jobs may still have in the pauses of this pass
        self._latest_small = -math.inf  # when one came
        self._reuse = Reuse(cache_bytes)
        self._closing = False
        self._change = threading.Condition()
        self._running = engine.submit(self._run_engine)

    def submit(self, job: Job) -> None:
        """Admit a job; blocks while its lane is full."""
        lane = self._lane_of(job)
        with self._change:
            self._change.wait_for(lambda: lane.admitted < ADMITTED * self._budget.whole)
            if lane is self._small:
                self._latest_small = time.monotonic()
            cached = self._reuse.join(job)
            if job.left:
                lane.admitted += job.cost
                lane.queue.append(job)
                self._change.notify_all()
            else:
                self._delivery.put(job.finish)
        if cached:
            self._tell_answered(0, 0, cached)

    def close(self) -> None:
        """Compute what was admitted, then stop."""
        with self._change:
            self._closing = True
            self._change.notify_all()
        self._running.result()

    def _run_engine(self) -> None:
        while (lane := self._next_lane()) is not None:
            if lane is self._small:
                self._pass_small(self._budget.whole)
            else:
                shared = time.monotonic() - self._latest_small < RECENT_SECONDS
                self._room = self._budget.shared if shared else self._budget.whole
                self._pass(self._take(lane, self._room), self._pause, spare=shared)

    def _next_lane(self) -> Lane | None:
        """Whose turn it is; None: the scheduler is closing."""
        with self._change:
            self._change.wait_for(lambda: self._small.queue or self._large.queue or self._closing)
            if self._large.queue and (self._yielded or not self._small.queue):
                self._yielded = False
                return self._large
            self._yielded = bool(self._large.queue)
            return self._small if self._small.queue else None

    def _pause(self) -> None:
        """Amid a pass: compute what small jobs have come."""
        if not self._small.queue or self._room <= 0:  # without the lock: it is looked at again in the next pause
            return
        began = time.monotonic()
        self._room -= self._pass_small(self._budget.small)
        self._paused += time.monotonic() - began

    def _pass_small(self, most: int) -> int:
        """Compute at most so many tokens of small jobs. Returns how many."""
        flights = self._take(self._small, most)
        tokens, jobs = _tokens(flights), len({job for flight in flights for job in flight.jobs})
        light = jobs > 1 and tokens < LIGHT * jobs
        self._pass(flights, spare=light or self._large.admitted > 0)
        return tokens

    def _take(self, lane: Lane, most: int) -> list[Flight]:
        """What to compute next, up to `most` tokens and at least one row, the shortest first; none where nobody waits
        for anything any more."""
        flights: list[Flight] = []
        tokens = 0
        with self._change:
            while lane.queue:
                job = lane.queue[0]
                if not job.begun and (reason := job.given_up()):
                    self._leave([job])
                    self._delivery.put(partial(job.reply.dropped, reason))
                    continue
                while job.waiting:
                    flight = job.waiting[0]
                    if not flight.taken:  # by another job's turn
                        if flights and tokens + flight.row.cost > most:
                            break
                        flight.taken = True
                        job.reused[flight.jobs[job][0]] = COMPUTED
                        flights.append(flight)
                        tokens += flight.row.cost
                    job.waiting.popleft()
                if job.waiting:
                    break
                lane.queue.popleft()
        return sorted(flights, key=lambda flight: flight.row.cost)

    def _pass(self, flights: Sequence[Flight], between: Between | None = None, *, spare: bool) -> None:
        if not flights:
            return
        began, paused = time.monotonic(), self._paused
        dims = [flight.dims for flight in flights]
        try:
            vectors = self._compute([flight.row for flight in flights], dims, between, spare)
            if len(vectors) != len(flights) or vectors.shape[1] < max(dims):
                raise ValueError(
                    f"{vectors.shape} vectors of {len(flights)} rows, of which the largest has {max(dims)}"
                )
        except Exception:
            log.exception("a forward pass over %d rows failed", len(flights))
            self._fail(flights)
            return
        seconds = time.monotonic() - began - (self._paused - paused)
        with self._change:
            jobs = {job: None for flight in flights for job in flight.jobs}
            rows = sum(len(places) for flight in flights for places in flight.jobs.values())
            complete = self._reuse.land(flights, (vector[:size] for vector, size in zip(vectors, dims, strict=True)))
            for job in complete:
                self._lane_of(job).admitted -= job.cost
            self._change.notify_all()
        for job in complete:
            self._delivery.put(job.finish)
        if self._watch is None:
            return
        # After the replies, which should not wait for it.
        waits = [max(0.0, began - job.submitted) for job in jobs if not job.told]
        for job in jobs:
            job.told = True
        self._delivery.put(partial(self._watch.passed, waits, seconds, _tokens(flights)))
        self._tell_answered(len(flights), max(0, rows - len(flights)), 0)

    def _fail(self, flights: Sequence[Flight]) -> None:
        with self._change:
            jobs = self._reuse.fail(flights)
            self._leave(jobs)
        for job in jobs:
            self._delivery.put(partial(job.finish, "The model failed to compute this request"))

    def _leave(self, jobs: Collection[Job]) -> None:
        """Forget jobs that are not complete."""
        for job in jobs:
            self._reuse.leave(job)
            lane = self._lane_of(job)
            lane.admitted -= job.cost
            if job in lane.queue:
                lane.queue.remove(job)
        self._change.notify_all()

    def _lane_of(self, job: Job) -> Lane:
        return self._small if job.cost <= self._budget.small else self._large

    def _tell_answered(self, computed: int, in_flight: int, cached: int) -> None:
        if self._watch is not None:
            told = partial(self._watch.answered, computed, in_flight, cached, self._reuse.cache_bytes)
            self._delivery.put(told)


def _tokens(flights: Sequence[Flight]) -> int:
    return sum(flight.row.cost for flight in flights)
