"""How much attention each slot receives from a segment's last queries: the column sums of the attention matrix.

    a[n] = sum_r mean_g softmax(q_gr K^T / sqrt(D))[n]

The matrix is never stored, only a tile of its rows at a time.

Shape suffixes: H KV head, G query head of a KV head's group, R observed query (the last R of T tokens), T token of the
segment, S slot of the past, N slot of past and segment (S + T), D head dim.
"""

import math

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


def attention_received(query_HGRD: torch.Tensor, key_HTD: torch.Tensor, past_key_HSD: torch.Tensor) -> torch.Tensor:
    """Attention received by each slot, summed over queries and averaged over the group, float32 [H, N].

    Args:
        query_HGRD: Rotated queries of the segment's last R tokens, any float dtype.
        key_HTD: Rotated keys of the segment; `past_key_HSD` those of the past.

    Raises:
        ValueError: If shapes do not agree.
    """
    check_observation(query_HGRD, key_HTD, past_key_HSD)
    receive = _attention_received_triton if query_HGRD.is_cuda else _attention_received_cpu
    return receive(query_HGRD, key_HTD, past_key_HSD)


def attention_received_reference(
    query_HGRD: torch.Tensor, key_HTD: torch.Tensor, past_key_HSD: torch.Tensor
) -> torch.Tensor:
    """As `attention_received`: the whole attention matrix, summed."""
    return attention_reference(query_HGRD, key_HTD, past_key_HSD).sum(dim=1)


def _attention_received_cpu(
    query_HGRD: torch.Tensor, key_HTD: torch.Tensor, past_key_HSD: torch.Tensor
) -> torch.Tensor:
    num_heads, num_columns = len(key_HTD), past_key_HSD.shape[1] + key_HTD.shape[1]
    rows_RHN = torch.empty(TILE_ROWS, num_heads, num_columns)
    received_HN = torch.zeros(num_heads, num_columns)
    for tile in attention_tiles(query_HGRD, key_HTD, past_key_HSD, rows_RHN):
        received_HN += rows_RHN[:tile].sum(dim=0)
    return received_HN


def _attention_received_triton(
    query_HGRD: torch.Tensor, key_HTD: torch.Tensor, past_key_HSD: torch.Tensor
) -> torch.Tensor:
    num_heads, group_size, num_rows, head_dim = query_HGRD.shape
    num_slots, num_tokens, block_keys = past_key_HSD.shape[1], key_HTD.shape[1], 64
    query_HGRD = query_HGRD.contiguous()
    key_HTD, past_key_HSD = contiguous_rows(key_HTD), contiguous_rows(past_key_HSD)
    log_sum = log_sum_exp_triton(query_HGRD, key_HTD, past_key_HSD)
    out = torch.empty(num_heads, num_slots + num_tokens, dtype=torch.float32, device=query_HGRD.device)
    for keys, first_column, is_causal in ((past_key_HSD, 0, False), (key_HTD, num_slots, True)):
        if keys.shape[1]:
            attention_received_kernel[(triton.cdiv(keys.shape[1], block_keys), num_heads)](
                query_HGRD, log_sum, keys, out,
                keys.stride(0), keys.shape[1], first_column, num_slots + num_tokens, num_rows, num_tokens - num_rows,
                head_dim**-0.5 * math.log2(math.e),
                group_size=group_size, head_dim=head_dim, padded_dim=max(16, triton.next_power_of_2(head_dim)),
                block_rows=32, block_keys=block_keys, is_causal=is_causal, widens=INTERPRETED,
            )  # fmt: skip
    return out


@triton.jit
def attention_received_kernel(
    query_pointer, log_sum_pointer, key_pointer, out_pointer,
    key_head_stride, num_keys, first_column, num_columns, num_rows, first_token, scale_log2,
    group_size: tl.constexpr, head_dim: tl.constexpr, padded_dim: tl.constexpr,
    block_rows: tl.constexpr, block_keys: tl.constexpr, is_causal: tl.constexpr, widens: tl.constexpr,
):  # fmt: skip
    """One program a KV head and block of slots: all queries pass by."""
    head = tl.program_id(1).to(tl.int64)
    slot = tl.program_id(0) * block_keys + tl.arange(0, block_keys)
    dim = tl.arange(0, padded_dim)
    dtype: tl.constexpr = query_pointer.dtype.element_ty
    key = load_keys(key_pointer + head * key_head_stride, slot, num_keys, dim, head_dim, dtype, widens)
    received = tl.zeros([block_keys], tl.float32)
    for first_row in range(0, num_rows, block_rows):
        weight = group_weights(
            query_pointer, log_sum_pointer, key, head, first_row, num_rows, first_token, slot, num_keys, scale_log2,
            dim, group_size, head_dim, block_rows, block_keys, is_causal, widens,
        )  # fmt: skip
        received += tl.sum(weight, axis=0)
    tl.store(out_pointer + head * num_columns + first_column + slot, received, mask=slot < num_keys)
