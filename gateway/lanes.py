"""Who may send work to a model, and when: a window of tokens that are at Triton, and two lanes of those that wait.

Triton is given enough to keep it busy and no more. What waits, waits here, where it costs nothing to drop it when its
caller has left or its time is up, where a single query passes by a bulk load, and where it is known how long the line
is. A call that was sent is never taken back: its tokens leave the window when it has really ended.

Small calls have a window of their own: the engine computes them in the midst of a large forward pass, so that they
need not wait for one to end, neither there nor here. Neither window can take the other's room.
"""

import asyncio
import math
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

from triton_embed.gateway.errors import ApiError

BUDGETS = 4  # forward passes' worth of tokens that may be at Triton: the one computed, the next, and what is tokenised
SMALL = 2  # a call is small that takes at most this part of what the engine calls small: its tokens are estimated
SMALL_CALLS = 16  # of that size, beside the others: with them fewer passes' worth than the engine admits (8)
CALLS = 112  # of either kind at Triton at once; its own queues hold 256 (max_queue_size), and others may ask it too
PIECE = 4  # small jobs' worth of tokens: the calls of a request that is too large for one
TURNS = 8  # after so many calls of the first lane the second has one
MEMORY_SECONDS = 10.0  # of computing, over which speed is averaged
PADDED = 2**20  # the most cells of one call's ids, each row as long as the longest: 4 MiB


