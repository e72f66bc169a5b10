"""Tests of deduplication and the cache: identical rows are computed once for every job, despite failures and drops.

Some tests use a fake whose vectors are digests of the ids, so that expected vectors do not depend on scheduling.
"""

import hashlib
import sys
import threading
import tracemalloc
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_scheduler import (
    POISON,
    TIMEOUT_SECONDS,
    WIDE_BUDGET,
    Caller,
    FakeEngine,
    RecordingMetrics,
    RunningScheduler,
    Vectors,
    batch_ids,
    check_cancellation_at_once,  # noqa: F401 - applies to every test here
    expected_vectors,
    first_id,
    forget_small_jobs_at_once,  # noqa: F401 - applies to every test here
    join_all,
    make_image_row,
    make_row,
    occupy_engine,
    raise_on_poison,
    replace_value,
    start_submitting,
)

from triton_embed.python_backend.inputs.row import Row
from triton_embed.python_backend.scheduling.dedup_cache import Cache
from triton_embed.python_backend.scheduling.job import Job, Key, identity
from triton_embed.python_backend.scheduling.scheduler import PauseHook

pytestmark = pytest.mark.timeout(60)
AMPLE_BYTES = 10**6


@pytest.fixture
def engine() -> FakeEngine:
    return FakeEngine()


@pytest.fixture
def running(engine: FakeEngine) -> Iterator[RunningScheduler]:
    running = RunningScheduler(engine.compute, budget=WIDE_BUDGET)
    yield running
    engine.gate.set()
    running.close()


def make_job(caller: Caller, *firsts: int, length: int = 11, dims: int = 3) -> Job:
    """Return a job of rows of one length, by their first ids."""
    return Job([make_row(first, length) for first in firsts], dims, caller)


def has_expected_reply(caller: Caller, job: Job, reused: Sequence[int]) -> bool:
    """Return whether the caller got the vectors of its job and the expected sources."""
    vectors = caller.outcome()
    return (
        isinstance(vectors, np.ndarray)
        and np.array_equal(vectors, expected_vectors(job))
        and caller.reused == list(reused)
    )


def test_identical_rows_of_a_request_are_computed_once(engine: FakeEngine, running: RunningScheduler) -> None:
    caller = Caller()
    job = make_job(caller, 7, 8, 7, 7, 9, 8)
    assert job.cost == 33
    running.submit(job)
    assert has_expected_reply(caller, job, [0, 0, 1, 1, 0, 1])
    assert batch_ids(engine) == [[7, 8, 9]]
    assert running.admitted_tokens == 0


def test_identical_rows_of_waiting_requests_are_computed_once(engine: FakeEngine, running: RunningScheduler) -> None:
    occupy_engine(engine, running)
    callers = [Caller() for _ in range(3)]
    jobs = [make_job(callers[0], 7, 8), make_job(callers[1], 8, 9), make_job(callers[2], 9, 7)]
    for job in jobs:
        running.submit(job)
    engine.gate.set()
    for caller, job, reused in zip(callers, jobs, ([0, 0], [1, 0], [1, 1]), strict=True):
        assert has_expected_reply(caller, job, reused)
    assert batch_ids(engine)[1:] == [[7, 8, 9]]
    assert running.admitted_tokens == 0


def test_row_in_a_running_pass_is_shared(engine: FakeEngine, running: RunningScheduler) -> None:
    engine.gate.clear()
    first, second = Caller(), Caller()
    leading, following = make_job(first, 7, 8), make_job(second, 8, 9)
    running.submit(leading)
    assert engine.entered.wait(TIMEOUT_SECONDS)
    running.submit(following)
    engine.gate.set()
    assert has_expected_reply(first, leading, [0, 0])
    assert has_expected_reply(second, following, [1, 0])
    assert batch_ids(engine) == [[7, 8], [9]]
    assert running.admitted_tokens == 0


