"""A window: the tokens and calls of one kind in flight at Triton, their limits, and the speed of their computation."""

import math
import time

MEMORY_SECONDS = 10.0  # time constant of the average speed
MIN_SECONDS = 0.5  # of measuring, before there is an average,
MIN_CALLS = 5  # and calls: what has begun and not ended is not counted
STALE_SECONDS = 10.0  # after which an average says nothing: the machine may have been busy with something else
BUSY_SHARE = 0.5  # of the window: that many tokens in flight keep the engine busy, so their speed is the engine's


class Window:
    """Tokens and calls in flight at Triton, and their limits."""

    def __init__(self, max_tokens: int, max_calls: int) -> None:
        self._max_tokens = max_tokens
        self._max_calls = max_calls
        self.tokens = 0
        self.calls = 0
        self.speed = Speed()

    def fits(self, tokens: int, share: float = 1.0) -> bool:
        """Return whether a call fits into a share of the window. The only call always fits."""
        if not self.calls:
            return True
        return self.calls < self._max_calls and self.tokens + tokens <= self._max_tokens * share

    @property
    def is_busy(self) -> bool:
        """Whether more is in flight than the engine computes at a time."""
        return self.tokens > BUSY_SHARE * self._max_tokens

    def add(self, tokens: int) -> None:
        """Count a call that is sent."""
        self.tokens += tokens
        self.calls += 1

    def remove(self, tokens: int) -> None:
        """Count a call that has ended."""
        self.tokens -= tokens
        self.calls -= 1
        self.speed.add_computed(tokens)


class Speed:
    """Tokens per second while the engine was busy, as an average in which recent seconds weigh most.

    The time of a single call is latency and says little about the speed.
    """

    def __init__(self) -> None:
        self._tokens = 0.0
        self._seconds = 0.0
        self._calls = 0
        self._updated = -math.inf
        self._busy_since: float | None = None

    @property
    def tokens_per_second(self) -> float | None:
        """The average, or None if there is none."""
        if self._seconds < MIN_SECONDS or self._calls < MIN_CALLS or time.monotonic() - self._updated > STALE_SECONDS:
            return None
        return self._tokens / self._seconds

    @property
    def busy_seconds(self) -> float:
        """For how long the engine has been busy without a pause."""
        return 0.0 if self._busy_since is None else time.monotonic() - self._busy_since

    def set_busy(self, busy: bool) -> None:
        """Measure while the engine is busy."""
        if not busy and self._busy_since is not None:
            self._advance()
            self._busy_since = None
        elif busy and self._busy_since is None:
            now = time.monotonic()
            if now - self._updated > STALE_SECONDS:
                self._tokens = self._seconds = 0.0
                self._calls = 0
            self._updated = self._busy_since = now

    def add_computed(self, tokens: int) -> None:
        """Count the tokens of a call that has ended."""
        if self._busy_since is not None:
            self._advance()
            self._tokens += tokens
            self._calls += 1

    def _advance(self) -> None:
        now = time.monotonic()
        elapsed, self._updated = now - self._updated, now
        decay = math.exp(-elapsed / MEMORY_SECONDS)
        self._tokens *= decay
        self._seconds = self._seconds * decay + elapsed
