"""How much attention each slot receives from a segment's last queries: the column sums of the attention matrix.

    a[n] = sum_r mean_g softmax(q_gr K^T / sqrt(D))[n]

The matrix is never stored, only a tile of its rows at a time.

Shape suffixes: H KV head, G query head of a KV head's group, R observed query (the last R of T tokens), T token of the
segment, S slot of the past, N slot of past and segment (S + T), D head dim.
"""

import torch

from eunoe_kernels._attention_rows import TILE_ROWS, attention_reference, attention_tiles, check_observation


def attention_received(query_HGRD: torch.Tensor, key_HTD: torch.Tensor, past_key_HSD: torch.Tensor) -> torch.Tensor:
    """Attention received by each slot, summed over queries and averaged over the group, float32 [H, N].

    Args:
        query_HGRD: Rotated queries of the segment's last R tokens, any float dtype.
        key_HTD: Rotated keys of the segment; `past_key_HSD` those of the past.

    Raises:
        ValueError: If shapes do not agree.
    """
    check_observation(query_HGRD, key_HTD, past_key_HSD)
    return _attention_received_cpu(query_HGRD, key_HTD, past_key_HSD)


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
