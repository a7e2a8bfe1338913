"""Compressive memory: a matrix M and a normalizer z a KV head, which hold every token that has left the window.

After "Leave No Context Behind" (Munkhdalai et al. 2024, arXiv:2404.07143): with sigma(x) = elu(x) + 1,

    retrieve   A = sigma(Q) M / (sigma(Q) z + 1e-6)                                                      (eq. 7)
    linear     M <- M + sum_t w_t sigma(k_t)^T v_t                     z <- z + sum_t w_t sigma(k_t)     (eq. 8)
    delta      M <- M + sum_t w_t sigma(k_t)^T (v_t - vhat_t)          z as in linear                    (eq. 9)
               vhat_t = sigma(k_t) M / (sigma(k_t) z + 1e-6)           M, z of before the batch

w_t is a token's write weight, 1 in the paper. `delta` subtracts what the memory already returns for a key, but z counts
the key each time: a value that is written again and again would be read back as its half. The gamma correction of ARMT
(Rodkin et al. 2024, arXiv:2407.04841) leaves out of z what is already in it:

    gamma      z <- max(z + sum_t w_t gamma_t sigma(k_t), sum_t w_t sigma(k_t))
               gamma_t = clip(1 - sigma(k_t) z / (|sigma(k_t)|^2 + 1e-5), 0, 1)                          z of before

Let one key be written N times with weight w and z = c sigma(k), M = m sigma(k)^T v. Then gamma = 1 - c, so
c <- c + w (1 - c) goes to 1 and m <- m + w (1 - m / c) keeps m = c: the value is read back whole from the first write
on. (ARMT's own z takes gamma without w: then a first write of weight w is read back as w v.)

The maximum is ours. A batch of `delta` multiplies M by I - P, where the greatest eigenvalue of P is at most the
greatest ratio, over the elements of z, of sum_t w_t sigma(k_t) to z: beyond 2 it overshoots. Without gamma z then holds
this batch too, and the next one like it has a ratio below 1. With gamma z may stay at what a first, smaller batch has
left, and every further batch overshoots again, until M is infinite. As z never falls below what one batch has written,
it overshoots at most once for each time that batches grow. The maximum changes z wherever an element of a batch's sum
exceeds it, so also a little between batches of one length: a model has to be trained with it.

Everything is float32, whatever the keys are: in float16 z overflows after some 50,000 tokens, and in bfloat16 it stops
growing at 2^18. Queries and keys are those before rotary positions.

Shape suffixes: H KV head, G query head of a KV head's group, T token, D key dim, E value dim.
"""

from typing import Literal, get_args

import torch
import triton
import triton.language as tl

UpdateRule = Literal["linear", "delta"]

NORMALIZER_EPSILON = 1e-6
GAMMA_EPSILON = 1e-5
# Of the kernels: small enough that a product in full float32 stays in registers.
BLOCK_DIM = 32
READ_TOKENS = 32
WRITTEN_TOKENS = 16


