"""What an eviction policy is given and what it answers."""

from typing import Protocol

import torch


class Window(Protocol):
    """What a policy sees of a memory state. Slots of a head are in ascending order of position.

    Shape suffixes: L KV source layer, H KV head, S slot (live ones only), D head dim.
    """

    @property
    def num_tokens(self) -> int:
        """Tokens of the stream folded so far."""

    @property
    def num_slots(self) -> int:
        """Live slots of each head."""

    @property
    def num_sink_tokens(self) -> int:
        """First tokens of the stream that no policy may evict."""

    @property
    def positions_LHS(self) -> torch.Tensor:
        """Position in the stream of each slot's token, int32."""

    @property
    def keys_LHSD(self) -> torch.Tensor:
        """Keys before rotary positions."""

    @property
    def values_LHSD(self) -> torch.Tensor:
        """Values."""


class EvictionPolicy(Protocol):
    """A rule that says which slots to keep. It must be a pure function of the window and the budget."""

    @property
    def name(self) -> str:
        """Name and version, recorded with every decision."""

    def keep(self, window: Window, budget: int) -> torch.Tensor:
        """Indices of the slots to keep, ascending, int64 [L, H, min(budget, num_slots)]; sink tokens are among them.

        Args:
            window: A memory state at a segment boundary.
            budget: Most slots a head keeps, sinks included; at least `window.num_sink_tokens`.
        """
