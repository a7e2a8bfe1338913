"""The gateway dies in the middle of appends; logs end as their sources."""

import pytest
from gateway_kills import gateway_kills


@pytest.mark.parametrize("num_kills", [3, pytest.param(100, marks=[pytest.mark.faults, pytest.mark.timeout(900)])])
async def test_an_append_goes_on_at_the_next_gateway_with_nothing_lost_and_nothing_twice(num_kills: int) -> None:
    figures = await gateway_kills(num_kills, seed=1)
    print(figures)

    assert figures.num_kills == num_kills
    assert figures.num_reconnects >= num_kills
    assert figures.num_streams > 0
    assert (figures.lost_bytes, figures.surplus_bytes, figures.wrong) == (0, 0, [])
