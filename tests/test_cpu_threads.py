"""Tests of the thread count of a pass, next to a real process that uses the same core."""

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch

from triton_embed.python_backend.execution import cpu_threads as threads_file
from triton_embed.python_backend.execution.cpu_threads import SMALL_PASS_TOKENS, Threads

MAX_THREADS = 4


@pytest.fixture(autouse=True)
def restore_thread_count() -> Iterator[None]:
    count = torch.get_num_threads()
    yield
    torch.set_num_threads(count)


@pytest.fixture
def pinned() -> Iterator[int]:
    """Set the affinity of this thread to one core; yield its number."""
    before = os.sched_getaffinity(0)
    core = min(before)
    os.sched_setaffinity(0, {core})
    yield core
    os.sched_setaffinity(0, before)


@contextmanager
def next_to_a_busy_process(core: int) -> Iterator[None]:
    code = f"import os; os.sched_setaffinity(0, {{{core}}}); print(flush=True)\nwhile True: pass"
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE) as busy:
        assert busy.stdout
        busy.stdout.readline()
        yield
        busy.kill()


def count(threads: Threads, tokens: int, spare_core: bool = False) -> int:
    with threads.for_pass(tokens, spare_core):
        return torch.get_num_threads()


def work(threads: Threads, tokens: int) -> None:
    with threads.for_pass(tokens, spare_core=False):
        until = time.monotonic() + 0.2
        while time.monotonic() < until:
            pass


def test_passes_use_all_threads_unless_a_core_is_spared() -> None:
    threads = Threads(MAX_THREADS)
    assert torch.get_num_threads() == MAX_THREADS
    for tokens in (1, SMALL_PASS_TOKENS - 1, SMALL_PASS_TOKENS, 10_000):
        assert count(threads, tokens) == MAX_THREADS
    sizes = (SMALL_PASS_TOKENS - 1, SMALL_PASS_TOKENS)
    assert [count(threads, tokens, spare_core=True) for tokens in sizes] == [1, MAX_THREADS - 1]
    assert count(Threads(1), SMALL_PASS_TOKENS, spare_core=True) == 1


def test_nested_pass_restores_the_outer_thread_count() -> None:
    threads = Threads(MAX_THREADS)
    with threads.for_pass(SMALL_PASS_TOKENS, spare_core=True):
        assert count(threads, 5) == MAX_THREADS
        assert count(threads, 5, spare_core=True) == 1
        assert torch.get_num_threads() == MAX_THREADS - 1
    assert torch.get_num_threads() == MAX_THREADS


def test_thread_count_is_restored_after_an_error() -> None:
    threads = Threads(MAX_THREADS)
    with pytest.raises(KeyError), threads.for_pass(5, spare_core=True):
        raise KeyError
    assert torch.get_num_threads() == MAX_THREADS


def test_small_passes_use_one_core_after_preemption(pinned: int) -> None:
    threads = Threads(MAX_THREADS)
    with next_to_a_busy_process(pinned):
        work(threads, 5)
    assert count(threads, SMALL_PASS_TOKENS - 1) == 1
    assert count(threads, SMALL_PASS_TOKENS) == MAX_THREADS  # in large passes a second core always does its share
    assert torch.get_num_threads() == MAX_THREADS


@pytest.mark.parametrize(
    ("preemptions", "shared"),
    [((3, 3, 3, 3, 3, 3), False), ((6, 0, 6, 0, 0, 6), False), ((6, 6), True), ((9,), True), ((2, 7), True)],
)
def test_cores_are_shared_only_above_an_average_of_preemptions(
    preemptions: tuple[int, ...], shared: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Replace the kernel's counter by readings before and after each pass."""
    readings = iter([reading for switches in preemptions for reading in (100, 100 + switches)] + [0] * 2)
    monkeypatch.setattr(threads_file, "_preemptions", lambda: next(readings))
    threads = Threads(MAX_THREADS)
    for _ in preemptions:
        assert count(threads, 5) == MAX_THREADS
    assert count(threads, 5) == (1 if shared else MAX_THREADS)


def test_preemption_of_a_large_pass_does_not_affect_small_passes(pinned: int) -> None:
    threads = Threads(MAX_THREADS)
    with next_to_a_busy_process(pinned):
        work(threads, SMALL_PASS_TOKENS)
    assert count(threads, 5) == MAX_THREADS


def test_small_passes_use_all_threads_again_after_a_while(pinned: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(threads_file, "SHARED_SECONDS", 0.3)
    threads = Threads(MAX_THREADS)
    with next_to_a_busy_process(pinned):
        work(threads, 5)
    assert count(threads, 5) == 1
    time.sleep(0.3)
    assert count(threads, 5) == MAX_THREADS
