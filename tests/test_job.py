"""A single job. test_scheduler.py tests several, and test_dedup_cache.py the identity of rows."""

import time

import numpy as np
import pytest
from test_scheduler import Broken, Caller, row

from triton_embed.python_backend.scheduling import job as job_file
from triton_embed.python_backend.scheduling.job import Job, PendingRow, identity


def made(caller: Caller, *lengths: int, deadline: float = float("inf")) -> Job:
    return Job([row(i, length) for i, length in enumerate(lengths)], 3, caller, deadline)


def test_distinct_rows_stand_from_short_to_long_and_cost_once() -> None:
    rows = [row(1, 9), row(2, 4), row(1, 9), row(1, 2), row(2, 4)]
    job = Job(rows, 3, Caller())
    assert list(job.indices.values()) == [[3], [1, 4], [0, 2]]
    assert job.cost == 2 + 4 + 9
    assert job.missing == 5


def test_filled_rows_are_no_longer_missing() -> None:
    caller = Caller()
    job = made(caller, 1, 2, 3)
    job.fill([2, 0], np.array([7, 8, 9], dtype=np.float32))
    assert job.missing == 1
    job.fill([1], np.array([1, 2, 3], dtype=np.float32))
    assert job.missing == 0
    job.finish()
    assert np.array_equal(caller.outcome(), [[7, 8, 9], [1, 2, 3], [7, 8, 9]])


def test_it_has_begun_when_a_pass_took_any_of_it() -> None:
    job = made(Caller(), 1, 2)
    assert not job.started
    job.pending = [PendingRow(identity(one, 3), one, 3) for one in job.rows]
    assert not job.started
    job.pending[1].started = True
    assert job.started


def test_a_deadline_is_looked_at_before_anybody_is_asked() -> None:
    caller = Caller(cancelled=True)
    assert made(caller, 1, deadline=time.monotonic() - 1).drop_reason() is not None
    assert caller.asked == 0


def test_who_has_waited_long_is_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    caller = Caller(cancelled=True)
    job = made(caller, 1, deadline=time.monotonic() + 60)
    assert job.drop_reason() is None
    monkeypatch.setattr(job_file, "CANCEL_SECONDS", 0)
    assert job.drop_reason() == "The request was cancelled"
    assert caller.asked == 1


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_vector_that_is_not_finite_is_a_failure(value: float) -> None:
    caller = Caller()
    job = made(caller, 1)
    job.fill([0], np.array([1, value, 1], dtype=np.float32))
    job.finish()
    assert caller.outcome() == "The model computed a vector that is not finite"


def test_a_result_that_cannot_be_sent_is_an_error_instead() -> None:
    caller = Broken(errors_too=False)
    job = made(caller, 1)
    job.fill([0], np.zeros(3, dtype=np.float32))
    job.finish()
    assert caller.outcome() == "The reply could not be sent"
    assert caller.tries == ["done", "failed"]
