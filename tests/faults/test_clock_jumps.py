"""Wall clocks that are set while everything runs."""

from pathlib import Path

import pytest
from clock_jumps import clock_jumps, find_libfaketime


@pytest.mark.parametrize("num_jumps", [5, pytest.param(60, marks=[pytest.mark.faults, pytest.mark.timeout(900)])])
async def test_clocks_may_jump_by_hours(tmp_path: Path, num_jumps: int) -> None:
    library = find_libfaketime()
    if library is None:
        pytest.skip("libfaketime is not installed (on Debian: apt install faketime)")
    figures = await clock_jumps(num_jumps, seed=1, directory=tmp_path, library=library)
    print(figures)

    assert sum(figures.jumps.values()) >= num_jumps
    assert figures.num_commits >= num_jumps
    assert (figures.stale_commits_accepted, figures.commits_lost, figures.expired_early) == (0, 0, ())
    assert (figures.acknowledged_bytes_lost, figures.records_applied_twice) == (0, 0)
