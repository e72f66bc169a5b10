"""One request -> one or several calls, each in its turn -> one answer."""

import asyncio
import contextlib
import re
from collections.abc import Awaitable, Callable, Coroutine, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

import numpy as np

from triton_embed.gateway.client import Metadata, TritonClient
from triton_embed.gateway.errors import ApiError, invalid
from triton_embed.gateway.lanes import Lanes, pieces
from triton_embed.gateway.model import ModelInfo
from triton_embed.gateway.schemas import EmbeddingRequest, Embeddings

T = TypeVar("T")

# What is not known before a model has read it. Too high holds work back for a moment, too low sends it early.
LETTERS_A_TOKEN = 4  # of ASCII text; other scripts come close to a token a letter
SPECIAL_TOKENS = 4
IMAGE_TOKENS = 768

Images = Sequence[Sequence[bytes]]


@dataclass(frozen=True, slots=True)
class Caller:
    """Who waits for an answer: until when (by the event loop's clock), what identifies the trace, when they left."""

    deadline: float
    metadata: Metadata = ()
    left: Callable[[], Awaitable[None]] | None = None  # returns or raises when they have


class Dispatcher:
    """For every model of one gateway; `most_waiting` tokens of each may wait, `sharers` gateways share a Triton."""

    def __init__(self, client: TritonClient, *, most_waiting: int, sharers: int) -> None:
        self._client = client
        self._most_waiting = most_waiting
        self._sharers = sharers
        self._lanes: dict[tuple[str, int, int], Lanes] = {}

    @property
    def waiting(self) -> Mapping[str, int]:
        """Tokens that wait, by model."""
        return {model: lanes.waiting for (model, *_), lanes in self._lanes.items()}

    async def embed(
        self, model: ModelInfo, request: EmbeddingRequest, images: Images | None, caller: Caller
    ) -> Embeddings:
        """The answer to a whole request. ApiError 429: too much is waiting; and what the client raises.

        What has not been sent when the caller leaves, is cancelled or gets an error, never is.
        """
        costs = estimate(request, images, model)
        calls = pieces(costs, model.batch_tokens, model.small_tokens)
        lanes = self._of(model)
        with lanes.admit(sum(costs)):
            if len(calls) == 1 and not request.batch and lanes.free(sum(costs)):
                return await self._call(lanes, sum(costs), model, request, calls[0], images, caller)
            return await _unless(caller.left, self._in_turn(lanes, costs, calls, model, request, images, caller))

    def _of(self, model: ModelInfo) -> Lanes:
        key = (model.name, model.batch_tokens, model.small_tokens)
        if key not in self._lanes:
            self._lanes[key] = Lanes(*key, most_waiting=self._most_waiting, sharers=self._sharers)
        return self._lanes[key]

    async def _in_turn(
        self,
        lanes: Lanes,
        costs: Sequence[int],
        calls: Sequence[Sequence[int]],
        model: ModelInfo,
        request: EmbeddingRequest,
        images: Images | None,
        caller: Caller,
    ) -> Embeddings:
        gate = asyncio.Lock()  # one of a request's calls waits in the lane at a time: others pass between them

        async def call(rows: Sequence[int]) -> Embeddings:
            cost = sum(costs[i] for i in rows)
            return await self._call(lanes, cost, model, request, rows, images, caller, gate)

        try:
            async with asyncio.TaskGroup() as group:
                tasks = [group.create_task(call(rows)) for rows in calls]
        except BaseExceptionGroup as failed:
            raise failed.exceptions[0] from None
        return _merged(calls, [task.result() for task in tasks])

    async def _call(
        self,
        lanes: Lanes,
        cost: int,
        model: ModelInfo,
        request: EmbeddingRequest,
        rows: Sequence[int],
        images: Images | None,
        caller: Caller,
        gate: asyncio.Lock | None = None,
    ) -> Embeddings:
        while True:
            async with gate or contextlib.nullcontext():
                ended = await lanes.turn(cost, batch=request.batch)
            seconds = caller.deadline - asyncio.get_running_loop().time()
            try:
                reply = await self._client.embed(
                    model.name, request, rows, images, seconds=seconds, metadata=caller.metadata, ended=ended
                )
                break
            except ApiError as error:
                if error.status == 429 and await lanes.another_has_ended():
                    continue  # Triton's queue is shorter than the line that it is sent
                raise self._told(error, lanes, request, rows) from None
            except Exception:
                ended()  # it may not have begun
                raise
        errors = [renumbered(message, rows) for message in reply.errors]
        return replace(reply, errors=errors)

    def _told(self, error: ApiError, lanes: Lanes, request: EmbeddingRequest, rows: Sequence[int]) -> ApiError:
        """What a caller is told of a call that failed."""
        if error.status == 429:
            return lanes.full()
        if error.status == 400 and "nput at index" in error.message:
            return invalid(renumbered(error.message, rows), request.param)
        return error


def estimate(request: EmbeddingRequest, images: Images | None, model: ModelInfo) -> list[int]:
    """Tokens that each input will about cost."""
    if request.ids:
        costs = [max(1, len(row)) for row in request.ids]
    else:
        added = SPECIAL_TOKENS + len(request.prompt.instruction or "") // LETTERS_A_TOKEN
        costs = [added + (len(text) // LETTERS_A_TOKEN if text.isascii() else len(text)) for text in request.texts]
    if request.long_text != "mean":
        costs = [min(cost, model.max_model_len) for cost in costs]
    if request.images and images:
        costs = [cost + IMAGE_TOKENS * len(row) for cost, row in zip(costs, images, strict=True)]
    return costs


def renumbered(message: str, rows: Sequence[int]) -> str:
    """What a model says of the inputs of one call, in the numbers that the caller knows."""
    if isinstance(rows, range):
        return message
    return re.sub(r"(?i)(input at index )(\d+)", lambda found: f"{found[1]}{rows[int(found[2])]}", message)


def _merged(calls: Sequence[Sequence[int]], replies: Sequence[Embeddings]) -> Embeddings:
    """The answers of several calls in the order of the request."""
    if len(calls) == 1:
        return replies[0]
    count = sum(map(len, calls))
    vectors = np.empty((count, replies[0].vectors.shape[1]), np.float32)
    tokens, dropped = np.empty(count, np.int32), np.empty(count, np.int32)
    reused = None if replies[0].reused is None else np.empty(count, np.int32)
    errors = [""] * count
    for rows, reply in zip(calls, replies, strict=True):
        vectors[rows], tokens[rows], dropped[rows] = reply.vectors, reply.tokens, reply.dropped
        if reused is not None and reply.reused is not None:
            reused[rows] = reply.reused
        for i, message in zip(rows, reply.errors, strict=False):
            errors[i] = message
    return Embeddings(vectors, tokens, dropped, errors, reused)


async def _unless(left: Callable[[], Awaitable[None]] | None, work: Coroutine[None, None, T]) -> T:
    """What `work` gives, or what `left` raises, whichever comes first."""
    if left is None:
        return await work
    working, leaving = asyncio.create_task(work), asyncio.ensure_future(left())
    try:
        await asyncio.wait({working, leaving}, return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            leaving.result()
        return await working
    finally:
        for task in (working, leaving):
            task.cancel()
        await asyncio.gather(working, leaving, return_exceptions=True)
