"""Attention of a segment: over the past window without a mask, and over the segment itself causally.

    O = softmax(Q [K_past; K]^T / sqrt(D) + causal mask on K) [V_past; V]

The two parts are attended apart and merged by their log-sum-exps, so no mask over the past is ever built:

    O = O_present + sigmoid(lse_past - lse_present) (O_past - O_present)

Shape suffixes: H KV head, G query head of a KV head's group, T token of the segment, S slot of the past, D head dim.
"""

import math

import torch
import triton
import triton.language as tl


def segment_attention(
    query_HGTD: torch.Tensor,
    key_HTD: torch.Tensor,
    value_HTD: torch.Tensor,
    past_key_HSD: torch.Tensor,
    past_value_HSD: torch.Tensor,
) -> torch.Tensor:
    """Attend each token of a segment to the whole past and to its own segment up to itself.

    Args:
        query_HGTD: Rotated queries, float32 or bfloat16, contiguous.
        key_HTD: Rotated keys of the segment, in the query's dtype; `value_HTD` its values.
        past_key_HSD: Rotated keys of the past, any float dtype; S may be 0. `past_value_HSD` its values.

    Returns:
        [T, H, G, D] in the query's dtype, contiguous.

    Raises:
        ValueError: If the shapes or the query's and the segment's dtypes do not agree.
    """
    num_heads, _, num_tokens, head_dim = query_HGTD.shape
    present = (num_heads, num_tokens, head_dim)
    past = (num_heads, past_key_HSD.shape[1], head_dim)
    if key_HTD.shape != present or value_HTD.shape != present:
        raise ValueError(f"keys {tuple(key_HTD.shape)} and values {tuple(value_HTD.shape)} must be {present}")
    if past_key_HSD.shape != past or past_value_HSD.shape != past:
        raise ValueError(f"past {tuple(past_key_HSD.shape)} and {tuple(past_value_HSD.shape)} must be {past}")
    if not query_HGTD.dtype == key_HTD.dtype == value_HTD.dtype:
        raise ValueError(f"dtypes differ: {query_HGTD.dtype}, {key_HTD.dtype}, {value_HTD.dtype}")
    attend = _segment_attention_triton if query_HGTD.is_cuda else _segment_attention_cpu
    return attend(query_HGTD, key_HTD, value_HTD, past_key_HSD, past_value_HSD)


def segment_attention_reference(
    query_HGTD: torch.Tensor,
    key_HTD: torch.Tensor,
    value_HTD: torch.Tensor,
    past_key_HSD: torch.Tensor,
    past_value_HSD: torch.Tensor,
) -> torch.Tensor:
    """As `segment_attention`: one softmax over past and present, in float32."""
    num_tokens, num_slots = key_HTD.shape[1], past_key_HSD.shape[1]
    key = torch.cat([past_key_HSD.float(), key_HTD.float()], dim=1)
    value = torch.cat([past_value_HSD.float(), value_HTD.float()], dim=1)
    score_HGTK = torch.einsum("hgtd,hkd->hgtk", query_HGTD.float(), key) / math.sqrt(query_HGTD.shape[-1])
    is_visible_TK = torch.ones(num_tokens, num_slots + num_tokens, dtype=torch.bool, device=key.device).tril(num_slots)
    weight_HGTK = score_HGTK.masked_fill(~is_visible_TK, -math.inf).softmax(dim=-1)
    return torch.einsum("hgtk,hkd->thgd", weight_HGTK, value).to(query_HGTD.dtype)


def _segment_attention_cpu(
    query_HGTD: torch.Tensor,
    key_HTD: torch.Tensor,
    value_HTD: torch.Tensor,
    past_key_HSD: torch.Tensor,
    past_value_HSD: torch.Tensor,
) -> torch.Tensor:
    num_heads, group_size, num_tokens, head_dim = query_HGTD.shape
    attend = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    # Heads are (KV head, member of its group), which is how the operator maps query heads to fewer KV heads.
    query = query_HGTD.view(1, num_heads * group_size, num_tokens, head_dim)
    out_HGTD, lse_HGT = attend(query, key_HTD[None], value_HTD[None], is_causal=True)
    out_HGTD = out_HGTD.view(query_HGTD.shape)
    if past_key_HSD.shape[1]:
        # Unmasked, a group's queries are just more rows of one head: blocks of 256 rows instead of 64.
        folded = query_HGTD.view(1, num_heads, group_size * num_tokens, head_dim)
        dtype = query_HGTD.dtype
        past_out, past_lse = attend(folded, past_key_HSD[None].to(dtype), past_value_HSD[None].to(dtype))
        past_share_HGT = torch.sigmoid(past_lse.view(query_HGTD.shape[:-1]) - lse_HGT.view(query_HGTD.shape[:-1]))
        out_HGTD = out_HGTD.lerp_(past_out.view(query_HGTD.shape), past_share_HGT[..., None].to(dtype))
    attended: torch.Tensor = out_HGTD.permute(2, 0, 1, 3).contiguous()
    return attended


