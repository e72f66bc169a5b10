"""Tests of the scheduler with real threads: every job gets exactly one reply, with its rows in order, despite failures.

`compute` is a fake whose vectors identify their rows: first id, cost in tokens, and sum of the ids. An image costs
tokens and may have no ids. With the budget used here, a job of up to two tokens is small.
"""

import math
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Executor, Future
from random import Random
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from triton_embed.python_backend.errors import DeviceLostError
from triton_embed.python_backend.execution.budget import Budget
from triton_embed.python_backend.inputs.row import NO_IDS, Row
from triton_embed.python_backend.scheduling import job as job_file
from triton_embed.python_backend.scheduling import scheduler as scheduler_file
from triton_embed.python_backend.scheduling.job import Job
from triton_embed.python_backend.scheduling.scheduler import (
    ADMITTED_BUDGETS,
    Compute,
    LaneFullError,
    MetricsSink,
    PauseHook,
    Scheduler,
)
from triton_embed.python_backend.scheduling.sender import Sender

BUDGET = 10
POISON = 666  # first id of a row whose computation fails
TIMEOUT_SECONDS = 5.0  # a job without a reply after this time is lost
pytestmark = pytest.mark.timeout(60)
Vectors = npt.NDArray[np.float32]


class Caller:
    """A Reply that records its calls."""

    def __init__(self, cancelled: bool = False, is_cancelled: Callable[[], bool] | None = None) -> None:
        self.outcomes: list[Vectors | str] = []
        self.reused: list[int] = []
        self.cancel_checks = 0
        self._is_cancelled = is_cancelled or (lambda: cancelled)
        self._replied = threading.Event()

    def cancelled(self) -> bool:
        self.cancel_checks += 1
        return self._is_cancelled()

    def done(self, vectors: Vectors, reused: npt.NDArray[np.int32]) -> None:
        self.outcomes.append(vectors)
        self.reused = reused.tolist()
        self._replied.set()

    def failed(self, reason: str) -> None:
        self.outcomes.append(reason)
        self._replied.set()

    def dropped(self, reason: str) -> None:
        self.outcomes.append(f"dropped: {reason}")
        self._replied.set()

    def unavailable(self) -> None:
        self.outcomes.append("unavailable")
        self._replied.set()

    def outcome(self) -> Vectors | str:
        """Wait for the outcome and return it. Call it after `close` as well, to check that there is only one."""
        assert self._replied.wait(TIMEOUT_SECONDS), "The job got no reply"
        assert len(self.outcomes) == 1, self.outcomes
        return self.outcomes[0]


def make_row(first: int, length: int) -> Row:
    return Row(np.array([first, *[1] * (length - 1)], dtype=np.int32))


def make_image_row(first: int, cost: int, *ids: int) -> Row:
    """Return an image of one color, alone or with ids."""
    image = np.full((1, 1, 3), first, dtype=np.uint8)
    return Row(np.array(ids, dtype=np.int32) if ids else NO_IDS, (image,), cost - len(ids))


def make_job(caller: Caller, *lengths: int, first: int = 0, dims: int = 3, deadline: float = math.inf) -> Job:
    """Return a job of rows of these lengths, whose first ids count up from `first`."""
    return Job([make_row(first + i, length) for i, length in enumerate(lengths)], dims, caller, deadline)


def first_id(row: Row) -> int:
    """Return the first id of a row, or the color of its image."""
    return int(row.ids[0] if len(row.ids) else row.images[0][0, 0, 0])


def expected_vectors(job: Job) -> Vectors:
    """Return the vectors that the fake computes for a job."""
    vectors = [[first_id(row), row.cost, row.ids.sum()] for row in job.rows]
    return np.array(vectors, dtype=np.float32)[:, : job.dims]


class FakeEngine:
    """A fake `compute` that records its batches. It can be held at a gate, pause, and fail."""

    def __init__(self) -> None:
        self.batches: list[list[Row]] = []
        self.pause_actions: list[Callable[[], object]] = []  # each runs before a call of the pause hook
        self.gate = threading.Event()
        self.gate.set()
        self.entered = threading.Event()
        self.transform: Callable[[Sequence[Row], Vectors], Vectors] = lambda _, vectors: vectors

    def compute(
        self, rows: Sequence[Row], dims: Sequence[int], pause_hook: PauseHook | None, spare_core: bool
    ) -> Vectors:
        assert len(rows) == len(dims)
        self.batches.append(list(rows))
        self.entered.set()
        assert self.gate.wait(TIMEOUT_SECONDS)
        if pause_hook is not None:
            for action in self.pause_actions:
                action()
                pause_hook()
        vectors = np.zeros((len(rows), 8), dtype=np.float32)
        for vector, row in zip(vectors, rows, strict=True):
            vector[:3] = first_id(row), row.cost, row.ids.sum()
        return self.transform(rows, vectors)

    def first_ids(self) -> list[int]:
        """Return the first ids of all computed rows, in order."""
        return [first_id(row) for batch in self.batches for row in batch]


class DaemonExecutor(Executor):
    """An executor of one daemon thread, so that an engine in an endless loop cannot keep pytest alive."""

    def submit(self, work: Callable[..., Any], /, *args: Any, **kwargs: Any) -> "Future[Any]":
        future: Future[Any] = Future()

        def run() -> None:
            try:
                future.set_result(work(*args, **kwargs))
            except BaseException as error:  # noqa: BLE001 - raised again by `result`
                future.set_exception(error)

        threading.Thread(target=run, name="engine", daemon=True).start()
        return future


