"""Heavy hitters (H2O, Zhang et al. 2023, arXiv:2306.14048): what collected the most attention stays.

    score = sum over all queries since the slot's birth of the attention that it received

Half of the budget is for the newest slots, which had no time to collect any.
"""

from dataclasses import dataclass, field

import torch

from eunoe.eviction.policy import Window, WindowShape, keep_by_scores
from eunoe.eviction.received import AttentionReceived
from eunoe.eviction.selection import keep_protected


@dataclass(frozen=True, slots=True)
class HeavyHitter:
    """Keeps the slots with the largest sums of attention, and the newest ones."""

    name: str = "heavy-hitter/1"
    statistics: AttentionReceived = field(default_factory=AttentionReceived)

    def features(self, window: Window) -> torch.Tensor:
        """See `ScoringPolicy`: the attention received."""
        assert window.statistics_LHSB is not None
        return self.statistics.unpack(window.statistics_LHSB)[..., None]

    def scores(self, feature_LHSI: torch.Tensor) -> torch.Tensor:
        """See `ScoringPolicy`."""
        return feature_LHSI[..., 0]

    def keep(self, window: Window, budget: int) -> torch.Tensor:
        """See `EvictionPolicy.keep`."""
        return keep_by_scores(self, window, budget)

    def keep_scored(self, scores_LHS: torch.Tensor, window: WindowShape, budget: int) -> torch.Tensor:
        """See `ScoringPolicy`."""
        return keep_protected(scores_LHS, window, budget, num_recent_tokens=budget // 2)
