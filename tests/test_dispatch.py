"""Dispatch: requests split into calls, replies in order, and nothing sent for a caller that has disconnected."""

import asyncio
import time
from collections.abc import Awaitable, Callable
from dataclasses import replace
from typing import Any

import grpc
import pytest
from test_client import Scripted, ids, texts, with_scripted
from test_model_info import INFO

from triton_embed.gateway.api.requests import EmbeddingRequest
from triton_embed.gateway.errors import ApiError
from triton_embed.gateway.triton.client import TritonClient
from triton_embed.gateway.triton.dispatch import CallContext, Dispatcher, estimate
from triton_embed.python_backend.wire import InputError

MODEL = replace(INFO, batch_tokens=10, small_tokens=3, max_model_len=50)
REFUSAL = (grpc.StatusCode.INVALID_ARGUMENT, InputError(0, "invalid_text", "Input is bad").to_json())


class DisconnectedError(Exception):
    """The error that `disconnected` raises in these tests."""


def dispatch(use: Callable[[Dispatcher, Scripted], Awaitable[Any]], *, gateway_count: int = 1) -> Any:
    async def with_client(client: TritonClient, script: Scripted) -> Any:
        return await use(Dispatcher(client, max_pending_tokens=10**6, gateway_count=gateway_count), script)

    return with_scripted(with_client)


def new_context(seconds: float = 10.0, **fields: Any) -> CallContext:
    return CallContext(asyncio.get_running_loop().time() + seconds, **fields)


def rows_of(script: Scripted) -> list[int]:
    return [request.inputs[0].shape[0] for request in script.requests]


@pytest.mark.parametrize("batch", [False, True])
def test_large_request_is_split_into_calls(batch: bool) -> None:
    async def use(dispatcher: Dispatcher, script: Scripted) -> None:
        request = replace(ids(*([7] * n for n in (5, 1, 5, 5, 30, 1))), batch=batch)
        reply = await dispatcher.embed(MODEL, request, None, new_context())
        assert sorted(rows_of(script)) == [1, 2, 3]
        assert (len(reply.vectors), len(reply.tokens), len(reply.dropped)) == (6, 6, 6)
        assert set(dispatcher.pending_tokens.values()) == {0}

    dispatch(use)


@pytest.mark.parametrize(("gateway_count", "max_in_flight"), [(1, 4), (2, 2), (9, 2)])
def test_single_call_requests_fill_the_window(gateway_count: int, max_in_flight: int) -> None:
    async def use(dispatcher: Dispatcher, script: Scripted) -> None:
        script.seconds = 0.02
        await asyncio.gather(*(dispatcher.embed(MODEL, ids([7] * 10), None, new_context()) for _ in range(12)))
        assert script.peak == max_in_flight

    dispatch(use, gateway_count=gateway_count)


def test_failed_call_stops_unsent_calls_of_its_request() -> None:
    async def use(dispatcher: Dispatcher, script: Scripted) -> None:
        script.failure = REFUSAL
        script.seconds = 0.05
        request = ids(*([7] * 10 for _ in range(40)))
        with pytest.raises(ApiError, match=r"Input at index \d+ is bad"):
            await dispatcher.embed(MODEL, request, None, new_context())
        await asyncio.sleep(0.2)
        assert script.answered <= 8
        script.failure = None
        assert len((await dispatcher.embed(MODEL, request, None, new_context())).tokens) == 40

    dispatch(use)


def test_full_triton_queue_returns_retry_after() -> None:
    async def use(dispatcher: Dispatcher, script: Scripted) -> ApiError:
        script.failure = (grpc.StatusCode.UNAVAILABLE, "Exceeds maximum queue size")
        with pytest.raises(ApiError) as caught:
            await dispatcher.embed(MODEL, texts("a"), None, new_context())
        return caught.value

    error = dispatch(use)
    assert (error.status, error.headers) == (429, {"Retry-After": "1"})


