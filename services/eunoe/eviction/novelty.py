"""How unlike its surroundings a token is, read off its keys and values: what a slot knows of its token from birth on.

Tokens of another sort than the text around them (a number in a psalm, a name in a program) have shorter keys and
values, which point away from the mean, in most layers and heads at once. Of a part x (keys or values) of a token t of a
pass, as means over the heads and layers of each sixth of the layers,

    short_t = mean_t' log |x_t'| - log |x_t|,   odd_t = 1 - cos(x_t, mean_t' x_t')

each averaged over 5, 17 and 41 tokens around t: 72 numbers, and a learned weight for each. Their weighted sum, the
token's novelty, is the same in all heads, and takes 2 bytes a slot. The published NAMM has nothing of the kind: the
attention that a token receives does not tell whether a question will need it.

Shape suffixes: L KV source layer, H KV head, T token of a pass, D head dim, N number, G group of layers, B byte.
"""

import hashlib
from dataclasses import dataclass, field
from functools import cached_property

import torch
import torch.nn.functional as F  # noqa: N812

from eunoe.eviction.spectrogram import AttentionSpectrogram

_NUM_GROUPS = 6
_REACHES = (2, 8, 20)
NUM_NUMBERS = 2 * 2 * _NUM_GROUPS * len(_REACHES)
_NUM_BYTES = 2
_LEAST_SCALE = 1e-7


@dataclass(frozen=True, eq=False)
class Novelty:
    """The learned sum: (numbers - mean) / scale times weight, float32 [N] each."""

    weight: torch.Tensor
    mean: torch.Tensor
    scale: torch.Tensor

    def __post_init__(self) -> None:
        for part in (self.weight, self.mean, self.scale):
            if part.shape != (NUM_NUMBERS,) or part.dtype != torch.float32:
                raise ValueError(f"weights of novelty {tuple(part.shape)} are not float32 ({NUM_NUMBERS},)")
            if not part.isfinite().all():
                raise ValueError("weights of novelty have values that are no numbers")
        # Numbers are below 100, so that nothing overflows.
        if not (self.scale >= _LEAST_SCALE).all():
            raise ValueError(f"a scale of novelty is below {_LEAST_SCALE}")

    @cached_property
    def digest(self) -> str:
        """Twelve hex digits that no other weights have."""
        content = b"".join(part.numpy().tobytes() for part in (self.weight, self.mean, self.scale))
        return hashlib.sha256(content).hexdigest()[:12]

    def __call__(self, key_LHTD: torch.Tensor, value_LHTD: torch.Tensor) -> torch.Tensor:
        """Novelty of each token of a pass, float32 [T].

        Args:
            key_LHTD: Before rotary positions; `value_LHTD` likewise.
        """
        return ((numbers(key_LHTD, value_LHTD) - self.mean) / self.scale) @ self.weight


@dataclass(frozen=True, eq=False)
class NovelSpectrogram:
    """`Statistics`: the attention spectrogram of a slot, which is packed, and the novelty of its token, in float16."""

    novelty: Novelty
    spectrogram: AttentionSpectrogram = field(default_factory=AttentionSpectrogram)

    def __post_init__(self) -> None:
        # With 2 bytes behind it the next slot's float32 would not begin at a multiple of 4.
        if not self.spectrogram.is_packed:
            raise ValueError("there is no novelty beside a spectrogram with is_packed=False")

    @property
    def name(self) -> str:
        """See `Statistics`."""
        return f"{self.spectrogram.name}+novelty/{self.novelty.digest}"

    @property
    def num_bytes(self) -> int:
        """See `Statistics`."""
        return self.spectrogram.num_bytes + _NUM_BYTES

    def observe(
        self,
        statistics_HNB: torch.Tensor,
        query_HGTD: torch.Tensor,
        key_HTD: torch.Tensor,
        past_key_HSD: torch.Tensor,
    ) -> None:
        """See `Statistics`."""
        self.spectrogram.observe(statistics_HNB[..., :-_NUM_BYTES], query_HGTD, key_HTD, past_key_HSD)

    def finish(self, statistics_LHTB: torch.Tensor, key_LHTD: torch.Tensor, value_LHTD: torch.Tensor) -> None:
        """See `Statistics`."""
        packed_TB = self.novelty(key_LHTD, value_LHTD).clamp(-1000, 1000).half()[:, None].view(torch.uint8)
        statistics_LHTB[..., -_NUM_BYTES:] = packed_TB

    def unpack(self, statistics_B: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Spectrogram [..., F] and novelty [..., 1] of packed slots [..., B], float32."""
        spectrogram_F, _ = self.spectrogram.unpack(statistics_B[..., :-_NUM_BYTES])
        return spectrogram_F, statistics_B[..., -_NUM_BYTES:].contiguous().view(torch.float16).float()


def numbers(key_LHTD: torch.Tensor, value_LHTD: torch.Tensor) -> torch.Tensor:
    """What novelty is made of, float32 [T, N]: by part, group of layers, shortness before oddness, reach."""
    per_token = [
        # A model of fewer layers than groups has groups without any.
        torch.stack(
            [group.sum(dim=(0, 1)) / max(group[..., 0].numel(), 1) for group in measure.tensor_split(_NUM_GROUPS)]
        )
        for part in (key_LHTD, value_LHTD)
        for measure in _short_and_odd(part.float())
    ]
    # [part, measure, G, T] -> [part, G, measure, T]
    num_tokens = key_LHTD.shape[2]
    measures = torch.stack(per_token).view(2, 2, _NUM_GROUPS, num_tokens).transpose(1, 2)
    pooled = torch.stack([_mean_around(measures, reach) for reach in _REACHES], dim=3)
    return pooled.reshape(NUM_NUMBERS, num_tokens).T


def _short_and_odd(part_LHTD: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """By how much each vector is shorter than the pass's, and how far it points from their mean, [L, H, T] each."""
    log_norm_LHT = torch.linalg.vector_norm(part_LHTD, dim=-1).clamp_min(1e-6).log()
    mean_LHD = part_LHTD.mean(dim=2, keepdim=True)
    return log_norm_LHT.mean(dim=-1, keepdim=True) - log_norm_LHT, 1 - F.cosine_similarity(part_LHTD, mean_LHD, dim=-1)


def _mean_around(values_T: torch.Tensor, reach: int) -> torch.Tensor:
    """Means over each token and up to `reach` neighbours on both sides, along the last axis."""
    total = F.pad(values_T.double().cumsum(dim=-1), (1, 0))
    num_tokens = values_T.shape[-1]
    place = torch.arange(num_tokens)
    first, end = (place - reach).clamp(min=0), (place + reach + 1).clamp(max=num_tokens)
    return ((total[..., end] - total[..., first]) / (end - first)).float()
