"""Attention spectrogram of each slot: how the attention that it receives changes over a segment's queries.

After "An Evolved Universal Transformer Memory" (Cetin et al. 2024, arXiv:2410.13166): the attention weights that a slot
receives from consecutive queries, averaged over the query heads that share its KV head, are a time series x. It is cut
into frames of 32 queries every 16, and the frames' magnitudes are summed with weights that fall with a frame's age:

    E[f] = sum_j (1 - a) a^(J - 1 - j) |sum_t hann[t] x[16 j + t] exp(-2 pi i f t / 32)|,   a = 0.99^16, f = 0..16

The attention matrix is never stored: a tile of rows at a time is computed and transformed, and a 32-point transform of
real numbers is a product with a 32 x 32 matrix, the window folded in.

Shape suffixes: H KV head, G query head of a KV head's group, R observed query (the last R of T tokens), T token of the
segment, S slot of the past, N slot of past and segment (S + T), D head dim, F frequency bin, W query of the tail.
"""

import math
from functools import cache

import torch

from eunoe_kernels._attention_rows import TILE_ROWS, attention_reference, attention_tiles, check_observation

WINDOW = 32
HOP = 16
NUM_BINS = WINDOW // 2 + 1
FRAME_DECAY = 0.99**HOP


def attention_spectrogram(
    query_HGRD: torch.Tensor,
    key_HTD: torch.Tensor,
    past_key_HSD: torch.Tensor,
    tail_HSW: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The spectrogram of a segment's last queries, and the tail that the next segment's first frame begins with.

    Args:
        query_HGRD: Rotated queries of the segment's last R tokens, R a multiple of 16, any float dtype.
        key_HTD: Rotated keys of the segment; `past_key_HSD` those of the past.
        tail_HSW: Attention that the past's slots received from the 16 queries before the first, oldest first; 16
            zeros for a new stream. None: the first 16 of the R queries are the tail and make no frame of their own.

    Returns:
        E, float32 [H, N, F], and the attention received from the last 16 queries, float32 [H, N, W].

    Raises:
        ValueError: If shapes do not agree, or R is no multiple of 16, or 0.
    """
    check_observation(query_HGRD, key_HTD, past_key_HSD)
    num_heads, _, num_rows, _ = query_HGRD.shape
    if num_rows % HOP or not num_rows:
        raise ValueError(f"{num_rows} queries are no positive multiple of {HOP}")
    expected = (num_heads, past_key_HSD.shape[1], HOP)
    if tail_HSW is not None and tail_HSW.shape != expected:
        raise ValueError(f"tail {tuple(tail_HSW.shape)} must be {expected}")
    return _attention_spectrogram_cpu(query_HGRD, key_HTD, past_key_HSD, tail_HSW)


def attention_spectrogram_reference(
    query_HGRD: torch.Tensor,
    key_HTD: torch.Tensor,
    past_key_HSD: torch.Tensor,
    tail_HSW: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """As `attention_spectrogram`: the whole attention matrix, then a Fourier transform of each frame."""
    series_HNR = attention_reference(query_HGRD, key_HTD, past_key_HSD).transpose(1, 2)
    if tail_HSW is not None:
        head = series_HNR.new_zeros(*series_HNR.shape[:2], HOP)
        head[:, : tail_HSW.shape[1]] = tail_HSW
        series_HNR = torch.cat([head, series_HNR], dim=2)
    window = torch.hann_window(WINDOW, periodic=True, device=series_HNR.device)
    magnitude_HNJF = torch.fft.rfft(series_HNR.unfold(2, WINDOW, HOP) * window).abs()
    num_frames = magnitude_HNJF.shape[2]
    age = torch.arange(num_frames - 1, -1, -1, device=series_HNR.device)
    weight_J = (1 - FRAME_DECAY) * FRAME_DECAY**age
    return torch.einsum("hnjf,j->hnf", magnitude_HNJF, weight_J), series_HNR[..., -HOP:]


def _attention_spectrogram_cpu(
    query_HGRD: torch.Tensor,
    key_HTD: torch.Tensor,
    past_key_HSD: torch.Tensor,
    tail_HSW: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    num_heads, num_slots = past_key_HSD.shape[:2]
    num_columns = num_slots + key_HTD.shape[1]
    # A tile of rows behind the 16 before it. Time comes first, so that a frame is a matrix with a column a slot.
    rows_RHN = torch.empty(HOP + TILE_ROWS, num_heads, num_columns)
    has_tail = tail_HSW is not None
    if tail_HSW is not None:
        rows_RHN[:HOP, :, :num_slots] = tail_HSW.permute(2, 0, 1)
        rows_RHN[:HOP, :, num_slots:] = 0
    transform = _transform()
    total = torch.zeros(NUM_BINS * num_heads * num_columns)
    for tile in attention_tiles(query_HGRD, key_HTD, past_key_HSD, rows_RHN[HOP:]):
        first_frame = 0 if has_tail else 1
        num_frames = tile // HOP - first_frame
        if num_frames:
            frames = rows_RHN.view(len(rows_RHN), -1)[first_frame * HOP : HOP + tile].unfold(0, WINDOW, HOP)
            spectrum = torch.bmm(transform.expand(num_frames, -1, -1), frames.transpose(1, 2)).square_()
            # Rows of the transform: 17 real parts, then the imaginary parts of bins 1 to 15; those of 0 and 16 are 0.
            spectrum[:, 1 : NUM_BINS - 1] += spectrum[:, NUM_BINS:]
            magnitude = spectrum[:, :NUM_BINS].sqrt_().flatten(1)
            weight_J = torch.tensor([(1 - FRAME_DECAY) * FRAME_DECAY**age for age in reversed(range(num_frames))])
            total.mul_(FRAME_DECAY**num_frames).addmv_(magnitude.T, weight_J)
        rows_RHN[:HOP] = rows_RHN[tile : tile + HOP].clone()
        has_tail = True
    spectrogram = total.view(NUM_BINS, num_heads, num_columns).permute(1, 2, 0)
    return spectrogram, rows_RHN[:HOP].permute(1, 2, 0)


@cache
def _transform() -> torch.Tensor:
    """The windowed transform of 32 real numbers: 17 real rows and 15 imaginary ones, float32 [32, 32]."""
    with torch.inference_mode(False):
        time = torch.arange(WINDOW, dtype=torch.float64)
        window = 0.5 - 0.5 * torch.cos(2 * math.pi * time / WINDOW)
        angle = 2 * math.pi * torch.arange(NUM_BINS, dtype=torch.float64)[:, None] * time / WINDOW
        return torch.cat([angle.cos() * window, (angle.sin() * window)[1:-1]]).float()
