"""A sidecar that dies, hangs and lies is no more than a recorded fallback."""

from pathlib import Path

import pytest
from sidecar_faults import sidecar_faults


@pytest.mark.parametrize(
    ("num_faults", "deadline_seconds"),
    [(13, 0.1), pytest.param(200, 0.5, marks=[pytest.mark.faults, pytest.mark.timeout(1200)])],
)
async def test_whatever_becomes_of_the_sidecar_streams_go_on_and_are_verified(
    tiny_model: Path, num_faults: int, deadline_seconds: float
) -> None:
    figures = await sidecar_faults(num_faults, seed=1, model_path=tiny_model, deadline_seconds=deadline_seconds)
    print(figures)

    assert figures.faults.total() == num_faults
    assert figures.num_hits > num_faults // 2
    assert (figures.failed_appends, figures.lost_bytes, figures.failed_folds) == ([], 0, [])
    assert figures.counted == figures.recorded
    assert (figures.misrecorded, figures.not_back) == ([], [])
    assert figures.num_unaudited <= figures.num_unrecorded
    assert figures.verdicts.keys() == {"VERIFIED"}
    # What is beyond the deadline is a busy machine's.
    assert max(figures.longest_seconds.values()) < deadline_seconds + 0.5
