"""Attention weights of a segment's last queries, for kernels that watch where attention goes: never more than a tile.

Shape suffixes: H KV head, G query head of a KV head's group, R observed query (the last R of T tokens), T token of the
segment, S slot of the past, N slot of past and segment (S + T), D head dim.
"""

import math
from collections.abc import Iterator

import torch

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
    later = torch.full((TILE_ROWS, TILE_ROWS), -math.inf).triu(1)
    for first in range(0, num_rows, TILE_ROWS):
        tile = min(TILE_ROWS, num_rows - first)
        # No row of the tile sees a slot behind its last token.
        end = num_slots + first_token + first + tile
        query = (
            query_HGRD[:, :, first : first + tile].float().mul_(scale)
            if query_HGRD.dtype != torch.float32
            else (query_HGRD[:, :, first : first + tile] * scale)
        )
        score = torch.bmm(query.reshape(num_heads, group_size * tile, head_dim), key_HND[:, :end].mT)
        score = score.view(num_heads, group_size, tile, end)
        score[..., end - tile :] += later[:tile, :tile]
        weight = torch.softmax(score, dim=-1, out=score)
        out_RHN[:tile, :, :end] = weight.mean(dim=1).transpose(0, 1)
        out_RHN[:tile, :, end:] = 0
        yield tile
