"""An append-only file that ends in the middle of anything."""

import tempfile
from pathlib import Path

import pytest
from file_cuts import file_cuts


@pytest.mark.parametrize(
    ("num_cuts", "num_last"), [(15, 0), pytest.param(500, 6000, marks=[pytest.mark.faults, pytest.mark.timeout(1800)])]
)
async def test_a_file_cut_anywhere_opens_as_of_one_moment_and_who_saw_a_later_one_is_told(
    num_cuts: int, num_last: int
) -> None:
    # Not pytest's: a socket's path ends at 107 bytes.
    with tempfile.TemporaryDirectory(prefix="eunoe-cuts-") as directory:
        figures = await file_cuts(num_cuts, num_last, seed=1, directory=Path(directory))
    print(figures)

    assert figures.problems == ()
    assert figures.num_cuts == num_cuts + num_last
    assert figures.num_inside > 0
    assert 0 < figures.num_gone < figures.num_marks
