"""The scheduler: admission of jobs, the token budget of forward passes, two lanes, and the engine thread.

The engine thread computes while other threads tokenize and send. `submit` refuses a job while its lane holds 64 forward
passes' worth of tokens, and never waits: Triton starts no other request meanwhile. Each lane counts separately: bulk
requests that are still being computed keep no small job out.
"""

import logging
import math
import threading
import time
from collections import deque
from collections.abc import Callable, Collection, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Protocol

import numpy as np
import numpy.typing as npt

from triton_embed.python_backend.errors import DeviceLostError
from triton_embed.python_backend.execution.budget import Budget
from triton_embed.python_backend.inputs.row import Row
from triton_embed.python_backend.scheduling.dedup_cache import DedupCache
from triton_embed.python_backend.scheduling.job import Job, PendingRow
from triton_embed.python_backend.scheduling.sender import Sender
from triton_embed.python_backend.wire import Reused

log = logging.getLogger(__name__)

ADMITTED_BUDGETS = 64  # per lane, in forward passes
# Jobs below this size cost as much I/O as compute, so a pass over several of them leaves a core to I/O (measured with
# MiniLM on 2 cores: 128 callers of 12 tokens each are served about 17 % faster, but 32 callers of 100 tokens about 20 %
# slower).
LIGHT_JOB_TOKENS = 32
# For how long after the last small job passes over large jobs stay smaller, so that the next one waits less (measured
# with MiniLM on 2 cores at eight times the load that can be served: the p95 of a query falls from 90 to 38 ms).
RECENT_SECONDS = 3.0

FAILURE = "A forward pass over %d rows failed"

PauseHook = Callable[[], None]
Vectors = npt.NDArray[np.float32]


class LaneFullError(Exception):
    """As many tokens wait as may wait."""


class Compute(Protocol):
    """Starts to compute rows, and returns the function that waits for their vectors, fp32 [rows, at least max(dims)].

    `pause_hook` is called many times during the pass and may itself run a pass. `spare_core`: other threads need a core
    meanwhile.
    """

    def __call__(
        self, rows: Sequence[Row], dims: Sequence[int], pause_hook: PauseHook | None, spare_core: bool
    ) -> Callable[[], Vectors]: ...


@dataclass(frozen=True)
class Pass:
    """A forward pass that has started. `wait` waits for its vectors; the times are those of its start."""

    pending_rows: Sequence[PendingRow]
    dims: Sequence[int]
    wait: Callable[[], Vectors]
    start: float
    paused_seconds: float


class MetricsSink(Protocol):
    """Receives measurements on the sender thread."""

    def record_pass(self, waits: Sequence[float], seconds: float, tokens: int) -> None:
        """Record one forward pass: its own seconds, and how long each job that started with it had waited."""

    def record_rows(self, computed: int, in_flight: int, cached: int, cache_bytes: int) -> None:
        """Record rows by the source of their vector, and the size of the cache."""


class Lane:
    """A queue of jobs, and the tokens of its jobs that have no reply yet."""

    def __init__(self) -> None:
        self.queue: deque[Job] = deque()
        self.admitted_tokens = 0