def empty_memory(
    num_heads: int, key_dim: int, value_dim: int, device: torch.device | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """M, float32 [H, D, E], and z, float32 [H, D], of a stream from whose window no token has left."""
    return torch.zeros(num_heads, key_dim, value_dim, device=device), torch.zeros(num_heads, key_dim, device=device)


def retrieve(query_HGTD: torch.Tensor, memory_HDE: torch.Tensor, normalizer_HD: torch.Tensor) -> torch.Tensor:
    """What the memory returns for each query: an average of the stored values (eq. 7), 0 from an empty memory.

    Args:
        query_HGTD: Queries before rotary positions, float32 or bfloat16.
        memory_HDE: M, float32; `normalizer_HD` z, float32.

    Returns:
        float32 [H, G, T, E], contiguous.

    Raises:
        ValueError: If shapes do not agree, or M or z is not float32.
    """
    _check_memory(memory_HDE, normalizer_HD)
    num_heads, _, _, key_dim = query_HGTD.shape
    if (num_heads, key_dim) != memory_HDE.shape[:2]:
        raise ValueError(f"queries {tuple(query_HGTD.shape)} do not fit a memory {tuple(memory_HDE.shape)}")
    read = _retrieve_triton if query_HGTD.is_cuda else _retrieve_cpu
    return read(query_HGTD, memory_HDE, normalizer_HD)


def update(
    memory_HDE: torch.Tensor,
    normalizer_HD: torch.Tensor,
    key_HTD: torch.Tensor,
    value_HTE: torch.Tensor,
    weight_HT: torch.Tensor | None,
    *,
    rule: UpdateRule,
    uses_gamma: bool = False,
) -> None:
    """Write the tokens that leave the window together into M and z, in place (eq. 8 and 9).

    Args:
        memory_HDE: M, float32; `normalizer_HD` z, float32.
        key_HTD: Keys before rotary positions, float32 or bfloat16; `value_HTE` their values.
        weight_HT: Write weights, 0 to 1; None means 1. A token of weight 0 contributes nothing, even if its key or
            value is NaN: it may be padding.
        rule: `linear` adds values, `delta` what the memory does not return already.
        uses_gamma: Leave out of z what it has counted already. Only with `delta`: M would hold what z does not count.

    Raises:
        ValueError: If shapes do not agree, M or z is not float32, the rule is unknown, or gamma is asked of `linear`.
    """
    _check_memory(memory_HDE, normalizer_HD)
    num_heads, key_dim, value_dim = memory_HDE.shape
    num_tokens = key_HTD.shape[1]
    if key_HTD.shape != (num_heads, num_tokens, key_dim) or value_HTE.shape != (num_heads, num_tokens, value_dim):
        found = f"keys {tuple(key_HTD.shape)} and values {tuple(value_HTE.shape)}"
        raise ValueError(f"{found} do not fit a memory {tuple(memory_HDE.shape)}")
    if weight_HT is not None and weight_HT.shape != (num_heads, num_tokens):
        raise ValueError(f"write weights {tuple(weight_HT.shape)} must be {(num_heads, num_tokens)}")
    if rule not in get_args(UpdateRule):
        raise ValueError(f"update rule {rule!r} is none of {get_args(UpdateRule)}")
    if uses_gamma and rule != "delta":
        raise ValueError("the gamma correction belongs to the delta rule")
    if not num_tokens:
        return
    write = _update_triton if key_HTD.is_cuda else _update_cpu
    write(memory_HDE, normalizer_HD, key_HTD, value_HTE, weight_HT, rule, uses_gamma)


def _check_memory(memory_HDE: torch.Tensor, normalizer_HD: torch.Tensor) -> None:
    if normalizer_HD.shape != memory_HDE.shape[:2]:
        raise ValueError(f"normalizer {tuple(normalizer_HD.shape)} must be {tuple(memory_HDE.shape[:2])}")
    for name, state in (("memory", memory_HDE), ("normalizer", normalizer_HD)):
        if state.dtype != torch.float32:
            raise ValueError(f"{name} must be float32, not {state.dtype}")


def retrieve_reference(query_HGTD: torch.Tensor, memory_HDE: torch.Tensor, normalizer_HD: torch.Tensor) -> torch.Tensor:
    """As `retrieve`, in the memory's own dtype."""
    feature_HGTD = features_reference(query_HGTD.to(memory_HDE.dtype))
    numerator_HGTE = torch.einsum("hgtd,hde->hgte", feature_HGTD, memory_HDE)
    denominator_HGT = torch.einsum("hgtd,hd->hgt", feature_HGTD, normalizer_HD)
    return numerator_HGTE / (denominator_HGT[..., None] + NORMALIZER_EPSILON)


def update_reference(
    memory_HDE: torch.Tensor,
    normalizer_HD: torch.Tensor,
    key_HTD: torch.Tensor,
    value_HTE: torch.Tensor,
    weight_HT: torch.Tensor | None,
    *,
    rule: UpdateRule,
    uses_gamma: bool = False,
) -> None:
    """As `update`, in the memory's own dtype, a head at a time and only with the tokens that are written."""
    dtype = memory_HDE.dtype
    for head, (memory_DE, normalizer_D) in enumerate(zip(memory_HDE, normalizer_HD, strict=True)):
        weight_T = key_HTD.new_ones(key_HTD.shape[1]) if weight_HT is None else weight_HT[head]
        is_written_T = weight_T != 0
        weight_T1 = weight_T[is_written_T, None].to(dtype)
        feature_TD = features_reference(key_HTD[head, is_written_T].to(dtype))
        new_value_TE = value_HTE[head, is_written_T].to(dtype)
        counted_T1 = weight_T1
        stored_T1 = feature_TD @ normalizer_D[:, None]
        if rule == "delta":
            new_value_TE = new_value_TE - feature_TD @ memory_DE / (stored_T1 + NORMALIZER_EPSILON)
        if uses_gamma:
            squared_norm_T1 = feature_TD.square().sum(dim=1, keepdim=True)
            counted_T1 = weight_T1 * (1 - stored_T1 / (squared_norm_T1 + GAMMA_EPSILON)).clamp(0, 1)
        memory_DE += (weight_T1 * feature_TD).T @ new_value_TE
        normalizer_D += (counted_T1 * feature_TD).sum(dim=0)
        if uses_gamma:
            normalizer_D.copy_(normalizer_D.maximum((weight_T1 * feature_TD).sum(dim=0)))


def features_reference(x: torch.Tensor) -> torch.Tensor:
    """sigma(x) = elu(x) + 1. Not written so: expm1(x) + 1 has lost 7% of exp(x) at -14, and all of it at -17."""
    return torch.where(x > 0, x + 1, x.exp())


def _retrieve_cpu(query_HGTD: torch.Tensor, memory_HDE: torch.Tensor, normalizer_HD: torch.Tensor) -> torch.Tensor:
    num_heads, group_size, num_tokens, key_dim = query_HGTD.shape
    feature_HRD = _features_cpu(query_HGTD).view(num_heads, group_size * num_tokens, key_dim)
    scale_HR1 = _counted_cpu(feature_HRD, normalizer_HD).add_(NORMALIZER_EPSILON).reciprocal_()
    retrieved = torch.bmm(feature_HRD, memory_HDE).mul_(scale_HR1)
    return retrieved.view(num_heads, group_size, num_tokens, memory_HDE.shape[2])


def _update_cpu(
    memory_HDE: torch.Tensor,
    normalizer_HD: torch.Tensor,
    key_HTD: torch.Tensor,
    value_HTE: torch.Tensor,
    weight_HT: torch.Tensor | None,
    rule: UpdateRule,
    uses_gamma: bool,
) -> None:
    value_HTE = value_HTE.float()
    if weight_HT is not None:
        # 0 times NaN would be NaN.
        is_unwritten = (weight_HT == 0)[..., None]
        key_HTD, value_HTE = key_HTD.masked_fill(is_unwritten, 0), value_HTE.masked_fill(is_unwritten, 0)
        weight_HT = weight_HT.float()
    feature_HTD = _features_cpu(key_HTD)
    written_HTD = feature_HTD if weight_HT is None else feature_HTD * weight_HT[..., None]
    if rule == "delta":
        stored_HT1 = _counted_cpu(feature_HTD, normalizer_HD)
        value_HTE = value_HTE - torch.bmm(feature_HTD, memory_HDE).div_(stored_HT1 + NORMALIZER_EPSILON)
    if uses_gamma:
        squared_norm_HT1 = feature_HTD.square().sum(dim=2, keepdim=True)
        gamma_HT1 = (1 - stored_HT1 / squared_norm_HT1.add_(GAMMA_EPSILON)).clamp_(0, 1)
        normalizer_HD += torch.bmm(written_HTD.transpose(1, 2), gamma_HT1)[..., 0]
        torch.maximum(normalizer_HD, written_HTD.sum(dim=1), out=normalizer_HD)
    else:
        normalizer_HD += written_HTD.sum(dim=1)
    memory_HDE.baddbmm_(written_HTD.transpose(1, 2), value_HTE)


def _counted_cpu(feature_HTD: torch.Tensor, normalizer_HD: torch.Tensor) -> torch.Tensor:
    """sigma z, [H, T, 1]: less than half the time of a product with a matrix of one column."""
    return (feature_HTD * normalizer_HD[:, None]).sum(dim=2, keepdim=True)


def _features_cpu(x: torch.Tensor) -> torch.Tensor:
    """sigma(x) = exp(min(x, 0)) + max(x, 0), float32, contiguous, new."""
    x = x.float().contiguous()
    return x.clamp(max=0).exp_().add_(x.clamp(min=0))


def _retrieve_triton(query_HGTD: torch.Tensor, memory_HDE: torch.Tensor, normalizer_HD: torch.Tensor) -> torch.Tensor:
    return _read_triton(query_HGTD, memory_HDE, normalizer_HD)[0]


def _read_triton(
    query_HGTD: torch.Tensor, memory_HDE: torch.Tensor, normalizer_HD: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """What the memory returns, and of each query the share that z has not counted: gamma, float32 [H, G, T]."""
    num_heads, group_size, num_tokens, key_dim = query_HGTD.shape
    value_dim, num_rows = memory_HDE.shape[2], group_size * num_tokens
    shape, device = (num_heads, group_size, num_tokens), query_HGTD.device
    retrieved = torch.empty(*shape, value_dim, dtype=torch.float32, device=device)
    gamma = torch.empty(shape, dtype=torch.float32, device=device)
    if num_rows:
        grid = (triton.cdiv(num_rows, READ_TOKENS), triton.cdiv(value_dim, BLOCK_DIM), num_heads)
        compressive_memory_read_kernel[grid](
            query_HGTD.contiguous(), memory_HDE.contiguous(), normalizer_HD.contiguous(), retrieved, gamma,
            num_rows, value_dim, NORMALIZER_EPSILON, GAMMA_EPSILON,
            key_dim=key_dim, block_rows=READ_TOKENS, block_dim=BLOCK_DIM,
        )  # fmt: skip
    return retrieved, gamma


def _update_triton(
    memory_HDE: torch.Tensor,
    normalizer_HD: torch.Tensor,
    key_HTD: torch.Tensor,
    value_HTE: torch.Tensor,
    weight_HT: torch.Tensor | None,
    rule: UpdateRule,
    uses_gamma: bool,
) -> None:
    if not memory_HDE.is_contiguous() or not normalizer_HD.is_contiguous():
        raise ValueError("memory and normalizer must be contiguous")
    num_heads, key_dim, value_dim = memory_HDE.shape
    key_HTD, value_HTE = key_HTD.contiguous(), value_HTE.contiguous()
    weight = memory_HDE if weight_HT is None else weight_HT.float().contiguous()
    # All of M and z is read before any of it is written: by a kernel of its own.
    is_delta = rule == "delta"
    stored, gamma = _read_triton(key_HTD[:, None], memory_HDE, normalizer_HD) if is_delta else (memory_HDE, memory_HDE)
    grid = (triton.cdiv(key_dim, BLOCK_DIM), triton.cdiv(value_dim, BLOCK_DIM), num_heads)
    compressive_memory_write_kernel[grid](
        key_HTD, value_HTE, weight, stored, gamma, memory_HDE, normalizer_HD, key_HTD.shape[1], key_dim, value_dim,
        has_weights=weight_HT is not None, is_delta=is_delta, uses_gamma=uses_gamma,
        block_tokens=WRITTEN_TOKENS, block_dim=BLOCK_DIM,
    )  # fmt: skip


@triton.jit
def _features(x):
    """sigma of what was loaded, in float32 from the first operation on."""
    x = x.to(tl.float32)
    return tl.where(x > 0, x + 1, tl.exp(tl.minimum(x, 0.0)))


@triton.jit
def compressive_memory_read_kernel(
    query_pointer, memory_pointer, normalizer_pointer, out_pointer, gamma_pointer,
    num_rows, value_dim, normalizer_epsilon, gamma_epsilon,
    key_dim: tl.constexpr, block_rows: tl.constexpr, block_dim: tl.constexpr,
):  # fmt: skip
    """One program a KV head, block of (group member, token) rows and block of value dims: key dims pass by."""
    head = tl.program_id(2).to(tl.int64)
    row = tl.program_id(0) * block_rows + tl.arange(0, block_rows)
    column = tl.program_id(1) * block_dim + tl.arange(0, block_dim)
    is_row, is_column = row < num_rows, column < value_dim
    query_row = (head * num_rows + row) * key_dim
    total = tl.zeros([block_rows, block_dim], tl.float32)
    counted = tl.zeros([block_rows], tl.float32)
    squared_norm = tl.zeros([block_rows], tl.float32)
    for first_dim in range(0, key_dim, block_dim):
        dim = first_dim + tl.arange(0, block_dim)
        is_dim = dim < key_dim
        is_query = is_row[:, None] & is_dim[None, :]
        query = tl.load(query_pointer + query_row[:, None] + dim[None, :], mask=is_query, other=0.0)
        # sigma(0) is 1: dims that are not there must be masked again.
        feature = tl.where(is_query, _features(query), 0.0)
        memory_row = (head * key_dim + dim) * value_dim
        is_memory = is_dim[:, None] & is_column[None, :]
        memory = tl.load(memory_pointer + memory_row[:, None] + column[None, :], mask=is_memory, other=0.0)
        normalizer = tl.load(normalizer_pointer + head * key_dim + dim, mask=is_dim, other=0.0)
        total += tl.dot(feature, memory, input_precision="ieee")
        counted += tl.sum(feature * normalizer[None, :], axis=1)
        squared_norm += tl.sum(feature * feature, axis=1)
    out_row = (head * num_rows + row) * value_dim
    out = total / (counted + normalizer_epsilon)[:, None]
    tl.store(out_pointer + out_row[:, None] + column[None, :], out, mask=is_row[:, None] & is_column[None, :])
    if tl.program_id(1) == 0:
        gamma = tl.minimum(tl.maximum(1 - counted / (squared_norm + gamma_epsilon), 0.0), 1.0)
        tl.store(gamma_pointer + head * num_rows + row, gamma, mask=is_row)


@triton.jit
def compressive_memory_write_kernel(
    key_pointer, value_pointer, weight_pointer, stored_pointer, gamma_pointer, memory_pointer, normalizer_pointer,
    num_tokens, key_dim, value_dim,
    has_weights: tl.constexpr, is_delta: tl.constexpr, uses_gamma: tl.constexpr,
    block_tokens: tl.constexpr, block_dim: tl.constexpr,
):  # fmt: skip
    """One program a KV head and tile of M: tokens pass by. The first tile of a row of tiles has the row's z as well."""
    head = tl.program_id(2).to(tl.int64)
    dim = tl.program_id(0) * block_dim + tl.arange(0, block_dim)
    column = tl.program_id(1) * block_dim + tl.arange(0, block_dim)
    is_dim, is_column = dim < key_dim, column < value_dim
    added = tl.zeros([block_dim, block_dim], tl.float32)
    written = tl.zeros([block_dim], tl.float32)
    counted = tl.zeros([block_dim], tl.float32)
    for first_token in range(0, num_tokens, block_tokens):
        token = first_token + tl.arange(0, block_tokens)
        is_written = token < num_tokens
        token_row = head * num_tokens + token
        weight = is_written.to(tl.float32)
        if has_weights:
            weight = tl.load(weight_pointer + token_row, mask=is_written, other=0.0)
            # Of a token without weight nothing is loaded: it may be NaN, and 0 times NaN too.
            is_written = is_written & (weight != 0)
        is_key = is_written[:, None] & is_dim[None, :]
        is_value = is_written[:, None] & is_column[None, :]
        key = tl.load(key_pointer + token_row[:, None] * key_dim + dim[None, :], mask=is_key, other=0.0)
        feature = _features(key) * weight[:, None]
        value_offset = token_row[:, None] * value_dim + column[None, :]
        value = tl.load(value_pointer + value_offset, mask=is_value, other=0.0).to(tl.float32)
        if is_delta:
            value -= tl.load(stored_pointer + value_offset, mask=is_value, other=0.0)
        added += tl.dot(tl.trans(feature), value, input_precision="ieee")
        written += tl.sum(feature, axis=0)
        if uses_gamma:
            gamma = tl.load(gamma_pointer + token_row, mask=is_written, other=0.0)
            counted += tl.sum(feature * gamma[:, None], axis=0)
    memory_offset = (head * key_dim + dim)[:, None] * value_dim + column[None, :]
    is_memory = is_dim[:, None] & is_column[None, :]
    memory = tl.load(memory_pointer + memory_offset, mask=is_memory, other=0.0)
    tl.store(memory_pointer + memory_offset, memory + added, mask=is_memory)
    if tl.program_id(1) == 0:
        normalizer = tl.load(normalizer_pointer + head * key_dim + dim, mask=is_dim, other=0.0)
        new_normalizer = normalizer + written
        if uses_gamma:
            new_normalizer = tl.maximum(normalizer + counted, written)
        tl.store(normalizer_pointer + head * key_dim + dim, new_normalizer, mask=is_dim)
