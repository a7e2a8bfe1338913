"""Clients that read slowly, not at all, or vanish, cost the others nothing and leave nothing behind."""

from pathlib import Path

import pytest
from slow_clients import Ending, SlowFigures, slow_clients


def check(figures: SlowFigures) -> None:
    """What holds of any crowd."""
    assert figures.complaints == ()
    # What is not read is not held: 20 to 30 MiB of each export as a rule, 59 once on a busy machine.
    num_exports = sum(count for kind, count in figures.num_clients.items() if kind.startswith("export"))
    assert max(figures.growth_mib.values()) < figures.export_mib / 2 * num_exports
    assert figures.unread_mib < 32
    assert figures.crowded_ms[0] < 200
    assert figures.crowded_ms[1] < 2000


async def test_slow_clients_are_held_back_and_leave_nothing_behind(tiny_model: Path) -> None:
    figures = await slow_clients(tiny_model, ["reset"], num_each=1, seconds=0.5, export_mib=128)

    check(figures)
    assert set(figures.given_back_seconds) == {"reset"}


@pytest.mark.faults
@pytest.mark.timeout(600)
async def test_slow_clients_that_stay_or_vanish_without_a_word_leave_nothing_behind(tiny_model: Path) -> None:
    endings: list[Ending] = ["reset", "black hole", "cancel", "reset", "black hole"]
    figures = await slow_clients(tiny_model, endings, num_each=4, seconds=5.0, export_mib=128)
    print(figures)

    check(figures)
    # Keepalive: 30 s of silence, and 10 s.
    assert figures.given_back_seconds["black hole"] < 60
