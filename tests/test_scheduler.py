"""The scheduler with real threads: every job is answered exactly once with its own rows in order, whatever fails.

`compute` is a stand-in that says what it was given: a vector holds its row's first id, its length and its sum.
A picture costs tokens and has no ids. With the budget used here a job of up to two tokens is a small
one.
"""

import math
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Executor, Future
from random import Random
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from triton_embed.python_backend.execution.budget import Budget
from triton_embed.python_backend.inputs.row import NO_IDS, Row
from triton_embed.python_backend.scheduling import job as job_file
from triton_embed.python_backend.scheduling import scheduler as scheduler_file
from triton_embed.python_backend.scheduling.job import Job
from triton_embed.python_backend.scheduling.scheduler import (
    ADMITTED_BUDGETS,
    Compute,
    MetricsSink,
    PauseHook,
    Scheduler,
)
from triton_embed.python_backend.scheduling.sender import Sender

BUDGET = 10
POISON = 666
PATIENCE = 5.0  # seconds: how long a test waits before it calls a job forgotten
pytestmark = pytest.mark.timeout(60)
Vectors = npt.NDArray[np.float32]


class Caller:
    """A Reply that remembers what it was told."""

    def __init__(self, cancelled: bool = False, asked: Callable[[], bool] | None = None) -> None:
        self.outcomes: list[Vectors | str] = []
        self.reused: list[int] = []
        self.asked = 0
        self._cancelled = asked or (lambda: cancelled)
        self._told = threading.Event()

    def cancelled(self) -> bool:
        self.asked += 1
        return self._cancelled()

    def done(self, vectors: Vectors, reused: npt.NDArray[np.int32]) -> None:
        self.outcomes.append(vectors)
        self.reused = reused.tolist()
        self._told.set()

    def failed(self, reason: str) -> None:
        self.outcomes.append(reason)
        self._told.set()

    def dropped(self, reason: str) -> None:
        self.outcomes.append(f"dropped: {reason}")
        self._told.set()

    def outcome(self) -> Vectors | str:
        """The one outcome. Call it after `close` as well, to be sure that no second one came."""
        assert self._told.wait(PATIENCE), "never answered"
        assert len(self.outcomes) == 1, self.outcomes
        return self.outcomes[0]


def row(first: int, length: int) -> Row:
    return Row(np.array([first, *[1] * (length - 1)], dtype=np.int32))


def picture(first: int, cost: int, *ids: int) -> Row:
    """A picture of one colour, by itself or among ids."""
    colour = np.full((1, 1, 3), first, dtype=np.uint8)
    return Row(np.array(ids, dtype=np.int32) if ids else NO_IDS, (colour,), cost - len(ids))


def job(caller: Caller, *lengths: int, first: int = 0, dims: int = 3, deadline: float = math.inf) -> Job:
    """Rows of these lengths, whose first ids count up from `first`."""
    return Job([row(first + i, length) for i, length in enumerate(lengths)], dims, caller, deadline)


def first_chunks(one: Row) -> int:
    return int(one.ids[0] if len(one.ids) else one.pictures[0][0, 0, 0])


def vectors_of(asked: Job) -> Vectors:
    found = [[first_chunks(one), one.cost, one.ids.sum()] for one in asked.rows]
    return np.array(found, dtype=np.float32)[:, : asked.dims]


class Engine:
    """`compute`, its record, a gate in front of it, some pauses in it and ways to go wrong."""

    def __init__(self) -> None:
        self.batches: list[list[Row]] = []
        self.pauses: list[Callable[[], object]] = []  # what happens before each chance to compute something else
        self.gate = threading.Event()
        self.gate.set()
        self.entered = threading.Event()
        self.spoil: Callable[[Sequence[Row], Vectors], Vectors] = lambda _, vectors: vectors

    def compute(
        self, rows: Sequence[Row], dims: Sequence[int], pause_hook: PauseHook | None, spare_core: bool
    ) -> Vectors:
        assert len(rows) == len(dims)
        self.batches.append(list(rows))
        self.entered.set()
        assert self.gate.wait(PATIENCE)
        if pause_hook is not None:
            for happens in self.pauses:
                happens()
                pause_hook()
        found = np.zeros((len(rows), 8), dtype=np.float32)
        for vector, one in zip(found, rows, strict=True):
            vector[:3] = first_chunks(one), one.cost, one.ids.sum()
        return self.spoil(rows, found)

    def firsts(self) -> list[int]:
        """First ids of all rows computed, in order."""
        return [first_chunks(one) for batch in self.batches for one in batch]


