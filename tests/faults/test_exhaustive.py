"""Every state that a small world can reach, whatever comes late, twice or never."""

import pytest
from exhaustive import FULL, SMALL, search


def test_no_reachable_state_of_the_smallest_world_breaks_a_promise() -> None:
    figures = search(SMALL)

    assert figures.violation == "", figures.trace
    assert figures.is_closed
    assert figures.num_states > 100_000


@pytest.mark.faults
@pytest.mark.timeout(3600)
def test_no_reachable_state_breaks_a_promise() -> None:
    figures = search(FULL, max_seconds=3000)
    print(figures)

    assert figures.violation == "", figures.trace
    assert figures.is_closed
