"""Admission control: no call is lost or starved, no token leaks, and the windows are never exceeded."""

import asyncio
import math
import random
from collections.abc import Awaitable, Callable
from typing import TypeVar

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from triton_embed.gateway.errors import ApiError
from triton_embed.gateway.triton import admission as lanes_module
from triton_embed.gateway.triton.admission import (
    ACCEPTED_SHARE,
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
    instances: int = 1,
) -> Admission:
    return Admission(
        "m", budget, small_tokens, instances, max_pending_tokens=max_pending_tokens, gateway_count=gateway_count
    )


async def send(admission: Admission, tokens: int, *, batch: bool = False, seconds: float = 60) -> Callable[[], None]:
    """Send a request in one call. Return the function that ends the call."""
    with admission.admit(tokens, asyncio.get_running_loop().time() + seconds, batch=batch) as request:
        return await admission.acquire(request, tokens)


def fits(admission: Admission, tokens: int) -> bool:
    """Return whether a request would be sent at once."""
    with admission.admit(tokens, asyncio.get_running_loop().time() + 60, batch=False) as request:
        return admission.can_send_now(request)


async def settle() -> None:
    for _ in range(5):
        await asyncio.sleep(0)


def test_large_window_bounds_tokens_in_flight() -> None:
    async def use() -> None:
        admission = new_admission()
        releases = [await send(admission, 100) for _ in range(WINDOW_BUDGETS)]
        late = asyncio.create_task(send(admission, 100))
        await settle()
        assert not late.done()
        assert not fits(admission, MAX_SMALL_TOKENS + 1)
        releases[0]()
        await settle()
        assert late.done()

    run(use)


def test_call_larger_than_window_is_sent_alone() -> None:
    async def use() -> None:
        admission = new_admission()
        release = await send(admission, 10**6)
        next_call = asyncio.create_task(send(admission, MAX_SMALL_TOKENS + 1))
        await settle()
        assert not next_call.done()
        release()
        await settle()
        assert next_call.done()

    run(use)


def test_small_call_does_not_wait_for_large_calls() -> None:
    async def use() -> None:
        admission = new_admission()
        await send(admission, 10**6)
        large = asyncio.create_task(send(admission, MAX_SMALL_TOKENS + 1))
        bulk = asyncio.create_task(send(admission, MAX_SMALL_TOKENS, batch=True))
        await settle()
        assert fits(admission, MAX_SMALL_TOKENS)
        small = asyncio.create_task(send(admission, MAX_SMALL_TOKENS))
        await settle()
        # A call of the batch lane is never small.
        assert [task.done() for task in (large, bulk, small)] == [False, False, True]
        for task in (large, bulk):
            task.cancel()

    run(use)


def test_small_window_is_bounded_and_served_in_order() -> None:
    async def use() -> None:
        admission, order = new_admission(), list[int]()
        release_large = await send(admission, 100)
        releases = [await send(admission, tokens) for tokens in [10] * (SMALL_CALLS - 1) + [1]]

        async def late(number: int) -> None:
            await send(admission, 10)
            order.append(number)

        tasks = [asyncio.create_task(late(number)) for number in range(3)]
        await settle()
        assert not fits(admission, 6)  # it would overtake the waiting calls, which are less than twice as large
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
            await send(admission, 10)
        waiting = [asyncio.create_task(send(admission, 10)) for _ in range(5)]
        await settle()
        for _ in range(WINDOW_BUDGETS):
            assert fits(admission, 100)
            await send(admission, 100)
        assert not any(task.done() for task in waiting)
        for task in waiting:
            task.cancel()

    run(use)


