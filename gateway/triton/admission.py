"""Admission control: a bounded window of tokens in flight at Triton, and the queues in front of it.

Triton gets enough work to stay busy and no more. The rest waits here, where a call can be dropped at no cost when its
caller disconnects or its deadline passes, where a single query can overtake a bulk load, and where the length of the
queue is known. A call that was sent is never cancelled: its tokens leave the window when the call has really ended.

Small calls have a separate window. The engine computes them between the layers of a large forward pass, so they need
not wait here for a large call to end. Free room in one window is never used by calls of the other kind.
"""

import asyncio
import math
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

from triton_embed.gateway.errors import ApiError

# Size of the large window, in forward passes: the one in progress, the next one, and those being tokenized.
WINDOW_BUDGETS = 4
# A call counts as small up to 1/2 of `small_tokens`, the engine's limit for small jobs: its tokens are only estimated.
SMALL_DIVISOR = 2
# Size of the small window, in calls of the largest size that counts as small. Both windows together hold fewer forward
# passes than the engine admits (8).
SMALL_CALLS = 16
# Calls of either kind in flight at Triton. Its queue holds 256 (max_queue_size), and other clients may use it too.
MAX_CALLS = 112
CALL_SMALL_JOBS = 4  # size of each call of a request that is split, in units of `small_tokens`
INTERACTIVE_TURNS = 8  # calls of the interactive lane per call of the batch lane, if both wait
MEMORY_SECONDS = 10.0  # time constant of the average speed, in seconds of computing
MAX_PADDED_IDS = 2**20  # cells of one call's token ids, padded to the longest row: 4 MiB