def test_triton_queue_full_of_own_calls_is_retried() -> None:
    async def use(dispatcher: Dispatcher, script: Scripted) -> None:
        script.seconds, script.max_running = 0.02, 2
        requests = [ids(*([7] * 10 for _ in range(8))) for _ in range(3)]
        replies = await asyncio.gather(*(dispatcher.embed(MODEL, request, None, new_context()) for request in requests))
        assert [len(reply.tokens) for reply in replies] == [8, 8, 8]
        assert script.refused > 0
        assert set(dispatcher.pending_tokens.values()) == {0}

    dispatch(use)


def test_model_error_names_the_request_field() -> None:
    async def use(dispatcher: Dispatcher, script: Scripted) -> None:
        script.failure = REFUSAL
        with pytest.raises(ApiError) as caught:
            await dispatcher.embed(MODEL, replace(texts("a"), param="image_data"), None, new_context())
        assert (caught.value.message, caught.value.param) == ("Input at index 0 is bad", "image_data")

    dispatch(use)


def test_remaining_deadline_is_forwarded() -> None:
    async def use(dispatcher: Dispatcher, script: Scripted) -> list[int]:
        script.seconds = 0.1
        await dispatcher.embed(MODEL, ids(*([7] * 10 for _ in range(12))), None, new_context(5.0))
        return [request.parameters["timeout_ms"].int64_param for request in script.requests]

    timeouts_ms = dispatch(use)
    # Calls sent at the same moment may arrive in any order.
    assert all(abs(a - b) <= 50 for a, b in zip(timeouts_ms, sorted(timeouts_ms, reverse=True), strict=True))
    assert 4_900 < timeouts_ms[0] <= 5_000
    assert timeouts_ms[-1] < 4_850


def test_disconnected_caller_stops_unsent_calls() -> None:
    async def use(dispatcher: Dispatcher, script: Scripted) -> None:
        script.seconds = 0.05
        hung_up = asyncio.Event()

        async def disconnected() -> None:
            await hung_up.wait()
            raise DisconnectedError

        request = ids(*([7] * 10 for _ in range(60)))
        embedding = asyncio.ensure_future(
            dispatcher.embed(MODEL, request, None, new_context(disconnected=disconnected))
        )
        await asyncio.sleep(0.12)
        hung_up.set()
        with pytest.raises(DisconnectedError):
            await embedding
        sent = script.answered
        await asyncio.sleep(0.2)
        assert script.answered <= sent + 4  # the calls that were in flight
        assert script.cancelled == 0
        assert len((await dispatcher.embed(MODEL, texts("a"), None, new_context())).tokens) == 1

    dispatch(use)


def test_other_requests_run_between_calls_of_a_large_request() -> None:
    async def use(dispatcher: Dispatcher, script: Scripted) -> None:
        script.seconds = 0.02
        async with asyncio.TaskGroup() as group:
            large = group.create_task(
                dispatcher.embed(MODEL, ids(*([7] * 10 for _ in range(100))), None, new_context())
            )
            await asyncio.sleep(0.05)
            await dispatcher.embed(MODEL, texts("a"), None, new_context())
            assert not large.done()
            assert script.answered < 30

    dispatch(use)


def test_small_query_does_not_wait_for_a_large_request() -> None:
    async def use(dispatcher: Dispatcher, script: Scripted) -> None:
        script.seconds = 0.1
        async with asyncio.TaskGroup() as group:
            group.create_task(dispatcher.embed(MODEL, ids(*([7] * 10 for _ in range(16))), None, new_context()))
            await asyncio.sleep(0.02)
            start = time.monotonic()
            await dispatcher.embed(MODEL, ids([7]), None, new_context())
            assert time.monotonic() - start < 0.15  # the window is full, and each call takes 0.1 s
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
def test_estimated_tokens_per_input(request_: EmbeddingRequest, expected: list[int]) -> None:
    assert estimate(request_, None, MODEL) == expected