@pytest.mark.parametrize(
    ("gateway_count", "instances", "large", "small"),
    [(1, 1, 4, 16), (2, 1, 2, 8), (9, 1, 2, 8), (1, 2, 8, 32), (2, 3, 6, 24)],
)
def test_gateways_share_the_windows_of_all_instances(
    gateway_count: int, instances: int, large: int, small: int
) -> None:
    async def use() -> None:
        admission = new_admission(gateway_count=gateway_count, instances=instances)
        calls = [asyncio.create_task(send(admission, tokens)) for tokens in (100, 10) for _ in range(40)]
        await settle()
        assert [sum(task.done() for task in tasks) for tasks in (calls[:40], calls[40:])] == [large, small]
        for task in calls:
            task.cancel()

    run(use)


def test_cancelled_small_call_frees_its_window() -> None:
    async def use() -> None:
        admission = new_admission()
        releases = [await send(admission, 10) for _ in range(SMALL_CALLS)]
        waiting = [asyncio.create_task(send(admission, 10)) for _ in range(3)]
        await settle()
        waiting[0].cancel()
        releases[0]()  # grants a call that is cancelled at this moment, or has not resumed yet
        waiting[1].cancel()
        await settle()
        assert waiting[2].done()
        releases[1]()
        assert fits(admission, 10)

    run(use)


@pytest.mark.parametrize("size", [1, 10**5 + 1])
def test_number_of_calls_in_flight_is_bounded(monkeypatch: pytest.MonkeyPatch, size: int) -> None:
    monkeypatch.setattr(lanes_module, "MAX_CALLS", 8)

    async def use() -> None:
        admission = new_admission(budget=10**6, small_tokens=SMALL_DIVISOR * 10**5)
        for _ in range(8):
            assert fits(admission, size)
            await send(admission, size)
        assert not fits(admission, size)
        assert fits(admission, 10**5 + 2 - size)  # a call of the other window

    run(use)


def test_interactive_lane_overtakes_but_does_not_starve_batch_lane() -> None:
    async def use() -> list[str]:
        admission, order = new_admission(), []
        release = await send(admission, 10**6)

        async def call(name: str, batch: bool) -> None:
            release = await send(admission, 300, batch=batch)
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
        bulk = [asyncio.create_task(send(admission, 100, batch=True)) for _ in range(WINDOW_BUDGETS)]
        await settle()
        assert sum(task.done() for task in bulk) == WINDOW_BUDGETS // 2
        query = asyncio.create_task(send(admission, 100))
        await settle()
        assert query.done()
        for task in bulk:
            task.cancel()

    run(use)


def test_cancelled_waiting_call_is_skipped() -> None:
    async def use() -> None:
        admission = new_admission()
        release = await send(admission, 10**6)
        waiting = [asyncio.create_task(send(admission, 400)) for _ in range(3)]
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
        release = await send(admission, 10**6)
        caller = asyncio.create_task(send(admission, 400))
        await settle()
        release()  # grants the call, whose task has not resumed yet
        caller.cancel()
        with pytest.raises(asyncio.CancelledError):
            await caller
        assert fits(admission, 400)

    run(use)


def test_refused_call_waits_only_if_another_call_is_in_flight() -> None:
    async def use() -> None:
        admission = new_admission()
        deadline = asyncio.get_running_loop().time() + 60
        with admission.admit(10, deadline, batch=False) as request:
            (await admission.acquire(request, 10))()
            assert not await admission.put_back(request, 10)
        releases = [await send(admission, 10) for _ in range(2)]

        all_refused = asyncio.Event()

        async def refused() -> None:
            with admission.admit(10, deadline, batch=False) as request:
                (await admission.acquire(request, 10))()
                await all_refused.wait()
                assert await admission.put_back(request, 10)
                await admission.acquire(request, 10)

        tasks = [asyncio.create_task(refused()) for _ in range(3)]
        await settle()
        all_refused.set()
        await settle()
        releases[0]()
        await settle()
        assert [task.done() for task in tasks] == [True, False, False]  # each end wakes one call
        releases[1]()
        await settle()
        assert [task.done() for task in tasks] == [True, True, False]

    run(use)


