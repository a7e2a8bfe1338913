from collections.abc import Callable
from dataclasses import dataclass, replace

import pytest
import torch

from eunoe.eviction import EvictionPolicy


@dataclass(frozen=True)
class FakeWindow:
    """What a memory state shows to a policy, without one."""

    num_sink_tokens: int
    positions_LHS: torch.Tensor
    keys_LHSD: torch.Tensor
    values_LHSD: torch.Tensor
    statistics_LHSB: torch.Tensor | None

    @property
    def num_slots(self) -> int:
        return self.positions_LHS.shape[-1]

    @property
    def num_tokens(self) -> int:
        return int(self.positions_LHS.max()) + 1

    def layer(self, index: int) -> "FakeWindow":
        """One layer alone."""
        part = slice(index, index + 1)
        statistics = None if self.statistics_LHSB is None else self.statistics_LHSB[part]
        return replace(
            self,
            positions_LHS=self.positions_LHS[part],
            keys_LHSD=self.keys_LHSD[part],
            values_LHSD=self.values_LHSD[part],
            statistics_LHSB=statistics,
        )


MakeWindow = Callable[..., FakeWindow]


@pytest.fixture
def a_window() -> MakeWindow:
    """Makes windows of a policy, a number of slots and of sink tokens."""
    return _window


def _window(policy: EvictionPolicy, num_slots: int, num_sink_tokens: int = 4, *, seed: int = 0) -> FakeWindow:
    """Two layers of three heads that read twice as many tokens; the policy's statistics have seen random attention."""
    generator = torch.Generator().manual_seed(seed)
    shape = (2, 3, num_slots)

    def random(*sizes: int) -> torch.Tensor:
        return torch.randn(sizes, generator=generator)

    keys = random(*shape, 16)
    statistics = None
    if policy.statistics is not None:
        statistics = torch.zeros(*shape, policy.statistics.num_bytes, dtype=torch.uint8)
        num_new = num_slots // 2
        for layer in range(shape[0]):
            query = 3 * random(shape[1], 2, num_new, 16)
            past, new = keys[layer, :, : num_slots - num_new], keys[layer, :, num_slots - num_new :]
            policy.statistics.observe(statistics[layer], query, new, past)
        policy.statistics.finish(statistics[:, :, -num_new:], keys[:, :, -num_new:], random(*shape[:2], num_new, 16))
    random_order = torch.rand(*shape[:2], 2 * num_slots - num_sink_tokens, generator=generator).argsort(dim=-1)
    evicted = random_order[..., : num_slots - num_sink_tokens] + num_sink_tokens
    sinks = torch.arange(num_sink_tokens).expand(*shape[:2], num_sink_tokens)
    positions = torch.cat([sinks, evicted], dim=-1).sort(dim=-1).values.int()
    return FakeWindow(num_sink_tokens, positions, keys, random(*shape, 16), statistics)