def test_job_whose_rows_are_all_in_flight_needs_no_pass(engine: FakeEngine, running: RunningScheduler) -> None:
    engine.gate.clear()
    first, second = Caller(), Caller()
    running.submit(make_job(first, 7, 8))
    assert engine.entered.wait(TIMEOUT_SECONDS)
    following = make_job(second, 8, 8)
    running.submit(following)
    engine.gate.set()
    assert has_expected_reply(second, following, [1, 1])
    assert len(engine.batches) == 1


def test_small_job_does_not_wait_for_a_large_job_with_its_row(engine: FakeEngine, running: RunningScheduler) -> None:
    occupy_engine(engine, running)
    large, small = Caller(), Caller()
    bulk, query = make_job(large, *range(100), length=8), make_job(small, 99, length=8)
    running.submit(bulk)
    running.submit(query)
    engine.gate.set()
    assert has_expected_reply(small, query, [0])
    assert has_expected_reply(large, bulk, [*[0] * 99, 1])
    assert batch_ids(engine)[1] == [99]
    assert sum(map(len, engine.batches)) == 101
    assert running.admitted_tokens == 0


def _row(ids: list[int], *images: np.ndarray, cost: int = 0) -> Row:
    return Row(np.array(ids, dtype=np.int32), images, cost)


GREY = np.full((2, 3, 3), 9, dtype=np.uint8)
DIFFERENT: dict[str, tuple[tuple[Row, int], tuple[Row, int]]] = {
    "ids": ((_row([1, 2, 3]), 3), (_row([1, 2, 4]), 3)),
    "order": ((_row([1, 2, 3]), 3), (_row([1, 3, 2]), 3)),
    "length": ((_row([1, 2]), 3), (_row([1, 2, 0]), 3)),
    "dims": ((_row([1, 2]), 3), (_row([1, 2]), 2)),
    "image or none": ((_row([1, 2], GREY), 3), (_row([1, 2]), 3)),
    "pixels": ((_row([], GREY), 3), (_row([], GREY + 1), 3)),
    "one pixel": ((_row([], GREY), 3), (_row([], np.where(np.arange(18).reshape(2, 3, 3) == 17, 8, GREY)), 3)),
    "shape": ((_row([], GREY), 3), (_row([], GREY.reshape(3, 2, 3)), 3)),
    "number": ((_row([], GREY), 3), (_row([], GREY, GREY), 3)),
    "order of images": ((_row([], GREY, GREY + 1), 3), (_row([], GREY + 1, GREY), 3)),
}


@pytest.mark.parametrize("difference", DIFFERENT)
def test_rows_that_differ_have_different_identities(difference: str) -> None:
    (row, dims), (other_row, other_dims) = DIFFERENT[difference]
    assert identity(row, dims) != identity(other_row, other_dims)
    copies = [image.copy() for image in row.images]
    assert identity(row, dims) == identity(_row(row.ids.tolist(), *copies), dims)


def test_identity_ignores_what_does_not_affect_the_vector() -> None:
    ids = np.array([1, 2, 3], dtype=np.int32)
    strided = np.array([1, 9, 2, 9, 3, 9], dtype=np.int32)[::2]
    assert identity(Row(ids), 3) == identity(Row(strided, dropped=7, shared_prefix_tokens=2), 3)
    flipped = np.arange(18, dtype=np.uint8).reshape(2, 3, 3)[:, ::-1]
    assert identity(_row([], flipped), 3) == identity(_row([], flipped.copy()), 3)


def test_equal_images_are_computed_once(engine: FakeEngine, running: RunningScheduler) -> None:
    caller = Caller()
    job = Job([make_image_row(3, 6), make_image_row(4, 6), make_image_row(3, 6)], 3, caller)
    running.submit(job)
    assert has_expected_reply(caller, job, [0, 0, 1])
    assert batch_ids(engine) == [[3, 4]]


def test_other_dimensions_are_computed_separately(engine: FakeEngine, running: RunningScheduler) -> None:
    occupy_engine(engine, running)
    callers = [Caller(), Caller()]
    jobs = [make_job(callers[0], 7, dims=3), make_job(callers[1], 7, dims=2)]
    for job in jobs:
        running.submit(job)
    engine.gate.set()
    assert all(has_expected_reply(caller, job, [0]) for caller, job in zip(callers, jobs, strict=True))
    assert batch_ids(engine)[1:] == [[7, 7]]


