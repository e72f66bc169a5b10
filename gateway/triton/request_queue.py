"""The requests that wait for room in a window, in the order in which they are sent."""

import asyncio
import math
from collections import deque
from collections.abc import Sequence

from triton_embed.gateway.triton.window import Window

# A request overtakes those that have at least this many times its tokens left to send.
OVERTAKEN_SIZE = 2
# Tokens of others that may overtake a request, in units of its own tokens.
OVERTAKEN_TOKENS = 4


class QueuedRequest:
    """A request, which is sent in one call or several.

    Attributes:
        unsent: Tokens that have not been sent.
        deadline: On the clock of the event loop.
        overtakable: Tokens of other requests that may still overtake it.
        calls: Calls that wait: (tokens, set when the call may be sent).
        started: Whether a call was sent.
        error: Why it is not sent any more.
    """

    def __init__(self, tokens: int, deadline: float, queue: "RequestQueue") -> None:
        self.unsent = tokens
        self.deadline = deadline
        self.queue = queue
        self.overtakable = 0.0
        self.calls: deque[tuple[int, asyncio.Future[None]]] = deque()
        self.started = False
        self.error: Exception | None = None

    def fail(self, error: Exception) -> None:
        """Raise an error in every call, those that wait and those that come."""
        self.error = error
        for _, granted in self.calls:
            if not granted.done():
                granted.set_exception(error)

    def has_call(self) -> bool:
        """Return whether a call waits. Drop the calls whose callers have gone."""
        while self.calls and self.calls[0][1].done():
            self.calls.popleft()
        return bool(self.calls)


class RequestQueue:
    """Requests in the order of their arrival, except that small ones overtake large ones within limits.

    A request is sent completely before the next one. If all requests took turns, each would be finished late, and under
    overload none before its deadline.

    Args:
        share: Of the window, which the calls of this queue may fill.
    """

    def __init__(self, window: Window, share: float = 1.0) -> None:
        self.window = window
        self.requests: list[QueuedRequest] = []
        self.unsent = 0  # tokens
        self.share = share

    def overtaken_by(self, tokens: int) -> list[QueuedRequest]:
        """Return the requests at the end of the queue that a request of this size overtakes, last one first."""
        overtaken = []
        for request in reversed(self.requests):
            if request.unsent < OVERTAKEN_SIZE * tokens or request.overtakable < tokens:
                break
            overtaken.append(request)
        return overtaken

    def insert(self, request: QueuedRequest, overtaken: Sequence[QueuedRequest] = (), spare: float = math.inf) -> None:
        """Insert a request ahead of those that it overtakes.

        Args:
            spare: Tokens of other requests that would not make it late.
        """
        request.overtakable = min(spare, OVERTAKEN_TOKENS * request.unsent)
        for other in overtaken:
            other.overtakable -= request.unsent
        self.requests.insert(len(self.requests) - len(overtaken), request)
        self.unsent += request.unsent

    def remove(self, request: QueuedRequest) -> None:
        """Remove a request, unless it has been sent completely."""
        if request in self.requests:
            self.requests.remove(request)
            self.unsent -= request.unsent

    def put_back(self, request: QueuedRequest, tokens: int) -> None:
        """Count a call as not sent, because Triton refused it."""
        self.remove(request)
        request.unsent += tokens
        self.requests.insert(0, request)
        self.unsent += request.unsent

    def next(self) -> QueuedRequest | None:
        """Return the first request with a call that waits."""
        return next((request for request in self.requests if request.has_call()), None)

    def send_next(self) -> bool:
        """Let the next call be sent if it fits into the window. Return whether it was."""
        request = self.next()
        if request is None or not self.window.fits(request.calls[0][0], self.share):
            return False
        tokens, granted = request.calls.popleft()
        granted.set_result(None)
        self.window.add(tokens)
        request.started = True
        request.unsent -= tokens
        self.unsent -= tokens
        if not request.unsent:
            self.requests.remove(request)
        return True