class RunningScheduler:
    """A scheduler and its sender thread, closed in the same order as by `EmbeddingServer.finalize`."""

    def __init__(
        self,
        compute: Callable[..., Vectors],
        metrics: MetricsSink | None = None,
        budget: int = BUDGET,
        cache_bytes: int = 0,
        on_gpu: Compute | None = None,
    ) -> None:
        def start(*args: Any) -> Callable[[], Vectors]:
            vectors = compute(*args)
            return lambda: vectors

        self.sender = Sender()
        self.ended = threading.Event()
        self.scheduler = Scheduler(
            *(on_gpu or start, Budget(budget, budget // 2, budget // 4), self.sender, DaemonExecutor()),
            *(metrics, cache_bytes, 2 if on_gpu else 1, self.ended.set),
        )
        self.submit = self.scheduler.submit

    @property
    def admitted_tokens(self) -> int:
        """Return the tokens admitted to both lanes; check that no row is pending without any."""
        admitted = self.scheduler._small.admitted_tokens + self.scheduler._large.admitted_tokens
        assert not self.scheduler._dedup._pending or admitted
        return admitted

    def close(self) -> None:
        closing = threading.Thread(target=self.scheduler.close, daemon=True)
        closing.start()
        closing.join(TIMEOUT_SECONDS)
        assert not closing.is_alive(), "The engine did not stop"
        self.sender.close()


@pytest.fixture(autouse=True)
def check_cancellation_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Check every job for cancellation, however short its wait."""
    monkeypatch.setattr(job_file, "CANCEL_SECONDS", 0)


@pytest.fixture(autouse=True)
def forget_small_jobs_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Set the memory for recent small jobs to zero, so that a pass over large jobs has a full budget."""
    monkeypatch.setattr(scheduler_file, "RECENT_SECONDS", 0.0)


@pytest.fixture
def engine() -> FakeEngine:
    return FakeEngine()


@pytest.fixture
def running(engine: FakeEngine) -> Iterator[RunningScheduler]:
    running = RunningScheduler(engine.compute)
    yield running
    engine.gate.set()
    running.close()


def start_submitting(running: RunningScheduler, jobs: Sequence[Job], threads: int) -> list[threading.Thread]:
    """Start threads that submit these jobs, each a share of them, when there is room. Wait with `join_all`."""

    def submit(share: Sequence[Job]) -> None:
        waiting = deque(share)
        while waiting:
            try:
                running.submit(waiting[0])
                waiting.popleft()
            except LaneFullError:
                time.sleep(0.001)

    running_threads = [threading.Thread(target=submit, args=(jobs[i::threads],), daemon=True) for i in range(threads)]
    for thread in running_threads:
        thread.start()
    return running_threads


def join_all(threads: Sequence[threading.Thread]) -> None:
    for thread in threads:
        thread.join(TIMEOUT_SECONDS)
        assert not thread.is_alive(), "there is no room"


def occupy_engine(engine: FakeEngine, running: RunningScheduler) -> Caller:
    """Hold the engine in one small job, so that jobs submitted next have to wait."""
    engine.gate.clear()
    first = Caller()
    running.submit(make_job(first, 1, first=10_000))
    assert engine.entered.wait(TIMEOUT_SECONDS)
    return first


def test_each_of_many_jobs_gets_its_vectors_in_order(engine: FakeEngine, running: RunningScheduler) -> None:
    random = Random(0)
    callers = [Caller() for _ in range(400)]
    jobs = [
        make_job(
            caller, *(random.randint(1, 14) for _ in range(random.choice([1, 1, 2, 9]))), first=100 * i, dims=1 + i % 3
        )
        for i, caller in enumerate(callers)
    ]
    join_all(start_submitting(running, jobs, threads=4))
    for job, caller in zip(jobs, callers, strict=True):
        vectors = caller.outcome()
        assert isinstance(vectors, np.ndarray)
        assert vectors.dtype == np.float32
        assert np.array_equal(vectors, expected_vectors(job))
    running.close()
    assert all(len(caller.outcomes) == 1 for caller in callers)
    assert all(1 <= caller.cancel_checks <= 2 for caller in callers)  # twice if its first row did not fit
    assert sorted(engine.first_ids()) == sorted(first_id(row) for job in jobs for row in job.rows)


def test_batch_stays_within_budget_and_is_sorted_by_length(engine: FakeEngine, running: RunningScheduler) -> None:
    random, callers = Random(1), [Caller() for _ in range(60)]
    occupy_engine(engine, running)
    jobs = [
        make_job(caller, *(random.randint(1, 14) for _ in range(3)), first=3 * i) for i, caller in enumerate(callers)
    ]
    threads = start_submitting(running, jobs, threads=1)
    engine.gate.set()
    join_all(threads)
    for caller in callers:
        caller.outcome()
    lengths = [[row.cost for row in batch] for batch in engine.batches]
    assert all(sum(batch) <= BUDGET or len(batch) == 1 for batch in lengths)
    assert all(batch == sorted(batch) for batch in lengths)
    assert max(map(len, lengths)) > 1


def test_job_larger_than_budget_is_split_and_answered_once(engine: FakeEngine, running: RunningScheduler) -> None:
    caller = Caller()
    job = make_job(caller, 4, 9, 4, 4, 1, 4, 4)
    running.submit(job)
    vectors = caller.outcome()
    assert isinstance(vectors, np.ndarray)
    assert np.array_equal(vectors, expected_vectors(job))
    assert len(engine.batches) > 2


def test_row_longer_than_budget_is_computed_alone(engine: FakeEngine, running: RunningScheduler) -> None:
    caller = Caller()
    running.submit(make_job(caller, 1, 35, 1))
    vectors = caller.outcome()
    assert isinstance(vectors, np.ndarray)
    assert vectors[:, 1].tolist() == [1, 35, 1]
    assert [35] in [[row.cost for row in batch] for batch in engine.batches]


def test_image_costs_its_tokens_in_all_towers(engine: FakeEngine, running: RunningScheduler) -> None:
    occupy_engine(engine, running)
    caller, dims = Caller(), 3
    job = Job(
        [
            make_row(0, 2),
            make_image_row(1, 6),
            make_image_row(2, 8),
            make_image_row(3, 2),
            make_image_row(4, 9, 4, 4, 4),
        ],
        dims,
        caller,
    )
    assert job.cost == 27
    running.submit(job)
    engine.gate.set()
    vectors = caller.outcome()
    assert isinstance(vectors, np.ndarray)
    assert np.array_equal(vectors, expected_vectors(job))
    assert [[first_id(row) for row in batch] for batch in engine.batches[1:]] == [[0, 3, 1], [2], [4]]


def test_tokens_of_images_fill_a_lane(engine: FakeEngine, running: RunningScheduler) -> None:
    occupy_engine(engine, running)
    running.submit(Job([make_image_row(1, ADMITTED_BUDGETS * BUDGET)], 3, image := Caller()))
    with pytest.raises(LaneFullError):
        running.submit(make_job(Caller(), 3))
    engine.gate.set()
    image.outcome()
    running.submit(make_job(late := Caller(), 3))
    assert isinstance(late.outcome(), np.ndarray)


def test_jobs_share_batches_in_order_of_arrival(engine: FakeEngine, running: RunningScheduler) -> None:
    occupy_engine(engine, running)
    callers = [Caller() for _ in range(7)]
    for i, caller in enumerate(callers):
        running.submit(make_job(caller, 2, first=i))
    engine.gate.set()
    for caller in callers:
        caller.outcome()
        assert caller.reused == [0]
    assert [[first_id(row) for row in batch] for batch in engine.batches[1:]] == [[0, 1, 2, 3, 4], [5, 6]]


@pytest.mark.parametrize("size", [1, BUDGET])
def test_submit_refuses_while_its_lane_is_full(size: int, engine: FakeEngine, running: RunningScheduler) -> None:
    """Admit jobs until their lane is full; the last one may exceed the limit. Refused jobs leave no trace."""
    occupy_engine(engine, running)
    other_size = BUDGET if size == 1 else 1
    running.submit(make_job(Caller(), other_size, first=10_001))  # counts in the other lane
    fitting_jobs = ADMITTED_BUDGETS * BUDGET // size - (size == 1)  # the job that holds the engine is small
    callers = [Caller() for _ in range(fitting_jobs + 1)]
    for i, caller in enumerate(callers[:-1]):
        running.submit(make_job(caller, size, first=i))
    with pytest.raises(LaneFullError):
        running.submit(make_job(callers[-1], size, first=fitting_jobs))
    running.submit(make_job(other := Caller(), other_size, first=10_002))  # the other lane has room
    engine.gate.set()
    for caller in (*callers[:-1], other):
        assert isinstance(caller.outcome(), np.ndarray)
    running.submit(make_job(callers[-1], size, first=fitting_jobs))
    assert isinstance(callers[-1].outcome(), np.ndarray)


@pytest.mark.parametrize("in_pause", [False, True])
def test_lost_device_answers_everything_and_ends_the_process(
    in_pause: bool, engine: FakeEngine, running: RunningScheduler
) -> None:
    """Lose the device in a pass, or in a small one in its pause: what is computed stays, the rest is unavailable."""
    running.submit(make_job(early := Caller(), 1))
    assert isinstance(early.outcome(), np.ndarray)
    bulk, small, waiting = Caller(), Caller(), Caller()

    def lose(rows: Sequence[Row], vectors: Vectors) -> Vectors:
        if len(rows[0].ids) == 1 or not in_pause:
            raise DeviceLostError("CUDA error: an illegal memory access was encountered")
        return vectors

    engine.transform = lose
    engine.gate.clear()
    engine.pause_actions = [lambda: running.submit(make_job(small, 1, first=50))]
    running.submit(make_job(bulk, 9, 9, 9, first=10))
    running.submit(make_job(waiting, 9, first=30))
    engine.gate.set()
    assert running.ended.wait(TIMEOUT_SECONDS)
    assert [caller.outcome() for caller in (bulk, small, waiting)] == ["unavailable"] * 3


class Gpu:
    """A fake GPU: it computes the passes that were started in order, each when the test lets it."""

    def __init__(self) -> None:
        self.passes: list[tuple[list[int], threading.Event]] = []
        self.error: Exception | None = None  # of passes that end

    def start(self, rows: Sequence[Row], dims: Sequence[int], *_: object) -> Callable[[], Vectors]:
        ended = threading.Event()
        self.passes.append(([first_id(row) for row in rows], ended))

        def wait() -> Vectors:
            assert ended.wait(TIMEOUT_SECONDS)
            if self.error is not None:
                raise self.error
            return np.array([[first_id(row)] * 3 for row in rows], dtype=np.float32)

        return wait

    def await_passes(self, count: int) -> None:
        """Wait until so many passes were started, and check that no more follow."""
        deadline = time.monotonic() + TIMEOUT_SECONDS
        while len(self.passes) < count:
            assert time.monotonic() < deadline, f"only {len(self.passes)} passes were started"
            time.sleep(0.001)
        time.sleep(0.03)
        assert len(self.passes) == count


def never(*_: object) -> Vectors:
    raise AssertionError


def test_gpu_finds_the_next_pass_when_it_has_finished_one() -> None:
    """Two passes are in flight, never three; what arrives until the next one may start shares it."""
    gpu = Gpu()
    running = RunningScheduler(never, on_gpu=gpu.start)
    callers = [Caller() for _ in range(6)]
    for i in range(3):
        running.submit(make_job(callers[i], BUDGET, first=i))
    gpu.await_passes(2)
    for i in range(3, 6):
        running.submit(make_job(callers[i], 2, first=i))
    gpu.passes[0][1].set()
    assert np.array_equal(callers[0].outcome(), [[0, 0, 0]])
    gpu.await_passes(3)
    gpu.passes[1][1].set()
    gpu.await_passes(4)
    assert sorted(ids for ids, _ in gpu.passes) == [[0], [1], [2], [3, 4, 5]]
    assert not callers[2].outcomes
    for _, ended in gpu.passes:
        ended.set()
    running.close()
    assert [int(caller.outcome()[0][0]) for caller in callers] == list(range(6))  # type: ignore[index]


def test_pass_that_fails_on_the_gpu_fails_alone() -> None:
    gpu = Gpu()
    running = RunningScheduler(never, on_gpu=gpu.start)
    running.submit(make_job(bad := Caller(), BUDGET, first=1))
    gpu.await_passes(1)
    gpu.error = ValueError("out of range")
    gpu.passes[0][1].set()
    assert bad.outcome() == "The model failed to compute this request"
    gpu.error = None
    running.submit(make_job(good := Caller(), BUDGET, first=2))
    gpu.await_passes(2)
    gpu.passes[1][1].set()
    assert np.array_equal(good.outcome(), [[2, 2, 2]])
    running.close()
    assert running.admitted_tokens == 0


def test_gpu_lost_while_two_passes_are_in_flight() -> None:
    gpu = Gpu()
    running = RunningScheduler(never, on_gpu=gpu.start)
    callers = [Caller() for _ in range(4)]
    for i, caller in enumerate(callers):
        running.submit(make_job(caller, BUDGET, first=i))
    gpu.await_passes(2)
    gpu.error = DeviceLostError("CUDA error: an illegal memory access was encountered")
    for _, ended in gpu.passes:
        ended.set()
    assert running.ended.wait(TIMEOUT_SECONDS)
    assert [caller.outcome() for caller in callers] == ["unavailable"] * 4
    assert len(gpu.passes) == 2


def raise_on_poison(rows: Sequence[Row], vectors: Vectors) -> Vectors:
    if any(first_id(row) == POISON for row in rows):
        raise MemoryError("out of memory")
    return vectors


def replace_value(value: float) -> Callable[[Sequence[Row], Vectors], Vectors]:
    def transform(rows: Sequence[Row], vectors: Vectors) -> Vectors:
        for row, vector in zip(rows, vectors, strict=True):
            if first_id(row) == POISON:
                vector[1] = value
        return vectors

    return transform


def drop_last_vector(rows: Sequence[Row], vectors: Vectors) -> Vectors:
    return vectors[:-1] if any(first_id(row) == POISON for row in rows) else vectors


def drop_last_value(rows: Sequence[Row], vectors: Vectors) -> Vectors:
    return vectors[:, :2] if any(first_id(row) == POISON for row in rows) else vectors


FAILURES = {
    "raises": raise_on_poison,
    "nan": replace_value(float("nan")),
    "infinite": replace_value(float("-inf")),
    "too few vectors": drop_last_vector,
    "vectors too short": drop_last_value,
}


@pytest.mark.parametrize("failure", FAILURES)
def test_failed_pass_fails_its_job_and_the_next_pass_runs(
    failure: str, engine: FakeEngine, running: RunningScheduler
) -> None:
    engine.transform = FAILURES[failure]
    bad, good = Caller(), Caller()
    running.submit(make_job(bad, BUDGET, first=POISON))
    good_job = make_job(good, 3, 4)
    running.submit(good_job)
    assert isinstance(bad.outcome(), str)
    assert "memory" not in str(bad.outcome())  # no exception text to callers
    vectors = good.outcome()
    assert isinstance(vectors, np.ndarray)
    assert np.array_equal(vectors, expected_vectors(good_job))
    running.close()
    assert len(bad.outcomes) == len(good.outcomes) == 1


@pytest.mark.parametrize("failure", ["nan", "infinite"])
def test_non_finite_vector_fails_only_its_job(failure: str, engine: FakeEngine, running: RunningScheduler) -> None:
    occupy_engine(engine, running)
    engine.transform = FAILURES[failure]
    bad, good = Caller(), Caller()
    running.submit(make_job(good, 3))
    running.submit(make_job(bad, 3, 3, first=POISON - 1))
    engine.gate.set()
    assert bad.outcome() == "The model computed a vector that is not finite"
    assert isinstance(good.outcome(), np.ndarray)
    assert len(engine.batches) == 2  # the two jobs shared a batch


def test_non_finite_value_beyond_requested_dimensions_is_ignored(engine: FakeEngine, running: RunningScheduler) -> None:
    engine.transform = replace_value(float("nan"))
    caller = Caller()
    running.submit(make_job(caller, 2, first=POISON, dims=1))
    assert isinstance(caller.outcome(), np.ndarray)


def test_rest_of_failed_job_is_not_computed(engine: FakeEngine, running: RunningScheduler) -> None:
    engine.transform = raise_on_poison
    bad, good = Caller(), Caller()
    running.submit(make_job(bad, *[BUDGET] * 6, first=POISON))
    running.submit(make_job(good, 3))
    assert isinstance(bad.outcome(), str)
    assert isinstance(good.outcome(), np.ndarray)
    assert engine.first_ids() == [POISON, 0]


def test_admitted_tokens_are_released_after_every_outcome(engine: FakeEngine, running: RunningScheduler) -> None:
    """Run failing, cancelled and good jobs: one that kept its tokens would block a later submit forever."""
    engine.transform = raise_on_poison
    for i in range(30):
        callers = [Caller(), Caller(cancelled=True), Caller()]
        for caller, first in zip(callers, (POISON, 0, i), strict=True):
            join_all(start_submitting(running, [make_job(caller, 7, 7, first=first)], threads=1))
        for caller in callers:
            caller.outcome()
    assert running.admitted_tokens == 0


class BrokenCaller(Caller):
    """A Reply without a connection: sending a result fails, and sending an error may fail too."""

    def __init__(self, errors_fail_too: bool) -> None:
        super().__init__()
        self.calls: list[str] = []
        self._errors_fail_too = errors_fail_too

    def done(self, vectors: Vectors, reused: npt.NDArray[np.int32]) -> None:
        self.calls.append("done")
        raise ConnectionError("connection lost")

    def failed(self, reason: str) -> None:
        self.calls.append("failed")
        if self._errors_fail_too:
            raise ConnectionError("connection lost")
        super().failed(reason)


@pytest.mark.parametrize("errors_fail_too", [False, True])
def test_unsendable_reply_becomes_an_error_and_affects_no_other_job(
    errors_fail_too: bool, engine: FakeEngine, running: RunningScheduler
) -> None:
    occupy_engine(engine, running)
    broken, good = BrokenCaller(errors_fail_too), Caller()
    running.submit(make_job(broken, 2))
    running.submit(make_job(good, 2, first=1))
    engine.gate.set()
    assert isinstance(good.outcome(), np.ndarray)
    running.close()
    assert broken.calls == ["done", "failed"]
    assert broken.outcomes == ([] if errors_fail_too else ["The reply could not be sent"])


def test_cancelled_job_is_answered_but_not_computed(engine: FakeEngine, running: RunningScheduler) -> None:
    occupy_engine(engine, running)
    gone, good = Caller(cancelled=True), Caller()
    running.submit(make_job(gone, *[3] * 3, first=500))
    running.submit(make_job(good, 2, first=1))
    engine.gate.set()
    assert gone.outcome() == "dropped: The request was cancelled"
    assert isinstance(good.outcome(), np.ndarray)
    assert engine.first_ids() == [10_000, 1]


def test_job_past_its_deadline_is_not_computed(engine: FakeEngine, running: RunningScheduler) -> None:
    occupy_engine(engine, running)
    late, early, good = Caller(), Caller(), Caller()
    now = time.monotonic()
    running.submit(make_job(late, *[3] * 3, first=500, deadline=now + 0.01))
    running.submit(make_job(early, 2, first=1, deadline=now + TIMEOUT_SECONDS))
    running.submit(make_job(good, 2, first=2))
    while time.monotonic() < now + 0.02:
        time.sleep(0.01)
    engine.gate.set()
    assert late.outcome() == "dropped: The request's deadline passed before its computation started"
    assert isinstance(early.outcome(), np.ndarray)
    assert isinstance(good.outcome(), np.ndarray)
    assert engine.first_ids() == [10_000, 1, 2]
    assert late.cancel_checks == 0
    assert running.admitted_tokens == 0


def test_started_job_is_finished_despite_its_deadline(engine: FakeEngine, running: RunningScheduler) -> None:
    caller, deadline = Caller(), time.monotonic() + 0.2
    engine.gate.clear()
    running.submit(make_job(caller, *[BUDGET] * 3, deadline=deadline))
    assert engine.entered.wait(0.2)
    while time.monotonic() <= deadline:
        time.sleep(0.01)
    engine.gate.set()
    assert isinstance(caller.outcome(), np.ndarray)


class RecordingMetrics:
    """A MetricsSink that records its calls."""

    def __init__(self) -> None:
        self.passes: list[tuple[list[float], float, int]] = []
        self.rows = np.zeros(3, dtype=int)
        self.cache_bytes = 0
        self.threads: set[str] = set()

    def record_pass(self, waits: Sequence[float], seconds: float, tokens: int) -> None:
        self.threads.add(threading.current_thread().name)
        self.passes.append((list(waits), seconds, tokens))

    def record_rows(self, computed: int, in_flight: int, cached: int, cache_bytes: int) -> None:
        self.threads.add(threading.current_thread().name)
        self.rows += computed, in_flight, cached
        self.cache_bytes = cache_bytes


def test_metrics_record_every_pass_and_each_wait_once(engine: FakeEngine) -> None:
    metrics = RecordingMetrics()
    running = RunningScheduler(engine.compute, metrics)
    occupy_engine(engine, running)
    callers = [Caller() for _ in range(3)]
    for i, (caller, lengths) in enumerate(zip(callers, ([4], [4], [3, 8]), strict=True)):
        running.submit(make_job(caller, *lengths, first=10 * i))
    time.sleep(0.05)
    engine.gate.set()
    for caller in callers:
        caller.outcome()
    running.close()
    assert metrics.threads == {"sender"}
    passes = metrics.passes
    assert [(len(waits), tokens) for waits, _, tokens in passes] == [(1, 1), (2, 8), (1, 3), (0, 8)]
    assert passes[0][0][0] < 0.05 <= min(passes[1][0])
    assert passes[0][1] >= 0.05


def test_failing_metrics_affect_no_job(engine: FakeEngine) -> None:
    class Failing(RecordingMetrics):
        def record_pass(self, waits: Sequence[float], seconds: float, tokens: int) -> None:
            raise RuntimeError("no such metric")

        def record_rows(self, computed: int, in_flight: int, cached: int, cache_bytes: int) -> None:
            raise RuntimeError("no such metric")

    running, callers = RunningScheduler(engine.compute, Failing()), [Caller() for _ in range(3)]
    for i, caller in enumerate(callers):
        running.submit(make_job(caller, 2, first=i))
    assert all(isinstance(caller.outcome(), np.ndarray) for caller in callers)
    running.close()


def test_cancellation_is_not_checked_after_the_first_batch(engine: FakeEngine, running: RunningScheduler) -> None:
    """Compute the rest of a job that is cancelled after its first batch: another check costs more than it saves."""
    caller = Caller(is_cancelled=lambda: bool(engine.batches))
    running.submit(make_job(caller, *[BUDGET] * 3))
    assert isinstance(caller.outcome(), np.ndarray)
    assert caller.cancel_checks == 1


def test_failing_cancellation_check_affects_no_job(engine: FakeEngine, running: RunningScheduler) -> None:
    def fail() -> bool:
        raise RuntimeError("no such request")

    occupy_engine(engine, running)
    failing, good = Caller(is_cancelled=fail), Caller()
    running.submit(make_job(failing, 2))
    running.submit(make_job(good, 2, first=1))
    engine.gate.set()
    assert isinstance(good.outcome(), np.ndarray)
    failing.outcome()


def test_close_computes_every_admitted_job(engine: FakeEngine) -> None:
    running = RunningScheduler(engine.compute)
    first = occupy_engine(engine, running)
    callers = [Caller() for _ in range(6)]
    for i, caller in enumerate(callers):
        running.submit(make_job(caller, 3, first=i))
    closing = threading.Thread(target=running.close, daemon=True)
    closing.start()
    closing.join(0.1)
    assert closing.is_alive()
    assert all(not caller.outcomes for caller in callers)
    engine.gate.set()
    closing.join(TIMEOUT_SECONDS)
    assert not closing.is_alive()
    # Not `outcome`, which would wait: all replies must have been sent.
    assert all(isinstance(outcome, np.ndarray) for caller in [first, *callers] for outcome in caller.outcomes)
    assert [len(caller.outcomes) for caller in [first, *callers]] == [1] * 7


def test_cancellation_is_not_checked_without_a_wait(
    engine: FakeEngine, running: RunningScheduler, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(job_file, "CANCEL_SECONDS", TIMEOUT_SECONDS)
    caller = Caller()
    caller.cancelled = lambda: pytest.fail("checked")  # type: ignore[method-assign]
    running.submit(make_job(caller, 3))
    assert isinstance(caller.outcome(), np.ndarray)


# Lanes: with a budget of 40 a job of up to 10 tokens is small.
WIDE_BUDGET = 40


@pytest.fixture
def wide(engine: FakeEngine) -> Iterator[RunningScheduler]:
    running = RunningScheduler(engine.compute, budget=WIDE_BUDGET)
    yield running
    engine.gate.set()
    running.close()


def batch_ids(engine: FakeEngine) -> list[list[int]]:
    """Return the first ids of the rows of each forward pass."""
    return [[first_id(row) for row in batch] for batch in engine.batches]


@pytest.mark.parametrize(("cost", "overtakes"), [(10, True), (11, False)])
def test_small_job_overtakes_large_ones_and_shares_no_pass(
    cost: int, overtakes: bool, engine: FakeEngine, wide: RunningScheduler
) -> None:
    occupy_engine(engine, wide)
    wide.submit(make_job(Caller(), *[10] * 6))
    last = Caller()
    wide.submit(make_job(last, cost, first=100))
    engine.gate.set()
    last.outcome()
    wide.close()
    assert batch_ids(engine)[1:] == ([[100], [0, 1, 2, 3], [4, 5]] if overtakes else [[0, 1, 2, 3], [4, 5, 100]])


def test_lanes_take_turns_while_both_have_jobs(engine: FakeEngine, wide: RunningScheduler) -> None:
    occupy_engine(engine, wide)
    for i in range(4):
        wide.submit(make_job(Caller(), WIDE_BUDGET, first=i))
        for k in range(10):
            wide.submit(make_job(Caller(), 4, first=100 + 10 * i + k))
    engine.gate.set()
    wide.close()
    sizes = [(len(batch), batch[0]) for batch in batch_ids(engine)[1:]]
    assert sizes == [(10, 100), (1, 0), (10, 110), (1, 1), (10, 120), (1, 2), (10, 130), (1, 3)]


def test_stream_of_small_jobs_does_not_starve_a_large_job(
    engine: FakeEngine, wide: RunningScheduler, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Run two callers, each of which submits its next small job when it gets a reply, while a large job runs."""
    monkeypatch.setattr(scheduler_file, "RECENT_SECONDS", 60.0)
    finished = threading.Event()
    reply_counts = [0, 0]

    def submit_small_jobs(caller_index: int) -> None:
        while not finished.is_set():
            caller = Caller()
            wide.submit(make_job(caller, 5, first=1_000_000 * caller_index + reply_counts[caller_index]))
            caller.outcome()
            reply_counts[caller_index] += 1

    def slow(rows: Sequence[Row], vectors: Vectors) -> Vectors:
        time.sleep(0.002)
        return vectors

    engine.transform = slow
    threads = [
        threading.Thread(target=submit_small_jobs, args=(caller_index,), daemon=True) for caller_index in range(2)
    ]
    for thread in threads:
        thread.start()
    large = Caller()
    large_job = make_job(large, *[20] * 40, first=10**7)
    wide.submit(large_job)
    assert isinstance(vectors := large.outcome(), np.ndarray)
    assert np.array_equal(vectors, expected_vectors(large_job))
    finished.set()
    join_all(threads)
    first_large = next(i for i, batch in enumerate(batch_ids(engine)) if batch[0] >= 10**7)
    end_of_large = len(engine.batches) - next(
        i for i, batch in enumerate(reversed(batch_ids(engine))) if batch[0] >= 10**7
    )
    assert end_of_large - first_large <= 2 * 40  # at most every other pass was over small jobs
    assert min(reply_counts) > 3


def test_large_pass_pauses_for_small_jobs_in_bounded_passes(engine: FakeEngine, wide: RunningScheduler) -> None:
    callers = [Caller() for _ in range(5)]
    order: list[str] = []

    def submit_five() -> None:
        for i, caller in enumerate(callers):
            wide.submit(make_job(caller, 4, first=100 + i))

    def expect_two_replies() -> None:
        order.append("pause")
        assert [isinstance(caller.outcome(), np.ndarray) for caller in callers[:2]] == [True, True]
        assert not any(caller.outcomes for caller in callers[2:])

    engine.pause_actions = [
        submit_five,
        expect_two_replies,
        lambda: order.append("pause"),
        lambda: order.append("pause"),
    ]
    large = Caller()
    large_job = make_job(large, 20, 20)
    wide.submit(large_job)
    assert isinstance(vectors := large.outcome(), np.ndarray)
    assert np.array_equal(vectors, expected_vectors(large_job))
    assert order == ["pause"] * 3
    assert batch_ids(engine) == [[0, 1], [100, 101], [102, 103], [104]]  # at most 10 tokens each
    for i, caller in enumerate(callers):
        assert np.array_equal(caller.outcome(), [[100 + i, 4, 103 + i]])
    wide.close()
    assert wide.admitted_tokens == 0


def test_pauses_of_a_pass_compute_at_most_a_budget_of_small_jobs(engine: FakeEngine, wide: RunningScheduler) -> None:
    """Compute the small jobs that exceed it in the next pass."""
    engine.pause_actions = [
        lambda: [wide.submit(make_job(Caller(), 6, first=100 + i)) for i in range(10)],
        *[lambda: None] * 20,
    ]
    wide.submit(make_job(large := Caller(), 30, 30))
    large.outcome()
    wide.close()
    assert batch_ids(engine)[:9] == [[0], *([100 + i] for i in range(7)), [107, 108, 109]]
    assert batch_ids(engine)[9] == [1]


def test_pauses_of_a_shared_pass_compute_at_most_its_own_tokens(
    engine: FakeEngine, wide: RunningScheduler, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Compute 20 tokens of small jobs in the pauses, because a shared pass is half a budget."""
    monkeypatch.setattr(scheduler_file, "RECENT_SECONDS", 60.0)
    wide.submit(make_job(before := Caller(), 1, first=1000))
    before.outcome()
    engine.pause_actions = [
        lambda: [wide.submit(make_job(Caller(), 6, first=100 + i)) for i in range(10)],
        *[lambda: None] * 20,
    ]
    wide.submit(make_job(large := Caller(), 20, 20))
    large.outcome()
    wide.close()
    assert batch_ids(engine)[1:7] == [[0], [100], [101], [102], [103], [104, 105, 106, 107, 108, 109]]


def test_passes_over_small_jobs_do_not_pause(engine: FakeEngine, wide: RunningScheduler) -> None:
    has_pause_hook: list[bool] = []
    compute = engine.compute

    def recording_compute(
        rows: Sequence[Row], dims: Sequence[int], pause_hook: PauseHook | None, spare_core: bool
    ) -> Vectors:
        has_pause_hook.append(pause_hook is not None)
        return compute(rows, dims, pause_hook, spare_core)

    running = RunningScheduler(recording_compute, budget=WIDE_BUDGET)
    engine.pause_actions = [lambda: running.submit(make_job(Caller(), 3, first=50))]
    alone, large = Caller(), Caller()
    running.submit(make_job(alone, 3))
    alone.outcome()
    running.submit(make_job(large, 35, first=1))
    large.outcome()
    running.close()
    assert has_pause_hook == [False, True, False]


class SpareCoreRecorder:
    """A wrapper of an engine that records the tokens of each pass and whether it left a core free."""

    def __init__(self, engine: FakeEngine) -> None:
        self._compute = engine.compute
        self.passes: list[tuple[int, bool]] = []

    def compute(
        self, rows: Sequence[Row], dims: Sequence[int], pause_hook: PauseHook | None, spare_core: bool
    ) -> Vectors:
        self.passes.append((sum(row.cost for row in rows), spare_core))
        return self._compute(rows, dims, pause_hook, spare_core)


def spare_core_passes(
    engine: FakeEngine, budget: int, jobs: Sequence[Sequence[int]], first: int = 1
) -> list[tuple[int, bool]]:
    """Return the passes over jobs of rows of these lengths, submitted while a job of `first` tokens was computed."""
    recorder = SpareCoreRecorder(engine)
    running = RunningScheduler(recorder.compute, budget=budget)
    engine.gate.clear()
    engine.entered.clear()
    callers = [Caller() for _ in range(len(jobs) + 1)]
    for i, (caller, lengths) in enumerate(zip(callers, [[first], *jobs], strict=True)):
        running.submit(make_job(caller, *lengths, first=100 * i))
        assert i or engine.entered.wait(TIMEOUT_SECONDS)
    engine.gate.set()
    assert all(isinstance(caller.outcome(), np.ndarray) for caller in callers)
    running.close()
    return recorder.passes


def test_pass_over_several_light_jobs_leaves_a_core_free(engine: FakeEngine) -> None:
    light = scheduler_file.LIGHT_JOB_TOKENS
    assert spare_core_passes(engine, 400, [[light - 1], [light]]) == [(1, False), (2 * light - 1, True)]
    assert spare_core_passes(engine, 400, [[light], [light]]) == [(1, False), (2 * light, False)]
    assert spare_core_passes(engine, 400, [[5]]) == [(1, False), (5, False)]


def test_passes_over_large_jobs_are_halved_while_small_jobs_arrive(
    engine: FakeEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Check that these passes, and passes over small jobs between them, use every core."""
    monkeypatch.setattr(scheduler_file, "RECENT_SECONDS", 60.0)
    alone = spare_core_passes(engine, 40, [[20, 20, 20]], first=20)
    assert alone == [(20, False), (40, False), (20, False)]
    engine.pause_actions = [lambda: None] * 2
    assert spare_core_passes(engine, 40, [[20, 20, 20]]) == [(1, False), (20, False), (20, False), (20, False)]
    assert spare_core_passes(engine, 40, [[20, 20], [3]]) == [(1, False), (3, False), (20, False), (20, False)]


def test_failure_in_a_pause_fails_only_its_job(engine: FakeEngine, wide: RunningScheduler) -> None:
    engine.transform = raise_on_poison
    bad, good, large = Caller(), Caller(), Caller()
    engine.pause_actions = [
        lambda: wide.submit(make_job(bad, 3, first=POISON)),
        lambda: wide.submit(make_job(good, 3, first=5)),
        lambda: None,
    ]
    large_job = make_job(large, 35, first=1)
    wide.submit(large_job)
    assert isinstance(vectors := large.outcome(), np.ndarray)
    assert np.array_equal(vectors, expected_vectors(large_job))
    assert isinstance(bad.outcome(), str)
    assert isinstance(good.outcome(), np.ndarray)
    wide.close()
    assert [len(caller.outcomes) for caller in (bad, good, large)] == [1, 1, 1]
    assert wide.admitted_tokens == 0


def test_failed_large_pass_keeps_the_results_of_its_pauses(engine: FakeEngine, wide: RunningScheduler) -> None:
    engine.transform = raise_on_poison
    small, large, next_one = Caller(), Caller(), Caller()
    engine.pause_actions = [lambda: wide.submit(make_job(small, 3, first=5))]
    wide.submit(make_job(large, 35, first=POISON))
    assert large.outcome() == "The model failed to compute this request"
    assert isinstance(small.outcome(), np.ndarray)
    engine.pause_actions = []
    wide.submit(make_job(next_one, 35, first=6))
    assert isinstance(next_one.outcome(), np.ndarray)
    assert wide.admitted_tokens == 0


def test_small_job_can_be_dropped_in_a_pause(engine: FakeEngine, wide: RunningScheduler) -> None:
    gone, large = Caller(cancelled=True), Caller()
    engine.pause_actions = [lambda: wide.submit(make_job(gone, 3, first=5))]
    wide.submit(make_job(large, 35))
    assert gone.outcome() == "dropped: The request was cancelled"
    assert isinstance(large.outcome(), np.ndarray)
    assert batch_ids(engine) == [[0]]


def test_seconds_of_a_pass_exclude_its_pauses(engine: FakeEngine) -> None:
    metrics = RecordingMetrics()
    running = RunningScheduler(engine.compute, metrics, budget=WIDE_BUDGET)

    def slow(rows: Sequence[Row], vectors: Vectors) -> Vectors:
        time.sleep(0.1 if first_id(rows[0]) == 5 else 0.02)
        return vectors

    engine.transform = slow
    engine.pause_actions = [lambda: running.submit(make_job(Caller(), 3, first=5))]
    running.submit(make_job(Caller(), 35))
    running.close()
    (_, small, _), (_, large, _) = metrics.passes
    assert small >= 0.1
    assert 0.02 <= large < 0.1


def test_idle_scheduler_uses_no_cpu_time(running: RunningScheduler) -> None:
    time.sleep(0.05)
    before = time.process_time()
    time.sleep(0.3)
    assert time.process_time() - before < 0.05
