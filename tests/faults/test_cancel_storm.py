"""Calls that are cancelled leave nothing behind."""

from pathlib import Path

import pytest
from cancel_storm import StormFigures, cancel_storm
from worker_processes import Site


async def storm(tiny_model: Path, num_calls: int) -> StormFigures:
    async with Site(tiny_model) as site:
        await site.serving_worker()
        gateway = await site.serving_gateway()
        pids = {"gateway": gateway.pid, "state_store": site.state_store_pid}
        return await cancel_storm(gateway.address, pids, site.model_name, num_calls=num_calls, seed=1)


@pytest.mark.faults
async def test_a_platform_serves_on_after_hundreds_of_cancelled_calls(tiny_model: Path) -> None:
    figures = await storm(tiny_model, 300)

    assert sum(figures.cancelled_by_kind.values()) == 400
    # A few pages more or less: only the long form can tell a leak from them.
    assert max(figures.mib_per_1000.values()) < 60


@pytest.mark.faults
@pytest.mark.timeout(600)
async def test_10_000_cancelled_calls_leave_no_memory_behind(tiny_model: Path) -> None:
    figures = await storm(tiny_model, 10_000)
    print(figures)

    assert max(figures.mib_per_1000.values()) <= 1.0
