"""Split a request into Triton calls, queue them, and merge the results."""

import asyncio
from collections.abc import Awaitable, Callable, Coroutine, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np

from triton_embed.gateway.api.requests import EmbeddingRequest, Embeddings
from triton_embed.gateway.errors import ApiError
from triton_embed.gateway.triton.admission import Admission, split
from triton_embed.gateway.triton.client import Metadata, TritonClient
from triton_embed.gateway.triton.request_queue import QueuedRequest
from triton_embed.python_backend.wire import ModelInfo

T = TypeVar("T")

# For estimates of token counts, which only the model knows. A call with too high an estimate waits a moment longer, one
# with too low an estimate is sent early.
CHARACTERS_PER_TOKEN = 4  # of ASCII text; other scripts have about one token per character
SPECIAL_TOKENS = 4
IMAGE_TOKENS = 768

Images = Sequence[Sequence[bytes]]


@dataclass(frozen=True, slots=True)
class CallContext:
    """The caller's side of a request: its deadline on the event loop's clock, and the metadata of its trace.

    `disconnected` returns, or raises, when the caller has disconnected.
    """

    deadline: float
    metadata: Metadata = ()
    disconnected: Callable[[], Awaitable[None]] | None = None


class Dispatcher:
    """The dispatcher of every model of one gateway.

    Args:
        max_pending_tokens: Tokens that may wait per model.
        gateway_count: Gateway processes that share one Triton.
    """

    def __init__(self, client: TritonClient, *, max_pending_tokens: int, gateway_count: int) -> None:
        self._client = client
        self._max_pending_tokens = max_pending_tokens
        self._gateway_count = gateway_count
        self._admissions: dict[tuple[str, int, int, int], Admission] = {}

    @property
    def pending_tokens(self) -> Mapping[str, int]:
        """Tokens that wait, by model."""
        return {model: admission.pending_tokens for (model, *_), admission in self._admissions.items()}

    async def embed(
        self, model: ModelInfo, request: EmbeddingRequest, images: Images | None, context: CallContext
    ) -> Embeddings:
        """Return the embeddings of a whole request.

        Calls that have not been sent when the caller disconnects, is cancelled or gets an error are never sent.

        Raises:
            ApiError: 429 if too much is waiting, or as `TritonClient.embed`.
            Exception: what `context.disconnected` raises.
        """
        costs = estimate(request, images, model)
        calls = split(costs, model.batch_tokens, model.small_tokens)
        admission = self._admission_of(model)
        with admission.admit(sum(costs), context.deadline, batch=request.batch) as queued:
            if len(calls) == 1 and admission.can_send_now(queued):
                return await self._call(admission, queued, sum(costs), model, request, calls[0], images, context)
            embeddings = self._call_all(admission, queued, costs, calls, model, request, images, context)
            return await _unless_disconnected(context.disconnected, embeddings)

    def _admission_of(self, model: ModelInfo) -> Admission:
        key = (model.name, model.batch_tokens, model.small_tokens, model.instances)
        if key not in self._admissions:
            self._admissions[key] = Admission(
                *key, max_pending_tokens=self._max_pending_tokens, gateway_count=self._gateway_count
            )
        return self._admissions[key]

    async def _call_all(
        self,
        admission: Admission,
        queued: QueuedRequest,
        costs: Sequence[int],
        calls: Sequence[Sequence[int]],
        model: ModelInfo,
        request: EmbeddingRequest,
        images: Images | None,
        context: CallContext,
    ) -> Embeddings:
        async def call(rows: Sequence[int]) -> Embeddings:
            cost = sum(costs[i] for i in rows)
            return await self._call(admission, queued, cost, model, request, rows, images, context)

        try:
            async with asyncio.TaskGroup() as group:
                tasks = [group.create_task(call(rows)) for rows in calls]
        except BaseExceptionGroup as group_error:
            raise group_error.exceptions[0] from None
        return _merge(calls, [task.result() for task in tasks])

    async def _call(
        self,
        admission: Admission,
        queued: QueuedRequest,
        cost: int,
        model: ModelInfo,
        request: EmbeddingRequest,
        rows: Sequence[int],
        images: Images | None,
        context: CallContext,
    ) -> Embeddings:
        while True:
            release = await admission.acquire(queued, cost)
            seconds = context.deadline - asyncio.get_running_loop().time()
            try:
                return await self._client.embed(
                    model.name, request, rows, images, seconds=seconds, metadata=context.metadata, ended=release
                )
            except ApiError as error:
                if error.status != 429:
                    raise
                # Triton's queue is full. When a call of ours ends, try again; if we have none, others fill the queue.
                if not await admission.put_back(queued, cost):
                    raise admission.overloaded(queued) from None
            except Exception:
                release()  # the client may have failed before it could call `ended`
                raise


def estimate(request: EmbeddingRequest, images: Images | None, model: ModelInfo) -> list[int]:
    """Return the estimated tokens of each input."""
    if request.ids:
        costs = [max(1, len(row)) for row in request.ids]
    else:
        added = SPECIAL_TOKENS + len(request.prompt.instruction or "") // CHARACTERS_PER_TOKEN
        costs = [added + (len(text) // CHARACTERS_PER_TOKEN if text.isascii() else len(text)) for text in request.texts]
    if request.long_text != "mean":
        costs = [min(cost, model.max_model_len) for cost in costs]
    if request.images and images:
        costs = [cost + IMAGE_TOKENS * len(row) for cost, row in zip(costs, images, strict=True)]
    return costs


def _merge(calls: Sequence[Sequence[int]], replies: Sequence[Embeddings]) -> Embeddings:
    """Return the replies of several calls as one, in the order of the request."""
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


async def _unless_disconnected(disconnected: Callable[[], Awaitable[None]] | None, work: Coroutine[None, None, T]) -> T:
    """Return the result of `work`, or raise what `disconnected` raises, whichever comes first."""
    if disconnected is None:
        return await work
    working, watching = asyncio.create_task(work), asyncio.ensure_future(disconnected())
    try:
        await asyncio.wait({working, watching}, return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            watching.result()
        return await working
    finally:
        for task in (working, watching):
            task.cancel()
        await asyncio.gather(working, watching, return_exceptions=True)
