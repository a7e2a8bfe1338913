"""What no fault of the simulation may bring about; `make faults` lives longer."""

import pytest
from simulation import simulate


def test_nothing_acknowledged_is_lost_or_applied_twice() -> None:
    figures = simulate(300, seed=100)

    assert figures.violations == []
    assert (figures.acknowledged_bytes_lost, figures.records_applied_twice) == (0, 0)
    kinds = {"lost_request", "lost_reply", "late_repeat", "database_crash", "promotion", "clock_jump", "process_death"}
    assert set(figures.faults_by_kind) == kinds
    assert figures.num_checkpoints > 50


def test_every_loss_is_noticed_and_mended() -> None:
    figures = simulate(300, seed=100, loses=True)

    assert figures.violations == []
    assert figures.num_rollbacks_detected == figures.num_rollbacks > 5


def test_a_seed_decides_everything() -> None:
    traces = [simulate(40, seed=7, loses=loses).trace_hash for loses in (False, True, False, True)]

    assert traces[:2] == traces[2:]
    assert traces[0] != simulate(40, seed=8).trace_hash


@pytest.mark.faults
@pytest.mark.timeout(600)
@pytest.mark.parametrize("loses", [False, True])
def test_nothing_is_lost_in_20_000_faults(loses: bool) -> None:
    figures = simulate(20_000, seed=1000, loses=loses)
    print(figures)

    assert figures.violations == []
    assert (figures.acknowledged_bytes_lost, figures.records_applied_twice) == (0, 0)
    assert figures.num_rollbacks_detected == figures.num_rollbacks
