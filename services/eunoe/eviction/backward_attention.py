"""NAMM's scoring network: one backward attention memory (BAM) layer over a head's slots, and a linear one.

After "An Evolved Universal Transformer Memory" (Cetin et al. 2024, arXiv:2410.13166), for the features x[n, 25] of a
head's slots from the oldest to the newest:

    [q | k | v] = x Wqkv + bqkv,   o_i = sum_{j >= i} softmax_j(q_i k_j / sqrt(32)) v_j
    [r | m] = o Wo + bo,   s = (x (1 + m) + r) w + b

A slot sees itself and newer ones only, so that what is old is judged by what came after it, and never the reverse.

Shape suffixes: Z sequence (a layer's KV head), S slot, I input feature, C hidden.
"""

import math
from dataclasses import dataclass
from functools import cache
from itertools import accumulate, pairwise
from typing import Literal

import torch
import torch.nn.functional as F  # noqa: N812

NUM_FEATURES = 25
"""Of the published network; more may follow them."""
HIDDEN = 32


@cache
def shapes(num_features: int) -> dict[str, tuple[int, ...]]:
    """The parts of the parameter vector, in order."""
    return {
        "input_weight": (num_features, 3 * HIDDEN),
        "input_bias": (3 * HIDDEN,),
        "output_weight": (HIDDEN, 2 * num_features),
        "output_bias": (2 * num_features,),
        "score_weight": (num_features,),
        "score_bias": (),
    }


def num_parameters(num_features: int) -> int:
    """Length of the parameter vector."""
    return sum(math.prod(shape) for shape in shapes(num_features).values())


@cache
def slices(num_features: int) -> dict[str, slice]:
    """Where each part is in the parameter vector."""
    parts = shapes(num_features)
    ends = (0, *accumulate(math.prod(shape) for shape in parts.values()))
    return {name: slice(*pair) for name, pair in zip(parts, pairwise(ends), strict=True)}


NUM_PARAMETERS = num_parameters(NUM_FEATURES)
SLICES = slices(NUM_FEATURES)

Attention = Literal["dense", "blocks"]
_BLOCK_SLOTS = 128
_SEQUENCES_AT_ONCE = 6


@dataclass(frozen=True, eq=False, slots=True)
class BackwardAttention:
    """The network. `parameters` is one float32 vector: row-major [in, out] weights, each before its bias.

    4172 of them for the published 25 features, 163 more for each further one.
    """

    parameters: torch.Tensor
    attention: Attention = "dense"
    """`dense`: each slot sees every newer one. `blocks`: those of its own block of 128, and of each newer block the
    mean key and value: a twelfth of the work at 1,536 slots."""

    def __post_init__(self) -> None:
        size = self.parameters.numel()
        if self.parameters.ndim != 1 or size != num_parameters(self.num_features) or self.num_features < NUM_FEATURES:
            raise ValueError(f"parameters {tuple(self.parameters.shape)} are not {NUM_PARAMETERS} + 163 n")
        if self.parameters.dtype != torch.float32:
            raise ValueError(f"parameters are {self.parameters.dtype}, not float32")
        if self.attention not in ("dense", "blocks"):
            raise ValueError(f"attention={self.attention!r} is neither dense nor blocks")

    @property
    def num_features(self) -> int:
        """Features of a slot that the parameters are for."""
        num_fixed = num_parameters(0)
        return (self.parameters.numel() - num_fixed) // (num_parameters(1) - num_fixed)

    def __call__(self, feature_ZSI: torch.Tensor, num_slots_Z: torch.Tensor | None = None) -> torch.Tensor:
        """Scores, float32 [Z, S].

        Args:
            feature_ZSI: Slots from the oldest to the newest, float32.
            num_slots_Z: Where sequences have different lengths: how many of their first rows count, int64. Scores of
                the others mean nothing.
        """
        num_rows = feature_ZSI.shape[1]
        # Newest first: seeing newer ones is then plain causal attention, and rows that do not count are at the end.
        newest = num_rows - 1 if num_slots_Z is None else num_slots_Z[:, None] - 1
        order_ZS = (newest - torch.arange(num_rows, device=feature_ZSI.device)) % num_rows
        order_ZS = order_ZS.expand(len(feature_ZSI), num_rows)
        x_ZSI = feature_ZSI.gather(1, order_ZS[..., None].expand_as(feature_ZSI))
        # Few sequences at a time: what a layer of the network makes of them stays in the cache.
        parts = [self._score(part_ZSI) for part_ZSI in x_ZSI.split(_SEQUENCES_AT_ONCE)]
        return torch.empty_like(feature_ZSI[..., 0]).scatter_(1, order_ZS, torch.cat(parts))

    def _score(self, x_ZSI: torch.Tensor) -> torch.Tensor:
        """Scores of slots from the newest to the oldest."""
        if self._is_linear:
            seen_ZSC = x_ZSI.new_zeros(*x_ZSI.shape[:2], HIDDEN)
        else:
            query, key, value = self._linear("input", x_ZSI).split(HIDDEN, dim=-1)
            if self.attention == "dense":
                seen_ZSC = F.scaled_dot_product_attention(query[:, None], key[:, None], value[:, None], is_causal=True)
                seen_ZSC = seen_ZSC[:, 0]
            else:
                seen_ZSC = _attend_blocks(query, key, value)
        residual, multiplier = self._linear("output", seen_ZSC).chunk(2, dim=-1)
        return (x_ZSI * (1 + multiplier)).add_(residual) @ self._matrix("score_weight") + self._matrix("score_bias")

    @property
    def _is_linear(self) -> bool:
        """Whether nothing of what a slot sees of others is used: attending is nine tenths of the network's work."""
        return not self._matrix("output_weight").any()

    def _linear(self, name: str, x: torch.Tensor) -> torch.Tensor:
        return F.linear(x, self._matrix(f"{name}_weight").T, self._matrix(f"{name}_bias"))

    def _matrix(self, name: str) -> torch.Tensor:
        num_features = self.num_features
        return self.parameters[slices(num_features)[name]].view(shapes(num_features)[name])


def _attend_blocks(query_ZSC: torch.Tensor, key_ZSC: torch.Tensor, value_ZSC: torch.Tensor) -> torch.Tensor:
    """Causal attention in one's own block, and to the mean of each whole block before, weighed as its 128 slots."""
    num_sequences, num_rows, hidden = query_ZSC.shape
    num_blocks = -(-num_rows // _BLOCK_SLOTS)
    blocks = (num_sequences, num_blocks, _BLOCK_SLOTS, hidden)
    padding = (0, 0, 0, num_blocks * _BLOCK_SLOTS - num_rows)
    query, key, value = (F.pad(part, padding).view(blocks) for part in (query_ZSC * hidden**-0.5, key_ZSC, value_ZSC))
    later = torch.full((_BLOCK_SLOTS, _BLOCK_SLOTS), -math.inf, device=query.device).triu(1)
    own = query @ key.mT + later
    landmarks = query.flatten(1, 2) @ key.mean(dim=2).mT + math.log(_BLOCK_SLOTS)
    is_own_or_later = torch.ones(num_blocks, num_blocks, dtype=torch.bool, device=query.device).triu()
    landmarks = landmarks.view(*blocks[:3], num_blocks).masked_fill(is_own_or_later[:, None], -math.inf)
    weight = torch.cat([own, landmarks], dim=-1).softmax(dim=-1)
    means = value.mean(dim=2)
    seen = weight[..., :_BLOCK_SLOTS] @ value + (weight[..., _BLOCK_SLOTS:] @ means[:, None])
    return seen.flatten(1, 2)[:, :num_rows]
