from types import SimpleNamespace

import pytest
import torch

from eunoe.eviction import SinksRecent


def a_window(num_slots: int, num_sink_tokens: int) -> SimpleNamespace:
    positions = torch.arange(num_slots, dtype=torch.int32).expand(2, 3, num_slots)
    return SimpleNamespace(num_sink_tokens=num_sink_tokens, positions_LHS=positions)


@pytest.mark.parametrize(
    ("num_slots", "num_sink_tokens", "budget", "kept"),
    [
        (10, 2, 5, [0, 1, 7, 8, 9]),
        (10, 0, 3, [7, 8, 9]),
        (5, 2, 5, [0, 1, 2, 3, 4]),
        (3, 2, 5, [0, 1, 2]),
        (10, 4, 4, [0, 1, 2, 3]),
    ],
)
def test_sinks_and_the_newest_slots_are_kept(
    num_slots: int, num_sink_tokens: int, budget: int, kept: list[int]
) -> None:
    got = SinksRecent().keep(a_window(num_slots, num_sink_tokens), budget)

    assert got.shape == (2, 3, len(kept))
    assert got.dtype == torch.int64
    assert (got == torch.tensor(kept)).all()
