"""The delivery thread: everything that is put runs once, in order, off the caller's thread, whatever fails."""

import logging
import threading

import pytest

from triton_embed.python_backend.scheduling.sender import Sender


def test_everything_is_sent_in_order_on_one_other_thread() -> None:
    delivery, sent = Sender(), []
    for i in range(200):
        delivery.put(lambda i=i: sent.append((i, threading.current_thread())))  # type: ignore[misc]
    delivery.close()
    assert [i for i, _ in sent] == list(range(200))
    threads = {thread for _, thread in sent}
    assert len(threads) == 1
    assert threading.current_thread() not in threads


def test_close_waits_for_what_was_put_before() -> None:
    delivery, started, release, sent = Sender(), threading.Event(), threading.Event(), []

    def slow() -> None:
        started.set()
        assert release.wait(5)
        sent.append("slow")

    delivery.put(slow)
    delivery.put(lambda: sent.append("last"))
    assert started.wait(5)
    closing = threading.Thread(target=delivery.close)
    closing.start()
    closing.join(0.1)
    assert closing.is_alive()
    assert sent == []
    release.set()
    closing.join(5)
    assert not closing.is_alive()
    assert sent == ["slow", "last"]


@pytest.mark.parametrize("error", [ValueError, MemoryError, KeyError])
def test_a_send_that_fails_is_logged_and_the_next_one_is_sent(
    error: type[Exception], caplog: pytest.LogCaptureFixture
) -> None:
    def fail() -> None:
        raise error("the client went away")

    delivery, sent = Sender(), []
    with caplog.at_level(logging.ERROR):
        delivery.put(fail)
        delivery.put(lambda: sent.append("next"))
        delivery.close()
    assert sent == ["next"]
    (record,) = caplog.records
    assert record.exc_info is not None
    assert record.exc_info[0] is error


def test_put_does_not_wait_for_the_one_before() -> None:
    delivery, release, done = Sender(), threading.Event(), []
    delivery.put(lambda: done.append(release.wait(5)))
    delivery.put(lambda: done.append("second"))  # returns while the first is blocked
    assert done == []
    release.set()
    delivery.close()
    assert done == [True, "second"]