class Admission:
    """Admission control of one model in one event loop.

    Args:
        batch_tokens: Tokens of one forward pass.
        small_tokens: The engine's limit for small jobs.
        max_pending_tokens: Tokens that may wait.
        gateway_count: Gateway processes that send to this model; they share the windows.
    """

    def __init__(
        self, model: str, batch_tokens: int, small_tokens: int, *, max_pending_tokens: int, gateway_count: int = 1
    ) -> None:
        self._model = model
        self._max_small_tokens = small_tokens // SMALL_DIVISOR
        max_calls = max(8, MAX_CALLS // gateway_count)
        self._small = _Window(max(8, SMALL_CALLS // gateway_count) * self._max_small_tokens, max_calls)
        self._large = _Window(max(2, WINDOW_BUDGETS // gateway_count) * batch_tokens, max_calls)
        self._max_pending_tokens = max_pending_tokens
        self._small_lane: _Lane = deque()
        self._interactive_lane: _Lane = deque()
        self._batch_lane: _Lane = deque()
        self._interactive_turns = 0  # calls since the last one of the batch lane
        self._waiting_for_call_end: deque[asyncio.Future[None]] = deque()
        self.pending_tokens = 0  # of requests without an answer
        self._speed = _Speed()

    @contextmanager
    def admit(self, tokens: int) -> Iterator[None]:
        """Count a request as pending while the context lasts.

        Raises:
            ApiError: 429 with Retry-After if too much is waiting.
        """
        if self.pending_tokens and self.pending_tokens + tokens > self._max_pending_tokens:
            raise self.overloaded(self.pending_tokens + tokens - self._max_pending_tokens)
        self.pending_tokens += tokens
        try:
            yield
        finally:
            self.pending_tokens -= tokens

    def overloaded(self, excess_tokens: int | None = None) -> ApiError:
        """Return a 429 whose Retry-After is the time to compute `excess_tokens`, or everything pending."""
        tokens = self.pending_tokens if excess_tokens is None else excess_tokens
        seconds = tokens / (self._speed.tokens_per_second or math.inf)
        headers = {"Retry-After": str(max(1, math.ceil(seconds)))}
        return ApiError(429, f"Too much work is waiting for model '{self._model}', try again later", headers=headers)

    def can_send_now(self, tokens: int) -> bool:
        """Return whether a call of this size would be sent without waiting."""
        if tokens <= self._max_small_tokens:
            return not self._small_lane and self._small.fits(tokens)
        return not self._interactive_lane and not self._batch_lane and self._large.fits(tokens)

    async def acquire(self, tokens: int, *, batch: bool) -> Callable[[], None]:
        """Wait until a gRPC call may be sent. Return the function that frees its room, for when the call has ended."""
        small = tokens <= self._max_small_tokens and not batch
        window = self._small if small else self._large
        if self.can_send_now(tokens) and not batch:
            self._start(tokens, window)
        else:
            granted: asyncio.Future[None] = asyncio.get_running_loop().create_future()
            lane = self._small_lane if small else self._batch_lane if batch else self._interactive_lane
            lane.append((tokens, granted))
            self._grant_waiting()
            try:
                await granted
            except asyncio.CancelledError:
                if granted.done() and not granted.cancelled():  # granted and cancelled at the same moment
                    self._end(tokens, window)
                raise
        return self._release(tokens, window)

    async def wait_for_call_end(self) -> bool:
        """Wait until one of our calls ends, after Triton refused one because its queue is full.

        Returns:
            False, at once, if we have no call at Triton: waiting would not help.
        """
        if not self._calls_in_flight:
            return False
        ended: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiting_for_call_end.append(ended)
        await ended
        return True

    @property
    def _calls_in_flight(self) -> int:
        return self._small.calls + self._large.calls

    def _release(self, tokens: int, window: "_Window") -> Callable[[], None]:
        """Return a function that frees the room of a gRPC call. Running it again has no effect."""
        unreleased = [tokens]

        def release() -> None:
            if unreleased:
                self._speed.add_computed(unreleased[0])
                self._end(unreleased.pop(), window)

        return release

    def _start(self, tokens: int, window: "_Window") -> None:
        if not self._calls_in_flight:
            self._speed.start()
        window.add(tokens)

    def _end(self, tokens: int, window: "_Window") -> None:
        window.remove(tokens)
        if not self._calls_in_flight:
            self._speed.stop()
        while self._waiting_for_call_end:
            ended = self._waiting_for_call_end.popleft()
            if not ended.done():
                ended.set_result(None)
                if self._calls_in_flight:  # one slot is free; the end of another call wakes the next waiter
                    break
        self._grant_waiting()

    def _grant_waiting(self) -> None:
        """Let the waiting calls that fit be sent."""
        for lane in (self._small_lane, self._interactive_lane, self._batch_lane):
            _drop_cancelled(lane)
        while self._small_lane and self._grant_first(self._small_lane, self._small):
            pass
        while True:
            batch_turn = bool(self._batch_lane) and (
                not self._interactive_lane or self._interactive_turns >= INTERACTIVE_TURNS
            )
            lane = self._batch_lane if batch_turn else self._interactive_lane
            # Half of the window keeps a model busy; the other half stays free for interactive calls.
            if not lane or not self._grant_first(lane, self._large, 0.5 if batch_turn else 1.0):
                return
            self._interactive_turns = 0 if batch_turn else self._interactive_turns + 1

    def _grant_first(self, lane: "_Lane", window: "_Window", share: float = 1.0) -> bool:
        """Let the first call of a lane be sent if it fits, and drop cancelled ones after it. Return whether it fits."""
        tokens, granted = lane[0]
        if not window.fits(tokens, share):
            return False
        lane.popleft()
        self._start(tokens, window)
        granted.set_result(None)
        _drop_cancelled(lane)
        return True


class _Window:
    """Tokens and calls in flight at Triton, and their limits."""

    def __init__(self, max_tokens: int, max_calls: int) -> None:
        self._max_tokens = max_tokens
        self._max_calls = max_calls
        self._tokens = 0
        self.calls = 0

    def fits(self, tokens: int, share: float = 1.0) -> bool:
        """Return whether a call fits into a share of the window. The only call always fits."""
        if not self.calls:
            return True
        return self.calls < self._max_calls and self._tokens + tokens <= self._max_tokens * share

    def add(self, tokens: int) -> None:
        self._tokens += tokens
        self.calls += 1

    def remove(self, tokens: int) -> None:
        self._tokens -= tokens
        self.calls -= 1


_Lane = deque[tuple[int, asyncio.Future[None]]]  # (tokens of a call, set when it may be sent)


def _drop_cancelled(lane: _Lane) -> None:
    """Drop calls at the head of a lane whose callers have gone."""
    while lane and lane[0][1].done():
        lane.popleft()


class _Speed:
    """Tokens per second while there was work, as an average in which recent seconds weigh most."""

    def __init__(self) -> None:
        self._tokens = 0.0
        self._seconds = 0.0
        self._since = 0.0

    @property
    def tokens_per_second(self) -> float:
        """The average, or 0 before anything was computed."""
        return self._tokens / self._seconds if self._seconds else 0.0

    def start(self) -> None:
        self._since = time.monotonic()

    def stop(self) -> None:
        self._advance()

    def add_computed(self, tokens: int) -> None:
        self._advance()
        self._tokens += tokens

    def _advance(self) -> None:
        now = time.monotonic()
        elapsed, self._since = now - self._since, now
        decay = math.exp(-elapsed / MEMORY_SECONDS)
        self._tokens *= decay
        self._seconds = self._seconds * decay + elapsed


def split(costs: Sequence[int], batch_tokens: int, small_tokens: int) -> list[Sequence[int]]:
    """Split the inputs of a request into calls.

    A request of at most `batch_tokens` is one call. A larger one becomes calls of a few small jobs' tokens, with at
    least one input each, shortest inputs first so that neighbors in a forward pass have about the same length. Calls
    are small because a query that arrives while a call is parsed and tokenized waits for it (measured: under requests
    of 2,048 inputs the p99 of queries was twice as long with calls of 4,096 tokens as with calls of 1,024).

    Args:
        costs: Tokens of each input.

    Returns:
        The indices of the inputs of each call.
    """
    if sum(costs) <= batch_tokens and len(costs) * max(costs) <= MAX_PADDED_IDS:
        return [range(len(costs))]
    max_tokens = min(batch_tokens, CALL_SMALL_JOBS * small_tokens)
    calls: list[list[int]] = [[]]
    tokens = 0
    for i in sorted(range(len(costs)), key=costs.__getitem__):
        tokens += costs[i]
        if calls[-1] and (tokens > max_tokens or (len(calls[-1]) + 1) * costs[i] > MAX_PADDED_IDS):
            calls.append([])
            tokens = costs[i]
        calls[-1].append(i)
    return [*calls]
