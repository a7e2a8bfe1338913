"""A replica that lags takes over: the client hears of it and sends again what is gone."""

import tempfile
from pathlib import Path

import pytest
from stale_replicas import stale_promotions


@pytest.mark.parametrize(
    "num_promotions", [2, pytest.param(200, marks=[pytest.mark.faults, pytest.mark.timeout(1800)])]
)
async def test_what_a_stale_replica_forgot_is_noticed_and_sent_again(num_promotions: int) -> None:
    # Not pytest's: a socket's path ends at 107 bytes.
    with tempfile.TemporaryDirectory(prefix="eunoe-stale-") as directory:
        figures = await stale_promotions(num_promotions, seed=1, directory=Path(directory))
    print(figures)

    assert figures.num_detected == figures.num_healed == figures.num_promotions == num_promotions
    assert figures.lost_bytes > 0