@pytest.mark.parametrize("why", ["cancelled", "late"])
def test_dropping_the_first_job_keeps_rows_that_others_need(
    why: str, engine: FakeEngine, running: RunningScheduler
) -> None:
    occupy_engine(engine, running)
    gone, good = Caller(cancelled=why == "cancelled"), Caller()
    leaving = make_job(gone, 7, 8)
    leaving.deadline = 0.0 if why == "late" else leaving.deadline
    following = make_job(good, 8, 9)
    running.submit(leaving)
    running.submit(following)
    engine.gate.set()
    assert isinstance(reason := gone.outcome(), str)
    assert reason.startswith("dropped")
    assert has_expected_reply(good, following, [0, 0])
    assert batch_ids(engine)[1:] == [[8, 9]]
    assert running.admitted_tokens == 0


def test_dropping_the_last_job_removes_only_its_rows(engine: FakeEngine, running: RunningScheduler) -> None:
    occupy_engine(engine, running)
    good, gone = Caller(), Caller(cancelled=True)
    leading = make_job(good, 7, 8, 10, 11, 12)  # more than a pass, so that the dropped job is considered alone
    running.submit(leading)
    running.submit(make_job(gone, 9))
    engine.gate.set()
    assert has_expected_reply(good, leading, [0] * 5)
    assert gone.outcome() == "dropped: The request was cancelled"
    running.close()
    assert 9 not in engine.first_ids()
    assert running.admitted_tokens == 0


def test_row_of_a_dropped_job_can_be_requested_again(engine: FakeEngine, running: RunningScheduler) -> None:
    occupy_engine(engine, running)
    gone, good = Caller(cancelled=True), Caller()
    running.submit(make_job(gone, 7))
    engine.gate.set()
    gone.outcome()
    job = make_job(good, 7)
    running.submit(job)
    assert has_expected_reply(good, job, [0])


def test_failed_pass_fails_every_job_that_needs_its_rows(engine: FakeEngine, running: RunningScheduler) -> None:
    engine.transform = raise_on_poison
    engine.gate.clear()
    callers = [Caller() for _ in range(4)]
    running.submit(make_job(callers[0], POISON, 7))
    assert engine.entered.wait(TIMEOUT_SECONDS)
    running.submit(make_job(callers[1], 7, 8))  # joins the pass
    running.submit(make_job(callers[2], 8, 9))  # shares a row with the job that fails
    running.submit(make_job(callers[3], *[7] * 9))
    engine.gate.set()
    outcomes = [caller.outcome() for caller in callers]
    assert [isinstance(outcome, str) for outcome in outcomes] == [True, True, False, True]
    assert callers[2].reused == [0, 0]
    last_job = make_job(last := Caller(), 7)
    running.submit(last_job)
    assert has_expected_reply(last, last_job, [0])
    assert batch_ids(engine) == [[POISON, 7], [8, 9], [7]]
    running.close()
    assert running.admitted_tokens == 0


def test_job_that_fails_in_a_pause_gets_no_second_reply(engine: FakeEngine, running: RunningScheduler) -> None:
    engine.transform = raise_on_poison
    failing, large, other = Caller(), Caller(), Caller()
    engine.pause_actions = [lambda: running.submit(make_job(failing, POISON, 1, length=5)), lambda: None]
    bulk = Job([make_row(1, 5), *(make_row(i, 11) for i in range(2, 5))], 3, large)
    running.submit(bulk)
    assert isinstance(failing.outcome(), str)
    assert has_expected_reply(large, bulk, [0] * 4)
    running.submit(query := make_job(other, 1, length=5))
    assert has_expected_reply(other, query, [0])
    running.close()
    assert len(failing.outcomes) == len(large.outcomes) == 1
    assert running.admitted_tokens == 0


