"""Attention spectrogram of each slot: how the attention that it receives changes over a segment's queries.

After "An Evolved Universal Transformer Memory" (Cetin et al. 2024, arXiv:2410.13166): the attention weights that a slot
receives from consecutive queries, averaged over the query heads that share its KV head, are a time series x. It is cut
into frames of 32 queries every 16, and the frames' magnitudes are summed with weights that fall with a frame's age:

    E[f] = sum_j (1 - a) a^(J - 1 - j) |sum_t hann[t] x[16 j + t] exp(-2 pi i f t / 32)|,   a = 0.99^16, f = 0..16

The attention matrix is never stored: a tile of rows at a time is computed and transformed, and a 32-point transform of
real numbers is a product with a 32 x 32 matrix, the window folded in. On a GPU the rows' log-sum-exps come first, then
each block of slots has all queries pass by, 16 at a time.

Shape suffixes: H KV head, G query head of a KV head's group, R observed query (the last R of T tokens), T token of the
segment, S slot of the past, N slot of past and segment (S + T), D head dim, F frequency bin, W query of the tail.
"""

import math
from functools import cache

import torch
import triton
import triton.language as tl

from eunoe_kernels._attention_rows import (
    INTERPRETED,
    TILE_ROWS,
    attention_reference,
    attention_tiles,
    check_observation,
    contiguous_rows,
    group_weights,
    load_keys,
    log_sum_exp_triton,
)

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
        ValueError: If shapes do not agree, or R is no multiple of 16 or makes no frame.
    """
    check_observation(query_HGRD, key_HTD, past_key_HSD)
    num_heads, _, num_rows, _ = query_HGRD.shape
    num_needed = WINDOW if tail_HSW is None else HOP
    if num_rows % HOP or num_rows < num_needed:
        raise ValueError(f"{num_rows} queries are no multiple of {HOP} that makes a frame: at least {num_needed}")
    expected = (num_heads, past_key_HSD.shape[1], HOP)
    if tail_HSW is not None and tail_HSW.shape != expected:
        raise ValueError(f"tail {tuple(tail_HSW.shape)} must be {expected}")
    observe = _attention_spectrogram_triton if query_HGRD.is_cuda else _attention_spectrogram_cpu
    return observe(query_HGRD, key_HTD, past_key_HSD, tail_HSW)


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


def _attention_spectrogram_triton(
    query_HGRD: torch.Tensor,
    key_HTD: torch.Tensor,
    past_key_HSD: torch.Tensor,
    tail_HSW: torch.Tensor | None,
    *,
    block_keys: int = 32,
) -> tuple[torch.Tensor, torch.Tensor]:
    num_heads, group_size, num_rows, head_dim = query_HGRD.shape
    num_slots, num_tokens = past_key_HSD.shape[1], key_HTD.shape[1]
    device, num_columns = query_HGRD.device, num_slots + num_tokens
    query_HGRD = query_HGRD.contiguous()
    key_HTD, past_key_HSD = contiguous_rows(key_HTD), contiguous_rows(past_key_HSD)
    log_sum = log_sum_exp_triton(query_HGRD, key_HTD, past_key_HSD)
    spectrogram = torch.empty(num_heads, num_columns, NUM_BINS, dtype=torch.float32, device=device)
    tail = torch.empty(num_heads, num_columns, HOP, dtype=torch.float32, device=device)
    has_tail = tail_HSW is not None
    given_tail = tail_HSW.float().contiguous() if tail_HSW is not None else tail
    for keys, first_column, is_past in ((past_key_HSD, 0, True), (key_HTD, num_slots, False)):
        if keys.shape[1]:
            attention_spectrogram_kernel[(triton.cdiv(keys.shape[1], block_keys), num_heads)](
                query_HGRD, log_sum, keys, given_tail, _padded_transform(device), spectrogram, tail,
                keys.stride(0), keys.shape[1], first_column, num_columns, num_rows, num_tokens - num_rows,
                head_dim**-0.5 * math.log2(math.e), FRAME_DECAY,
                group_size=group_size, head_dim=head_dim, padded_dim=max(16, triton.next_power_of_2(head_dim)),
                hop=HOP, num_bins=NUM_BINS, padded_bins=WINDOW, block_keys=block_keys, is_causal=not is_past,
                has_tail=has_tail, loads_tail=has_tail and is_past, widens=INTERPRETED,
            )  # fmt: skip
    return spectrogram, tail


@cache
def _padded_transform(device: torch.device) -> torch.Tensor:
    """Real parts, then imaginary ones, each over the older and the newer 16 queries: float32 [2, 2, 32, 16]."""
    with torch.inference_mode(False):
        padded = torch.zeros(2, WINDOW, WINDOW)
        padded[0, :NUM_BINS] = _transform()[:NUM_BINS]
        padded[1, 1 : NUM_BINS - 1] = _transform()[NUM_BINS:]
        return padded.view(2, WINDOW, 2, HOP).transpose(1, 2).contiguous().to(device)


@triton.jit
def attention_spectrogram_kernel(
    query_pointer, log_sum_pointer, key_pointer, given_tail_pointer, transform_pointer, out_pointer, tail_pointer,
    key_head_stride, num_keys, first_column, num_columns, num_rows, first_token, scale_log2, decay,
    group_size: tl.constexpr, head_dim: tl.constexpr, padded_dim: tl.constexpr,
    hop: tl.constexpr, num_bins: tl.constexpr, padded_bins: tl.constexpr, block_keys: tl.constexpr,
    is_causal: tl.constexpr, has_tail: tl.constexpr, loads_tail: tl.constexpr, widens: tl.constexpr,
):  # fmt: skip
    """One program a KV head and block of slots: queries pass by, 16 at a time, a frame at each step."""
    head = tl.program_id(1).to(tl.int64)
    slot = tl.program_id(0) * block_keys + tl.arange(0, block_keys)
    dim = tl.arange(0, padded_dim)
    query = tl.arange(0, hop)
    frequency = tl.arange(0, padded_bins)
    is_slot = slot < num_keys
    dtype: tl.constexpr = query_pointer.dtype.element_ty
    key = load_keys(key_pointer + head * key_head_stride, slot, num_keys, dim, head_dim, dtype, widens)
    part = transform_pointer + frequency[:, None] * hop + query[None, :]
    real_old, real_new = tl.load(part), tl.load(part + padded_bins * hop)
    imaginary_old, imaginary_new = tl.load(part + 2 * padded_bins * hop), tl.load(part + 3 * padded_bins * hop)
    old = tl.zeros([hop, block_keys], tl.float32)
    if loads_tail:
        given = (head * num_keys + slot[None, :]) * hop + query[:, None]
        old = tl.load(given_tail_pointer + given, mask=is_slot[None, :], other=0.0)
    total = tl.zeros([padded_bins, block_keys], tl.float32)
    for first_row in range(0, num_rows, hop):
        new = group_weights(
            query_pointer, log_sum_pointer, key, head, first_row, num_rows, first_token, slot, num_keys, scale_log2,
            dim, group_size, head_dim, hop, block_keys, is_causal, widens,
        )  # fmt: skip
        real = tl.dot(real_old, old, input_precision="ieee") + tl.dot(real_new, new, input_precision="ieee")
        imaginary = tl.dot(imaginary_old, old, input_precision="ieee")
        imaginary += tl.dot(imaginary_new, new, input_precision="ieee")
        magnitude = tl.sqrt(real * real + imaginary * imaginary)
        if not has_tail:
            # The first 16 queries only begin the first frame.
            magnitude = tl.where(first_row > 0, magnitude, 0.0)
        total = total * decay + magnitude * (1 - decay)
        old = new
    column = head * num_columns + first_column + slot
    is_out = is_slot[None, :] & (frequency < num_bins)[:, None]
    tl.store(out_pointer + column[None, :] * num_bins + frequency[:, None], total, mask=is_out)
    tl.store(tail_pointer + column[None, :] * hop + query[:, None], old, mask=is_slot[None, :])
