"""What an eviction policy is given and what it answers."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol, runtime_checkable

import torch


class WindowShape(Protocol):
    """What it takes of a memory state to go from scores to slots."""

    @property
    def num_slots(self) -> int:
        """Live slots of each head."""

    @property
    def num_sink_tokens(self) -> int:
        """First tokens of the stream that no policy may evict."""


class Window(WindowShape, Protocol):
    """What a policy sees of a memory state. Slots of a head are in ascending order of position.

    Shape suffixes: L KV source layer, H KV head, S slot (live ones only), D head dim, B byte.
    """

    @property
    def num_tokens(self) -> int:
        """Tokens of the stream folded so far."""

    @property
    def positions_LHS(self) -> torch.Tensor:
        """Position in the stream of each slot's token, int32."""

    @property
    def keys_LHSD(self) -> torch.Tensor:
        """Keys before rotary positions."""

    @property
    def values_LHSD(self) -> torch.Tensor:
        """Values."""

    @property
    def statistics_LHSB(self) -> torch.Tensor | None:
        """What the policy's `Statistics` remember of each slot, uint8; None if it has none."""


class Statistics(Protocol):
    """What a policy has the memory state remember of each slot, beside its key and value: a few bytes, packed.

    Shape suffixes as in `Window`; G query head of a KV head's group, T token of a pass, N slot of both.
    """

    @property
    def name(self) -> str:
        """Layout, settings and version, at most 48 bytes. Under another name a state's statistics start from zero."""

    @property
    def num_bytes(self) -> int:
        """Bytes a slot."""

    def observe(
        self,
        statistics_HNB: torch.Tensor,
        query_HGTD: torch.Tensor,
        key_HTD: torch.Tensor,
        past_key_HSD: torch.Tensor,
    ) -> None:
        """Take in what one layer attended to in a pass. A token that is decoded alone is seen by nobody.

        Args:
            statistics_HNB: Changed in place; all bytes of the pass's own T slots are zero.
            query_HGTD: Rotated queries of the pass.
            key_HTD: Rotated keys of the pass; `past_key_HSD` those of the slots before it.
        """

    def finish(self, statistics_LHTB: torch.Tensor, key_LHTD: torch.Tensor, value_LHTD: torch.Tensor) -> None:
        """Take in a pass as a whole, after all layers were observed.

        Args:
            statistics_LHTB: Of the pass's own slots, changed in place.
            key_LHTD: Their keys before rotary positions; `value_LHTD` their values.
        """


class EvictionPolicy(Protocol):
    """A rule that says which slots to keep. It must be a pure function of the window and the budget."""

    @property
    def name(self) -> str:
        """Name and version, recorded with every decision."""

    @property
    def statistics(self) -> Statistics | None:
        """What it needs to know of each slot beside key, value and position."""

    def keep(self, window: Window, budget: int) -> torch.Tensor:
        """Indices of the slots to keep, ascending, int64 [L, H, n] with n <= budget; sink tokens are among them.

        Args:
            window: A memory state at a segment boundary.
            budget: Most slots a head keeps, sinks included; above `window.num_sink_tokens`.
        """


@runtime_checkable
class ScoringPolicy(EvictionPolicy, Protocol):
    """A policy whose choice is a score for each slot: one call for all layers and heads, wherever it runs.

    Shape suffix I: feature of a slot.
    """

    def features(self, window: Window) -> torch.Tensor:
        """What the scores are computed from, float32 [L, H, S, I]; the memory state is not needed beyond it."""

    def scores(self, feature_LHSI: torch.Tensor) -> torch.Tensor:
        """How much each slot is worth keeping, float32 [L, H, S]; higher is kept."""

    def keep_scored(self, scores_LHS: torch.Tensor, window: WindowShape, budget: int) -> torch.Tensor:
        """As `keep`, with the scores given."""


def keep_by_scores(policy: ScoringPolicy, window: Window, budget: int) -> torch.Tensor:
    """What a scoring policy's `keep` is."""
    return policy.keep_scored(score(policy, policy.features(window)), window, budget)


def score(policy: ScoringPolicy, feature_LHSI: torch.Tensor) -> torch.Tensor:
    """The policy's scores, float32 [L, H, S], with the same bits in every process of a machine."""
    with _one_thread():
        return policy.scores(feature_LHSI.contiguous())


def scoring_numerics() -> str:
    """What the last bits of scores depend on, beside the policy."""
    return f"torch-{torch.__version__}/{torch.backends.cpu.get_cpu_capability().replace(' ', '-')}"


@contextmanager
def _one_thread() -> Iterator[None]:
    """The last bits of a product depend on how it is shared out."""
    num_threads = torch.get_num_threads()
    if num_threads == 1:
        yield
        return
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(num_threads)
