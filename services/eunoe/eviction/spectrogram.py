"""The statistics of NAMM: an exponential mean of each slot's attention spectrogram, packed.

    E' = a^J E + sum_j (1 - a) a^(J - 1 - j) |STFT_j|,   J frames in a pass, a = 0.99^16

A slot takes 52 bytes: 17 bins in float16, and the attention that it received from the last 16 queries (the half frame
that the next pass goes on with) in 8 bits each, with a float16 scale. Observed with fewer queries, there is no tail.

Shape suffixes: H KV head, G query head of a KV head's group, T token of a pass, S slot of the past, N slot of past and
pass, D head dim, F frequency bin, W query of the tail, B byte.
"""

from dataclasses import dataclass

import torch

from eunoe_kernels.attention_spectrogram import FRAME_DECAY, HOP, NUM_BINS, attention_spectrogram

# A slot that receives a weight of 1e-6 has bins of 1e-7, which float16 does not have; none is above 16.
_UNIT = 1 / 1024
_MAX_CODE = 255


@dataclass(frozen=True, slots=True)
class AttentionSpectrogram:
    """The exponential mean of a slot's spectrogram. What a pass has beyond a multiple of 16 queries is not seen."""

    num_observed_queries: int | None = None
    """Only so many of a pass's last queries are observed; the others' weight in the mean is taken as zero. None: all.
    Of 512 queries the last 128 have 72% of the weight, the last 256 have 92%."""
    is_packed: bool = True
    """False: 132 bytes of float32, as exact as the published method."""

    def __post_init__(self) -> None:
        if self.num_observed_queries is not None and (self.num_observed_queries % HOP or self.num_observed_queries < 1):
            raise ValueError(f"num_observed_queries={self.num_observed_queries} is no positive multiple of {HOP}")

    @property
    def name(self) -> str:
        """See `Statistics`."""
        queries = "all" if self.num_observed_queries is None else self.num_observed_queries
        return f"spectrogram/1/{queries}/{'packed' if self.is_packed else 'float32'}"

    @property
    def has_tail(self) -> bool:
        """Whether frames go on from pass to pass."""
        return self.num_observed_queries is None

    @property
    def num_bytes(self) -> int:
        """See `Statistics`."""
        if not self.is_packed:
            return 4 * (NUM_BINS + HOP * self.has_tail)
        return 2 * NUM_BINS + (2 + HOP) * self.has_tail

    def observe(
        self,
        statistics_HNB: torch.Tensor,
        query_HGTD: torch.Tensor,
        key_HTD: torch.Tensor,
        past_key_HSD: torch.Tensor,
    ) -> None:
        """See `Statistics`."""
        num_frames, num_slots = key_HTD.shape[1] // HOP, past_key_HSD.shape[1]
        if not num_frames:
            return
        mean_HNF, tail_HNW = self.unpack(statistics_HNB)
        num_rows = num_frames * HOP
        tail_HSW = None if tail_HNW is None else tail_HNW[:, :num_slots]
        if self.num_observed_queries is not None:
            # Sixteen queries more, as the first half of the first frame; a pass too short for that begins with zeros.
            num_rows = min(num_rows, self.num_observed_queries + HOP)
            if num_rows < self.num_observed_queries + HOP:
                tail_HSW = mean_HNF.new_zeros(len(mean_HNF), num_slots, HOP)
        query_HGRD = query_HGTD[:, :, key_HTD.shape[1] - num_rows :]
        seen_HNF, tail_HNW = attention_spectrogram(query_HGRD, key_HTD, past_key_HSD, tail_HSW)
        mean_HNF = mean_HNF * FRAME_DECAY**num_frames + seen_HNF
        self.pack(mean_HNF, tail_HNW if self.has_tail else None, out_HNB=statistics_HNB)

    def finish(self, statistics_LHTB: torch.Tensor, key_LHTD: torch.Tensor, value_LHTD: torch.Tensor) -> None:
        """See `Statistics`: nothing to add."""

    def unpack(self, statistics_B: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Mean [..., F] and tail [..., W] (None if there is none) of packed slots [..., B], float32."""
        if not self.is_packed:
            mean, tail = statistics_B[..., : 4 * NUM_BINS], statistics_B[..., 4 * NUM_BINS :]
            return mean.view(torch.float32), tail.view(torch.float32) if self.has_tail else None
        mean_F = statistics_B[..., : 2 * NUM_BINS].view(torch.float16).float().mul_(_UNIT)
        if not self.has_tail:
            return mean_F, None
        largest = statistics_B[..., 2 * NUM_BINS : 2 * NUM_BINS + 2].view(torch.float16).float()
        return mean_F, statistics_B[..., 2 * NUM_BINS + 2 :].float().mul_(largest / _MAX_CODE)

    def pack(self, mean_F: torch.Tensor, tail_W: torch.Tensor | None, out_HNB: torch.Tensor) -> None:
        """Inverse of `unpack`, up to rounding."""
        if not self.is_packed:
            out_HNB[..., : 4 * NUM_BINS].view(torch.float32).copy_(mean_F)
            if tail_W is not None:
                out_HNB[..., 4 * NUM_BINS :].view(torch.float32).copy_(tail_W)
            return
        out_HNB[..., : 2 * NUM_BINS].view(torch.float16).copy_(mean_F / _UNIT)
        if tail_W is not None:
            largest = tail_W.amax(dim=-1, keepdim=True).half()
            code = (tail_W * _MAX_CODE / largest.float().clamp_min(1e-7)).round_().clamp_(max=_MAX_CODE)
            out_HNB[..., 2 * NUM_BINS : 2 * NUM_BINS + 2].view(torch.float16).copy_(largest)
            out_HNB[..., 2 * NUM_BINS + 2 :] = code.to(torch.uint8)
