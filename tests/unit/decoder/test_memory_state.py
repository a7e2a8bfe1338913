import pytest
import torch

from eunoe.decoder.config import RopeConfig
from eunoe.decoder.memory_state import MemorySettings, MemoryState
from eunoe.decoder.rotary import Rotary
from eunoe.decoder.tiny import tiny_config

CONFIG = tiny_config()


def a_state(num_tokens: int, settings: MemorySettings) -> MemoryState:
    """Each key and value is its token's number."""
    state = MemoryState(CONFIG, settings, torch.float32)
    numbers = torch.arange(num_tokens, dtype=torch.float32)[None, :, None].expand(2, num_tokens, CONFIG.head_dim)
    for layer in range(CONFIG.num_layers):
        state.write(layer, numbers, numbers)
    state.append(torch.arange(num_tokens, dtype=torch.int32))
    return state


def test_state_bytes_follow_the_formula() -> None:
    settings = MemorySettings(kv_budget_tokens=1024, segment_length=512)
    state = MemoryState(CONFIG, settings, torch.bfloat16)

    # 2 layers, 2 KV heads, 16 dims: 2 L H D C 2 bytes of keys and values, 8 L H C of positions and token ids.
    assert state.state_bytes == 2 * 2 * 2 * 16 * 1024 * 2 + 8 * 2 * 2 * 1024
    # Three slabs, positions and token ids, of budget + segment slots.
    assert state.resident_bytes == (3 * 2 * 2 * 16 * 2 + 8 * 2 * 2) * 1536


def test_statistics_count_in_state_bytes_and_follow_their_slots() -> None:
    settings = MemorySettings(kv_budget_tokens=4, segment_length=6, num_sink_tokens=0)
    state = a_state(6, settings)
    plain_bytes, plain_resident = state.state_bytes, state.resident_bytes
    state.set_statistics("some/1", 5)
    assert state.statistics_LHSB is not None
    state.statistics_LHSB[:] = torch.arange(6, dtype=torch.uint8)[:, None]
    kept = torch.tensor([[[0, 2, 5], [1, 3, 4]], [[0, 1, 2], [3, 4, 5]]])

    copy = state.copy()
    state.evict(kept)

    assert state.state_bytes == plain_bytes + 2 * 2 * 4 * 5
    assert state.resident_bytes == plain_resident + 2 * 2 * 10 * 5
    assert torch.equal(state.statistics_LHSB[..., 4].long(), kept)
    assert copy.statistics_LHSB is not None
    assert (copy.statistics_LHSB == torch.arange(6)[:, None]).all()


def test_heads_may_keep_different_slots() -> None:
    state = a_state(6, MemorySettings(kv_budget_tokens=4, segment_length=6, num_sink_tokens=0))
    kept = torch.tensor([[[0, 2, 5], [1, 3, 4]], [[0, 1, 2], [3, 4, 5]]])

    state.evict(kept)

    assert state.num_slots == 3
    assert state.num_tokens == 6
    assert torch.equal(state.positions_LHS.long(), kept)
    assert torch.equal(state.keys_LHSD[..., 0].long(), kept)
    assert torch.equal(state.values_LHSD[..., -1].long(), kept)


@pytest.mark.parametrize("positions", ["compact", "original"])
def test_keys_are_rotated_by_rank_or_by_place(positions: str) -> None:
    settings = MemorySettings(
        kv_budget_tokens=4, segment_length=6, num_sink_tokens=0, positions=positions  # type: ignore[arg-type]
    )  # fmt: skip
    rotary = Rotary(RopeConfig(), CONFIG.head_dim)
    state = a_state(6, settings)
    state.rotate_pending(rotary)

    state.evict(torch.tensor([0, 4, 5]).expand(2, 2, 3))
    state.rotate_pending(rotary)

    place = {"compact": 1, "original": 4}[positions]
    cos, sin = rotary.rows(torch.tensor(place))
    expected = torch.cat([4 * cos - 4 * sin, 4 * cos + 4 * sin])
    torch.testing.assert_close(state.rotated_keys[1, 1, 1], expected)


@pytest.mark.parametrize(
    "settings",
    [
        {"segment_length": 0},
        {"kv_budget_tokens": 4, "num_sink_tokens": 4},
        {"num_sink_tokens": -1},
        {"positions": "relative"},
    ],
    ids=str,
)
def test_settings_that_cannot_work_are_refused(settings: dict[str, int]) -> None:
    with pytest.raises(ValueError, match=next(iter(settings))):
        MemorySettings(**settings)  # type: ignore[arg-type]
