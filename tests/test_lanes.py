"""Who may send when: nothing lost, nothing leaked, no more at Triton than there is room for, and nobody starved."""

import asyncio
import random
import time
from collections.abc import Awaitable, Callable
from typing import TypeVar

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from triton_embed.gateway import lanes as module
from triton_embed.gateway.errors import ApiError
from triton_embed.gateway.lanes import BUDGETS, PIECE, SMALL, SMALL_CALLS, TURNS, Lanes, pieces

T = TypeVar("T")

MOST_SMALL = 10  # tokens, of `lanes`


def run(use: Callable[[], Awaitable[T]]) -> T:
    async def whole() -> T:
        return await asyncio.wait_for(use(), 20)

    return asyncio.run(whole())


def lanes(budget: int = 100, small: int = SMALL * MOST_SMALL, most_waiting: int = 10**9, sharers: int = 1) -> Lanes:
    return Lanes("m", budget, small, most_waiting=most_waiting, sharers=sharers)


async def settled() -> None:
    for _ in range(5):
        await asyncio.sleep(0)


def test_a_window_of_tokens_and_no_more() -> None:
    async def use() -> None:
        door = lanes()
        ends = [await door.turn(100, batch=False) for _ in range(BUDGETS)]
        late = asyncio.create_task(door.turn(100, batch=False))
        await settled()
        assert not late.done()
        assert not door.free(MOST_SMALL + 1)
        ends[0]()
        await settled()
        assert late.done()

    run(use)


def test_a_call_larger_than_the_window_goes_alone() -> None:
    async def use() -> None:
        door = lanes()
        end = await door.turn(10**6, batch=False)
        next_one = asyncio.create_task(door.turn(MOST_SMALL + 1, batch=False))
        await settled()
        assert not next_one.done()
        end()
        await settled()
        assert next_one.done()

    run(use)


def test_a_small_call_does_not_wait_for_large_ones() -> None:
    async def use() -> None:
        door = lanes()
        await door.turn(10**6, batch=False)
        large = asyncio.create_task(door.turn(MOST_SMALL + 1, batch=False))
        bulk = asyncio.create_task(door.turn(MOST_SMALL, batch=True))
        await settled()
        assert door.free(MOST_SMALL)
        small = asyncio.create_task(door.turn(MOST_SMALL, batch=False))
        await settled()
        assert [task.done() for task in (large, bulk, small)] == [False, False, True]  # what can wait is never small
        for task in (large, bulk):
            task.cancel()

    run(use)


def test_small_calls_have_a_window_too_and_wait_for_each_other_in_order() -> None:
    async def use() -> None:
        door, order = lanes(), list[int]()
        end_large = await door.turn(100, batch=False)
        ends = [await door.turn(tokens, batch=False) for tokens in [10] * (SMALL_CALLS - 1) + [5]]

        async def late(number: int) -> None:
            await door.turn(10, batch=False)
            order.append(number)

        tasks = [asyncio.create_task(late(number)) for number in range(3)]
        await settled()
        assert not door.free(1)  # it would pass those who wait
        end_large()
        await settled()
        assert order == []  # the room of large calls is not theirs
        for end in ends[:2]:
            end()
        await settled()
        assert order == [0, 1]
        tasks[2].cancel()

    run(use)


def test_small_calls_take_no_room_from_large_ones() -> None:
    async def use() -> None:
        door = lanes()
        for _ in range(SMALL_CALLS):
            await door.turn(10, batch=False)
        waiting = [asyncio.create_task(door.turn(10, batch=False)) for _ in range(5)]
        await settled()
        for _ in range(BUDGETS):
            assert door.free(100)
            await door.turn(100, batch=False)
        assert not any(task.done() for task in waiting)
        for task in waiting:
            task.cancel()

    run(use)


@pytest.mark.parametrize(("sharers", "large", "small"), [(1, 4, 16), (2, 2, 8), (9, 2, 8)])
def test_those_who_send_to_one_triton_share_the_windows(sharers: int, large: int, small: int) -> None:
    async def use() -> None:
        door = lanes(sharers=sharers)
        calls = [asyncio.create_task(door.turn(tokens, batch=False)) for tokens in (100, 10) for _ in range(30)]
        await settled()
        assert [sum(task.done() for task in tasks) for tasks in (calls[:30], calls[30:])] == [large, small]
        for task in calls:
            task.cancel()

    run(use)


