"""How many threads a pass takes, beside a real process that wants the same core."""

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

MOST = 4


@pytest.fixture(autouse=True)
def as_before() -> Iterator[None]:
    count = torch.get_num_threads()
    yield
    torch.set_num_threads(count)


@pytest.fixture
def pinned() -> Iterator[int]:
    """A core that this thread keeps to."""
    before = os.sched_getaffinity(0)
    core = min(before)
    os.sched_setaffinity(0, {core})
    yield core
    os.sched_setaffinity(0, before)


@contextmanager
def beside_a_busy_process(core: int) -> Iterator[None]:
    code = f"import os; os.sched_setaffinity(0, {{{core}}}); print(flush=True)\nwhile True: pass"
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE) as hog:
        assert hog.stdout
        hog.stdout.readline()
        yield
        hog.kill()


def count(threads: Threads, tokens: int, spare_core: bool = False) -> int:
    with threads.for_pass(tokens, spare_core):
        return torch.get_num_threads()


def work(threads: Threads, tokens: int) -> None:
    with threads.for_pass(tokens, spare_core=False):
        until = time.monotonic() + 0.2
        while time.monotonic() < until:
            pass


def test_all_of_them_unless_others_need_a_core() -> None:
    threads = Threads(MOST)
    assert torch.get_num_threads() == MOST
    for tokens in (1, SMALL_PASS_TOKENS - 1, SMALL_PASS_TOKENS, 10_000):
        assert count(threads, tokens) == MOST
    sizes = (SMALL_PASS_TOKENS - 1, SMALL_PASS_TOKENS)
    assert [count(threads, tokens, spare_core=True) for tokens in sizes] == [1, MOST - 1]
    assert count(Threads(1), SMALL_PASS_TOKENS, spare_core=True) == 1


def test_a_pass_within_another_leaves_it_its_threads() -> None:
    threads = Threads(MOST)
    with threads.for_pass(SMALL_PASS_TOKENS, spare_core=True):
        assert count(threads, 5) == MOST
        assert count(threads, 5, spare_core=True) == 1
        assert torch.get_num_threads() == MOST - 1
    assert torch.get_num_threads() == MOST


def test_threads_come_back_after_an_error() -> None:
    threads = Threads(MOST)
    with pytest.raises(KeyError), threads.for_pass(5, spare_core=True):
        raise KeyError
    assert torch.get_num_threads() == MOST


def test_passes_of_few_tokens_keep_to_one_core_where_they_were_preempted(pinned: int) -> None:
    threads = Threads(MOST)
    with beside_a_busy_process(pinned):
        work(threads, 5)
    assert count(threads, SMALL_PASS_TOKENS - 1) == 1
    assert count(threads, SMALL_PASS_TOKENS) == MOST  # of many tokens a second core always computes its part
    assert torch.get_num_threads() == MOST


@pytest.mark.parametrize(
    ("preempted", "crowded"),
    [((3, 3, 3, 3, 3, 3), False), ((6, 0, 6, 0, 0, 6), False), ((6, 6), True), ((9,), True), ((2, 7), True)],
)
def test_one_pass_that_was_disturbed_a_little_says_nothing(
    preempted: tuple[int, ...], crowded: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The kernel's counter, as it stood before and after each pass."""
    readings = iter([reading for one in preempted for reading in (100, 100 + one)] + [0] * 2)
    monkeypatch.setattr(threads_file, "_preemptions", lambda: next(readings))
    threads = Threads(MOST)
    for _ in preempted:
        assert count(threads, 5) == MOST
    assert count(threads, 5) == (1 if crowded else MOST)


def test_what_many_tokens_met_says_nothing_of_few(pinned: int) -> None:
    threads = Threads(MOST)
    with beside_a_busy_process(pinned):
        work(threads, SMALL_PASS_TOKENS)
    assert count(threads, 5) == MOST


def test_they_try_again_after_a_while(pinned: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(threads_file, "SHARED_SECONDS", 0.3)
    threads = Threads(MOST)
    with beside_a_busy_process(pinned):
        work(threads, 5)
    assert count(threads, 5) == 1
    time.sleep(0.3)
    assert count(threads, 5) == MOST