class Scheduler:
    """Fills forward passes with the rows of jobs and runs them on the engine, an executor of one thread.

    Small jobs go first: lanes take turns when both wait, and a pass over large jobs pauses for small jobs that arrive
    meanwhile, up to as many tokens as the pass may hold itself, so that a stream of small jobs cannot stop it. Small
    and large jobs never share a pass, because the small ones would wait for all of it.

    The engine is passed in because torch should run on no other thread: each thread that runs it gets a separate pool
    of OpenMP workers, and with more workers than cores they stop spinning and sleep between operations (measured: a
    short query then takes about 1.5 times as long).

    Args:
        passes_in_flight: Above 1, that many passes are started before the first has ended, so that a GPU finds the next
            one when it has finished one. Another thread waits for their vectors, in order.
        end_process: Called on the sender thread after the replies, when the device computes no more. Its errors are for
            ever, and a new process is the only way to get rid of them.
    """

    def __init__(
        self,
        compute: Compute,
        budget: Budget,
        sender: Sender,
        engine: Executor,
        metrics: MetricsSink | None = None,
        cache_bytes: int = 0,
        passes_in_flight: int = 1,
        end_process: Callable[[], None] = lambda: None,
    ) -> None:
        self._compute = compute
        self._end_process = end_process
        self._metrics = metrics
        self._sender = sender
        self._budget = budget
        self._small, self._large = Lane(), Lane()
        self._large_yielded = False  # the small lane had the last turn while the large lane waited
        self._paused_seconds = 0.0  # total time of the passes that ran in pauses
        self._pause_tokens = 0  # tokens of small jobs that still fit the pauses of the current pass
        self._latest_small = -math.inf  # time of the latest small job
        self._dedup = DedupCache(cache_bytes)
        self._closing = False
        self._changed = threading.Condition()
        self._max_in_flight, self._in_flight = passes_in_flight, 0
        self._lost = False  # the device
        self._landing = ThreadPoolExecutor(1, "landing") if passes_in_flight > 1 else None
        self._last_landed = 0.0  # when the latest pass ended
        self._engine_loop = engine.submit(self._run_engine)

    def submit(self, job: Job) -> None:
        """Admit a job.

        Raises:
            LaneFullError: Its lane is full.
        """
        lane = self._lane_of(job)
        with self._changed:
            if lane.admitted_tokens >= ADMITTED_BUDGETS * self._budget.pass_tokens:
                raise LaneFullError
            if lane is self._small:
                self._latest_small = time.monotonic()
            cached = self._dedup.join(job)
            if job.missing:
                lane.admitted_tokens += job.cost
                lane.queue.append(job)
                self._changed.notify_all()
            else:
                self._sender.put(job.finish)
        if cached:
            self._report_rows(0, 0, cached)

    def close(self) -> None:
        """Compute every admitted job, then stop."""
        with self._changed:
            self._closing = True
            self._changed.notify_all()
        self._engine_loop.result()
        if self._landing is not None:
            self._landing.shutdown()

    def _run_engine(self) -> None:
        try:
            self._run_passes()
        except DeviceLostError:
            self._end()

    def _end(self) -> None:
        """Answer all jobs, and end the process. Called where the loss of the device is noticed, maybe twice."""
        with self._changed:
            if self._lost:
                return
            self._lost = True
            jobs = self._dedup.jobs()
            self._changed.notify_all()
        log.exception("The device computes no more")
        for job in jobs:
            self._sender.put(job.reply.unavailable)
        self._sender.put(self._end_process)

    def _run_passes(self) -> None:
        while (lane := self._next_lane()) is not None:
            if lane is self._small:
                self._run_small_pass(self._budget.pass_tokens)
            else:
                expects_small = time.monotonic() - self._latest_small < RECENT_SECONDS
                self._pause_tokens = self._budget.shared_pass_tokens if expects_small else self._budget.pass_tokens
                self._run_pass(self._take(lane, self._pause_tokens), self._pause)

    def _next_lane(self) -> Lane | None:
        """Wait for work, and until a pass may start: it takes what has come by then.

        Returns:
            The lane whose turn it is; None if the scheduler is closing and has no work, or the device is lost.
        """
        with self._changed:
            self._changed.wait_for(
                lambda: (
                    self._lost
                    or (
                        self._in_flight < self._max_in_flight
                        and (self._small.queue or self._large.queue or self._closing)
                    )
                )
            )
            if self._lost:
                return None
            if self._large.queue and (self._large_yielded or not self._small.queue):
                self._large_yielded = False
                return self._large
            self._large_yielded = bool(self._large.queue)
            return self._small if self._small.queue else None

    def _pause(self) -> None:
        """Compute small jobs that arrived during a pass."""
        if not self._small.queue or self._pause_tokens <= 0:  # no lock needed: the next pause checks again
            return
        start = time.monotonic()
        self._pause_tokens -= self._run_small_pass(self._budget.small_job_tokens)
        self._paused_seconds += time.monotonic() - start

    def _run_small_pass(self, max_tokens: int) -> int:
        """Compute up to `max_tokens` tokens of small jobs. Return the number of tokens."""
        pending_rows = self._take(self._small, max_tokens)
        tokens, jobs = _tokens(pending_rows), len({job for pending in pending_rows for job in pending.jobs})
        light = jobs > 1 and tokens < LIGHT_JOB_TOKENS * jobs
        self._run_pass(pending_rows, spare_core=light)
        return tokens

    def _take(self, lane: Lane, max_tokens: int) -> list[PendingRow]:
        """Take the next rows of a lane: up to `max_tokens` and at least one row, shortest first.

        Jobs that are cancelled or too late are dropped, so the result may be empty.
        """
        pending_rows: list[PendingRow] = []
        tokens = 0
        with self._changed:
            while lane.queue:
                job = lane.queue[0]
                if not job.started and (reason := job.drop_reason()):
                    self._remove([job])
                    self._sender.put(partial(job.reply.dropped, reason))
                    continue
                while job.queue:
                    pending = job.queue[0]
                    if not pending.started:  # else it is computed for another job
                        if pending_rows and tokens + pending.row.cost > max_tokens:
                            break
                        pending.started = True
                        job.reused[pending.jobs[job][0]] = Reused.COMPUTED
                        pending_rows.append(pending)
                        tokens += pending.row.cost
                    job.queue.popleft()
                if job.queue:
                    break
                lane.queue.popleft()
        return sorted(pending_rows, key=lambda pending: pending.row.cost)

    def _run_pass(
        self, pending_rows: Sequence[PendingRow], pause_hook: PauseHook | None = None, *, spare_core: bool = False
    ) -> None:
        if not pending_rows:
            return
        start, paused_before = time.monotonic(), self._paused_seconds
        dims = [pending.dims for pending in pending_rows]
        try:
            wait = self._compute([pending.row for pending in pending_rows], dims, pause_hook, spare_core)
        except DeviceLostError:
            raise  # also out of the pass in whose pause this one ran
        except Exception:
            log.exception(FAILURE, len(pending_rows))
            self._fail(pending_rows)
            return
        started = Pass(pending_rows, dims, wait, start, paused_before)
        if self._landing is None:
            self._land(started)
            return
        with self._changed:
            self._in_flight += 1
        self._landing.submit(self._land_later, started)

    def _land_later(self, started: Pass) -> None:
        """Wait for a pass on the landing thread, and let another one start."""
        try:
            self._land(started)
        except DeviceLostError:
            self._end()
        finally:
            with self._changed:
                self._in_flight -= 1
                self._changed.notify_all()

    def _land(self, started: Pass) -> None:
        """Wait for the vectors of a pass, and complete the jobs that have all of theirs."""
        pending_rows, dims = started.pending_rows, started.dims
        try:
            vectors = started.wait()
            if len(vectors) != len(pending_rows) or vectors.shape[1] < max(dims):
                raise ValueError(
                    f"got vectors {vectors.shape} for {len(pending_rows)} rows of up to {max(dims)} dimensions"
                )
        except DeviceLostError:
            raise  # also out of the pass in whose pause this one ran
        except Exception:
            log.exception(FAILURE, len(pending_rows))
            self._fail(pending_rows)
            return
        now = time.monotonic()
        # A pass begins to be computed when the one before it has ended.
        seconds = now - max(started.start, self._last_landed) - (self._paused_seconds - started.paused_seconds)
        self._last_landed = now if self._landing is not None else 0.0
        with self._changed:
            jobs = {job: None for pending in pending_rows for job in pending.jobs}
            row_count = sum(len(indices) for pending in pending_rows for indices in pending.jobs.values())
            complete = self._dedup.complete(
                pending_rows, (vector[:size] for vector, size in zip(vectors, dims, strict=True))
            )
            for job in complete:
                self._lane_of(job).admitted_tokens -= job.cost
            self._changed.notify_all()
        for job in complete:
            self._sender.put(job.finish)
        if self._metrics is None:
            return
        # Queued after the replies, so that these do not wait for the metrics.
        waits = [max(0.0, started.start - job.submitted) for job in jobs if not job.wait_reported]
        for job in jobs:
            job.wait_reported = True
        self._sender.put(partial(self._metrics.record_pass, waits, seconds, _tokens(pending_rows)))
        self._report_rows(len(pending_rows), max(0, row_count - len(pending_rows)), 0)

    def _fail(self, pending_rows: Sequence[PendingRow]) -> None:
        with self._changed:
            jobs = self._dedup.fail(pending_rows)
            self._remove(jobs)
        for job in jobs:
            self._sender.put(partial(job.finish, "The model failed to compute this request"))

    def _remove(self, jobs: Collection[Job]) -> None:
        """Remove incomplete jobs from their lanes."""
        for job in jobs:
            self._dedup.leave(job)
            lane = self._lane_of(job)
            lane.admitted_tokens -= job.cost
            if job in lane.queue:
                lane.queue.remove(job)
        self._changed.notify_all()

    def _lane_of(self, job: Job) -> Lane:
        return self._small if job.cost <= self._budget.small_job_tokens else self._large

    def _report_rows(self, computed: int, in_flight: int, cached: int) -> None:
        if self._metrics is not None:
            report = partial(self._metrics.record_rows, computed, in_flight, cached, self._dedup.cache_bytes)
            self._sender.put(report)


def _tokens(pending_rows: Sequence[PendingRow]) -> int:
    return sum(pending.row.cost for pending in pending_rows)
