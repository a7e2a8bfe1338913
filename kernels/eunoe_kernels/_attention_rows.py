"""Attention weights of a segment's last queries, for kernels that watch where attention goes: never more than a tile.

Shape suffixes: H KV head, G query head of a KV head's group, R observed query (the last R of T tokens), T token of the
segment, S slot of the past, N slot of past and segment (S + T), D head dim.
"""

import math
import os
from collections.abc import Iterator
from functools import cache

import torch
import triton
import triton.language as tl

# The interpreter multiplies bfloat16 bits as integers, so there they are widened as soon as they are loaded.
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
# Rows of 9 query heads over 1,536 slots take 3.5 MB in float32: small enough for a second-level cache and a half.
TILE_ROWS = 64


def check_observation(query_HGRD: torch.Tensor, key_HTD: torch.Tensor, past_key_HSD: torch.Tensor) -> None:
    """Refuse queries and keys that do not belong together.

    Raises:
        ValueError: If heads or head dims differ, or there are more queries than tokens.
    """
    num_heads, _, num_rows, head_dim = query_HGRD.shape
    for name, keys in (("keys", key_HTD), ("past keys", past_key_HSD)):
        if (keys.shape[0], keys.shape[2]) != (num_heads, head_dim):
            raise ValueError(f"{name} {tuple(keys.shape)} do not fit queries {tuple(query_HGRD.shape)}")
    if num_rows > key_HTD.shape[1]:
        raise ValueError(f"{num_rows} queries of a segment of {key_HTD.shape[1]} tokens")


def attention_reference(query_HGRD: torch.Tensor, key_HTD: torch.Tensor, past_key_HSD: torch.Tensor) -> torch.Tensor:
    """Mean attention weight over each group's query heads, whole, in float32: [H, R, N]."""
    num_rows, num_tokens = query_HGRD.shape[2], key_HTD.shape[1]
    key_HND = torch.cat([past_key_HSD.float(), key_HTD.float()], dim=1)
    score = torch.einsum("hgrd,hnd->hgrn", query_HGRD.float(), key_HND) / math.sqrt(query_HGRD.shape[-1])
    is_visible = torch.ones(num_rows, key_HND.shape[1], dtype=torch.bool, device=score.device)
    is_visible = is_visible.tril(past_key_HSD.shape[1] + num_tokens - num_rows)
    return score.masked_fill(~is_visible, -math.inf).softmax(dim=-1).mean(dim=1)


def attention_tiles(
    query_HGRD: torch.Tensor, key_HTD: torch.Tensor, past_key_HSD: torch.Tensor, out_RHN: torch.Tensor
) -> Iterator[int]:
    """`attention_reference` a tile of rows at a time: after each yield `out_RHN` holds the number of rows yielded.

    Args:
        query_HGRD: Rotated queries, any float dtype.
        key_HTD: Rotated keys of the segment; `past_key_HSD` those of the past.
        out_RHN: Room for `TILE_ROWS` rows, float32, contiguous over its last two axes.
    """
    num_heads, group_size, num_rows, head_dim = query_HGRD.shape
    num_slots = past_key_HSD.shape[1]
    first_token = key_HTD.shape[1] - num_rows
    key_HND = torch.cat([past_key_HSD.float(), key_HTD.float()], dim=1)
    scale = head_dim**-0.5
    later = _later()
    for first in range(0, num_rows, TILE_ROWS):
        tile = min(TILE_ROWS, num_rows - first)
        # No row of the tile sees a slot behind its last token.
        end = num_slots + first_token + first + tile
        query = query_HGRD[:, :, first : first + tile].float() * scale
        score = torch.bmm(query.reshape(num_heads, group_size * tile, head_dim), key_HND[:, :end].mT)
        score = score.view(num_heads, group_size, tile, end)
        score[..., end - tile :] += later[:tile, :tile]
        weight = torch.softmax(score, dim=-1, out=score)
        # Straight into place: a mean would pass over the tile three times.
        visible = out_RHN[:tile, :, :end]
        torch.sum(weight, dim=1, out=visible.transpose(0, 1))
        visible /= group_size
        out_RHN[:tile, :, end:] = 0
        yield tile


@cache
def _later() -> torch.Tensor:
    """What takes the later tokens of a tile out of a row."""
    with torch.inference_mode(False):
        return torch.full((TILE_ROWS, TILE_ROWS), -math.inf).triu(1)


def log_sum_exp_triton(
    query_HGRD: torch.Tensor,
    key_HTD: torch.Tensor,
    past_key_HSD: torch.Tensor,
    *,
    block_rows: int = 64,
    block_keys: int = 64,
) -> torch.Tensor:
    """Base-2 logarithm of each row's sum of exponentials, float32 [H, G, R]: the first of two passes over the keys."""
    num_heads, group_size, num_rows, head_dim = query_HGRD.shape
    out = torch.empty(num_heads, group_size, num_rows, dtype=torch.float32, device=query_HGRD.device)
    num_tokens = key_HTD.shape[1]
    log_sum_exp_kernel[(triton.cdiv(group_size * num_rows, block_rows), num_heads)](
        query_HGRD, key_HTD, past_key_HSD, out,
        key_HTD.stride(0), past_key_HSD.stride(0), num_rows, num_tokens, past_key_HSD.shape[1],
        head_dim**-0.5 * math.log2(math.e),
        group_size=group_size, head_dim=head_dim, padded_dim=max(16, triton.next_power_of_2(head_dim)),
        block_rows=block_rows, block_keys=block_keys, widens=INTERPRETED,
    )  # fmt: skip
    return out


