"""The speed that is measured while the engine is busy, in real seconds."""

import time

import pytest

from triton_embed.gateway.triton import window as window_module
from triton_embed.gateway.triton.window import Speed


@pytest.fixture(autouse=True)
def few_calls(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(window_module, "MIN_CALLS", 1)


def test_speed_needs_calls(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(window_module, "MIN_CALLS", 2)
    monkeypatch.setattr(window_module, "MIN_SECONDS", 0.05)
    speed = Speed()
    speed.set_busy(True)
    time.sleep(0.1)
    speed.add_computed(10)
    assert speed.tokens_per_second is None
    speed.add_computed(10)
    assert speed.tokens_per_second is not None


def test_speed_is_measured_while_the_engine_is_busy() -> None:
    speed = Speed()
    assert speed.tokens_per_second is None
    speed.add_computed(10**9)  # it is not busy: this is latency
    speed.set_busy(True)
    time.sleep(0.3)
    speed.add_computed(1_000)
    assert speed.tokens_per_second is None  # too short
    speed.set_busy(False)
    time.sleep(0.4)
    speed.set_busy(True)
    time.sleep(0.3)
    speed.add_computed(2_000)
    assert speed.tokens_per_second is not None
    assert 2_000 < speed.tokens_per_second < 5_100


def test_busy_seconds_begin_anew_after_a_pause() -> None:
    speed = Speed()
    speed.set_busy(True)
    time.sleep(0.1)
    speed.set_busy(True)
    assert 0.1 <= speed.busy_seconds < 2
    speed.set_busy(False)
    assert speed.busy_seconds == 0
    speed.set_busy(True)
    assert speed.busy_seconds < 0.1


def test_recent_seconds_weigh_most(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(window_module, "MEMORY_SECONDS", 0.1)
    monkeypatch.setattr(window_module, "MIN_SECONDS", 0.05)
    speed = Speed()
    speed.set_busy(True)
    for tokens in (10_000, 100):
        time.sleep(0.5)
        speed.add_computed(tokens)
    assert speed.tokens_per_second is not None
    assert speed.tokens_per_second < 1_500  # an average of all would be 10,000


def test_old_speed_is_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(window_module, "MIN_SECONDS", 0.05)
    speed = Speed()
    for tokens in (1_000, 10):
        speed.set_busy(True)
        time.sleep(0.1)
        speed.add_computed(tokens)
        speed.set_busy(False)
        assert speed.tokens_per_second is not None
        assert 2 * tokens < speed.tokens_per_second < 10 * tokens
        monkeypatch.setattr(window_module, "STALE_SECONDS", 0.05)
        time.sleep(0.1)
        assert speed.tokens_per_second is None
        monkeypatch.setattr(window_module, "STALE_SECONDS", 0.1)
