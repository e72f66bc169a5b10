"""One request, several calls: in order, in turn, and nothing sent for a caller who is gone."""

import asyncio
import time
from collections.abc import Awaitable, Callable
from dataclasses import replace
from typing import Any

import grpc
import pytest
from test_client import Scripted, ids, texts, with_scripted
from test_model import INFO

from triton_embed.gateway.client import TritonClient
from triton_embed.gateway.dispatch import Caller, Dispatcher, estimate, renumbered
from triton_embed.gateway.errors import ApiError
from triton_embed.gateway.schemas import EmbeddingRequest

MODEL = INFO.model_copy(update={"batch_tokens": 10, "small_tokens": 3, "max_model_len": 50})


class LeftError(Exception):
    """What the caller's absence raises here."""


def dispatch(use: Callable[[Dispatcher, Scripted], Awaitable[Any]], *, sharers: int = 1) -> Any:
    async def with_client(client: TritonClient, script: Scripted) -> Any:
        return await use(Dispatcher(client, most_waiting=10**6, sharers=sharers), script)

    return with_scripted(with_client)


def caller(seconds: float = 10.0, **more: Any) -> Caller:
    return Caller(asyncio.get_running_loop().time() + seconds, **more)


def rows_of(script: Scripted) -> list[int]:
    return [request.inputs[0].shape[0] for request in script.asked]


@pytest.mark.parametrize("batch", [False, True])
def test_a_request_is_sent_in_calls_of_a_forward_pass(batch: bool) -> None:
    async def use(door: Dispatcher, script: Scripted) -> None:
        request = replace(ids(*([7] * n for n in (5, 1, 5, 5, 30, 1))), batch=batch)
        reply = await door.embed(MODEL, request, None, caller())
        assert sorted(rows_of(script)) == [1, 2, 3]
        assert (len(reply.vectors), len(reply.tokens), len(reply.dropped)) == (6, 6, 6)
        assert set(door.waiting.values()) == {0}

    dispatch(use)


@pytest.mark.parametrize(("sharers", "at_once"), [(1, 4), (2, 2), (9, 2)])
def test_requests_of_one_call_fill_the_window_too(sharers: int, at_once: int) -> None:
    async def use(door: Dispatcher, script: Scripted) -> None:
        script.seconds = 0.02
        await asyncio.gather(*(door.embed(MODEL, ids([7] * 10), None, caller()) for _ in range(12)))
        assert script.peak == at_once

    dispatch(use, sharers=sharers)


def test_a_faulty_call_ends_those_that_have_not_been_sent() -> None:
    async def use(door: Dispatcher, script: Scripted) -> None:
        script.failure = (grpc.StatusCode.INVALID_ARGUMENT, "Input at index 0 is bad")
        script.seconds = 0.05
        request = ids(*([7] * 10 for _ in range(40)))
        with pytest.raises(ApiError, match=r"Input at index \d+ is bad"):
            await door.embed(MODEL, request, None, caller())
        await asyncio.sleep(0.2)
        assert script.answered <= 8
        script.failure = None
        assert len((await door.embed(MODEL, request, None, caller())).tokens) == 40

    dispatch(use)


def test_tritons_own_full_queue_says_when_to_come_back() -> None:
    async def use(door: Dispatcher, script: Scripted) -> ApiError:
        script.failure = (grpc.StatusCode.UNAVAILABLE, "Exceeds maximum queue size")
        with pytest.raises(ApiError) as caught:
            await door.embed(MODEL, texts("a"), None, caller())
        return caught.value

    error = dispatch(use)
    assert (error.status, error.headers) == (429, {"Retry-After": "1"})


def test_a_queue_of_tritons_that_is_full_of_our_own_calls_is_waited_for() -> None:
    async def use(door: Dispatcher, script: Scripted) -> None:
        script.seconds, script.most = 0.02, 2
        requests = [ids(*([7] * 10 for _ in range(8))) for _ in range(3)]
        replies = await asyncio.gather(*(door.embed(MODEL, request, None, caller()) for request in requests))
        assert [len(reply.tokens) for reply in replies] == [8, 8, 8]
        assert script.refused > 0
        assert set(door.waiting.values()) == {0}

    dispatch(use)


