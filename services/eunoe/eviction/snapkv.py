"""SnapKV (Li et al. 2024, arXiv:2404.14469), at every segment's end instead of once at a prompt's.

    score_n = mean over n - 2 .. n + 2 of the attention received from the segment's last 64 queries

Those 64 tokens stay. The mean over neighbours keeps words together: of a word, attention picks out single tokens.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F  # noqa: N812

from eunoe.eviction.policy import Window, WindowShape, keep_by_scores
from eunoe.eviction.received import AttentionReceived
from eunoe.eviction.selection import keep_protected

_NUM_QUERIES = 64
_STATISTICS = AttentionReceived(num_last_queries=_NUM_QUERIES)


@dataclass(frozen=True, slots=True)
class SnapKV:
    """Keeps the slots that the newest tokens attend to, with their neighbours, and those tokens."""

    name: str = "snapkv/1"
    statistics: AttentionReceived = _STATISTICS
    num_pooled: int = 5
    """Neighbouring slots whose attention is averaged, odd."""

    def __post_init__(self) -> None:
        if self.num_pooled < 1 or not self.num_pooled % 2:
            raise ValueError(f"num_pooled={self.num_pooled} is not odd")

    def features(self, window: Window) -> torch.Tensor:
        """See `ScoringPolicy`: the attention received."""
        assert window.statistics_LHSB is not None
        return self.statistics.unpack(window.statistics_LHSB)[..., None]

    def scores(self, feature_LHSI: torch.Tensor) -> torch.Tensor:
        """See `ScoringPolicy`."""
        return F.avg_pool1d(feature_LHSI[..., 0], self.num_pooled, stride=1, padding=self.num_pooled // 2)

    def keep(self, window: Window, budget: int) -> torch.Tensor:
        """See `EvictionPolicy.keep`."""
        return keep_by_scores(self, window, budget)

    def keep_scored(self, scores_LHS: torch.Tensor, window: WindowShape, budget: int) -> torch.Tensor:
        """See `ScoringPolicy`."""
        return keep_protected(scores_LHS, window, budget, num_recent_tokens=_NUM_QUERIES)
