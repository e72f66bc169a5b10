"""The number of CPU threads of each forward pass."""

import resource
import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch

SMALL_PASS_TOKENS = 256  # a second core speeds up a smaller pass by less than it slows down other processes
# Involuntary context switches per small pass (moving average) above which the cores are assumed to be shared (measured
# on 2 cores, one query after another: 0 to 3 per pass while nothing else runs, rarely 6; mostly more than 8 next to a
# busy process).
MAX_PREEMPTIONS = 4
SHARED_SECONDS = 5.0  # how long small passes use one core after that


class Threads:
    """The thread counts of passes on the engine thread.

    The threads of a pass wait for each other after every operation, and so for any other process that preempts one of
    them. A pass therefore leaves one core free when asked to. A small pass then uses a single core, and also does so
    for some seconds after its threads were preempted (measured: one query after another takes 9 ms next to a busy
    process instead of 58).

    Args:
        max_threads: The operator's limit.
    """

    def __init__(self, max_threads: int) -> None:
        self._max_threads = max_threads
        self._preemptions = 0.0  # moving average
        self._shared_until = 0.0  # on the monotonic clock
        torch.set_num_threads(max_threads)

    @contextmanager
    def for_pass(self, tokens: int, spare_core: bool) -> Iterator[None]:
        """Set the thread count for a pass over `tokens` tokens.

        Args:
            spare_core: Other threads need a core meanwhile.
        """
        previous, small = torch.get_num_threads(), tokens < SMALL_PASS_TOKENS
        if small and (spare_core or time.monotonic() < self._shared_until):
            count = 1
        else:
            count = max(1, self._max_threads - 1) if spare_core else self._max_threads
        _set_thread_count(count)
        before = _preemptions()
        try:
            yield
        finally:
            if small and count > 1:
                self._record(_preemptions() - before)
            _set_thread_count(previous)  # this pass may be nested in another, which continues

    def _record(self, preemptions: int) -> None:
        self._preemptions = (self._preemptions + preemptions) / 2
        if self._preemptions >= MAX_PREEMPTIONS:
            self._preemptions, self._shared_until = 0.0, time.monotonic() + SHARED_SECONDS


def _set_thread_count(count: int) -> None:
    if count != torch.get_num_threads():
        torch.set_num_threads(count)


def _preemptions() -> int:
    """Return the involuntary context switches of this process so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_nivcsw
