"""A disk without room for the next write."""

import tempfile
from pathlib import Path

import pytest
from disk_full import NoMountError, disk_full


@pytest.mark.parametrize("num_fillings", [3, pytest.param(60, marks=[pytest.mark.faults, pytest.mark.timeout(900)])])
async def test_a_full_disk_loses_nothing_and_clients_are_told_to_try_again(num_fillings: int) -> None:
    # Not pytest's: a socket's path ends at 107 bytes.
    with tempfile.TemporaryDirectory(prefix="eunoe-full-") as directory:
        try:
            figures = await disk_full(num_fillings, seed=1, directory=Path(directory))
        except NoMountError as error:
            pytest.skip(str(error))
    print(figures)

    assert set(figures.errors) == {"UNAVAILABLE"}
    assert figures.errors["UNAVAILABLE"] >= num_fillings
    assert sum(figures.exits.values()) > num_fillings
    assert figures.num_checkpoints > 0
    lost = (figures.acknowledged_bytes_lost, figures.records_applied_twice, figures.torn_checkpoints)
    assert lost == (0, 0, 0)