def test_metrics_count_rows_by_source(engine: FakeEngine) -> None:
    metrics = RecordingMetrics()
    running = RunningScheduler(engine.compute, metrics, WIDE_BUDGET, AMPLE_BYTES)
    for firsts in ((1, 2, 2), (2, 3), (1, 1)):
        caller = Caller()
        running.submit(make_job(caller, *firsts))
        caller.outcome()
    running.close()
    assert metrics.rows.tolist() == [3, 1, 3]
    assert metrics.cache_bytes > 0
    assert metrics.threads == {"sender"}
    assert [len(waits) for waits, _, _ in metrics.passes] == [1, 1]


def test_job_that_joins_a_running_pass_has_no_wait(engine: FakeEngine) -> None:
    metrics = RecordingMetrics()
    running = RunningScheduler(engine.compute, metrics, WIDE_BUDGET)
    engine.gate.clear()
    running.submit(make_job(Caller(), 7, 8))
    assert engine.entered.wait(TIMEOUT_SECONDS)
    running.submit(make_job(Caller(), 8, 9))
    engine.gate.set()
    running.close()
    assert [len(waits) for waits, _, _ in metrics.passes] == [2, 0]
    assert metrics.passes[0][0][1] == 0


# The cache


def test_computed_vectors_are_cached(engine: FakeEngine) -> None:
    running = RunningScheduler(engine.compute, budget=WIDE_BUDGET, cache_bytes=AMPLE_BYTES)
    callers = [Caller() for _ in range(3)]
    jobs = [make_job(callers[0], 7, 8), make_job(callers[1], 8, 9, 8), make_job(callers[2], 7, 9, 7)]
    for caller, job, reused in zip(callers, jobs, ([0, 0], [2, 0, 2], [2, 2, 2]), strict=True):
        running.submit(job)
        assert has_expected_reply(caller, job, reused)
    last_job = make_job(last := Caller(), 7, dims=2)
    running.submit(last_job)
    assert has_expected_reply(last, last_job, [0])
    assert batch_ids(engine) == [[7, 8], [9], [7]]
    running.close()
    assert running.admitted_tokens == 0


def test_nothing_is_cached_by_default(engine: FakeEngine, running: RunningScheduler) -> None:
    for _ in range(2):
        running.submit(job := make_job(caller := Caller(), 7))
        assert has_expected_reply(caller, job, [0])


def test_changing_returned_vectors_does_not_change_the_cache(engine: FakeEngine) -> None:
    running = RunningScheduler(engine.compute, budget=WIDE_BUDGET, cache_bytes=AMPLE_BYTES)
    for reused in ([0, 1], [2, 2], [2, 2]):
        running.submit(job := make_job(caller := Caller(), 7, 7))
        assert has_expected_reply(caller, job, reused)
        vectors = caller.outcome()
        assert isinstance(vectors, np.ndarray)
        vectors[0] = -1
        assert np.array_equal(vectors[1], expected_vectors(job)[1])
    running.close()


def test_non_finite_vector_is_not_cached(engine: FakeEngine) -> None:
    running = RunningScheduler(engine.compute, budget=WIDE_BUDGET, cache_bytes=AMPLE_BYTES)
    engine.transform = replace_value(float("nan"))
    running.submit(make_job(bad := Caller(), POISON, 7))
    assert bad.outcome() == "The model computed a vector that is not finite"
    engine.transform = lambda _, vectors: vectors
    running.submit(job := make_job(good := Caller(), POISON, 7))
    assert has_expected_reply(good, job, [0, 2])
    running.close()


KEYS: list[Key] = [(8, bytes([i]) * 40, b"") for i in range(50)]


def vector(i: int) -> Vectors:
    return np.full(8, i, dtype=np.float32)