def test_release_counts_once() -> None:
    async def use() -> None:
        admission = new_admission()
        first, second = await send(admission, 200), await send(admission, 200)
        first()
        first()
        assert not fits(admission, 300)
        second()
        assert fits(admission, 300)

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
            release = await send(admission, tokens, batch=batch)
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
        assert fits(admission, WINDOW_BUDGETS * 100)
        releases = [await send(admission, 10) for _ in range(SMALL_CALLS) if fits(admission, 10)]
        assert len(releases) == SMALL_CALLS

    run(use)


async def saturate(admission: Admission, tokens: int = 100) -> Callable[[], None]:
    """Let calls that fill the large window wait and end every 0.1 s for 0.7 s. Return what ends the last one."""
    release = await send(admission, WINDOW_BUDGETS * tokens)
    waiting = [asyncio.create_task(send(admission, WINDOW_BUDGETS * tokens)) for _ in range(8)]
    await settle()
    for task in waiting[:-1]:
        await asyncio.sleep(0.1)
        release()
        release = await task
    waiting[-1].cancel()
    await settle()
    return release


def test_measured_speed_decides_what_is_accepted() -> None:
    async def use() -> None:
        admission = new_admission()
        end = await saturate(admission)
        now = asyncio.get_running_loop().time()
        speed = admission._interactive.window.speed.tokens_per_second
        assert speed is not None
        accepted = int(ACCEPTED_SHARE * 10 * speed) - 400  # in 10 s, after the call in flight
        with pytest.raises(ApiError) as caught, admission.admit(accepted + int(2.5 * speed), now + 10, batch=False):
            pass
        assert (caught.value.status, caught.value.headers) == (429, {"Retry-After": "3"})
        with admission.admit(accepted - int(speed), now + 10, batch=False):
            with pytest.raises(ApiError), admission.admit(2 * int(speed), now + 10, batch=False):
                pass
            with admission.admit(2 * int(speed), now + 20, batch=False):  # a later deadline
                pass
        end()
        with admission.admit(100 * int(speed), now + 10, batch=False):  # nothing is ahead of it
            pass

    run(use)


async def send_all(
    admission: Admission, calls: int, name: str, order: list[str], *, deadline: float = 60, batch: bool = False
) -> None:
    """Send a request of `calls` calls of 100 tokens, each of which takes 50 ms."""
    loop = asyncio.get_running_loop()
    with admission.admit(100 * calls, loop.time() + deadline, batch=batch) as request:

        async def call() -> None:
            release = await admission.acquire(request, 100)
            order.append(name)
            loop.call_later(0.05, release)

        try:
            async with asyncio.TaskGroup() as group:
                for _ in range(calls):
                    group.create_task(call())
        except ExceptionGroup as errors:
            raise errors.exceptions[0] from None


def test_requests_are_sent_completely_one_after_the_other() -> None:
    async def use() -> None:
        admission, order = new_admission(), list[str]()
        await asyncio.gather(*(send_all(admission, 9, name, order) for name in "abc"))
        assert "".join(order) == 9 * "a" + 9 * "b" + 9 * "c"

    run(use)


def test_small_requests_overtake_a_large_one_within_limits() -> None:
    async def use() -> None:
        admission, order = new_admission(), list[str]()
        end = await send(admission, WINDOW_BUDGETS * 100)
        large = asyncio.create_task(send_all(admission, 10, "L", order))
        await settle()
        others = [asyncio.create_task(send_all(admission, 4, "s", order)) for number in range(12)]
        await settle()
        end()
        await asyncio.gather(large, *others)
        # Ten of them are as many tokens as four times those of the large one.
        assert "".join(order).index("L") == 4 * 10
        assert "".join(order)[40:50] == 10 * "L"

    run(use)


