"""No work twice: what is the same is computed once, and everyone gets it, whoever fails or leaves.

The stand-in's vector is a digest of the ids: an oracle that knows nothing of how rows are scheduled.
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
    PATIENCE,
    POISON,
    WIDE,
    Caller,
    Engine,
    Running,
    Vectors,
    Watching,
    ask_at_once,  # noqa: F401 - applies to every test here
    computed,
    finish,
    first_chunks,
    hold,
    not_finite,
    picture,
    raising,
    row,
    submitting,
    undivided,  # noqa: F401 - applies to every test here
    vectors_of,
)

from triton_embed.python_backend.inputs.row import Row
from triton_embed.python_backend.scheduling.dedup_cache import Cache
from triton_embed.python_backend.scheduling.job import Job, Key, identity
from triton_embed.python_backend.scheduling.scheduler import PauseHook

pytestmark = pytest.mark.timeout(60)
PLENTY = 10**6


@pytest.fixture
def engine() -> Engine:
    return Engine()


@pytest.fixture
def running(engine: Engine) -> Iterator[Running]:
    made = Running(engine.compute, budget=WIDE)
    yield made
    engine.gate.set()
    made.close()


def same(caller: Caller, *firsts: int, length: int = 11, dims: int = 3) -> Job:
    """Rows of one length by their first ids."""
    return Job([row(first, length) for first in firsts], dims, caller)


def answered(caller: Caller, asked: Job, reused: Sequence[int]) -> bool:
    """Whether it got its own vectors and was told truly where they came from."""
    found = caller.outcome()
    return isinstance(found, np.ndarray) and np.array_equal(found, vectors_of(asked)) and caller.reused == list(reused)


def test_identical_rows_of_a_request_are_computed_once(engine: Engine, running: Running) -> None:
    caller = Caller()
    asked = same(caller, 7, 8, 7, 7, 9, 8)
    assert asked.cost == 33
    running.submit(asked)
    assert answered(caller, asked, [0, 0, 1, 1, 0, 1])
    assert computed(engine) == [[7, 8, 9]]
    assert running.admitted == 0


def test_identical_rows_of_requests_that_wait_are_computed_once(engine: Engine, running: Running) -> None:
    hold(engine, running)
    callers = [Caller() for _ in range(3)]
    jobs = [same(callers[0], 7, 8), same(callers[1], 8, 9), same(callers[2], 9, 7)]
    for one in jobs:
        running.submit(one)
    engine.gate.set()
    for caller, asked, reused in zip(callers, jobs, ([0, 0], [1, 0], [1, 1]), strict=True):
        assert answered(caller, asked, reused)
    assert computed(engine)[1:] == [[7, 8, 9]]
    assert running.admitted == 0


def test_a_row_that_is_being_computed_is_joined(engine: Engine, running: Running) -> None:
    engine.gate.clear()
    first, second = Caller(), Caller()
    leading, following = same(first, 7, 8), same(second, 8, 9)
    running.submit(leading)
    assert engine.entered.wait(PATIENCE)
    running.submit(following)
    engine.gate.set()
    assert answered(first, leading, [0, 0])
    assert answered(second, following, [1, 0])
    assert computed(engine) == [[7, 8], [9]]
    assert running.admitted == 0


def test_one_that_joins_with_all_it_has_asks_for_no_pass(engine: Engine, running: Running) -> None:
    engine.gate.clear()
    first, second = Caller(), Caller()
    running.submit(same(first, 7, 8))
    assert engine.entered.wait(PATIENCE)
    following = same(second, 8, 8)
    running.submit(following)
    engine.gate.set()
    assert answered(second, following, [1, 1])
    assert len(engine.batches) == 1


def test_a_small_job_does_not_wait_for_the_large_one_that_has_its_row_too(engine: Engine, running: Running) -> None:
    hold(engine, running)
    large, small = Caller(), Caller()
    bulk, query = same(large, *range(100), length=8), same(small, 99, length=8)
    running.submit(bulk)
    running.submit(query)
    engine.gate.set()
    assert answered(small, query, [0])
    assert answered(large, bulk, [*[0] * 99, 1])
    assert computed(engine)[1] == [99]
    assert sum(map(len, engine.batches)) == 101
    assert running.admitted == 0


def _one(ids: list[int], *pictures: np.ndarray, cost: int = 0) -> Row:
    return Row(np.array(ids, dtype=np.int32), pictures, cost)


GREY = np.full((2, 3, 3), 9, dtype=np.uint8)
DIFFERENT: dict[str, tuple[tuple[Row, int], tuple[Row, int]]] = {
    "ids": ((_one([1, 2, 3]), 3), (_one([1, 2, 4]), 3)),
    "order": ((_one([1, 2, 3]), 3), (_one([1, 3, 2]), 3)),
    "length": ((_one([1, 2]), 3), (_one([1, 2, 0]), 3)),
    "dims": ((_one([1, 2]), 3), (_one([1, 2]), 2)),
    "a picture or none": ((_one([1, 2], GREY), 3), (_one([1, 2]), 3)),
    "pixels": ((_one([], GREY), 3), (_one([], GREY + 1), 3)),
    "one pixel": ((_one([], GREY), 3), (_one([], np.where(np.arange(18).reshape(2, 3, 3) == 17, 8, GREY)), 3)),
    "shape": ((_one([], GREY), 3), (_one([], GREY.reshape(3, 2, 3)), 3)),
    "number": ((_one([], GREY), 3), (_one([], GREY, GREY), 3)),
    "order of pictures": ((_one([], GREY, GREY + 1), 3), (_one([], GREY + 1, GREY), 3)),
}


@pytest.mark.parametrize("what", DIFFERENT)
def test_what_differs_in_anything_is_not_the_same(what: str) -> None:
    (one, its), (other, others) = DIFFERENT[what]
    assert identity(one, its) != identity(other, others)
    assert identity(one, its) == identity(_one(one.ids.tolist(), *(picture.copy() for picture in one.pictures)), its)


def test_what_does_not_decide_a_vector_is_left_out() -> None:
    ids = np.array([1, 2, 3], dtype=np.int32)
    strided = np.array([1, 9, 2, 9, 3, 9], dtype=np.int32)[::2]
    assert identity(Row(ids), 3) == identity(Row(strided, dropped=7, shared=2), 3)
    flipped = np.arange(18, dtype=np.uint8).reshape(2, 3, 3)[:, ::-1]
    assert identity(_one([], flipped), 3) == identity(_one([], flipped.copy()), 3)


def test_equal_pictures_are_computed_once(engine: Engine, running: Running) -> None:
    caller = Caller()
    asked = Job([picture(3, 6), picture(4, 6), picture(3, 6)], 3, caller)
    running.submit(asked)
    assert answered(caller, asked, [0, 0, 1])
    assert computed(engine) == [[3, 4]]


def test_other_dimensions_are_computed_by_themselves(engine: Engine, running: Running) -> None:
    hold(engine, running)
    callers = [Caller(), Caller()]
    jobs = [same(callers[0], 7, dims=3), same(callers[1], 7, dims=2)]
    for one in jobs:
        running.submit(one)
    engine.gate.set()
    assert all(answered(caller, asked, [0]) for caller, asked in zip(callers, jobs, strict=True))
    assert computed(engine)[1:] == [[7, 7]]


@pytest.mark.parametrize("why", ["cancelled", "late"])
def test_the_first_to_ask_may_leave_while_others_wait_for_the_same(why: str, engine: Engine, running: Running) -> None:
    hold(engine, running)
    gone, good = Caller(cancelled=why == "cancelled"), Caller()
    leaving = same(gone, 7, 8)
    leaving.deadline = 0.0 if why == "late" else leaving.deadline
    following = same(good, 8, 9)
    running.submit(leaving)
    running.submit(following)
    engine.gate.set()
    assert isinstance(reason := gone.outcome(), str)
    assert reason.startswith("dropped")
    assert answered(good, following, [0, 0])
    assert computed(engine)[1:] == [[8, 9]]
    assert running.admitted == 0


def test_the_last_to_ask_may_leave_as_well(engine: Engine, running: Running) -> None:
    hold(engine, running)
    good, gone = Caller(), Caller(cancelled=True)
    leading = same(good, 7, 8, 10, 11, 12)  # more than a pass: the one that leaves is looked at by itself
    running.submit(leading)
    running.submit(same(gone, 9))
    engine.gate.set()
    assert answered(good, leading, [0] * 5)
    assert gone.outcome() == "dropped: The request was cancelled"
    running.close()
    assert 9 not in engine.firsts()
    assert running.admitted == 0


def test_what_nobody_waits_for_any_more_may_be_asked_for_again(engine: Engine, running: Running) -> None:
    hold(engine, running)
    gone, good = Caller(cancelled=True), Caller()
    running.submit(same(gone, 7))
    engine.gate.set()
    gone.outcome()
    asked = same(good, 7)
    running.submit(asked)
    assert answered(good, asked, [0])


def test_everyone_who_waits_for_a_row_of_a_pass_that_fails_is_told(engine: Engine, running: Running) -> None:
    engine.spoil = raising
    engine.gate.clear()
    callers = [Caller() for _ in range(4)]
    running.submit(same(callers[0], POISON, 7))
    assert engine.entered.wait(PATIENCE)
    running.submit(same(callers[1], 7, 8))  # joins
    running.submit(same(callers[2], 8, 9))  # waits for what the one that fails waits for
    running.submit(same(callers[3], *[7] * 9))
    engine.gate.set()
    outcomes = [caller.outcome() for caller in callers]
    assert [isinstance(outcome, str) for outcome in outcomes] == [True, True, False, True]
    assert callers[2].reused == [0, 0]
    again = same(last := Caller(), 7)
    running.submit(again)
    assert answered(last, again, [0])
    assert computed(engine) == [[POISON, 7], [8, 9], [7]]
    running.close()
    assert running.admitted == 0


def test_a_job_that_fails_in_a_pause_is_not_answered_again_by_the_pass_it_has_joined(
    engine: Engine, running: Running
) -> None:
    engine.spoil = raising
    both, large, other = Caller(), Caller(), Caller()
    engine.pauses = [lambda: running.submit(same(both, POISON, 1, length=5)), lambda: None]
    bulk = Job([row(1, 5), *(row(i, 11) for i in range(2, 5))], 3, large)
    running.submit(bulk)
    assert isinstance(both.outcome(), str)
    assert answered(large, bulk, [0] * 4)
    running.submit(query := same(other, 1, length=5))
    assert answered(other, query, [0])
    running.close()
    assert len(both.outcomes) == len(large.outcomes) == 1
    assert running.admitted == 0


def test_rows_are_told_by_where_their_vectors_came_from(engine: Engine) -> None:
    watch = Watching()
    running = Running(engine.compute, watch, WIDE, PLENTY)
    for firsts in ((1, 2, 2), (2, 3), (1, 1)):
        caller = Caller()
        running.submit(same(caller, *firsts))
        caller.outcome()
    running.close()
    assert watch.rows.tolist() == [3, 1, 3]
    assert watch.cache_bytes > 0
    assert watch.threads == {"sender"}
    assert [len(waits) for waits, _, _ in watch.passes] == [1, 1]


def test_one_that_joins_a_pass_has_waited_for_nothing(engine: Engine) -> None:
    watch = Watching()
    running = Running(engine.compute, watch, WIDE)
    engine.gate.clear()
    running.submit(same(Caller(), 7, 8))
    assert engine.entered.wait(PATIENCE)
    running.submit(same(Caller(), 8, 9))
    engine.gate.set()
    running.close()
    assert [len(waits) for waits, _, _ in watch.passes] == [2, 0]
    assert watch.passes[0][0][1] == 0


# The cache


def test_what_was_computed_is_remembered(engine: Engine) -> None:
    running = Running(engine.compute, budget=WIDE, cache_bytes=PLENTY)
    callers = [Caller() for _ in range(3)]
    jobs = [same(callers[0], 7, 8), same(callers[1], 8, 9, 8), same(callers[2], 7, 9, 7)]
    for caller, asked, reused in zip(callers, jobs, ([0, 0], [2, 0, 2], [2, 2, 2]), strict=True):
        running.submit(asked)
        assert answered(caller, asked, reused)
    other = same(last := Caller(), 7, dims=2)
    running.submit(other)
    assert answered(last, other, [0])
    assert computed(engine) == [[7, 8], [9], [7]]
    running.close()
    assert running.admitted == 0


def test_nothing_is_remembered_unless_asked_for(engine: Engine, running: Running) -> None:
    for _ in range(2):
        running.submit(asked := same(caller := Caller(), 7))
        assert answered(caller, asked, [0])


def test_what_a_caller_does_with_its_vectors_is_its_own_affair(engine: Engine) -> None:
    running = Running(engine.compute, budget=WIDE, cache_bytes=PLENTY)
    for reused in ([0, 1], [2, 2], [2, 2]):
        running.submit(asked := same(caller := Caller(), 7, 7))
        assert answered(caller, asked, reused)
        found = caller.outcome()
        assert isinstance(found, np.ndarray)
        found[0] = -1
        assert np.array_equal(found[1], vectors_of(asked)[1])
    running.close()


def test_a_vector_that_is_not_finite_is_not_remembered(engine: Engine) -> None:
    running = Running(engine.compute, budget=WIDE, cache_bytes=PLENTY)
    engine.spoil = not_finite(float("nan"))
    running.submit(same(bad := Caller(), POISON, 7))
    assert bad.outcome() == "The model computed a vector that is not finite"
    engine.spoil = lambda _, vectors: vectors
    running.submit(asked := same(good := Caller(), POISON, 7))
    assert answered(good, asked, [0, 2])
    running.close()


KEYS: list[Key] = [(8, bytes([i]) * 40, b"") for i in range(50)]


def vector(i: int) -> Vectors:
    return np.full(8, i, dtype=np.float32)


@given(st.lists(st.tuples(st.booleans(), st.integers(0, 12)), max_size=60), st.integers(0, 6))
def test_the_cache_holds_those_used_last(uses: list[tuple[bool, int]], room: int) -> None:
    """Against a plain list, most recent last. Every entry here has the same size."""
    one = Cache(PLENTY)
    one.put(KEYS[0], vector(0))
    cache, expected = Cache(room * one.bytes), list[int]()
    for puts, i in uses:
        if puts:
            cache.put(KEYS[i], vector(i))
            expected = [*expected, i] if i not in expected else expected
        else:
            found = cache.get(KEYS[i])
            assert (found is not None) == (i in expected)
            if found is not None:
                assert np.array_equal(found, vector(i))
                expected = [k for k in expected if k != i] + [i]
        expected = expected[-room:] if room else []
        assert cache.bytes == len(expected) * one.bytes
    assert [i for i in range(13) if cache.get(KEYS[i]) is not None] == sorted(expected)


def test_a_vector_larger_than_the_cache_drives_nothing_out() -> None:
    cache = Cache(1_000)
    cache.put(KEYS[0], vector(0))
    cache.put(KEYS[1], np.zeros(1_000, dtype=np.float32))
    assert cache.get(KEYS[1]) is None
    assert cache.get(KEYS[0]) is not None


def test_a_large_vector_drives_out_as_many_as_it_must() -> None:
    cache = Cache(10_000)
    for i in range(20):
        cache.put(KEYS[i], vector(i))
    cache.put(KEYS[20], np.zeros(2_000, dtype=np.float32))
    assert cache.bytes <= 10_000
    assert cache.get(KEYS[20]) is not None
    left = [i for i in range(20) if cache.get(KEYS[i]) is not None]
    assert left == list(range(20 - len(left), 20))
    assert 0 < len(left) < 10


def test_what_is_remembered_is_a_copy_that_nobody_can_change() -> None:
    cache, batch = Cache(PLENTY), np.ones((2, 8), dtype=np.float32)
    cache.put(KEYS[0], batch[0])
    batch[:] = 5
    found = cache.get(KEYS[0])
    assert found is not None
    assert np.array_equal(found, np.ones(8))
    assert found.base is None  # it would keep its whole batch in memory
    with pytest.raises(ValueError, match="read-only"):
        found[0] = 3


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_the_cache_takes_no_vector_that_is_not_finite(value: float) -> None:
    cache = Cache(PLENTY)
    cache.put(KEYS[0], np.array([0, value], dtype=np.float32))
    assert cache.get(KEYS[0]) is None
    assert cache.bytes == 0


@pytest.mark.parametrize(("length", "dims"), [(8, 384), (512, 64), (3, 8)])
def test_the_cache_takes_no_more_memory_than_it_counts(length: int, dims: int) -> None:
    """By Python's own account of what it allocates, and not much less either."""
    limit = 4_000_000
    tracemalloc.start()
    try:
        before, cache = tracemalloc.get_traced_memory()[0], Cache(limit)
        for i in range(2 * limit // (4 * dims + 4 * length)):
            cache.put(identity(row(i, length), dims), np.full(dims, i, dtype=np.float32))
        taken = tracemalloc.get_traced_memory()[0] - before
    finally:
        tracemalloc.stop()
    assert limit * 0.99 < cache.bytes <= limit
    assert 0.6 * cache.bytes < taken <= cache.bytes


# Any interleaving


def digest(one: Row, dims: int) -> Vectors:
    """A vector that depends on every id."""
    words = np.frombuffer(hashlib.blake2b(one.ids.tobytes()).digest(), dtype=np.uint8)
    return words[:dims].astype(np.float32)


class Digesting:
    """`compute`: it fails for poisoned rows, and holds that nothing is ever computed twice at a time."""

    def __init__(self, pauses: int) -> None:
        self.pauses = pauses
        self.now: Counter[Key] = Counter()
        self.most = 0
        self.rows = 0
        self.failed: list[set[Key]] = []
        self.together: list[list[int]] = []

    def compute(self, rows: Sequence[Row], dims: Sequence[int], between: PauseHook | None, spare: bool) -> Vectors:
        keys = [identity(one, size) for one, size in zip(rows, dims, strict=True)]
        self.now.update(keys)
        self.most = max(self.most, *self.now.values())
        self.together.append([one.cost for one in rows])
        try:
            for _ in range(self.pauses if between else 0):
                between and between()
            if any(first_chunks(one) == POISON for one in rows):
                self.failed.append(set(keys))
                raise MemoryError
            self.rows += len(rows)
            found = np.full((len(rows), 16), np.nan, dtype=np.float32)
            for made, one, size in zip(found, rows, dims, strict=True):
                made[:size] = digest(one, size)
            return found
        finally:
            self.now.subtract(keys)


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
    st.sampled_from([0, 900, PLENTY]),
    st.integers(0, 4),
)
def test_any_interleaving(wanted: list[dict[str, Any]], threads: int, cache_bytes: int, pauses: int) -> None:
    """Everyone is answered once, with its own vectors or with a reason that holds; nothing is left behind."""
    compute = Digesting(pauses)
    running = Running(compute.compute, budget=WIDE, cache_bytes=cache_bytes)
    callers, jobs = [], []
    for one in wanted:
        callers.append(Caller(cancelled=one["cancelled"]))
        rows = [row(first, length) for first, length in one["rows"]]
        jobs.append(Job(rows, one["dims"], callers[-1], -1.0 if one["late"] else float("inf")))
    finish(submitting(running, jobs, threads))
    for caller in callers:
        caller.outcome()
    running.close()
    shares = np.zeros(3, dtype=int)
    for one, caller, asked in zip(wanted, callers, jobs, strict=True):
        found = caller.outcome()
        if isinstance(found, np.ndarray):
            assert np.array_equal(found, [digest(each, asked.dims) for each in asked.rows])
            assert not any(first == POISON for first, _ in one["rows"])
            shares += np.bincount(caller.reused, minlength=3)
        elif found.startswith("dropped"):
            assert one["cancelled"] or one["late"]
            assert ("deadline" in found) == one["late"]
        else:
            assert any(not failed.isdisjoint(asked.indices) for failed in compute.failed)
    assert shares[0] <= compute.rows
    assert cache_bytes or not shares[2]
    assert compute.most <= 1
    assert all(sum(costs) <= WIDE or len(costs) == 1 for costs in compute.together)
    assert running.admitted == 0
    assert not running.scheduler._dedup._pending


def test_many_threads_ask_for_the_same_few_rows(engine: Engine) -> None:
    compute = Digesting(pauses=3)
    running = Running(compute.compute, budget=WIDE, cache_bytes=3_000)
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    try:
        callers = [Caller() for _ in range(600)]
        jobs = [
            Job([row(1 + (i * k) % 11, 3 + 20 * (i % 3)) for k in range(1 + i % 7)], 16, caller)
            for i, caller in enumerate(callers)
        ]
        finish(submitting(running, jobs, threads=6))
        for caller, asked in zip(callers, jobs, strict=True):
            assert np.array_equal(caller.outcome(), [digest(each, 16) for each in asked.rows])
    finally:
        sys.setswitchinterval(interval)
    running.close()
    assert running.admitted == 0
    assert compute.most == 1
    assert compute.rows < sum(len(asked.rows) for asked in jobs)
    assert threading.active_count() < 50