def test_a_small_call_whose_caller_left_takes_no_room() -> None:
    async def use() -> None:
        door = lanes()
        ends = [await door.turn(10, batch=False) for _ in range(SMALL_CALLS)]
        waiting = [asyncio.create_task(door.turn(10, batch=False)) for _ in range(3)]
        await settled()
        waiting[0].cancel()
        ends[0]()  # the turn of one who has left in this moment, or has not run yet
        waiting[1].cancel()
        await settled()
        assert waiting[2].done()
        ends[1]()
        assert door.free(10)

    run(use)


@pytest.mark.parametrize("size", [1, 10**5 + 1])
def test_calls_are_bounded_by_number_too(monkeypatch: pytest.MonkeyPatch, size: int) -> None:
    monkeypatch.setattr(module, "CALLS", 8)

    async def use() -> None:
        door = lanes(budget=10**6, small=SMALL * 10**5)
        for _ in range(8):
            assert door.free(size)
            await door.turn(size, batch=False)
        assert not door.free(size)
        assert door.free(10**5 + 2 - size)  # of the other kind

    run(use)


def test_the_first_lane_passes_the_second_and_does_not_starve_it() -> None:
    async def use() -> list[str]:
        door, order = lanes(), []
        end = await door.turn(10**6, batch=False)

        async def call(name: str, batch: bool) -> None:
            ended = await door.turn(300, batch=batch)
            order.append(name)
            await asyncio.sleep(0)
            ended()

        calls = [asyncio.create_task(call("bulk", True)) for _ in range(2)]
        await settled()
        calls += [asyncio.create_task(call("query", False)) for _ in range(2 * TURNS + 3)]
        await settled()
        end()
        await asyncio.gather(*calls)
        return order

    order = run(use)
    assert order[:TURNS] == ["query"] * TURNS
    assert order.index("bulk") == TURNS
    assert order.count("bulk") == 2
    assert order[TURNS + 1 :].index("bulk") == TURNS


def test_the_second_lane_leaves_half_of_the_window() -> None:
    async def use() -> None:
        door = lanes()
        bulk = [asyncio.create_task(door.turn(100, batch=True)) for _ in range(BUDGETS)]
        await settled()
        assert sum(task.done() for task in bulk) == BUDGETS // 2
        assert not door.free(100)  # those of the second lane wait, and yet
        query = asyncio.create_task(door.turn(100, batch=False))
        await settled()
        assert query.done()
        for task in bulk:
            task.cancel()

    run(use)


def test_who_leaves_the_line_takes_no_room() -> None:
    async def use() -> None:
        door = lanes()
        end = await door.turn(10**6, batch=False)
        waiting = [asyncio.create_task(door.turn(400, batch=False)) for _ in range(3)]
        await settled()
        waiting[0].cancel()
        await settled()
        end()
        await settled()
        assert waiting[1].done()
        assert not waiting[2].done()
        waiting[1].result()()
        await settled()
        assert waiting[2].done()

    run(use)


def test_who_leaves_in_the_moment_of_his_turn_gives_it_back() -> None:
    async def use() -> None:
        door = lanes()
        end = await door.turn(10**6, batch=False)
        caller = asyncio.create_task(door.turn(400, batch=False))
        await settled()
        end()  # his turn, before he has run again
        caller.cancel()
        with pytest.raises(asyncio.CancelledError):
            await caller
        assert door.free(400)

    run(use)


def test_whom_triton_refused_waits_for_an_end_and_for_none_where_there_is_none() -> None:
    async def use() -> None:
        door = lanes()
        assert not await door.another_has_ended()
        ends = [await door.turn(10, batch=False) for _ in range(2)]
        refused = [asyncio.create_task(door.another_has_ended()) for _ in range(3)]
        await settled()
        ends[0]()
        await settled()
        assert [task.done() for task in refused] == [True, False, False]  # one room, one more try
        ends[1]()
        await settled()
        assert all(task.done() for task in refused)  # no other end is to come

    run(use)


