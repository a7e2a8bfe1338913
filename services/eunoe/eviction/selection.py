"""From scores to the slots that stay. Among equal scores the newer slot wins: without a preference, recency it is.

Shape suffixes: L KV source layer, H KV head, S slot.
"""

import torch

from eunoe.eviction.policy import WindowShape


def keep_best(scores_LHS: torch.Tensor, num_kept: int) -> torch.Tensor:
    """The `num_kept` best slots of each head, ascending, int64 [L, H, num_kept].

    Raises:
        ValueError: If a score is NaN.
    """
    if scores_LHS.isnan().any():
        raise ValueError("scores of slots are not numbers")
    # Stable, so that equal scores stay in slot order and the cut falls before the newest of them.
    order = scores_LHS.sort(dim=-1, stable=True).indices
    return order[..., scores_LHS.shape[-1] - num_kept :].sort(dim=-1).values


def protect(scores_LHS: torch.Tensor, window: WindowShape, budget: int, num_recent_tokens: int) -> torch.Tensor:
    """The scores with those of sink tokens and the newest slots raised to infinity.

    Half of the budget at most is for the newest slots, so that scores count; the very newest always stays.
    """
    num_sinks = min(window.num_sink_tokens, window.num_slots)
    num_recent = min(max(1, min(num_recent_tokens, budget // 2)), budget - num_sinks)
    # No score, however high, is above them.
    scores_LHS = scores_LHS.clamp(max=torch.finfo(scores_LHS.dtype).max)
    # Sinks are never evicted, so they stand in the first slots for ever.
    scores_LHS[..., :num_sinks] = torch.inf
    scores_LHS[..., max(num_sinks, window.num_slots - num_recent) :] = torch.inf
    return scores_LHS


def keep_protected(scores_LHS: torch.Tensor, window: WindowShape, budget: int, num_recent_tokens: int) -> torch.Tensor:
    """The `min(budget, num_slots)` slots of each head with the best scores, sinks and the newest ones among them."""
    protected = protect(scores_LHS, window, budget, num_recent_tokens)
    return keep_best(protected, min(budget, window.num_slots))
