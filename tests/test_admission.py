"""Admission control: no call is lost or starved, no token leaks, and the windows are never exceeded."""

import asyncio
import random
import time
from collections.abc import Awaitable, Callable
from typing import TypeVar

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from triton_embed.gateway.errors import ApiError
from triton_embed.gateway.triton import admission as lanes_module
from triton_embed.gateway.triton.admission import (
    CALL_SMALL_JOBS,
    INTERACTIVE_TURNS,
    SMALL_CALLS,
    SMALL_DIVISOR,
    WINDOW_BUDGETS,
    Admission,
    split,
)

T = TypeVar("T")

MAX_SMALL_TOKENS = 10  # largest small call of `new_admission`


def run(use: Callable[[], Awaitable[T]]) -> T:
    async def with_timeout() -> T:
        return await asyncio.wait_for(use(), 20)

    return asyncio.run(with_timeout())


def new_admission(
    budget: int = 100,
    small_tokens: int = SMALL_DIVISOR * MAX_SMALL_TOKENS,
    max_pending_tokens: int = 10**9,
    gateway_count: int = 1,
) -> Admission:
    return Admission("m", budget, small_tokens, max_pending_tokens=max_pending_tokens, gateway_count=gateway_count)


async def settle() -> None:
    for _ in range(5):
        await asyncio.sleep(0)


def test_large_window_bounds_tokens_in_flight() -> None:
    async def use() -> None:
        admission = new_admission()
        releases = [await admission.acquire(100, batch=False) for _ in range(WINDOW_BUDGETS)]
        late = asyncio.create_task(admission.acquire(100, batch=False))
        await settle()
        assert not late.done()
        assert not admission.can_send_now(MAX_SMALL_TOKENS + 1)
        releases[0]()
        await settle()
        assert late.done()

    run(use)


def test_call_larger_than_window_is_sent_alone() -> None:
    async def use() -> None:
        admission = new_admission()
        release = await admission.acquire(10**6, batch=False)
        next_call = asyncio.create_task(admission.acquire(MAX_SMALL_TOKENS + 1, batch=False))
        await settle()
        assert not next_call.done()
        release()
        await settle()
        assert next_call.done()

    run(use)


def test_small_call_does_not_wait_for_large_calls() -> None:
    async def use() -> None:
        admission = new_admission()
        await admission.acquire(10**6, batch=False)
        large = asyncio.create_task(admission.acquire(MAX_SMALL_TOKENS + 1, batch=False))
        bulk = asyncio.create_task(admission.acquire(MAX_SMALL_TOKENS, batch=True))
        await settle()
        assert admission.can_send_now(MAX_SMALL_TOKENS)
        small = asyncio.create_task(admission.acquire(MAX_SMALL_TOKENS, batch=False))
        await settle()
        # A call of the batch lane is never small.
        assert [task.done() for task in (large, bulk, small)] == [False, False, True]
        for task in (large, bulk):
            task.cancel()

    run(use)


def test_small_window_is_bounded_and_served_in_order() -> None:
    async def use() -> None:
        admission, order = new_admission(), list[int]()
        release_large = await admission.acquire(100, batch=False)
        releases = [await admission.acquire(tokens, batch=False) for tokens in [10] * (SMALL_CALLS - 1) + [5]]

        async def late(number: int) -> None:
            await admission.acquire(10, batch=False)
            order.append(number)

        tasks = [asyncio.create_task(late(number)) for number in range(3)]
        await settle()
        assert not admission.can_send_now(1)  # it would overtake the waiting calls
        release_large()
        await settle()
        assert order == []  # small calls cannot use the large window
        for release in releases[:2]:
            release()
        await settle()
        assert order == [0, 1]
        tasks[2].cancel()

    run(use)


def test_small_calls_do_not_use_the_large_window() -> None:
    async def use() -> None:
        admission = new_admission()
        for _ in range(SMALL_CALLS):
            await admission.acquire(10, batch=False)
        waiting = [asyncio.create_task(admission.acquire(10, batch=False)) for _ in range(5)]
        await settle()
        for _ in range(WINDOW_BUDGETS):
            assert admission.can_send_now(100)
            await admission.acquire(100, batch=False)
        assert not any(task.done() for task in waiting)
        for task in waiting:
            task.cancel()

    run(use)


@pytest.mark.parametrize(("gateway_count", "large", "small"), [(1, 4, 16), (2, 2, 8), (9, 2, 8)])
def test_gateways_of_one_triton_share_the_windows(gateway_count: int, large: int, small: int) -> None:
    async def use() -> None:
        admission = new_admission(gateway_count=gateway_count)
        calls = [asyncio.create_task(admission.acquire(tokens, batch=False)) for tokens in (100, 10) for _ in range(30)]
        await settle()
        assert [sum(task.done() for task in tasks) for tasks in (calls[:30], calls[30:])] == [large, small]
        for task in calls:
            task.cancel()

    run(use)


