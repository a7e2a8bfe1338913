import pytest

from eunoe.model_worker import failures
from eunoe.model_worker.failures import FailedStreams
from eunoe.runtime.errors import FoldFailed, QuotaExceeded


class Clock:
    """Seconds, moved by the test."""

    def __init__(self) -> None:
        self.now = 1000.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(failures, "time", clock)
    return clock


def rest_seconds(failed: FailedStreams) -> float:
    with pytest.raises(FoldFailed) as caught:
        failed.check("a", 1)
    return caught.value.retry_after_seconds


def test_a_stream_rests_twice_as_long_after_each_failure_up_to_a_limit(clock: Clock) -> None:
    failed = FailedStreams()
    rests = []
    for _ in range(9):
        failed.note("a", 1, RuntimeError("poison"))
        rests.append(rest_seconds(failed))
        clock.now += rests[-1]
        failed.check("a", 1)

    assert rests == [2, 4, 8, 16, 32, 64, 120, 120, 120]


def test_another_stream_of_that_name_is_not_refused(clock: Clock) -> None:
    failed = FailedStreams()
    failed.note("a", 1, RuntimeError("poison"))

    failed.check("a", 2)
    failed.check("b", 1)


def test_a_stream_that_left_for_another_reason_starts_over(clock: Clock) -> None:
    failed = FailedStreams()
    failed.note("a", 1, RuntimeError("poison"))
    failed.note("a", 1, RuntimeError("poison"))
    failed.forget("a")
    failed.check("a", 1)
    failed.note("a", 1, RuntimeError("poison"))

    assert rest_seconds(failed) == 2


def test_what_a_stream_failed_of_is_told_again(clock: Clock) -> None:
    failed = FailedStreams()
    failed.note("a", 1, QuotaExceeded("full", quota="checkpoint_bytes"))

    with pytest.raises(QuotaExceeded) as caught:
        failed.check("a", 1)

    assert caught.value.quota == "checkpoint_bytes"
