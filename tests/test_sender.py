"""Tests of the sender thread: every callable runs once, in order, off the caller's thread, despite failures."""

import logging
import threading

import pytest

from triton_embed.python_backend.scheduling.sender import Sender


def test_callables_run_in_order_on_one_other_thread() -> None:
    sender, sent = Sender(), []
    for i in range(200):
        sender.put(lambda i=i: sent.append((i, threading.current_thread())))  # type: ignore[misc]
    sender.close()
    assert [i for i, _ in sent] == list(range(200))
    threads = {thread for _, thread in sent}
    assert len(threads) == 1
    assert threading.current_thread() not in threads


def test_close_runs_the_remaining_callables_first() -> None:
    sender, started, release, sent = Sender(), threading.Event(), threading.Event(), []

    def slow() -> None:
        started.set()
        assert release.wait(5)
        sent.append("slow")

    sender.put(slow)
    sender.put(lambda: sent.append("last"))
    assert started.wait(5)
    closing = threading.Thread(target=sender.close)
    closing.start()
    closing.join(0.1)
    assert closing.is_alive()
    assert sent == []
    release.set()
    closing.join(5)
    assert not closing.is_alive()
    assert sent == ["slow", "last"]


@pytest.mark.parametrize("error", [ValueError, MemoryError, KeyError])
def test_failing_send_is_logged_and_the_next_one_runs(error: type[Exception], caplog: pytest.LogCaptureFixture) -> None:
    def fail() -> None:
        raise error("connection lost")

    sender, sent = Sender(), []
    with caplog.at_level(logging.ERROR):
        sender.put(fail)
        sender.put(lambda: sent.append("next"))
        sender.close()
    assert sent == ["next"]
    (record,) = caplog.records
    assert record.exc_info is not None
    assert record.exc_info[0] is error


def test_put_does_not_wait_for_the_previous_send() -> None:
    sender, release, done = Sender(), threading.Event(), []
    sender.put(lambda: done.append(release.wait(5)))
    sender.put(lambda: done.append("second"))  # returns while the first is blocked
    assert done == []
    release.set()
    sender.close()
    assert done == [True, "second"]
