"""Sink tokens and a recent window (StreamingLLM, Xiao et al. 2023, arXiv:2309.17453)."""

from dataclasses import dataclass

import torch

from eunoe.eviction.policy import Window


@dataclass(frozen=True, slots=True)
class SinksRecent:
    """Keeps the stream's first tokens, which collect the attention that has nowhere to go, and the newest ones."""

    name: str = "sinks-recent/1"
    statistics: None = None

    def keep(self, window: Window, budget: int) -> torch.Tensor:
        """See `EvictionPolicy.keep`."""
        num_layers, num_heads, num_slots = window.positions_LHS.shape
        num_kept = min(budget, num_slots)
        # Sinks are never evicted, so they stand in the first slots for ever.
        num_sinks = min(window.num_sink_tokens, num_kept)
        kept = torch.arange(num_kept, device=window.positions_LHS.device)
        kept[num_sinks:] += num_slots - num_kept
        return kept.expand(num_layers, num_heads, num_kept)
