"""No bytes from outside may do more than be refused."""

import pytest
from fuzzing import TARGETS, fuzz

FULL_RUNS = {"state": 300_000, "record": 200_000, "metadata": 300_000, "export": 300_000}


@pytest.mark.parametrize(
    "runs_by_target",
    [dict.fromkeys(TARGETS, 2_000), pytest.param(FULL_RUNS, marks=[pytest.mark.faults, pytest.mark.timeout(1200)])],
    ids=["short", "full"],
)
def test_no_input_does_more_than_be_refused(runs_by_target: dict[str, int]) -> None:
    pytest.importorskip("atheris", reason="atheris is not installed here")

    figures = fuzz(runs_by_target, seed=1)

    assert figures.num_crashes == 0, figures.output
    assert figures.num_executions >= sum(runs_by_target.values())
