"""The memory state of a stream: the window of cached tokens, in fixed slabs, and a matrix a head of what has left it.

Shape suffixes: L KV source layer, H KV head, G query head of its group, S slot, D head dim, T new token, B byte.
Slots of a head are in ascending order of position. Keys are kept before rotary positions: a slot's rotation depends on
its place among the slots that are left, which changes with every eviction.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

import torch

from eunoe.decoder.config import DecoderConfig
from eunoe.decoder.rotary import Rotary, rotate
from eunoe.eviction.policy import Statistics
from eunoe_kernels.kv_compaction import compact

Positions = Literal["original", "compact"]

MAX_TOKENS = 1 << 31
"""Of a stream: its tokens' positions are 32 bits wide, with a sign."""


@dataclass(frozen=True, kw_only=True, slots=True)
class MemorySettings:
    """What a stream fixes about its memory for life."""

    kv_budget_tokens: int = 1024
    """Most slots a head keeps between segments, sinks included. 0, with no sinks, carries no window from one segment to
    the next, as Infini-attention's paper does: only a decoder with a compressive memory remembers anything then."""
    segment_length: int = 512
    """Tokens per pass; segments are cut only at multiples of it from the stream's start."""
    num_sink_tokens: int = 4
    """First tokens of the stream, never evicted."""
    positions: Positions = "compact"
    """What rotary positions a slot has when it is read: its place in the stream (`original`), exact as long as the
    stream stays in the model's trained range; or its rank among the head's slots (`compact`), for streams without an
    end. Equal until the first eviction."""

    def __post_init__(self) -> None:
        if self.segment_length < 1:
            raise ValueError(f"segment_length={self.segment_length} is below 1")
        if self.kv_budget_tokens < 0:
            raise ValueError(f"kv_budget_tokens={self.kv_budget_tokens} is below 0")
        if not 0 <= self.num_sink_tokens < max(1, self.kv_budget_tokens):
            raise ValueError(f"{self.num_sink_tokens=} must be from 0 to below {self.kv_budget_tokens=}")
        if self.positions not in ("original", "compact"):
            raise ValueError(f"positions={self.positions!r} is neither original nor compact")

    @property
    def capacity(self) -> int:
        """Slots of a slab: what is kept and what one segment adds."""
        return self.kv_budget_tokens + self.segment_length


