"""Admission control: which requests are accepted, and when their calls are sent to Triton.

Triton gets enough work to stay busy and no more. The rest waits here, where a request can be dropped at no cost when
its caller disconnects, where a single query can overtake a bulk load, and where it can be predicted when a request will
be computed: one that would be late is refused when it arrives, or leaves the queue when that becomes known. A call that
was sent is never cancelled: its tokens leave the window when the call has really ended.

Small requests have a separate window. The engine computes them between the layers of a large forward pass, so they need
not wait here for a large call to end. Free room in one window is never used by requests of the other kind.
"""

import asyncio
import math
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

from triton_embed.gateway.errors import ApiError
from triton_embed.gateway.triton.request_queue import QueuedRequest, RequestQueue
from triton_embed.gateway.triton.window import Window

# Size of the large window per instance, in forward passes: the one in progress, the next one, and those being
# tokenized.
WINDOW_BUDGETS = 4
# A request counts as small up to 1/2 of `small_tokens`, the engine's limit for small jobs: its tokens are estimates.
SMALL_DIVISOR = 2
# Size of the small window, in requests of the largest size that counts as small. Both windows together hold fewer
# forward passes than the engine admits.
SMALL_CALLS = 16
# Calls of either kind in flight at Triton. A model accepts 256 (MAX_REQUESTS), and other clients may use it too.
MAX_CALLS = 112
CALL_SMALL_JOBS = 4  # size of each call of a request that is split, in units of `small_tokens`
INTERACTIVE_TURNS = 8  # interactive calls per batch call, if both wait
BATCH_SHARE = 0.5  # of the large window: enough to keep a model busy; the rest stays free for interactive calls
MAX_PADDED_IDS = 2**20  # cells of one call's token ids, padded to the longest row: 4 MiB
# A request is accepted if it is predicted to be computed in this share of the time until its deadline. The rest is for
# errors of the prediction.
ACCEPTED_SHARE = 0.8
BATCH_ACCEPTED_SHARE = 0.4  # half of it, so that interactive requests are still accepted
# A batch request that needs this share of the time until its deadline is sent before interactive ones.
URGENT_SHARE = 0.7
# Small requests are there to be fast. If the engine has been busy with them for BURST_SECONDS without a pause, one is
# accepted only if it is predicted to be computed in SMALL_SECONDS.
BURST_SECONDS = 2.0
SMALL_SECONDS = 1.0
SHED_SECONDS = 0.1  # between two searches for requests that will be late


