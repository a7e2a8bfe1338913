"""How long a stream stands still after its worker was killed."""

from pathlib import Path

import pytest
from recovery import Recovery, RecoveryFigures, recovery


def test_the_figures_are_quantiles_of_the_first_segments() -> None:
    figures = RecoveryFigures(tuple(Recovery(0.1, seconds) for seconds in (3.0, 1.0, 2.0, 9.0, 4.0)))

    assert (figures.p50_seconds, figures.p99_seconds, figures.max_seconds) == (3.0, 9.0, 9.0)
    assert RecoveryFigures(tuple(Recovery(0.1, float(i)) for i in range(1, 201))).p99_seconds == 198.0


# A platform of its own, which takes half a minute: `make test` kills workers in test_worker_faults and test_restart.
@pytest.mark.faults
@pytest.mark.timeout(170)
async def test_a_stream_goes_on_at_the_other_worker(tiny_model: Path) -> None:
    figures = await recovery(1, tiny_model, text=b"All that was acknowledged is read on. " * 20_000)

    assert 0.0 < figures.recoveries[0].takeover_seconds <= figures.recoveries[0].first_segment_seconds < 10.0


@pytest.mark.model
@pytest.mark.full
@pytest.mark.timeout(900)
async def test_the_other_warm_worker_goes_on_within_seconds(smollm2_directory: Path) -> None:
    figures = await recovery(30, smollm2_directory)
    print(figures.p50_seconds, figures.p99_seconds, figures)

    assert figures.p50_seconds <= 3.0
    assert figures.p99_seconds <= 10.0