class MemoryState:
    """All that a model remembers of a stream. Slabs have `settings.capacity` slots and never grow.

    Attributes:
        settings: What the stream fixed.
        num_tokens: Tokens of the stream folded so far.
        num_slots: Live slots, the same for every head; the rest of a slab is undefined.
        keys: [L, H, capacity, D] in the KV dtype, before rotary positions; `values` likewise.
        positions: [L, H, capacity] int32, each slot's place in the stream; `token_ids` likewise.
        rotated_keys: `keys` after rotary positions, in the KV dtype. Derived from `keys`: never stored, and valid
            only below `num_rotated`.
        num_rotated: Slots of `rotated_keys` that are up to date.
        statistics_name: Layout of `statistics`; empty if there are none.
        statistics: [L, H, capacity, B] uint8, what the eviction policy remembers of each slot, or None.
        memory: [L, H, D, D] float32, the compressive memory's M: a sum over every token that has left the window; None
            if the decoder has none. Zero until the first eviction.
        normalizer: [L, H, D] float32, its z.
    """

    def __init__(
        self,
        config: DecoderConfig,
        settings: MemorySettings,
        kv_dtype: torch.dtype,
        statistics: Statistics | None = None,
    ) -> None:
        if settings.kv_budget_tokens == 0 and config.compressive_memory is None:
            raise ValueError(f"with kv_budget_tokens=0 {config.name} would remember nothing")
        heads = (config.num_kv_layers, config.num_kv_heads)
        slab = (*heads, settings.capacity, config.head_dim)
        self.settings = settings
        self.num_tokens = 0
        self.num_slots = 0
        self.num_rotated = 0
        self.keys = torch.empty(slab, dtype=kv_dtype)
        self.values = torch.empty(slab, dtype=kv_dtype)
        self.rotated_keys = torch.empty(slab, dtype=kv_dtype)
        self.positions = torch.empty(*heads, settings.capacity, dtype=torch.int32)
        self.token_ids = torch.empty(*heads, settings.capacity, dtype=torch.int32)
        self.statistics_name = ""
        self.statistics: torch.Tensor | None = None
        self.use_statistics(statistics)
        self.memory: torch.Tensor | None = None
        self.normalizer: torch.Tensor | None = None
        if config.compressive_memory is not None:
            self.memory = torch.zeros(*heads, config.head_dim, config.head_dim)
            self.normalizer = torch.zeros(*heads, config.head_dim)

    def use_statistics(self, statistics: Statistics | None) -> None:
        """Have the statistics that a policy needs; if those there are others, they start from zero."""
        name = statistics.name if statistics is not None else ""
        if name != self.statistics_name:
            self.set_statistics(name, statistics.num_bytes if statistics is not None else 0)

    def set_statistics(self, name: str, num_bytes: int) -> None:
        """Replace the statistics by zeros of `num_bytes` a slot; by none if the name is empty."""
        assert len(name.encode()) <= 48, f"the encoding has no room for {name!r}"
        self.statistics_name = name
        self.statistics = torch.zeros(*self.positions.shape, num_bytes, dtype=torch.uint8) if name else None

    @property
    def num_sink_tokens(self) -> int:
        return self.settings.num_sink_tokens

    @property
    def positions_LHS(self) -> torch.Tensor:
        """Live slots of `positions`."""
        return self.positions[:, :, : self.num_slots]

    @property
    def token_ids_LHS(self) -> torch.Tensor:
        """Live slots of `token_ids`."""
        return self.token_ids[:, :, : self.num_slots]

    @property
    def keys_LHSD(self) -> torch.Tensor:
        """Live slots of `keys`."""
        return self.keys[:, :, : self.num_slots]

    @property
    def values_LHSD(self) -> torch.Tensor:
        """Live slots of `values`."""
        return self.values[:, :, : self.num_slots]

    @property
    def statistics_LHSB(self) -> torch.Tensor | None:
        """Live slots of `statistics`."""
        return None if self.statistics is None else self.statistics[:, :, : self.num_slots]

    @property
    def next_position(self) -> int:
        """Rotary position of the next token."""
        return self.num_slots if self.settings.positions == "compact" else self.num_tokens

    @property
    def num_tokens_to_boundary(self) -> int:
        """Tokens until the next segment boundary, 1 to segment_length."""
        return self.settings.segment_length - self.num_tokens % self.settings.segment_length

    @property
    def state_bytes(self) -> int:
        """Bytes of the canonical state once the budget is full: keys, values, positions, token ids, statistics, M, z.

        2 L H D C itemsize + (8 + B) L H C for a budget of C slots; with a compressive memory 4 L H (D^2 + D) more.
        """
        num_layers, num_heads, _, head_dim = self.keys.shape
        slot_bytes = 2 * head_dim * self.keys.element_size() + 8
        if self.statistics is not None:
            slot_bytes += self.statistics.shape[-1]
        return num_layers * num_heads * self.settings.kv_budget_tokens * slot_bytes + _num_bytes(self.compressed)

    @property
    def resident_bytes(self) -> int:
        """Bytes that this state holds in memory, the derived copy included."""
        return _num_bytes((*self._slabs, self.rotated_keys, *self.compressed))

    @property
    def compressed(self) -> tuple[torch.Tensor, ...]:
        """M and z; nothing if the decoder has no compressive memory."""
        return () if self.memory is None or self.normalizer is None else (self.memory, self.normalizer)

    @property
    def _slabs(self) -> tuple[torch.Tensor, ...]:
        """All slots that are not derived."""
        slabs = (self.keys, self.values, self.positions, self.token_ids)
        return slabs if self.statistics is None else (*slabs, self.statistics)

    def write(self, layer: int, keys_HTD: torch.Tensor, values_HTD: torch.Tensor) -> None:
        """Put the keys and values of new tokens behind the live slots of one layer; `append` makes them live."""
        end = self.num_slots + keys_HTD.shape[1]
        self.keys[layer, :, self.num_slots : end] = keys_HTD
        self.values[layer, :, self.num_slots : end] = values_HTD

    def observe(self, statistics: Statistics, layer: int, query_HGTD: torch.Tensor, key_HTD: torch.Tensor) -> None:
        """Have the policy's statistics take in what one layer attends to in a pass over T new tokens.

        Args:
            statistics: Those in use.
            layer: Of the KV source layer.
            query_HGTD: Rotated queries of the pass.
            key_HTD: Its rotated keys; those of the past are up to date.
        """
        assert self.statistics is not None
        assert statistics.name == self.statistics_name
        past_key_HSD = self.rotated_keys[layer, :, : self.num_slots]
        end = self.num_slots + key_HTD.shape[1]
        statistics.observe(self.statistics[layer, :, :end], query_HGTD, key_HTD, past_key_HSD)

    def finish_observation(self, statistics: Statistics, num_new: int) -> None:
        """Have the policy's statistics take in a pass over so many new tokens, once every layer has written them."""
        assert self.statistics is not None
        new = slice(self.num_slots, self.num_slots + num_new)
        statistics.finish(self.statistics[:, :, new], self.keys[:, :, new], self.values[:, :, new])

    def clear_statistics(self, num_new: int) -> None:
        """Zero the statistics of slots behind the live ones, before their tokens are run."""
        if self.statistics is not None:
            self.statistics[:, :, self.num_slots : self.num_slots + num_new] = 0

    def append(self, token_ids: torch.Tensor) -> None:
        """Count new tokens whose keys and values every layer has written.

        Args:
            token_ids: int32 [num_new_tokens].
        """
        num_new = len(token_ids)
        end = self.num_slots + num_new
        assert self.num_tokens + num_new <= MAX_TOKENS
        assert end <= self.settings.capacity, f"{end} slots in slabs of {self.settings.capacity}"
        new_positions = torch.arange(self.num_tokens, self.num_tokens + num_new, dtype=torch.int32)
        self.positions[:, :, self.num_slots : end] = new_positions
        self.token_ids[:, :, self.num_slots : end] = token_ids
        self.num_slots = end
        self.num_tokens += num_new

    def rotate_pending(self, rotary: Rotary) -> None:
        """Bring `rotated_keys` up to the live slots: after an eviction all of them, else what came since."""
        if self.num_rotated == self.num_slots:
            return
        pending = slice(self.num_rotated, self.num_slots)
        is_compact = self.settings.positions == "compact"
        cos, sin = rotary.rows(torch.arange(pending.start, pending.stop))
        for layer in range(len(self.keys)):
            if not is_compact:
                cos, sin = rotary.rows(self.positions[layer, :, pending])
            keys = self.keys[layer, :, pending].float()
            self.rotated_keys[layer, :, pending] = rotate(keys, cos, sin, out=torch.empty_like(keys))
        self.num_rotated = self.num_slots

    def leaving(self, kept_LHS: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values of the slots that `evict` would drop, [L, H, n, D] each, in ascending order of position."""
        is_leaving = torch.ones(self.positions_LHS.shape, dtype=torch.bool).scatter_(2, kept_LHS, False)
        slots = is_leaving.nonzero()[:, 2].view(*is_leaving.shape[:2], -1, 1)
        slots = slots.expand(*slots.shape[:3], self.keys.shape[3])
        return self.keys_LHSD.gather(2, slots), self.values_LHSD.gather(2, slots)

    def evict(self, kept_LHS: torch.Tensor) -> None:
        """Leave only the slots of these indices, int64 [L, H, num_kept], ascending."""
        compact(self._slabs, kept_LHS)
        self.num_slots = kept_LHS.shape[2]
        self.num_rotated = 0

    def copy(self) -> "MemoryState":
        """An independent state with the same content."""
        other = object.__new__(MemoryState)
        other.__dict__ |= self.__dict__
        for name in ("keys", "values", "rotated_keys", "positions", "token_ids", "statistics"):
            slab = getattr(self, name)
            if slab is None:
                continue
            copied = torch.empty_like(slab)
            num_live = self.num_rotated if name == "rotated_keys" else self.num_slots
            copied[:, :, :num_live] = slab[:, :, :num_live]
            setattr(other, name, copied)
        if self.memory is not None and self.normalizer is not None:
            other.memory, other.normalizer = self.memory.clone(), self.normalizer.clone()
        return other


def _num_bytes(tensors: Iterable[torch.Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)