class Admission:
    """Admission control of one model in one event loop.

    Args:
        batch_tokens: Tokens of one forward pass.
        small_tokens: The engine's limit for small jobs.
        instances: Processes that compute. The windows grow with them, so that each has work.
        max_pending_tokens: Tokens that may wait.
        gateway_count: Gateway processes that send to this model; they share the windows.
    """

    def __init__(
        self,
        model: str,
        batch_tokens: int,
        small_tokens: int,
        instances: int = 1,
        *,
        max_pending_tokens: int,
        gateway_count: int = 1,
    ) -> None:
        self._model = model
        self._max_small_tokens = small_tokens // SMALL_DIVISOR
        max_calls = max(8, MAX_CALLS * instances // gateway_count)
        small = Window(max(8, SMALL_CALLS * instances // gateway_count) * self._max_small_tokens, max_calls)
        large = Window(max(2, WINDOW_BUDGETS * instances // gateway_count) * batch_tokens, max_calls)
        self._small, self._interactive = RequestQueue(small), RequestQueue(large)
        self._batch = RequestQueue(large, BATCH_SHARE)
        self._max_pending_tokens = max_pending_tokens
        self._interactive_turns = 0  # calls since the last batch call
        self._waiting_for_call_end: deque[asyncio.Future[None]] = deque()
        self._next_shed = 0.0  # time
        self.pending_tokens = 0  # of requests without an answer

    @contextmanager
    def admit(self, tokens: int, deadline: float, *, batch: bool) -> Iterator[QueuedRequest]:
        """Accept a request, which is pending while the context lasts.

        Args:
            deadline: On the clock of the event loop.

        Raises:
            ApiError: 429 with Retry-After if the request would be late, or if too much is waiting.
        """
        queue = self._batch if batch else self._small if tokens <= self._max_small_tokens else self._interactive
        request, overtaken = QueuedRequest(tokens, deadline, queue), queue.overtaken_by(tokens)
        spare = self._spare_tokens(request, sum(other.unsent for other in overtaken))
        if self.pending_tokens:
            spare = min(spare, self._max_pending_tokens - self.pending_tokens - tokens)
        if spare < 0:
            raise self._overloaded(queue, -spare)
        queue.insert(request, overtaken, spare)
        self.pending_tokens += tokens
        try:
            yield request
        finally:
            self.pending_tokens -= tokens
            queue.remove(request)
            self._send_waiting()

    def _spare_tokens(self, request: QueuedRequest, overtaken: int) -> float:
        """Return how many tokens of others can be computed before a request without making it late.

        Returns:
            Less than 0 if it will be late, but at least 0 if nothing is in flight.
        """
        queue, window = request.queue, request.queue.window
        # A batch request that becomes urgent is sent before interactive ones, so both count as ahead of each other.
        queues = [self._small] if queue is self._small else [self._interactive, self._batch]
        ahead = sum(other.unsent for other in queues) - overtaken
        speed = window.speed.tokens_per_second
        if speed is None:
            return math.inf
        share = BATCH_ACCEPTED_SHARE if queue is self._batch else ACCEPTED_SHARE
        seconds = share * (request.deadline - asyncio.get_running_loop().time())
        if queue is self._small and window.speed.busy_seconds > BURST_SECONDS:
            seconds = min(seconds, SMALL_SECONDS)
        spare = seconds * speed - request.unsent - window.tokens - ahead
        return spare if window.calls else max(0.0, spare)

    def overloaded(self, request: QueuedRequest) -> ApiError:
        """Return a 429 whose Retry-After is the time to compute everything pending."""
        return self._overloaded(request.queue, self.pending_tokens)

    def _overloaded(self, queue: RequestQueue, excess_tokens: float) -> ApiError:
        """Return a 429 whose Retry-After is the time to compute `excess_tokens`."""
        seconds = excess_tokens / (queue.window.speed.tokens_per_second or math.inf)
        headers = {"Retry-After": str(max(1, math.ceil(seconds)))}
        return ApiError(429, f"Too much work is waiting for model '{self._model}', try again later", headers=headers)

    def can_send_now(self, request: QueuedRequest) -> bool:
        """Return whether a request in one call would be sent without waiting."""
        queue = request.queue
        return queue.requests[0] is request and queue.window.fits(request.unsent, queue.share)

    async def acquire(self, request: QueuedRequest, tokens: int) -> Callable[[], None]:
        """Wait until a gRPC call may be sent. Return the function that frees its room, for when the call has ended.

        Raises:
            ApiError: 429 if the request will be late and none of its calls was sent.
        """
        if request.error is not None:
            raise request.error
        granted: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        request.calls.append((tokens, granted))
        self._send_waiting()
        window = request.queue.window
        try:
            await granted
        except asyncio.CancelledError:
            # Granted and cancelled at the same moment?
            if granted.done() and not granted.cancelled() and granted.exception() is None:
                self._end(tokens, window)
            raise
        return self._release(tokens, window)

    async def put_back(self, request: QueuedRequest, tokens: int) -> bool:
        """Count a call as not sent, because Triton refused it, and wait until one of our calls ends.

        Returns:
            False, at once, if we have no call at Triton: waiting would not help.
        """
        if not self._calls_in_flight:
            return False
        request.queue.put_back(request, tokens)
        ended: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiting_for_call_end.append(ended)
        await ended
        return True

    @property
    def _calls_in_flight(self) -> int:
        return self._small.window.calls + self._interactive.window.calls

    def _release(self, tokens: int, window: Window) -> Callable[[], None]:
        """Return a function that frees the room of a gRPC call. Running it again has no effect."""
        unreleased = [tokens]

        def release() -> None:
            if unreleased:
                self._end(unreleased.pop(), window)

        return release

    def _end(self, tokens: int, window: Window) -> None:
        window.remove(tokens)
        while self._waiting_for_call_end:
            ended = self._waiting_for_call_end.popleft()
            if not ended.done():
                ended.set_result(None)
                if self._calls_in_flight:  # one slot is free; the end of another call wakes the next waiter
                    break
        self._send_waiting()

    def _send_waiting(self) -> None:
        """Let the waiting calls that fit be sent."""
        now = asyncio.get_running_loop().time()
        if now >= self._next_shed:
            self._next_shed = now + SHED_SECONDS
            for queue in (self._small, self._interactive, self._batch):
                self._shed_late(queue, now)
        while self._small.send_next():
            pass
        while (queue := self._next_large(now)).send_next():
            if queue is self._batch:
                self._interactive_turns = 0
            elif self._batch.requests:
                self._interactive_turns += 1
        for queues in ((self._small,), (self._interactive, self._batch)):
            window = queues[0].window
            window.speed.set_busy(window.is_busy or any(queue.requests for queue in queues))

    def _next_large(self, now: float) -> RequestQueue:
        """Return the queue whose turn it is in the large window."""
        batch = self._batch.next()
        if batch is None:
            return self._interactive
        speed = self._batch.window.speed.tokens_per_second or math.inf
        urgent = batch.unsent > URGENT_SHARE * (batch.deadline - now) * speed
        self._batch.share = 1.0 if urgent else BATCH_SHARE
        if urgent or self._interactive_turns >= INTERACTIVE_TURNS or self._interactive.next() is None:
            return self._batch
        return self._interactive

    def _shed_late(self, queue: RequestQueue, now: float) -> None:
        """Refuse requests that will be late, as far as none of their calls was sent."""
        speed = queue.window.speed.tokens_per_second
        if speed is None:
            return
        tokens = queue.window.tokens
        for request in [*queue.requests]:
            excess = tokens + request.unsent - (request.deadline - now) * speed
            if excess > 0 and tokens and not request.started:  # without any ahead, it is sent now
                queue.remove(request)
                request.fail(self._overloaded(queue, excess))
            else:
                tokens += request.unsent


def split(costs: Sequence[int], batch_tokens: int, small_tokens: int) -> list[Sequence[int]]:
    """Split the inputs of a request into calls.

    A request of at most `batch_tokens` is one call. A larger one becomes calls of a few small jobs' tokens, with at
    least one input each, shortest inputs first so that neighbors in a forward pass have about the same length. Calls
    are small because a query that arrives while a call is parsed and tokenized waits for it (measured: under requests
    of 2,048 inputs the p99 of queries was twice as long with calls of 4,096 tokens as with calls of 1,024). They are of
    about equal size, because a small rest would be a small job to the engine, and queries would wait for it.

    Args:
        costs: Tokens of each input.

    Returns:
        The indices of the inputs of each call.
    """
    if sum(costs) <= batch_tokens and len(costs) * max(costs) <= MAX_PADDED_IDS:
        return [range(len(costs))]
    total = sum(costs)
    count = math.ceil(total / min(batch_tokens, CALL_SMALL_JOBS * small_tokens))
    calls: list[list[int]] = [[]]
    part = before = 0  # the part of the request to which an input belongs; tokens of the inputs before it
    for i in sorted(range(len(costs)), key=costs.__getitem__):
        previous, part = part, (2 * before + costs[i]) * count // (2 * total)
        before += costs[i]
        if calls[-1] and (part > previous or (len(calls[-1]) + 1) * costs[i] > MAX_PADDED_IDS):
            calls.append([])
        calls[-1].append(i)
    return [*calls]
