"""Threads: how many of a CPU's cores each forward pass takes."""

import resource
import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch

FEW_TOKENS = 256  # of a pass, below which a second core gains less than others lose
# Of our threads during passes of few tokens, the last counting half: from so many on, cores have something else to do.
# Measured on two cores, one query after another: 0 to 3 a pass while nothing else runs, seldom 6; mostly more than 8
# beside a busy process.
PREEMPTED = 4
REMEMBERED_SECONDS = 5.0  # that a pass over few tokens keeps to one core then


class Threads:
    """Of the engine, on its own thread; `most` are what the operator gives it.

    Threads that wait for each other after every operation wait for all that runs in their stead. So a pass leaves a
    core to others where it is told to, and one of few tokens all but one, which it does by itself too for some seconds
    after its threads have been preempted: one query after another takes 9 ms beside a busy process, not 58.
    """

    def __init__(self, most: int) -> None:
        self._most = most
        self._preempted = 0.0
        self._crowded_until = 0.0
        torch.set_num_threads(most)

    @contextmanager
    def of(self, tokens: int, spare: bool) -> Iterator[None]:
        """For a pass over so many tokens. `spare`: others need a core meanwhile."""
        before, few = torch.get_num_threads(), tokens < FEW_TOKENS
        if few and (spare or time.monotonic() < self._crowded_until):
            count = 1
        else:
            count = max(1, self._most - 1) if spare else self._most
        _use(count)
        began = _preemptions()
        try:
            yield
        finally:
            if few and count > 1:
                self._note(_preemptions() - began)
            _use(before)  # it may have been within another pass, which goes on

    def _note(self, preempted: int) -> None:
        self._preempted = (self._preempted + preempted) / 2
        if self._preempted >= PREEMPTED:
            self._preempted, self._crowded_until = 0.0, time.monotonic() + REMEMBERED_SECONDS


def _use(count: int) -> None:
    if count != torch.get_num_threads():
        torch.set_num_threads(count)


def _preemptions() -> int:
    """Of all threads of this process, so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_nivcsw
