from collections.abc import Callable
from typing import Any

import pytest
import torch

from eunoe.eviction import HeavyHitter, KeyNorm, SnapKV
from eunoe.eviction.received import AttentionReceived
from eunoe_kernels.attention_received import attention_received_reference

MakeWindow = Callable[..., Any]


def with_attention(a_window: MakeWindow, received: dict[int, float], num_slots: int) -> Any:
    """A window whose slots have received so much, and the others nothing."""
    row = torch.zeros(num_slots)
    for slot, amount in received.items():
        row[slot] = amount
    window = a_window(HeavyHitter(), num_slots, num_sink_tokens=1)
    assert window.statistics_LHSB is not None
    window.statistics_LHSB.view(torch.float32)[..., 0] = row
    return window


def test_heavy_hitters_stay_beside_the_newest_half(a_window: MakeWindow) -> None:
    kept = HeavyHitter().keep(with_attention(a_window, {3: 5.0, 11: 9.0, 7: 0.5}, 20), budget=6)

    assert (kept == torch.tensor([0, 3, 11, 17, 18, 19])).all()


def test_attention_is_summed_over_passes_and_averaged_over_the_group() -> None:
    statistics = AttentionReceived()
    keys = torch.randn(2, 40, 16)
    queries = torch.randn(2, 3, 40, 16)
    packed = torch.zeros(2, 40, 4, dtype=torch.uint8)

    for start, end in ((0, 13), (13, 40)):
        statistics.observe(packed[:, :end], queries[:, :, start:end], keys[:, start:end], keys[:, :start])

    whole = attention_received_reference(queries, keys, keys[:, :0])
    torch.testing.assert_close(statistics.unpack(packed), whole)
    torch.testing.assert_close(whole.sum(dim=1), torch.full((2,), 40.0))


def test_the_last_queries_count_alone_where_only_they_are_wanted() -> None:
    statistics = AttentionReceived(num_last_queries=8)
    keys, queries = torch.randn(2, 40, 16), torch.randn(2, 3, 20, 16)
    packed = torch.full((2, 40, 4), 7, dtype=torch.uint8)

    statistics.observe(packed, queries, keys[:, 20:], keys[:, :20])

    expected = attention_received_reference(queries[:, :, -8:], keys[:, 20:], keys[:, :20])
    torch.testing.assert_close(statistics.unpack(packed), expected)


def test_keys_of_small_norm_stay(a_window: MakeWindow) -> None:
    policy = KeyNorm(num_recent_tokens=2)
    window = a_window(policy, 20, num_sink_tokens=1)
    window.keys_LHSD[:] = 1.0
    window.keys_LHSD[:, :, 5] = 0.1
    window.keys_LHSD[:, :, 9] = 0.2

    kept = policy.keep(window, budget=5)

    assert (kept == torch.tensor([0, 5, 9, 18, 19])).all()


def test_neighbours_of_what_is_attended_to_stay(a_window: MakeWindow) -> None:
    window = with_attention(a_window, {40: 1.0}, 200)

    kept = SnapKV().keep(window, budget=1 + 64 + 5)

    assert (kept == torch.tensor([0, *range(38, 43), *range(136, 200)])).all()


def test_an_even_number_of_neighbours_is_refused() -> None:
    with pytest.raises(ValueError, match="odd"):
        SnapKV(num_pooled=4)