@given(st.lists(st.tuples(st.booleans(), st.integers(0, 12)), max_size=60), st.integers(0, 6))
def test_cache_keeps_the_most_recently_used(uses: list[tuple[bool, int]], room: int) -> None:
    """Compare with a plain list, most recent last. Every entry here has the same size."""
    single = Cache(AMPLE_BYTES)
    single.put(KEYS[0], vector(0))
    cache, expected = Cache(room * single.bytes), list[int]()
    for puts, i in uses:
        if puts:
            cache.put(KEYS[i], vector(i))
            expected = [*expected, i] if i not in expected else expected
        else:
            cached = cache.get(KEYS[i])
            assert (cached is not None) == (i in expected)
            if cached is not None:
                assert np.array_equal(cached, vector(i))
                expected = [k for k in expected if k != i] + [i]
        expected = expected[-room:] if room else []
        assert cache.bytes == len(expected) * single.bytes
    assert [i for i in range(13) if cache.get(KEYS[i]) is not None] == sorted(expected)


def test_vector_larger_than_the_cache_evicts_nothing() -> None:
    cache = Cache(1_000)
    cache.put(KEYS[0], vector(0))
    cache.put(KEYS[1], np.zeros(1_000, dtype=np.float32))
    assert cache.get(KEYS[1]) is None
    assert cache.get(KEYS[0]) is not None


def test_large_vector_evicts_as_many_as_necessary() -> None:
    cache = Cache(10_000)
    for i in range(20):
        cache.put(KEYS[i], vector(i))
    cache.put(KEYS[20], np.zeros(2_000, dtype=np.float32))
    assert cache.bytes <= 10_000
    assert cache.get(KEYS[20]) is not None
    remaining = [i for i in range(20) if cache.get(KEYS[i]) is not None]
    assert remaining == list(range(20 - len(remaining), 20))
    assert 0 < len(remaining) < 10


def test_cached_vector_is_a_read_only_copy() -> None:
    cache, batch = Cache(AMPLE_BYTES), np.ones((2, 8), dtype=np.float32)
    cache.put(KEYS[0], batch[0])
    batch[:] = 5
    cached = cache.get(KEYS[0])
    assert cached is not None
    assert np.array_equal(cached, np.ones(8))
    assert cached.base is None  # a view would keep its batch in memory
    with pytest.raises(ValueError, match="read-only"):
        cached[0] = 3


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_cache_stores_no_non_finite_vector(value: float) -> None:
    cache = Cache(AMPLE_BYTES)
    cache.put(KEYS[0], np.array([0, value], dtype=np.float32))
    assert cache.get(KEYS[0]) is None
    assert cache.bytes == 0


