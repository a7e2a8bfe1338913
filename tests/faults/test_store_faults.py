"""Redis and the state store die, hang and lose their connections; what was acknowledged stays."""

import pytest
from store_faults import forced_retries, real_faults


@pytest.mark.parametrize("num_faults", [10, pytest.param(320, marks=[pytest.mark.faults, pytest.mark.timeout(1800)])])
async def test_nothing_acknowledged_is_lost_torn_or_applied_twice(num_faults: int) -> None:
    figures = await real_faults(num_faults, seed=1)
    print(figures)

    assert figures.num_faults == num_faults
    assert figures.acknowledged_bytes > 0
    assert figures.num_checkpoints > 0
    lost = (figures.acknowledged_bytes_lost, figures.records_applied_twice, figures.torn_checkpoints)
    assert lost == (0, 0, 0)


@pytest.mark.parametrize(
    "num_retries", [300, pytest.param(10_000, marks=[pytest.mark.faults, pytest.mark.timeout(600)])]
)
async def test_no_record_is_applied_twice(num_retries: int) -> None:
    figures = await forced_retries(num_retries, seed=1)
    print(figures)

    assert figures.num_retries >= num_retries
    assert figures.records_applied_twice == 0