def test_cancelled_small_call_frees_its_window() -> None:
    async def use() -> None:
        admission = new_admission()
        releases = [await admission.acquire(10, batch=False) for _ in range(SMALL_CALLS)]
        waiting = [asyncio.create_task(admission.acquire(10, batch=False)) for _ in range(3)]
        await settle()
        waiting[0].cancel()
        releases[0]()  # grants a call that is cancelled at this moment, or has not resumed yet
        waiting[1].cancel()
        await settle()
        assert waiting[2].done()
        releases[1]()
        assert admission.can_send_now(10)

    run(use)


@pytest.mark.parametrize("size", [1, 10**5 + 1])
def test_number_of_calls_in_flight_is_bounded(monkeypatch: pytest.MonkeyPatch, size: int) -> None:
    monkeypatch.setattr(lanes_module, "MAX_CALLS", 8)

    async def use() -> None:
        admission = new_admission(budget=10**6, small_tokens=SMALL_DIVISOR * 10**5)
        for _ in range(8):
            assert admission.can_send_now(size)
            await admission.acquire(size, batch=False)
        assert not admission.can_send_now(size)
        assert admission.can_send_now(10**5 + 2 - size)  # a call of the other window

    run(use)


def test_interactive_lane_overtakes_but_does_not_starve_batch_lane() -> None:
    async def use() -> list[str]:
        admission, order = new_admission(), []
        release = await admission.acquire(10**6, batch=False)

        async def call(name: str, batch: bool) -> None:
            release = await admission.acquire(300, batch=batch)
            order.append(name)
            await asyncio.sleep(0)
            release()

        calls = [asyncio.create_task(call("bulk", True)) for _ in range(2)]
        await settle()
        calls += [asyncio.create_task(call("query", False)) for _ in range(2 * INTERACTIVE_TURNS + 3)]
        await settle()
        release()
        await asyncio.gather(*calls)
        return order

    order = run(use)
    assert order[:INTERACTIVE_TURNS] == ["query"] * INTERACTIVE_TURNS
    assert order.index("bulk") == INTERACTIVE_TURNS
    assert order.count("bulk") == 2
    assert order[INTERACTIVE_TURNS + 1 :].index("bulk") == INTERACTIVE_TURNS


def test_batch_lane_uses_at_most_half_of_the_window() -> None:
    async def use() -> None:
        admission = new_admission()
        bulk = [asyncio.create_task(admission.acquire(100, batch=True)) for _ in range(WINDOW_BUDGETS)]
        await settle()
        assert sum(task.done() for task in bulk) == WINDOW_BUDGETS // 2
        assert not admission.can_send_now(100)  # calls of the batch lane wait, but an interactive call is sent at once
        query = asyncio.create_task(admission.acquire(100, batch=False))
        await settle()
        assert query.done()
        for task in bulk:
            task.cancel()

    run(use)


def test_cancelled_waiting_call_is_skipped() -> None:
    async def use() -> None:
        admission = new_admission()
        release = await admission.acquire(10**6, batch=False)
        waiting = [asyncio.create_task(admission.acquire(400, batch=False)) for _ in range(3)]
        await settle()
        waiting[0].cancel()
        await settle()
        release()
        await settle()
        assert waiting[1].done()
        assert not waiting[2].done()
        waiting[1].result()()
        await settle()
        assert waiting[2].done()

    run(use)


def test_call_cancelled_when_granted_releases_its_tokens() -> None:
    async def use() -> None:
        admission = new_admission()
        release = await admission.acquire(10**6, batch=False)
        caller = asyncio.create_task(admission.acquire(400, batch=False))
        await settle()
        release()  # grants the call, whose task has not resumed yet
        caller.cancel()
        with pytest.raises(asyncio.CancelledError):
            await caller
        assert admission.can_send_now(400)

    run(use)


def test_refused_call_waits_only_if_another_call_is_in_flight() -> None:
    async def use() -> None:
        admission = new_admission()
        assert not await admission.wait_for_call_end()
        releases = [await admission.acquire(10, batch=False) for _ in range(2)]
        refused = [asyncio.create_task(admission.wait_for_call_end()) for _ in range(3)]
        await settle()
        releases[0]()
        await settle()
        assert [task.done() for task in refused] == [True, False, False]  # each end wakes one call
        releases[1]()
        await settle()
        assert all(task.done() for task in refused)  # no call in flight remains to wait for

    run(use)


