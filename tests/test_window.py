"""The speed that is measured while work waits, in real seconds."""

import time

import pytest

from triton_embed.gateway.triton import window as window_module
from triton_embed.gateway.triton.window import Speed


def test_speed_is_measured_while_work_waits() -> None:
    speed = Speed()
    assert speed.tokens_per_second is None
    speed.add_computed(10**9)  # nothing waits: this is latency
    speed.set_waiting(True)
    time.sleep(0.3)
    speed.add_computed(1_000)
    assert speed.tokens_per_second is None  # too short
    speed.set_waiting(False)
    time.sleep(0.4)
    speed.set_waiting(True)
    time.sleep(0.3)
    speed.add_computed(2_000)
    assert speed.tokens_per_second is not None
    assert 4_000 < speed.tokens_per_second < 5_100


def test_waiting_seconds_begin_anew_when_nothing_waits() -> None:
    speed = Speed()
    speed.set_waiting(True)
    time.sleep(0.1)
    speed.set_waiting(True)
    assert 0.1 <= speed.waiting_seconds < 0.2
    speed.set_waiting(False)
    assert speed.waiting_seconds == 0
    speed.set_waiting(True)
    assert speed.waiting_seconds < 0.1


def test_old_speed_is_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(window_module, "MIN_SECONDS", 0.05)
    speed = Speed()
    for tokens in (1_000, 10):
        speed.set_waiting(True)
        time.sleep(0.1)
        speed.add_computed(tokens)
        speed.set_waiting(False)
        assert speed.tokens_per_second is not None
        assert 7 * tokens < speed.tokens_per_second < 10 * tokens
        monkeypatch.setattr(window_module, "STALE_SECONDS", 0.05)
        time.sleep(0.1)
        assert speed.tokens_per_second is None
        monkeypatch.setattr(window_module, "STALE_SECONDS", 0.1)
