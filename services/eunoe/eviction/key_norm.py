"""Key norms (Devoto et al. 2024, arXiv:2406.11430): keys of a small norm attract much attention, so they stay.

    score = -|k|

A rotation does not change a norm, so it does not matter that keys are kept before rotary positions.
"""

from dataclasses import dataclass

import torch

from eunoe.eviction.policy import Window, WindowShape, keep_by_scores
from eunoe.eviction.selection import keep_protected


@dataclass(frozen=True, slots=True)
class KeyNorm:
    """Keeps the slots whose keys have the smallest norms, and the newest ones."""

    name: str = "key-norm/1"
    statistics: None = None
    num_recent_tokens: int = 64
    """Newest slots that are never evicted, but at most half of the budget."""

    def features(self, window: Window) -> torch.Tensor:
        """See `ScoringPolicy`: the norm."""
        norm_LHS: torch.Tensor = torch.linalg.vector_norm(window.keys_LHSD, dim=-1, dtype=torch.float32)
        return norm_LHS[..., None]

    def scores(self, feature_LHSI: torch.Tensor) -> torch.Tensor:
        """See `ScoringPolicy`."""
        return -feature_LHSI[..., 0]

    def keep(self, window: Window, budget: int) -> torch.Tensor:
        """See `EvictionPolicy.keep`."""
        return keep_by_scores(self, window, budget)

    def keep_scored(self, scores_LHS: torch.Tensor, window: WindowShape, budget: int) -> torch.Tensor:
        """See `ScoringPolicy`."""
        return keep_protected(scores_LHS, window, budget, self.num_recent_tokens)
