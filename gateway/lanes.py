"""Who may send work to a model, and when: a window of tokens that are at Triton, and two lanes of those that wait.

Triton is given enough to keep it busy and no more. What waits, waits here, where it costs nothing to drop it when its
caller has left or its time is up, where a single query passes by a bulk load, and where it is known how long the line
is. A call that was sent is never taken back: its tokens leave the window when it has really ended.
"""

import asyncio
import math
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

from triton_embed.gateway.errors import ApiError

BUDGETS = 4  # forward passes' worth of tokens that may be at Triton: the one computed, the next, and what is tokenised
CALLS = 192  # at Triton at once; its own queues hold 256 (max_queue_size), and others may ask it too
TURNS = 8  # after so many calls of the first lane the second has one
MEMORY_SECONDS = 10.0  # of computing, over which speed is averaged
PADDED = 2**20  # the most cells of one call's ids, each row as long as the longest: 4 MiB


class Lanes:
    """For one model and one event loop. `most_waiting` tokens may wait; `sharers` is how many processes send to it."""

    def __init__(self, model: str, batch_tokens: int, *, most_waiting: int, sharers: int = 1) -> None:
        self._model = model
        self._window = max(2, BUDGETS // sharers) * batch_tokens
        self._calls = max(8, CALLS // sharers)
        self._most_waiting = most_waiting
        self._at_triton = 0
        self._calling = 0
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
        """Whether a call would have its turn at once."""
        return not any(self._lanes) and self._fits(tokens, self._window)

    async def turn(self, tokens: int, *, batch: bool) -> Callable[[], None]:
        """Wait until a call may be sent; returns what to call once when it has ended."""
        if self.free(tokens) and not batch:
            self._start(tokens)
        else:
            place: asyncio.Future[None] = asyncio.get_running_loop().create_future()
            self._lanes[batch].append((tokens, place))
            self._serve()
            try:
                await place
            except asyncio.CancelledError:
                if place.done() and not place.cancelled():  # it was granted in the same moment
                    self._end(tokens)
                raise
        return self._ending(tokens)

    async def another_has_ended(self) -> bool:
        """Wait until Triton, whose own queue is full, has answered one of our calls; whether it has any."""
        if not self._calling:
            return False
        place: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._refused.append(place)
        await place
        return True

    def _ending(self, tokens: int) -> Callable[[], None]:
        left = [tokens]

        def end() -> None:
            if left:
                self._speed.computed(left[0])
                self._end(left.pop())

        return end

    def _start(self, tokens: int) -> None:
        if not self._calling:
            self._speed.start()
        self._at_triton += tokens
        self._calling += 1

    def _end(self, tokens: int) -> None:
        self._at_triton -= tokens
        self._calling -= 1
        if not self._calling:
            self._speed.stop()
        while self._refused:
            place = self._refused.popleft()
            if not place.done():
                place.set_result(None)
                if self._calling:  # the others have more ends to wait for
                    break
        self._serve()

    def _fits(self, tokens: int, window: int) -> bool:
        return not self._calling or (self._calling < self._calls and self._at_triton + tokens <= window)

    def _serve(self) -> None:
        """Let in whom there is room for."""
        while True:
            for lane in self._lanes:
                while lane and lane[0][1].done():  # its caller has left
                    lane.popleft()
            first, second = self._lanes
            patient = second and (not first or self._turns >= TURNS)
            lane = second if patient else first
            # Half a window is enough to keep a model busy, and leaves room for who comes by the first lane.
            window = self._window // 2 if patient else self._window
            if not lane or not self._fits(lane[0][0], window):
                return
            tokens, place = lane.popleft()
            self._turns = 0 if patient else self._turns + 1
            self._start(tokens)
            place.set_result(None)


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


def pieces(costs: Sequence[int], most: int) -> list[Sequence[int]]:
    """The inputs of a request, by index, in calls of at most `most` tokens, and at least one input each.

    Where they are many, short ones come first, so that neighbours in a forward pass are of a length.
    """
    if sum(costs) <= most and len(costs) * max(costs) <= PADDED:
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