def _segment_attention_triton(
    query_HGTD: torch.Tensor,
    key_HTD: torch.Tensor,
    value_HTD: torch.Tensor,
    past_key_HSD: torch.Tensor,
    past_value_HSD: torch.Tensor,
    *,
    block_rows: int = 64,
    block_keys: int = 64,
) -> torch.Tensor:
    num_heads, group_size, num_tokens, head_dim = query_HGTD.shape
    query_HGTD, key_HTD, value_HTD = query_HGTD.contiguous(), key_HTD.contiguous(), value_HTD.contiguous()
    for slab in (past_key_HSD, past_value_HSD):
        if slab.stride(1) != head_dim or slab.stride(2) != 1:
            raise ValueError(f"past slots must be contiguous within a head, strides are {slab.stride()}")
    out = torch.empty(num_tokens, num_heads, group_size, head_dim, dtype=query_HGTD.dtype, device=query_HGTD.device)
    grid = (triton.cdiv(group_size * num_tokens, block_rows), num_heads)
    segment_attention_kernel[grid](
        query_HGTD, key_HTD, value_HTD, past_key_HSD, past_value_HSD, out,
        past_key_HSD.stride(0), past_value_HSD.stride(0), num_heads, num_tokens, past_key_HSD.shape[1],
        head_dim**-0.5 * math.log2(math.e),
        group_size=group_size, head_dim=head_dim, padded_dim=max(16, triton.next_power_of_2(head_dim)),
        block_rows=block_rows, block_keys=block_keys,
    )  # fmt: skip
    return out


@triton.jit
def _attend_block(
    query, key_pointer, value_pointer, first_key, num_keys, row_token, weight_max, weight_sum, total, scale_log2,
    dim, head_dim: tl.constexpr, block_keys: tl.constexpr, is_causal: tl.constexpr,
):  # fmt: skip
    """One step of online softmax: fold a block of keys into the running maximum, sum and total of each row."""
    slot = first_key + tl.arange(0, block_keys)
    is_live = (slot < num_keys)[:, None] & (dim < head_dim)[None, :]
    offset = slot[:, None] * head_dim + dim[None, :]
    key = tl.load(key_pointer + offset, mask=is_live, other=0.0).to(query.dtype)
    value = tl.load(value_pointer + offset, mask=is_live, other=0.0).to(query.dtype)
    # ieee: TF32 would cost 3 digits of what the memory state is made from.
    score = tl.dot(query, tl.trans(key), input_precision="ieee") * scale_log2
    is_visible = (slot < num_keys)[None, :]
    if is_causal:
        is_visible = is_visible & (slot[None, :] <= row_token[:, None])
    score = tl.where(is_visible, score, float("-inf"))
    new_max = tl.maximum(weight_max, tl.max(score, axis=1))
    # A row that has seen no key yet has no maximum: -inf - -inf would be NaN.
    safe_max = tl.where(new_max == float("-inf"), 0.0, new_max)
    weight = tl.exp2(score - safe_max[:, None])
    decay = tl.exp2(weight_max - safe_max)
    total = total * decay[:, None] + tl.dot(weight.to(value.dtype), value, input_precision="ieee")
    return new_max, weight_sum * decay + tl.sum(weight, axis=1), total


@triton.jit
def segment_attention_kernel(
    query_pointer, key_pointer, value_pointer, past_key_pointer, past_value_pointer, out_pointer,
    past_key_head_stride, past_value_head_stride, num_heads, num_tokens, num_slots, scale_log2,
    group_size: tl.constexpr, head_dim: tl.constexpr, padded_dim: tl.constexpr,
    block_rows: tl.constexpr, block_keys: tl.constexpr,
):  # fmt: skip
    """One program a KV head and block of (group member, token) rows: the past, then the present up to the block."""
    head = tl.program_id(1).to(tl.int64)
    row = tl.program_id(0) * block_rows + tl.arange(0, block_rows)
    dim = tl.arange(0, padded_dim)
    num_rows = group_size * num_tokens
    # Rows are ordered by token, so that a block's causal end is near.
    row_token = row // group_size
    row_member = row % group_size
    is_row = (row < num_rows)[:, None] & (dim < head_dim)[None, :]
    query_row = (head * group_size + row_member) * num_tokens + row_token
    query = tl.load(query_pointer + query_row[:, None] * head_dim + dim[None, :], mask=is_row, other=0.0)
    weight_max = tl.full([block_rows], float("-inf"), tl.float32)
    weight_sum = tl.zeros([block_rows], tl.float32)
    total = tl.zeros([block_rows, padded_dim], tl.float32)

    past_key = past_key_pointer + head * past_key_head_stride
    past_value = past_value_pointer + head * past_value_head_stride
    for first_key in range(0, num_slots, block_keys):
        weight_max, weight_sum, total = _attend_block(
            query, past_key, past_value, first_key, num_slots, row_token, weight_max, weight_sum, total, scale_log2,
            dim, head_dim, block_keys, False,
        )  # fmt: skip
    present_key = key_pointer + head * num_tokens * head_dim
    present_value = value_pointer + head * num_tokens * head_dim
    causal_end = tl.minimum(num_tokens, (tl.program_id(0) * block_rows + block_rows - 1) // group_size + 1)
    for first_key in range(0, causal_end, block_keys):
        weight_max, weight_sum, total = _attend_block(
            query, present_key, present_value, first_key, num_tokens, row_token, weight_max, weight_sum, total,
            scale_log2, dim, head_dim, block_keys, True,
        )  # fmt: skip

    out_row = (row_token.to(tl.int64) * num_heads + head) * group_size + row_member
    out = (total / weight_sum[:, None]).to(out_pointer.dtype.element_ty)
    tl.store(out_pointer + out_row[:, None] * head_dim + dim[None, :], out, mask=is_row)
