"""The sender thread: the only place that sends responses.

Sending takes 0.2 to 0.5 ms, which the engine thread should not spend.
"""

import logging
import queue
import threading
from collections.abc import Callable

log = logging.getLogger(__name__)


class Sender:
    """Runs callables in order on a separate thread. `close` runs the remaining ones first."""

    def __init__(self) -> None:
        self._queue: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, name="sender", daemon=True)
        self._thread.start()

    def put(self, send: Callable[[], None]) -> None:
        self._queue.put(send)

    def close(self) -> None:
        self._queue.put(None)
        self._thread.join()

    def _run(self) -> None:
        while (send := self._queue.get()) is not None:
            try:
                send()
            except Exception:
                log.exception("A response could not be sent")