def test_release_counts_once() -> None:
    async def use() -> None:
        admission = new_admission()
        first, second = await admission.acquire(200, batch=False), await admission.acquire(200, batch=False)
        first()
        first()
        assert not admission.can_send_now(300)
        second()
        assert admission.can_send_now(300)

    run(use)


@settings(deadline=None)
@given(seed=st.integers(0, 10**6), cancelled_share=st.floats(0, 0.6))
def test_random_load_respects_windows_and_serves_every_call(seed: int, cancelled_share: float) -> None:
    """Test as in the gateway: a caller may disconnect at any moment, and a call that was sent runs to its end."""
    rng = random.Random(seed)

    async def use() -> None:
        admission = new_admission()
        at_triton: dict[bool, list[int]] = {True: [], False: []}
        sent: set[asyncio.Task[None]] = set()

        async def compute(tokens: int, batch: bool, release: Callable[[], None]) -> None:
            small = tokens <= MAX_SMALL_TOKENS and not batch
            in_flight = at_triton[small]
            max_tokens = SMALL_CALLS * MAX_SMALL_TOKENS if small else WINDOW_BUDGETS * 100
            in_flight.append(tokens)
            fits = sum(in_flight) <= max_tokens or len(in_flight) == 1
            for _ in range(rng.randrange(4)):
                await asyncio.sleep(0)
            in_flight.remove(tokens)
            release()
            assert fits

        async def call(tokens: int, batch: bool) -> None:
            release = await admission.acquire(tokens, batch=batch)
            sent.add(task := asyncio.create_task(compute(tokens, batch, release)))
            await asyncio.shield(task)

        sizes = [(rng.choice([1, 12, 12, 50, 100, 399, 500]), rng.random() < 0.3) for _ in range(120)]
        calls = [asyncio.create_task(call(*size)) for size in sizes]
        for task in calls:
            if rng.random() < cancelled_share:
                await asyncio.sleep(0)
                task.cancel()
        outcomes = await asyncio.gather(*calls, return_exceptions=True)
        assert all(outcome is None or isinstance(outcome, asyncio.CancelledError) for outcome in outcomes)
        await asyncio.gather(*sent)
        assert admission.can_send_now(WINDOW_BUDGETS * 100)
        releases = [await admission.acquire(10, batch=False) for _ in range(SMALL_CALLS) if admission.can_send_now(10)]
        assert len(releases) == SMALL_CALLS

    run(use)


def test_retry_after_is_the_time_to_compute_the_excess() -> None:
    async def use() -> None:
        admission = new_admission(max_pending_tokens=1000)
        release = await admission.acquire(400, batch=False)
        await asyncio.sleep(0.2)
        release()  # 400 tokens in 0.2 s
        with admission.admit(900), pytest.raises(ApiError) as caught, admission.admit(4100):
            pass
        assert caught.value.status == 429
        assert caught.value.headers is not None
        # 4,000 tokens too many, at nearly 2,000 tokens per second.
        assert int(caught.value.headers["Retry-After"]) in (2, 3)
        with admission.admit(10**6):  # a request of any size is admitted if nothing is pending
            assert admission.pending_tokens == 10**6
        assert admission.pending_tokens == 0

    run(use)


def test_speed_counts_busy_time_only() -> None:
    speed = lanes_module._Speed()
    assert speed.tokens_per_second == 0
    speed.start()
    time.sleep(0.1)
    speed.add_computed(1000)
    speed.stop()
    time.sleep(0.3)
    speed.start()
    time.sleep(0.1)
    speed.add_computed(1000)
    assert 7_000 < speed.tokens_per_second < 10_100


@given(
    costs=st.lists(st.integers(1, 300), min_size=1, max_size=80),
    batch_tokens=st.integers(1, 4_000),
    small_tokens=st.integers(1, 400),
)
def test_split_covers_every_input_once_within_limits(costs: list[int], batch_tokens: int, small_tokens: int) -> None:
    calls = split(costs, batch_tokens, small_tokens)
    assert sorted(i for call in calls for i in call) == list(range(len(costs)))
    if sum(costs) <= batch_tokens:
        assert calls == [range(len(costs))]
        return
    for call in calls:
        assert len(call) == 1 or sum(costs[i] for i in call) <= min(batch_tokens, CALL_SMALL_JOBS * small_tokens)


def test_split_bounds_padded_ids(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lanes_module, "MAX_PADDED_IDS", 60)
    costs = [3, 40, 1, 2, 50, 1]
    calls = split(costs, 10**6, 10**6)
    assert sorted(i for call in calls for i in call) == list(range(6))
    assert all(len(call) == 1 or len(call) * max(costs[i] for i in call) <= 60 for call in calls)