def contiguous_rows(keys_HSD: torch.Tensor) -> torch.Tensor:
    """Keys as the kernels read them: any distance between heads, slots side by side."""
    is_dense = keys_HSD.stride(1) == keys_HSD.shape[2] and keys_HSD.stride(2) == 1
    return keys_HSD if is_dense else keys_HSD.contiguous()


@triton.jit
def load_keys(pointer, slot, num_slots, dim, head_dim: tl.constexpr, dtype: tl.constexpr, widens: tl.constexpr):
    """Keys of a block of slots, [slots, padded_dim]; zero where there is none."""
    is_live = (slot < num_slots)[:, None] & (dim < head_dim)[None, :]
    key = tl.load(pointer + slot[:, None] * head_dim + dim[None, :], mask=is_live, other=0.0)
    return key.to(tl.float32) if widens else key.to(dtype)


@triton.jit
def _fold_scores(
    query, key_pointer, first_key, num_keys, row_token, score_max, score_sum, scale_log2,
    dim, head_dim: tl.constexpr, block_keys: tl.constexpr, is_causal: tl.constexpr, widens: tl.constexpr,
):  # fmt: skip
    """Fold a block of keys into the running maximum and sum of each row."""
    slot = first_key + tl.arange(0, block_keys)
    key = load_keys(key_pointer, slot, num_keys, dim, head_dim, query.dtype, widens)
    score = tl.dot(query, tl.trans(key), input_precision="ieee") * scale_log2
    is_visible = (slot < num_keys)[None, :]
    if is_causal:
        is_visible = is_visible & (slot[None, :] <= row_token[:, None])
    score = tl.where(is_visible, score, float("-inf"))
    new_max = tl.maximum(score_max, tl.max(score, axis=1))
    # A row that has seen no key yet has no maximum: -inf - -inf would be NaN.
    safe_max = tl.where(new_max == float("-inf"), 0.0, new_max)
    score_sum = score_sum * tl.exp2(score_max - safe_max) + tl.sum(tl.exp2(score - safe_max[:, None]), axis=1)
    return new_max, score_sum


@triton.jit
def log_sum_exp_kernel(
    query_pointer, key_pointer, past_key_pointer, out_pointer,
    key_head_stride, past_key_head_stride, num_rows, num_tokens, num_slots, scale_log2,
    group_size: tl.constexpr, head_dim: tl.constexpr, padded_dim: tl.constexpr,
    block_rows: tl.constexpr, block_keys: tl.constexpr, widens: tl.constexpr,
):  # fmt: skip
    """One program a KV head and block of (group member, query) rows: the past, then the segment up to the block."""
    head = tl.program_id(1).to(tl.int64)
    row = tl.program_id(0) * block_rows + tl.arange(0, block_rows)
    dim = tl.arange(0, padded_dim)
    is_row = row < group_size * num_rows
    # Rows are ordered by token, so that a block's causal end is near.
    row_token = num_tokens - num_rows + row // group_size
    source = (head * group_size + row % group_size) * num_rows + row // group_size
    is_live = is_row[:, None] & (dim < head_dim)[None, :]
    query = tl.load(query_pointer + source[:, None] * head_dim + dim[None, :], mask=is_live, other=0.0)
    if widens:
        query = query.to(tl.float32)
    score_max = tl.full([block_rows], float("-inf"), tl.float32)
    score_sum = tl.zeros([block_rows], tl.float32)
    for first_key in range(0, num_slots, block_keys):
        score_max, score_sum = _fold_scores(
            query, past_key_pointer + head * past_key_head_stride, first_key, num_slots, row_token, score_max,
            score_sum, scale_log2, dim, head_dim, block_keys, False, widens,
        )  # fmt: skip
    last_row = tl.program_id(0) * block_rows + block_rows - 1
    causal_end = tl.minimum(num_tokens, num_tokens - num_rows + last_row // group_size + 1)
    for first_key in range(0, causal_end, block_keys):
        score_max, score_sum = _fold_scores(
            query, key_pointer + head * key_head_stride, first_key, num_tokens, row_token, score_max,
            score_sum, scale_log2, dim, head_dim, block_keys, True, widens,
        )  # fmt: skip
    tl.store(out_pointer + source, score_max + tl.log2(score_sum), mask=is_row)


@triton.jit
def group_weights(
    query_pointer, log_sum_pointer, key, head, first_row, num_rows, first_token, slot, num_slots, scale_log2,
    dim, group_size: tl.constexpr, head_dim: tl.constexpr, block_rows: tl.constexpr, block_keys: tl.constexpr,
    is_causal: tl.constexpr, widens: tl.constexpr,
):  # fmt: skip
    """Weights of a block of queries on a block of slots, averaged over the group: [block_rows, block_keys]."""
    row = first_row + tl.arange(0, block_rows)
    is_row = row < num_rows
    is_live = is_row[:, None] & (dim < head_dim)[None, :]
    is_visible = is_row[:, None] & (slot < num_slots)[None, :]
    if is_causal:
        is_visible = is_visible & (slot[None, :] <= first_token + row[:, None])
    total = tl.zeros([block_rows, block_keys], tl.float32)
    for member in range(group_size):
        source = (head * group_size + member) * num_rows + row
        query = tl.load(query_pointer + source[:, None] * head_dim + dim[None, :], mask=is_live, other=0.0)
        if widens:
            query = query.to(tl.float32)
        log_sum = tl.load(log_sum_pointer + source, mask=is_row, other=0.0)
        score = tl.dot(query, tl.trans(key), input_precision="ieee") * scale_log2
        # What is not visible has no part in the sum, so its power may be above any number.
        total += tl.exp2(tl.where(is_visible, score - log_sum[:, None], float("-inf")))
    return total / group_size