class Lanes:
    """For one model and one event loop. `most_waiting` tokens may wait; `sharers` is how many processes send to it."""

    def __init__(
        self, model: str, batch_tokens: int, small_tokens: int, *, most_waiting: int, sharers: int = 1
    ) -> None:
        self._model = model
        self._most_small = small_tokens // SMALL
        calls = max(8, CALLS // sharers)
        self._small = _Window(max(8, SMALL_CALLS // sharers) * self._most_small, calls)
        self._large = _Window(max(2, BUDGETS // sharers) * batch_tokens, calls)
        self._most_waiting = most_waiting
        self._small_lane: _Lane = deque()
        self._lanes: tuple[_Lane, _Lane] = (deque(), deque())
        self._turns = 0
        self._refused: deque[asyncio.Future[None]] = deque()
        self.waiting = 0  # tokens of requests that are not answered and not all at Triton
        self._speed = _Speed()

    @contextmanager
    def admit(self, tokens: int) -> Iterator[None]:
        """A request's place, as long as it lasts. ApiError 429: too much is waiting, and when to come back."""
        if self.waiting and self.waiting + tokens > self._most_waiting:
            raise self.full(self.waiting + tokens - self._most_waiting)
        self.waiting += tokens
        try:
            yield
        finally:
            self.waiting -= tokens

    def full(self, excess: int | None = None) -> ApiError:
        """429, with the seconds until `excess` tokens, or all that are waiting, are computed."""
        seconds = (self.waiting if excess is None else excess) / (self._speed.tokens_per_second or math.inf)
        wait = {"Retry-After": str(max(1, math.ceil(seconds)))}
        return ApiError(429, f"Too much work is waiting for model '{self._model}', try again later", headers=wait)

    def free(self, tokens: int) -> bool:
        """Whether a call that cannot wait would have its turn at once."""
        if tokens <= self._most_small:
            return not self._small_lane and self._small.fits(tokens)
        return not any(self._lanes) and self._large.fits(tokens)

    async def turn(self, tokens: int, *, batch: bool) -> Callable[[], None]:
        """Wait until a call may be sent; returns what to call once when it has ended."""
        small = tokens <= self._most_small and not batch
        window = self._small if small else self._large
        if self.free(tokens) and not batch:
            self._start(tokens, window)
        else:
            place: asyncio.Future[None] = asyncio.get_running_loop().create_future()
            (self._small_lane if small else self._lanes[batch]).append((tokens, place))
            self._serve()
            try:
                await place
            except asyncio.CancelledError:
                if place.done() and not place.cancelled():  # it was granted in the same moment
                    self._end(tokens, window)
                raise
        return self._ending(tokens, window)

    async def another_has_ended(self) -> bool:
        """Wait until Triton, whose own queue is full, has answered one of our calls; whether it has any."""
        if not self._calling:
            return False
        place: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._refused.append(place)
        await place
        return True

    @property
    def _calling(self) -> int:
        return self._small.calling + self._large.calling

    def _ending(self, tokens: int, window: "_Window") -> Callable[[], None]:
        left = [tokens]

        def end() -> None:
            if left:
                self._speed.computed(left[0])
                self._end(left.pop(), window)

        return end

    def _start(self, tokens: int, window: "_Window") -> None:
        if not self._calling:
            self._speed.start()
        window.add(tokens)

    def _end(self, tokens: int, window: "_Window") -> None:
        window.remove(tokens)
        if not self._calling:
            self._speed.stop()
        while self._refused:
            place = self._refused.popleft()
            if not place.done():
                place.set_result(None)
                if self._calling:  # the others have more ends to wait for
                    break
        self._serve()

    def _serve(self) -> None:
        """Let in whom there is room for."""
        for lane in (self._small_lane, *self._lanes):
            while lane and lane[0][1].done():  # its caller has left
                lane.popleft()
        while self._small_lane and self._admitted(self._small_lane, self._small):
            pass
        while True:
            first, second = self._lanes
            patient = bool(second) and (not first or self._turns >= TURNS)
            lane = second if patient else first
            # Half a window is enough to keep a model busy, and leaves room for who comes by the first lane.
            if not lane or not self._admitted(lane, self._large, 0.5 if patient else 1.0):
                return
            self._turns = 0 if patient else self._turns + 1

    def _admitted(self, lane: "_Lane", window: "_Window", share: float = 1.0) -> bool:
        """Whether the first of a lane could be let in; afterwards nobody who has left is first."""
        tokens, place = lane[0]
        if not window.fits(tokens, share):
            return False
        lane.popleft()
        self._start(tokens, window)
        place.set_result(None)
        while lane and lane[0][1].done():  # its caller has left
            lane.popleft()
        return True


class _Window:
    """What is at Triton, and how much of it may be."""

    def __init__(self, most: int, calls: int) -> None:
        self._most = most
        self._calls = calls
        self._tokens = 0
        self.calling = 0

    def fits(self, tokens: int, share: float = 1.0) -> bool:
        """Whether a call has room in a part of the window; a lone one always has."""
        return not self.calling or (self.calling < self._calls and self._tokens + tokens <= self._most * share)

    def add(self, tokens: int) -> None:
        self._tokens += tokens
        self.calling += 1

    def remove(self, tokens: int) -> None:
        self._tokens -= tokens
        self.calling -= 1


_Lane = deque[tuple[int, asyncio.Future[None]]]


class _Speed:
    """Tokens a second while there was anything to compute, the last seconds counting most."""

    def __init__(self) -> None:
        self._tokens = 0.0
        self._seconds = 0.0
        self._since = 0.0

    @property
    def tokens_per_second(self) -> float:
        """0: not known yet."""
        return self._tokens / self._seconds if self._seconds else 0.0

    def start(self) -> None:
        self._since = time.monotonic()

    def stop(self) -> None:
        self._pass()

    def computed(self, tokens: int) -> None:
        self._pass()
        self._tokens += tokens

    def _pass(self) -> None:
        now = time.monotonic()
        spent, self._since = now - self._since, now
        kept = math.exp(-spent / MEMORY_SECONDS)
        self._tokens *= kept
        self._seconds = self._seconds * kept + spent


def pieces(costs: Sequence[int], whole: int, small: int) -> list[Sequence[int]]:
    """The inputs of a request, by index: in one call of at most `whole` tokens, or else in several of at most a few
    small jobs' tokens, and at least one input each.

    Where they are many, short ones come first, so that neighbours in a forward pass are of a length. A query that
    comes while a call is read and tokenised waits for it: under requests of 2,048 inputs its p99 was twice as long
    with calls of 4,096 tokens as with those of 1,024.
    """
    most = min(whole, PIECE * small)
    if sum(costs) <= whole and len(costs) * max(costs) <= PADDED:
        return [range(len(costs))]
    found: list[list[int]] = [[]]
    tokens = 0
    for i in sorted(range(len(costs)), key=costs.__getitem__):
        tokens += costs[i]
        if found[-1] and (tokens > most or (len(found[-1]) + 1) * costs[i] > PADDED):
            found.append([])
            tokens = costs[i]
        found[-1].append(i)
    return [*found]
