"""A single job. test_scheduler.py tests several, and test_dedup_cache.py the identity of rows."""

import time

import numpy as np
import pytest
from test_scheduler import BrokenCaller, Caller, make_row

from triton_embed.python_backend.scheduling import job as job_file
from triton_embed.python_backend.scheduling.job import Job, PendingRow, identity


def make_job(caller: Caller, *lengths: int, deadline: float = float("inf")) -> Job:
    return Job([make_row(i, length) for i, length in enumerate(lengths)], 3, caller, deadline)


def test_distinct_rows_are_sorted_by_length_and_cost_once() -> None:
    rows = [make_row(1, 9), make_row(2, 4), make_row(1, 9), make_row(1, 2), make_row(2, 4)]
    job = Job(rows, 3, Caller())
    assert list(job.indices.values()) == [[3], [1, 4], [0, 2]]
    assert job.cost == 2 + 4 + 9
    assert job.missing == 5


def test_filled_rows_are_no_longer_missing() -> None:
    caller = Caller()
    job = make_job(caller, 1, 2, 3)
    job.fill([2, 0], np.array([7, 8, 9], dtype=np.float32))
    assert job.missing == 1
    job.fill([1], np.array([1, 2, 3], dtype=np.float32))
    assert job.missing == 0
    job.finish()
    assert np.array_equal(caller.outcome(), [[7, 8, 9], [1, 2, 3], [7, 8, 9]])


def test_job_is_started_once_a_pass_includes_any_row() -> None:
    job = make_job(Caller(), 1, 2)
    assert not job.started
    job.pending = [PendingRow(identity(row, 3), row, 3) for row in job.rows]
    assert not job.started
    job.pending[1].started = True
    assert job.started


def test_deadline_is_checked_before_cancellation() -> None:
    caller = Caller(cancelled=True)
    assert make_job(caller, 1, deadline=time.monotonic() - 1).drop_reason() is not None
    assert caller.cancel_checks == 0


def test_cancellation_is_checked_after_a_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    caller = Caller(cancelled=True)
    job = make_job(caller, 1, deadline=time.monotonic() + 60)
    assert job.drop_reason() is None
    monkeypatch.setattr(job_file, "CANCEL_SECONDS", 0)
    assert job.drop_reason() == "The request was cancelled"
    assert caller.cancel_checks == 1


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_non_finite_vector_is_a_failure(value: float) -> None:
    caller = Caller()
    job = make_job(caller, 1)
    job.fill([0], np.array([1, value, 1], dtype=np.float32))
    job.finish()
    assert caller.outcome() == "The model computed a vector that is not finite"


def test_unsendable_result_becomes_an_error() -> None:
    caller = BrokenCaller(errors_fail_too=False)
    job = make_job(caller, 1)
    job.fill([0], np.zeros(3, dtype=np.float32))
    job.finish()
    assert caller.outcome() == "The reply could not be sent"
    assert caller.calls == ["done", "failed"]
