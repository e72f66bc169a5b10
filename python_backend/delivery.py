"""The delivery thread: the only place that sends.

A response sent while `execute()` is still running stalls its caller for 500 ms about once in a hundred times
(measured on server 2.51, returned lists included); from another thread it never did. Sending also takes 0.2 to
0.5 ms, which the engine thread should not pay.
"""

import logging
import queue
import threading
from collections.abc import Callable

log = logging.getLogger(__name__)


class Delivery:
    """Runs what is put, in order, on a thread of its own; `close` finishes the rest first."""

    def __init__(self) -> None:
        self._queue: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, name="delivery", daemon=True)
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
                log.exception("a response could not be sent")