def test_request_that_will_be_late_leaves_the_queue() -> None:
    async def use() -> None:
        admission, order = new_admission(), list[str]()
        # Nothing is known about the speed yet: 8,000 tokens per second.
        first = asyncio.create_task(send_all(admission, 80, "a", order))
        late = asyncio.create_task(send_all(admission, 160, "b", order, deadline=2))
        last = asyncio.create_task(send_all(admission, 8, "c", order, deadline=2))
        with pytest.raises(ApiError) as caught:
            await late
        assert caught.value.status == 429
        assert not first.done()
        await asyncio.gather(first, last)
        assert sorted(order) == 80 * ["a"] + 8 * ["c"]

    run(use)


def test_call_that_is_refused_and_cancelled_at_once_was_never_in_flight() -> None:
    async def use() -> None:
        admission = new_admission()
        release = await send(admission, WINDOW_BUDGETS * 100)
        with admission.admit(100, asyncio.get_running_loop().time() + 60, batch=False) as request:
            call = asyncio.create_task(admission.acquire(request, 100))
            await settle()
            request.fail(ApiError(429, "late"))
            call.cancel()
            with pytest.raises(asyncio.CancelledError):
                await call
        assert not fits(admission, 100)
        release()
        assert fits(admission, 100)

    run(use)


def test_batch_request_is_computed_before_its_deadline() -> None:
    async def use() -> None:
        admission, order = new_admission(), list[str]()
        (await saturate(admission))()
        batch = asyncio.create_task(send_all(admission, 40, "b", order, batch=True, deadline=3))
        await settle()
        interactive = [asyncio.create_task(send_all(admission, 300, "i", order)) for _ in range(2)]
        await batch
        assert order.count("i") < 0.8 * INTERACTIVE_TURNS * 40  # more than one turn in nine
        assert order.count("i") > 40  # but it did not go first
        for task in interactive:
            task.cancel()

    run(use)


def test_small_requests_wait_for_a_second_only_while_more_arrive_than_can_be_computed() -> None:
    async def use() -> None:
        admission = new_admission()
        accepted: list[asyncio.Task[None]] = []

        async def query() -> None:
            release = await send(admission, 10)
            asyncio.get_running_loop().call_later(0.1, release)

        async def burst(count: int) -> int:
            tasks = [asyncio.create_task(query()) for _ in range(count)]
            await settle()
            accepted.extend(tasks)
            return sum(task.done() and task.exception() is not None for task in tasks)

        # 160 queries per second are computed. A burst of 600 is accepted, and waits for 3.7 s.
        assert await burst(600) == 0
        await asyncio.sleep(2.3)
        assert await burst(100) == 100
        while await burst(10) == 10:  # until a second's work is left
            assert not all(task.done() for task in accepted)
            await asyncio.sleep(0.1)
        await asyncio.gather(*accepted, return_exceptions=True)

    run(use)


def test_pending_tokens_are_bounded() -> None:
    async def use() -> None:
        admission = new_admission(max_pending_tokens=1000)
        later = asyncio.get_running_loop().time() + 60
        with admission.admit(10**6, later, batch=False):  # any size is accepted if nothing is pending
            assert admission.pending_tokens == 10**6
            with pytest.raises(ApiError, match="Too much work"), admission.admit(1, later, batch=False):
                pass
        assert admission.pending_tokens == 0
        with admission.admit(900, later, batch=False), pytest.raises(ApiError), admission.admit(101, later, batch=True):
            pass

    run(use)


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
    part = sum(costs) / math.ceil(sum(costs) / min(batch_tokens, CALL_SMALL_JOBS * small_tokens))
    for call in calls:
        tokens, longest = sum(costs[i] for i in call), max(costs[i] for i in call)
        assert len(call) == 1 or tokens <= part + longest
        assert tokens >= part - max(costs)  # a small rest would be a small job to the engine


def test_split_bounds_padded_ids(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lanes_module, "MAX_PADDED_IDS", 60)
    costs = [3, 40, 1, 2, 50, 1]
    calls = split(costs, 10**6, 10**6)
    assert sorted(i for call in calls for i in call) == list(range(6))
    assert all(len(call) == 1 or len(call) * max(costs[i] for i in call) <= 60 for call in calls)