def test_an_end_counts_once() -> None:
    async def use() -> None:
        door = lanes()
        first, second = await door.turn(200, batch=False), await door.turn(200, batch=False)
        first()
        first()
        assert not door.free(300)
        second()
        assert door.free(300)

    run(use)


@settings(deadline=None)
@given(seed=st.integers(0, 10**6), leaving=st.floats(0, 0.6))
def test_whatever_comes_and_goes_the_window_holds_and_all_are_served(seed: int, leaving: float) -> None:
    """As the gateway does it: a caller may leave at any moment, and a call that was sent runs to its end."""
    chance = random.Random(seed)

    async def use() -> None:
        door = lanes()
        at_triton: dict[bool, list[int]] = {True: [], False: []}
        sent: set[asyncio.Task[None]] = set()

        async def compute(tokens: int, batch: bool, ended: Callable[[], None]) -> None:
            small = tokens <= MOST_SMALL and not batch
            there, most = at_triton[small], SMALL_CALLS * MOST_SMALL if small else BUDGETS * 100
            there.append(tokens)
            within = sum(there) <= most or len(there) == 1
            for _ in range(chance.randrange(4)):
                await asyncio.sleep(0)
            there.remove(tokens)
            ended()
            assert within

        async def call(tokens: int, batch: bool) -> None:
            ended = await door.turn(tokens, batch=batch)
            sent.add(task := asyncio.create_task(compute(tokens, batch, ended)))
            await asyncio.shield(task)

        sizes = [(chance.choice([1, 12, 12, 50, 100, 399, 500]), chance.random() < 0.3) for _ in range(120)]
        calls = [asyncio.create_task(call(*size)) for size in sizes]
        for task in calls:
            if chance.random() < leaving:
                await asyncio.sleep(0)
                task.cancel()
        found = await asyncio.gather(*calls, return_exceptions=True)
        assert all(outcome is None or isinstance(outcome, asyncio.CancelledError) for outcome in found)
        await asyncio.gather(*sent)
        assert door.free(BUDGETS * 100)
        ends = [await door.turn(10, batch=False) for _ in range(SMALL_CALLS) if door.free(10)]
        assert len(ends) == SMALL_CALLS

    run(use)


def test_what_is_refused_knows_when_to_come_back() -> None:
    async def use() -> None:
        door = lanes(most_waiting=1000)
        end = await door.turn(400, batch=False)
        await asyncio.sleep(0.2)
        end()  # 400 tokens in 0.2 s
        with door.admit(900), pytest.raises(ApiError) as caught, door.admit(4100):
            pass
        assert caught.value.status == 429
        assert caught.value.headers is not None
        assert int(caught.value.headers["Retry-After"]) in (2, 3)  # 4,000 tokens too many, at nearly 2,000 a second
        with door.admit(10**6):  # one request may be as large as it likes where nobody waits
            assert door.waiting == 10**6
        assert door.waiting == 0

    run(use)


def test_speed_is_that_of_the_busy_time() -> None:
    speed = module._Speed()
    assert speed.tokens_per_second == 0
    speed.start()
    time.sleep(0.1)
    speed.computed(1000)
    speed.stop()
    time.sleep(0.3)
    speed.start()
    time.sleep(0.1)
    speed.computed(1000)
    assert 7_000 < speed.tokens_per_second < 10_100


@given(
    costs=st.lists(st.integers(1, 300), min_size=1, max_size=80), whole=st.integers(1, 4_000), small=st.integers(1, 400)
)
def test_pieces_hold_every_input_once_and_no_more_than_they_may(costs: list[int], whole: int, small: int) -> None:
    found = pieces(costs, whole, small)
    assert sorted(i for piece in found for i in piece) == list(range(len(costs)))
    if sum(costs) <= whole:
        assert found == [range(len(costs))]
        return
    for piece in found:
        assert len(piece) == 1 or sum(costs[i] for i in piece) <= min(whole, PIECE * small)


def test_a_long_row_among_short_ones_does_not_pad_them_all(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "PADDED", 60)
    found = pieces([3, 40, 1, 2, 50, 1], 10**6, 10**6)
    assert sorted(i for piece in found for i in piece) == list(range(6))
    assert all(len(piece) == 1 or len(piece) * max([3, 40, 1, 2, 50, 1][i] for i in piece) <= 60 for piece in found)