class DaemonExecutor(Executor):
    """One thread that an engine in an endless loop cannot keep pytest alive with."""

    def submit(self, work: Callable[..., Any], /, *args: Any, **kwargs: Any) -> "Future[Any]":
        future: Future[Any] = Future()

        def run() -> None:
            try:
                future.set_result(work(*args, **kwargs))
            except BaseException as error:  # noqa: BLE001 - whoever waits for the result gets it
                future.set_exception(error)

        threading.Thread(target=run, name="engine", daemon=True).start()
        return future


class Running:
    """A scheduler and its delivery thread; `close` as `finalize` does it."""

    def __init__(
        self, compute: Compute, watch: MetricsSink | None = None, budget: int = BUDGET, cache_bytes: int = 0
    ) -> None:
        self.delivery = Sender()
        self.scheduler = Scheduler(
            compute, Budget(budget, budget // 2, budget // 4), self.delivery, DaemonExecutor(), watch, cache_bytes
        )
        self.submit = self.scheduler.submit

    @property
    def admitted(self) -> int:
        """Tokens that count in either lane; jobs that are waited for too, when nothing is left of them: none."""
        admitted = self.scheduler._small.admitted_tokens + self.scheduler._large.admitted_tokens
        assert not self.scheduler._dedup._pending or admitted
        return admitted

    def close(self) -> None:
        closing = threading.Thread(target=self.scheduler.close, daemon=True)
        closing.start()
        closing.join(PATIENCE)
        assert not closing.is_alive(), "the engine does not stop"
        self.delivery.close()


@pytest.fixture(autouse=True)
def ask_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every job is asked whether it was cancelled, however short its wait."""
    monkeypatch.setattr(job_file, "CANCEL_SECONDS", 0)


@pytest.fixture(autouse=True)
def undivided(monkeypatch: pytest.MonkeyPatch) -> None:
    """Small jobs are forgotten at once: a pass over large ones is a budget."""
    monkeypatch.setattr(scheduler_file, "RECENT_SECONDS", 0.0)


@pytest.fixture
def engine() -> Engine:
    return Engine()


@pytest.fixture
def running(engine: Engine) -> Iterator[Running]:
    made = Running(engine.compute)
    yield made
    engine.gate.set()
    made.close()


def submitting(running: Running, jobs: Sequence[Job], threads: int) -> list[threading.Thread]:
    """Threads that submit these jobs between them; `finish` waits for them."""

    def submit(share: Sequence[Job]) -> None:
        for one in share:
            running.submit(one)

    started = [threading.Thread(target=submit, args=(jobs[i::threads],), daemon=True) for i in range(threads)]
    for thread in started:
        thread.start()
    return started


def finish(threads: Sequence[threading.Thread]) -> None:
    for thread in threads:
        thread.join(PATIENCE)
        assert not thread.is_alive(), "submit hangs"


def hold(engine: Engine, running: Running) -> Caller:
    """Occupy the engine with one small job, so that what follows still waits."""
    engine.gate.clear()
    first = Caller()
    running.submit(job(first, 1, first=10_000))
    assert engine.entered.wait(PATIENCE)
    return first


def test_every_one_of_many_jobs_gets_its_own_rows_in_order(engine: Engine, running: Running) -> None:
    random = Random(0)
    callers = [Caller() for _ in range(400)]
    jobs = [
        job(caller, *(random.randint(1, 14) for _ in range(random.choice([1, 1, 2, 9]))), first=100 * i, dims=1 + i % 3)
        for i, caller in enumerate(callers)
    ]
    finish(submitting(running, jobs, threads=4))
    for asked, caller in zip(jobs, callers, strict=True):
        found = caller.outcome()
        assert isinstance(found, np.ndarray)
        assert found.dtype == np.float32
        assert np.array_equal(found, vectors_of(asked))
    running.close()
    assert all(len(caller.outcomes) == 1 for caller in callers)
    assert all(1 <= caller.asked <= 2 for caller in callers)  # again where its first row did not fit
    assert sorted(engine.firsts()) == sorted(first_chunks(one) for asked in jobs for one in asked.rows)


def test_a_batch_stays_within_the_budget_and_runs_from_short_to_long(engine: Engine, running: Running) -> None:
    random, callers = Random(1), [Caller() for _ in range(60)]
    hold(engine, running)
    jobs = [job(caller, *(random.randint(1, 14) for _ in range(3)), first=3 * i) for i, caller in enumerate(callers)]
    threads = submitting(running, jobs, threads=1)
    engine.gate.set()
    finish(threads)
    for caller in callers:
        caller.outcome()
    lengths = [[one.cost for one in batch] for batch in engine.batches]
    assert all(sum(batch) <= BUDGET or len(batch) == 1 for batch in lengths)
    assert all(batch == sorted(batch) for batch in lengths)
    assert max(map(len, lengths)) > 1


def test_a_job_larger_than_the_budget_is_split_and_answered_once(engine: Engine, running: Running) -> None:
    caller = Caller()
    asked = job(caller, 4, 9, 4, 4, 1, 4, 4)
    running.submit(asked)
    found = caller.outcome()
    assert isinstance(found, np.ndarray)
    assert np.array_equal(found, vectors_of(asked))
    assert len(engine.batches) > 2


def test_a_row_longer_than_the_budget_is_computed_alone(engine: Engine, running: Running) -> None:
    caller = Caller()
    running.submit(job(caller, 1, 35, 1))
    found = caller.outcome()
    assert isinstance(found, np.ndarray)
    assert found[:, 1].tolist() == [1, 35, 1]
    assert [35] in [[one.cost for one in batch] for batch in engine.batches]


def test_a_picture_counts_by_what_it_costs_in_all_towers(engine: Engine, running: Running) -> None:
    hold(engine, running)
    caller, dims = Caller(), 3
    asked = Job([row(0, 2), picture(1, 6), picture(2, 8), picture(3, 2), picture(4, 9, 4, 4, 4)], dims, caller)
    assert asked.cost == 27
    running.submit(asked)
    engine.gate.set()
    found = caller.outcome()
    assert isinstance(found, np.ndarray)
    assert np.array_equal(found, vectors_of(asked))
    assert [[first_chunks(one) for one in batch] for batch in engine.batches[1:]] == [[0, 3, 1], [2], [4]]


def test_submit_waits_for_pictures_too(engine: Engine, running: Running) -> None:
    hold(engine, running)
    running.submit(Job([picture(1, ADMITTED_BUDGETS * BUDGET)], 3, Caller()))
    late = threading.Thread(target=running.submit, args=(job(Caller(), 3),), daemon=True)
    late.start()
    late.join(0.2)
    assert late.is_alive()
    engine.gate.set()
    late.join(PATIENCE)
    assert not late.is_alive()


def test_jobs_share_a_batch_and_are_served_first_come_first_served(engine: Engine, running: Running) -> None:
    hold(engine, running)
    callers = [Caller() for _ in range(7)]
    for i, caller in enumerate(callers):
        running.submit(job(caller, 2, first=i))
    engine.gate.set()
    for caller in callers:
        caller.outcome()
        assert caller.reused == [0]
    assert [[first_chunks(one) for one in batch] for batch in engine.batches[1:]] == [[0, 1, 2, 3, 4], [5, 6]]


@pytest.mark.parametrize("size", [1, BUDGET])
def test_submit_waits_when_a_lane_is_full_and_goes_on_when_there_is_room(
    size: int, engine: Engine, running: Running
) -> None:
    """A lane holds eight budgets, and what brings it over them."""
    hold(engine, running)
    other = BUDGET if size == 1 else 1
    running.submit(job(Caller(), other, first=10_001))  # counts elsewhere
    fits = ADMITTED_BUDGETS * BUDGET // size - (size == 1)  # the one that holds the engine is a small one
    callers = [Caller() for _ in range(fits + 2)]
    admitted: list[int] = []

    def submit_all() -> None:
        for i, caller in enumerate(callers):
            running.submit(job(caller, size, first=i))
            admitted.append(i)

    thread = threading.Thread(target=submit_all, daemon=True)
    thread.start()
    thread.join(0.2)
    assert thread.is_alive()
    assert admitted == list(range(fits))
    running.submit(job(Caller(), other, first=10_002))  # the other lane has room
    engine.gate.set()
    thread.join(PATIENCE)
    assert admitted == list(range(fits + 2))
    for caller in callers:
        assert isinstance(caller.outcome(), np.ndarray)


def raising(rows: Sequence[Row], vectors: Vectors) -> Vectors:
    if any(first_chunks(one) == POISON for one in rows):
        raise MemoryError("the machine is full")
    return vectors


def not_finite(value: float) -> Callable[[Sequence[Row], Vectors], Vectors]:
    def spoil(rows: Sequence[Row], vectors: Vectors) -> Vectors:
        for one, vector in zip(rows, vectors, strict=True):
            if first_chunks(one) == POISON:
                vector[1] = value
        return vectors

    return spoil


def too_few(rows: Sequence[Row], vectors: Vectors) -> Vectors:
    return vectors[:-1] if any(first_chunks(one) == POISON for one in rows) else vectors


def too_short(rows: Sequence[Row], vectors: Vectors) -> Vectors:
    return vectors[:, :2] if any(first_chunks(one) == POISON for one in rows) else vectors


WRONG = {
    "raises": raising,
    "nan": not_finite(float("nan")),
    "infinite": not_finite(float("-inf")),
    "too few vectors": too_few,
    "vectors too short": too_short,
}


@pytest.mark.parametrize("wrong", WRONG)
def test_a_forward_pass_that_goes_wrong_is_one_failure_and_the_next_one_runs(
    wrong: str, engine: Engine, running: Running
) -> None:
    engine.spoil = WRONG[wrong]
    bad, good = Caller(), Caller()
    running.submit(job(bad, BUDGET, first=POISON))
    asked = job(good, 3, 4)
    running.submit(asked)
    assert isinstance(bad.outcome(), str)
    assert "machine" not in str(bad.outcome())  # no exception text to callers
    found = good.outcome()
    assert isinstance(found, np.ndarray)
    assert np.array_equal(found, vectors_of(asked))
    running.close()
    assert len(bad.outcomes) == len(good.outcomes) == 1


@pytest.mark.parametrize("wrong", ["nan", "infinite"])
def test_a_vector_that_is_not_finite_fails_its_own_job_alone(wrong: str, engine: Engine, running: Running) -> None:
    hold(engine, running)
    engine.spoil = WRONG[wrong]
    bad, good = Caller(), Caller()
    running.submit(job(good, 3))
    running.submit(job(bad, 3, 3, first=POISON - 1))
    engine.gate.set()
    assert bad.outcome() == "The model computed a vector that is not finite"
    assert isinstance(good.outcome(), np.ndarray)
    assert len(engine.batches) == 2  # they shared one


def test_a_value_beyond_the_dimensions_asked_for_may_be_anything(engine: Engine, running: Running) -> None:
    engine.spoil = not_finite(float("nan"))
    caller = Caller()
    running.submit(job(caller, 2, first=POISON, dims=1))
    assert isinstance(caller.outcome(), np.ndarray)


def test_the_rest_of_a_failed_job_is_not_computed(engine: Engine, running: Running) -> None:
    engine.spoil = raising
    bad, good = Caller(), Caller()
    running.submit(job(bad, *[BUDGET] * 6, first=POISON))
    running.submit(job(good, 3))
    assert isinstance(bad.outcome(), str)
    assert isinstance(good.outcome(), np.ndarray)
    assert engine.firsts() == [POISON, 0]


def test_admission_is_given_back_whatever_became_of_the_jobs(engine: Engine, running: Running) -> None:
    """Had any of these kept its tokens, a later submit would wait for ever."""
    engine.spoil = raising
    for i in range(30):
        callers = [Caller(), Caller(cancelled=True), Caller()]
        for caller, first in zip(callers, (POISON, 0, i), strict=True):
            finish(submitting(running, [job(caller, 7, 7, first=first)], threads=1))
        for caller in callers:
            caller.outcome()
    assert running.admitted == 0


class Broken(Caller):
    """Its connection is gone: sending a result fails, and so may sending an error."""

    def __init__(self, errors_too: bool) -> None:
        super().__init__()
        self.tries: list[str] = []
        self._errors_too = errors_too

    def done(self, vectors: Vectors, reused: npt.NDArray[np.int32]) -> None:
        self.tries.append("done")
        raise ConnectionError("gone")

    def failed(self, reason: str) -> None:
        self.tries.append("failed")
        if self._errors_too:
            raise ConnectionError("gone")
        super().failed(reason)


@pytest.mark.parametrize("errors_too", [False, True])
def test_a_reply_that_cannot_be_sent_is_an_error_instead_and_harms_nobody(
    errors_too: bool, engine: Engine, running: Running
) -> None:
    hold(engine, running)
    broken, good = Broken(errors_too), Caller()
    running.submit(job(broken, 2))
    running.submit(job(good, 2, first=1))
    engine.gate.set()
    assert isinstance(good.outcome(), np.ndarray)
    running.close()
    assert broken.tries == ["done", "failed"]
    assert broken.outcomes == ([] if errors_too else ["The reply could not be sent"])


def test_a_cancelled_job_is_answered_but_never_computed(engine: Engine, running: Running) -> None:
    hold(engine, running)
    gone, good = Caller(cancelled=True), Caller()
    running.submit(job(gone, *[3] * 3, first=500))
    running.submit(job(good, 2, first=1))
    engine.gate.set()
    assert gone.outcome() == "dropped: The request was cancelled"
    assert isinstance(good.outcome(), np.ndarray)
    assert engine.firsts() == [10_000, 1]


def test_a_job_whose_deadline_passes_before_it_begins_is_never_computed(engine: Engine, running: Running) -> None:
    hold(engine, running)
    late, early, good = Caller(), Caller(), Caller()
    now = time.monotonic()
    running.submit(job(late, *[3] * 3, first=500, deadline=now + 0.01))
    running.submit(job(early, 2, first=1, deadline=now + PATIENCE))
    running.submit(job(good, 2, first=2))
    while time.monotonic() < now + 0.02:
        time.sleep(0.01)
    engine.gate.set()
    assert late.outcome() == "dropped: The request's deadline passed before its computation started"
    assert isinstance(early.outcome(), np.ndarray)
    assert isinstance(good.outcome(), np.ndarray)
    assert engine.firsts() == [10_000, 1, 2]
    assert late.asked == 0
    assert running.admitted == 0


def test_a_job_that_has_begun_is_finished_whatever_its_deadline(engine: Engine, running: Running) -> None:
    caller, deadline = Caller(), time.monotonic() + 0.2
    engine.gate.clear()
    running.submit(job(caller, *[BUDGET] * 3, deadline=deadline))
    assert engine.entered.wait(0.2)
    while time.monotonic() <= deadline:
        time.sleep(0.01)
    engine.gate.set()
    assert isinstance(caller.outcome(), np.ndarray)


class Watching:
    """A MetricsSink that remembers."""

    def __init__(self) -> None:
        self.passes: list[tuple[list[float], float, int]] = []
        self.rows = np.zeros(3, dtype=int)
        self.cache_bytes = 0
        self.threads: set[str] = set()

    def passed(self, waits: Sequence[float], seconds: float, tokens: int) -> None:
        self.threads.add(threading.current_thread().name)
        self.passes.append((list(waits), seconds, tokens))

    def answered(self, computed: int, in_flight: int, cached: int, cache_bytes: int) -> None:
        self.threads.add(threading.current_thread().name)
        self.rows += computed, in_flight, cached
        self.cache_bytes = cache_bytes


def test_every_forward_pass_is_told_and_every_wait_once(engine: Engine) -> None:
    watch = Watching()
    running = Running(engine.compute, watch)
    hold(engine, running)
    callers = [Caller() for _ in range(3)]
    for i, (caller, lengths) in enumerate(zip(callers, ([4], [4], [3, 8]), strict=True)):
        running.submit(job(caller, *lengths, first=10 * i))
    time.sleep(0.05)
    engine.gate.set()
    for caller in callers:
        caller.outcome()
    running.close()
    assert watch.threads == {"sender"}
    told = watch.passes
    assert [(len(waits), tokens) for waits, _, tokens in told] == [(1, 1), (2, 8), (1, 3), (0, 8)]
    assert told[0][0][0] < 0.05 <= min(told[1][0])
    assert told[0][1] >= 0.05


def test_a_watch_that_fails_harms_nobody(engine: Engine) -> None:
    class Failing(Watching):
        def passed(self, waits: Sequence[float], seconds: float, tokens: int) -> None:
            raise RuntimeError("no such metric")

        def answered(self, computed: int, in_flight: int, cached: int, cache_bytes: int) -> None:
            raise RuntimeError("no such metric")

    running, callers = Running(engine.compute, Failing()), [Caller() for _ in range(3)]
    for i, caller in enumerate(callers):
        running.submit(job(caller, 2, first=i))
    assert all(isinstance(caller.outcome(), np.ndarray) for caller in callers)
    running.close()


def test_a_job_is_asked_once_and_not_again_half_way(engine: Engine, running: Running) -> None:
    """Cancelled after its first batch: asking costs more than the rest is worth."""
    caller = Caller(asked=lambda: bool(engine.batches))
    running.submit(job(caller, *[BUDGET] * 3))
    assert isinstance(caller.outcome(), np.ndarray)
    assert caller.asked == 1


def test_a_caller_that_cannot_be_asked_harms_nobody(engine: Engine, running: Running) -> None:
    def fail() -> bool:
        raise RuntimeError("no such request")

    hold(engine, running)
    odd, good = Caller(asked=fail), Caller()
    running.submit(job(odd, 2))
    running.submit(job(good, 2, first=1))
    engine.gate.set()
    assert isinstance(good.outcome(), np.ndarray)
    odd.outcome()


def test_close_computes_everything_that_was_admitted(engine: Engine) -> None:
    running = Running(engine.compute)
    first = hold(engine, running)
    callers = [Caller() for _ in range(6)]
    for i, caller in enumerate(callers):
        running.submit(job(caller, 3, first=i))
    closing = threading.Thread(target=running.close, daemon=True)
    closing.start()
    closing.join(0.1)
    assert closing.is_alive()
    assert all(not caller.outcomes for caller in callers)
    engine.gate.set()
    closing.join(PATIENCE)
    assert not closing.is_alive()
    # Answered already: nobody waits here.
    assert all(isinstance(outcome, np.ndarray) for caller in [first, *callers] for outcome in caller.outcomes)
    assert [len(caller.outcomes) for caller in [first, *callers]] == [1] * 7


def test_a_job_that_did_not_wait_is_not_asked(
    engine: Engine, running: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(job_file, "CANCEL_SECONDS", PATIENCE)
    caller = Caller()
    caller.cancelled = lambda: pytest.fail("asked")  # type: ignore[method-assign]
    running.submit(job(caller, 3))
    assert isinstance(caller.outcome(), np.ndarray)


# Lanes: with a budget of 40 a job of up to 10 tokens is small.
WIDE = 40


@pytest.fixture
def wide(engine: Engine) -> Iterator[Running]:
    made = Running(engine.compute, budget=WIDE)
    yield made
    engine.gate.set()
    made.close()


def computed(engine: Engine) -> list[list[int]]:
    """First ids of each forward pass."""
    return [[first_chunks(one) for one in batch] for batch in engine.batches]


@pytest.mark.parametrize(("cost", "overtakes"), [(10, True), (11, False)])
def test_a_small_job_overtakes_large_ones_and_shares_no_pass_with_them(
    cost: int, overtakes: bool, engine: Engine, wide: Running
) -> None:
    hold(engine, wide)
    wide.submit(job(Caller(), *[10] * 6))
    last = Caller()
    wide.submit(job(last, cost, first=100))
    engine.gate.set()
    last.outcome()
    wide.close()
    assert computed(engine)[1:] == ([[100], [0, 1, 2, 3], [4, 5]] if overtakes else [[0, 1, 2, 3], [4, 5, 100]])


def test_where_both_lanes_wait_they_take_turns(engine: Engine, wide: Running) -> None:
    hold(engine, wide)
    for i in range(4):
        wide.submit(job(Caller(), WIDE, first=i))
        for k in range(10):
            wide.submit(job(Caller(), 4, first=100 + 10 * i + k))
    engine.gate.set()
    wide.close()
    sizes = [(len(batch), batch[0]) for batch in computed(engine)[1:]]
    assert sizes == [(10, 100), (1, 0), (10, 110), (1, 1), (10, 120), (1, 2), (10, 130), (1, 3)]


def test_a_stream_of_small_jobs_starves_no_large_one(
    engine: Engine, wide: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two callers, each of whom asks again as soon as it is answered, for as long as a large job runs."""
    monkeypatch.setattr(scheduler_file, "RECENT_SECONDS", 60.0)
    finished = threading.Event()
    answered = [0, 0]

    def ask(me: int) -> None:
        while not finished.is_set():
            caller = Caller()
            wide.submit(job(caller, 5, first=1_000_000 * me + answered[me]))
            caller.outcome()
            answered[me] += 1

    def slow(rows: Sequence[Row], vectors: Vectors) -> Vectors:
        time.sleep(0.002)
        return vectors

    engine.spoil = slow
    threads = [threading.Thread(target=ask, args=(me,), daemon=True) for me in range(2)]
    for thread in threads:
        thread.start()
    large = Caller()
    asked = job(large, *[20] * 40, first=10**7)
    wide.submit(asked)
    assert isinstance(found := large.outcome(), np.ndarray)
    assert np.array_equal(found, vectors_of(asked))
    finished.set()
    finish(threads)
    begun = next(i for i, batch in enumerate(computed(engine)) if batch[0] >= 10**7)
    ended = len(engine.batches) - next(i for i, b in enumerate(reversed(computed(engine))) if b[0] >= 10**7)
    assert ended - begun <= 2 * 40  # at most every other one was somebody else's
    assert min(answered) > 3


def test_a_large_pass_pauses_for_small_jobs_by_a_bounded_pass_at_a_time(engine: Engine, wide: Running) -> None:
    callers = [Caller() for _ in range(5)]
    order: list[str] = []

    def five_come() -> None:
        for i, caller in enumerate(callers):
            wide.submit(job(caller, 4, first=100 + i))

    def two_are_answered() -> None:
        order.append("pause")
        assert [isinstance(caller.outcome(), np.ndarray) for caller in callers[:2]] == [True, True]
        assert not any(caller.outcomes for caller in callers[2:])

    engine.pauses = [five_come, two_are_answered, lambda: order.append("pause"), lambda: order.append("pause")]
    large = Caller()
    asked = job(large, 20, 20)
    wide.submit(asked)
    assert isinstance(found := large.outcome(), np.ndarray)
    assert np.array_equal(found, vectors_of(asked))
    assert order == ["pause"] * 3
    assert computed(engine) == [[0, 1], [100, 101], [102, 103], [104]]  # at most 10 tokens each
    for i, caller in enumerate(callers):
        assert np.array_equal(caller.outcome(), [[100 + i, 4, 103 + i]])
    wide.close()
    assert wide.admitted == 0


def test_small_jobs_get_a_budget_in_all_the_pauses_of_a_pass(engine: Engine, wide: Running) -> None:
    """Where there are more of them the pass goes on, and theirs is the next."""
    engine.pauses = [lambda: [wide.submit(job(Caller(), 6, first=100 + i)) for i in range(10)], *[lambda: None] * 20]
    wide.submit(job(large := Caller(), 30, 30))
    large.outcome()
    wide.close()
    assert computed(engine)[:9] == [[0], *([100 + i] for i in range(7)), [107, 108, 109]]
    assert computed(engine)[9] == [1]


def test_small_jobs_get_no_more_of_a_shared_pass_than_it_takes_itself(
    engine: Engine, wide: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However many come: a shared pass is half a budget, 20 tokens."""
    monkeypatch.setattr(scheduler_file, "RECENT_SECONDS", 60.0)
    wide.submit(job(before := Caller(), 1, first=1000))
    before.outcome()
    engine.pauses = [lambda: [wide.submit(job(Caller(), 6, first=100 + i)) for i in range(10)], *[lambda: None] * 20]
    wide.submit(job(large := Caller(), 20, 20))
    large.outcome()
    wide.close()
    assert computed(engine)[1:7] == [[0], [100], [101], [102], [103], [104, 105, 106, 107, 108, 109]]


def test_a_small_pass_and_a_pass_in_a_pause_are_not_interrupted(engine: Engine, wide: Running) -> None:
    betweens: list[bool] = []
    compute = engine.compute

    def watched(rows: Sequence[Row], dims: Sequence[int], pause_hook: PauseHook | None, spare_core: bool) -> Vectors:
        betweens.append(pause_hook is not None)
        return compute(rows, dims, pause_hook, spare_core)

    running = Running(watched, budget=WIDE)
    engine.pauses = [lambda: running.submit(job(Caller(), 3, first=50))]
    alone, large = Caller(), Caller()
    running.submit(job(alone, 3))
    alone.outcome()
    running.submit(job(large, 35, first=1))
    large.outcome()
    running.close()
    assert betweens == [False, True, False]


class Spared:
    """An engine, and of each pass begun: its tokens, and whether it left a core to others."""

    def __init__(self, engine: Engine) -> None:
        self._compute = engine.compute
        self.passes: list[tuple[int, bool]] = []

    def compute(
        self, rows: Sequence[Row], dims: Sequence[int], pause_hook: PauseHook | None, spare_core: bool
    ) -> Vectors:
        self.passes.append((sum(one.cost for one in rows), spare_core))
        return self._compute(rows, dims, pause_hook, spare_core)


def spared(engine: Engine, budget: int, jobs: Sequence[Sequence[int]], first: int = 1) -> list[tuple[int, bool]]:
    """The passes over jobs of rows of these lengths, which came while a job of `first` tokens was computed."""
    seen = Spared(engine)
    running = Running(seen.compute, budget=budget)
    engine.gate.clear()
    engine.entered.clear()
    callers = [Caller() for _ in range(len(jobs) + 1)]
    for i, (caller, lengths) in enumerate(zip(callers, [[first], *jobs], strict=True)):
        running.submit(job(caller, *lengths, first=100 * i))
        assert i or engine.entered.wait(PATIENCE)
    engine.gate.set()
    assert all(isinstance(caller.outcome(), np.ndarray) for caller in callers)
    running.close()
    return seen.passes


def test_several_jobs_of_few_tokens_leave_a_core_to_others(engine: Engine) -> None:
    light = scheduler_file.LIGHT_JOB_TOKENS
    assert spared(engine, 400, [[light - 1], [light]]) == [(1, False), (2 * light - 1, True)]
    assert spared(engine, 400, [[light], [light]]) == [(1, False), (2 * light, False)]
    assert spared(engine, 400, [[5]]) == [(1, False), (5, False)]


def test_while_small_jobs_come_passes_over_large_ones_are_halved(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And leave a core, as do the small ones among them."""
    monkeypatch.setattr(scheduler_file, "RECENT_SECONDS", 60.0)
    alone = spared(engine, 40, [[20, 20, 20]], first=20)
    assert alone == [(20, False), (40, False), (20, False)]
    engine.pauses = [lambda: None] * 2
    assert spared(engine, 40, [[20, 20, 20]]) == [(1, False), (20, True), (20, True), (20, True)]
    assert spared(engine, 40, [[20, 20], [3]]) == [(1, False), (3, True), (20, True), (20, True)]


def test_what_fails_in_a_pause_fails_alone(engine: Engine, wide: Running) -> None:
    engine.spoil = raising
    bad, good, large = Caller(), Caller(), Caller()
    engine.pauses = [
        lambda: wide.submit(job(bad, 3, first=POISON)),
        lambda: wide.submit(job(good, 3, first=5)),
        lambda: None,
    ]
    asked = job(large, 35, first=1)
    wide.submit(asked)
    assert isinstance(found := large.outcome(), np.ndarray)
    assert np.array_equal(found, vectors_of(asked))
    assert isinstance(bad.outcome(), str)
    assert isinstance(good.outcome(), np.ndarray)
    wide.close()
    assert [len(caller.outcomes) for caller in (bad, good, large)] == [1, 1, 1]
    assert wide.admitted == 0


def test_a_large_pass_that_fails_takes_nothing_from_what_was_computed_in_its_pauses(
    engine: Engine, wide: Running
) -> None:
    engine.spoil = raising
    small, large, next_one = Caller(), Caller(), Caller()
    engine.pauses = [lambda: wide.submit(job(small, 3, first=5))]
    wide.submit(job(large, 35, first=POISON))
    assert large.outcome() == "The model failed to compute this request"
    assert isinstance(small.outcome(), np.ndarray)
    engine.pauses = []
    wide.submit(job(next_one, 35, first=6))
    assert isinstance(next_one.outcome(), np.ndarray)
    assert wide.admitted == 0


def test_a_small_job_may_be_dropped_in_a_pause(engine: Engine, wide: Running) -> None:
    gone, large = Caller(cancelled=True), Caller()
    engine.pauses = [lambda: wide.submit(job(gone, 3, first=5))]
    wide.submit(job(large, 35))
    assert gone.outcome() == "dropped: The request was cancelled"
    assert isinstance(large.outcome(), np.ndarray)
    assert computed(engine) == [[0]]


def test_the_seconds_of_a_pass_are_without_those_of_its_pauses(engine: Engine) -> None:
    watch = Watching()
    running = Running(engine.compute, watch, budget=WIDE)

    def slow(rows: Sequence[Row], vectors: Vectors) -> Vectors:
        time.sleep(0.1 if first_chunks(rows[0]) == 5 else 0.02)
        return vectors

    engine.spoil = slow
    engine.pauses = [lambda: running.submit(job(Caller(), 3, first=5))]
    running.submit(job(Caller(), 35))
    running.close()
    (_, small, _), (_, large, _) = watch.passes
    assert small >= 0.1
    assert 0.02 <= large < 0.1


def test_waiting_costs_no_time(running: Running) -> None:
    time.sleep(0.05)
    before = time.process_time()
    time.sleep(0.3)
    assert time.process_time() - before < 0.05