@pytest.mark.parametrize(("length", "dims"), [(8, 384), (512, 64), (3, 8)])
def test_cache_uses_no_more_memory_than_it_counts(length: int, dims: int) -> None:
    """Compare with what Python reports as allocated, which must not be much less either."""
    limit = 400_000
    tracemalloc.start()
    try:
        before, cache = tracemalloc.get_traced_memory()[0], Cache(limit)
        for i in range(2 * limit // (4 * dims + 4 * length)):
            cache.put(identity(make_row(i, length), dims), np.full(dims, i, dtype=np.float32))
        allocated = tracemalloc.get_traced_memory()[0] - before
    finally:
        tracemalloc.stop()
    assert limit * 0.99 < cache.bytes <= limit
    assert 0.6 * cache.bytes < allocated <= cache.bytes


# Any interleaving


def digest(row: Row, dims: int) -> Vectors:
    """Return a vector that depends on every id."""
    words = np.frombuffer(hashlib.blake2b(row.ids.tobytes()).digest(), dtype=np.uint8)
    return words[:dims].astype(np.float32)


class DigestEngine:
    """A fake `compute` that fails for poisoned rows and counts how often each row is computed at the same time."""

    def __init__(self, pauses: int) -> None:
        self.pause_count = pauses
        self.running_keys: Counter[Key] = Counter()
        self.max_concurrent = 0
        self.rows = 0
        self.failed: list[set[Key]] = []
        self.batch_costs: list[list[int]] = []

    def compute(
        self, rows: Sequence[Row], dims: Sequence[int], pause_hook: PauseHook | None, spare_core: bool
    ) -> Vectors:
        keys = [identity(row, size) for row, size in zip(rows, dims, strict=True)]
        self.running_keys.update(keys)
        self.max_concurrent = max(self.max_concurrent, *self.running_keys.values())
        self.batch_costs.append([row.cost for row in rows])
        try:
            for _ in range(self.pause_count if pause_hook else 0):
                pause_hook and pause_hook()
            if any(first_id(row) == POISON for row in rows):
                self.failed.append(set(keys))
                raise MemoryError
            self.rows += len(rows)
            vectors = np.full((len(rows), 16), np.nan, dtype=np.float32)
            for vector, row, size in zip(vectors, rows, dims, strict=True):
                vector[:size] = digest(row, size)
            return vectors
        finally:
            self.running_keys.subtract(keys)


LENGTHS = st.sampled_from([2, 3, 9, 30, 90])
ROWS = st.tuples(st.sampled_from([1, 2, 3, 4, 5, POISON]), LENGTHS)
JOBS = st.fixed_dictionaries(
    {
        "rows": st.lists(ROWS, min_size=1, max_size=12),
        "dims": st.sampled_from([3, 16]),
        "cancelled": st.booleans(),
        "late": st.booleans(),
    }
)


@settings(deadline=None, max_examples=150)
@given(
    st.lists(JOBS, min_size=1, max_size=25),
    st.integers(1, 3),
    st.sampled_from([0, 900, AMPLE_BYTES]),
    st.integers(0, 4),
)
def test_every_interleaving_answers_each_job_once(
    specs: list[dict[str, Any]], threads: int, cache_bytes: int, pauses: int
) -> None:
    """Check that every job is answered once, with its vectors or a valid reason, and nothing stays pending."""
    compute = DigestEngine(pauses)
    running = RunningScheduler(compute.compute, budget=WIDE_BUDGET, cache_bytes=cache_bytes)
    callers, jobs = [], []
    for spec in specs:
        callers.append(Caller(cancelled=spec["cancelled"]))
        rows = [make_row(first, length) for first, length in spec["rows"]]
        jobs.append(Job(rows, spec["dims"], callers[-1], -1.0 if spec["late"] else float("inf")))
    join_all(start_submitting(running, jobs, threads))
    for caller in callers:
        caller.outcome()
    running.close()
    shares = np.zeros(3, dtype=int)
    for spec, caller, job in zip(specs, callers, jobs, strict=True):
        outcome = caller.outcome()
        if isinstance(outcome, np.ndarray):
            assert np.array_equal(outcome, [digest(each, job.dims) for each in job.rows])
            assert not any(first == POISON for first, _ in spec["rows"])
            shares += np.bincount(caller.reused, minlength=3)
        elif outcome.startswith("dropped"):
            assert spec["cancelled"] or spec["late"]
            assert ("deadline" in outcome) == spec["late"]
        else:
            assert any(not failed.isdisjoint(job.indices) for failed in compute.failed)
    assert shares[0] <= compute.rows
    assert cache_bytes or not shares[2]
    assert compute.max_concurrent <= 1
    assert all(sum(costs) <= WIDE_BUDGET or len(costs) == 1 for costs in compute.batch_costs)
    assert running.admitted_tokens == 0
    assert not running.scheduler._dedup._pending


def test_many_threads_request_the_same_few_rows(engine: FakeEngine) -> None:
    compute = DigestEngine(pauses=3)
    running = RunningScheduler(compute.compute, budget=WIDE_BUDGET, cache_bytes=3_000)
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    try:
        callers = [Caller() for _ in range(600)]
        jobs = [
            Job([make_row(1 + (i * k) % 11, 3 + 20 * (i % 3)) for k in range(1 + i % 7)], 16, caller)
            for i, caller in enumerate(callers)
        ]
        join_all(start_submitting(running, jobs, threads=6))
        for caller, job in zip(callers, jobs, strict=True):
            assert np.array_equal(caller.outcome(), [digest(each, 16) for each in job.rows])
    finally:
        sys.setswitchinterval(interval)
    running.close()
    assert running.admitted_tokens == 0
    assert compute.max_concurrent == 1
    assert compute.rows < sum(len(job.rows) for job in jobs)
    assert threading.active_count() < 50
