"""No request harms the platform or anybody else."""

from pathlib import Path

import pytest
from hostile_requests import hostile_requests
from worker_processes import Site


@pytest.mark.parametrize(
    "num_calls", [150, pytest.param(10_000, marks=[pytest.mark.faults, pytest.mark.timeout(1200)])]
)
async def test_every_request_is_answered_or_refused_by_a_typed_error(tiny_model: Path, num_calls: int) -> None:
    async with Site(tiny_model) as site:
        worker = await site.serving_worker()
        gateway = await site.serving_gateway()

        figures = await hostile_requests(gateway.address, site.model_name, num_calls=num_calls, seed_number=1)
        print(figures)

        # Those that were there at the start are those that answered the last call.
        assert (worker.exit_status, gateway.exit_status) == (None, None)
        assert "failed unexpectedly" not in gateway.log_file.read_text()
        assert figures.num_calls >= num_calls