def test_a_fault_that_the_model_finds_names_the_field() -> None:
    async def use(door: Dispatcher, script: Scripted) -> None:
        script.failure = (grpc.StatusCode.INVALID_ARGUMENT, "Input at index 0 is bad")
        with pytest.raises(ApiError) as caught:
            await door.embed(MODEL, replace(texts("a"), param="image_data"), None, caller())
        assert (caught.value.message, caught.value.param) == ("Input at index 0 is bad", "image_data")

    dispatch(use)


def test_what_is_left_of_the_time_travels_along() -> None:
    async def use(door: Dispatcher, script: Scripted) -> list[int]:
        script.seconds = 0.1
        await door.embed(MODEL, ids(*([7] * 10 for _ in range(12))), None, caller(5.0))
        return [request.parameters["timeout_ms"].int64_param for request in script.asked]

    left = dispatch(use)
    # Calls of one moment may arrive in any order.
    assert all(abs(a - b) <= 50 for a, b in zip(left, sorted(left, reverse=True), strict=True))
    assert 4_900 < left[0] <= 5_000
    assert left[-1] < 4_850


def test_a_caller_who_leaves_is_not_worked_for() -> None:
    async def use(door: Dispatcher, script: Scripted) -> None:
        script.seconds = 0.05
        gone = asyncio.Event()

        async def left() -> None:
            await gone.wait()
            raise LeftError

        request = ids(*([7] * 10 for _ in range(60)))
        asking = asyncio.ensure_future(door.embed(MODEL, request, None, caller(left=left)))
        await asyncio.sleep(0.12)
        gone.set()
        with pytest.raises(LeftError):
            await asking
        sent = script.answered
        await asyncio.sleep(0.2)
        assert script.answered <= sent + 4  # those that were there already
        assert script.cancelled == 0
        assert len((await door.embed(MODEL, texts("a"), None, caller())).tokens) == 1

    dispatch(use)


def test_one_large_request_leaves_room_between_its_calls() -> None:
    async def use(door: Dispatcher, script: Scripted) -> None:
        script.seconds = 0.02
        async with asyncio.TaskGroup() as group:
            large = group.create_task(door.embed(MODEL, ids(*([7] * 10 for _ in range(100))), None, caller()))
            await asyncio.sleep(0.05)
            await door.embed(MODEL, texts("a"), None, caller())
            assert not large.done()
            assert script.answered < 30

    dispatch(use)


def test_a_small_query_waits_for_nothing_of_a_large_request() -> None:
    async def use(door: Dispatcher, script: Scripted) -> None:
        script.seconds = 0.1
        async with asyncio.TaskGroup() as group:
            group.create_task(door.embed(MODEL, ids(*([7] * 10 for _ in range(16))), None, caller()))
            await asyncio.sleep(0.02)
            began = time.monotonic()
            await door.embed(MODEL, ids([7]), None, caller())
            assert time.monotonic() - began < 0.15  # the window is full, and each call takes 0.1 s
        assert script.peak == 5

    dispatch(use)


@pytest.mark.parametrize(
    ("request_", "expected"),
    [
        (texts("a" * 40), [14]),
        (texts("画" * 40), [44]),
        (texts("a" * 4_000), [50]),
        (texts("a" * 4_000, long_text="mean"), [1004]),
        (ids([1] * 7, [], [1] * 90), [7, 1, 50]),
    ],
)
def test_what_inputs_will_about_cost(request_: EmbeddingRequest, expected: list[int]) -> None:
    assert estimate(request_, None, MODEL) == expected


def test_a_models_numbers_become_the_callers() -> None:
    said = "Input at index 1: the image is bad"
    assert renumbered(said, [7, 12]) == "Input at index 12: the image is bad"
    assert renumbered("The input is longer. (input at index 0)", [7]) == "The input is longer. (input at index 7)"
    assert renumbered(said, range(2)) == said
