"""Compressive memory: a matrix and a vector a KV head that stand for all tokens which have left the window.

After "Leave No Context Behind: Efficient Infinite Context Transformers with Infini-attention" (Munkhdalai et al. 2024,
arXiv:2404.07143), equations 7 to 9, with s(x) = elu(x) + 1, keys and queries before rotary positions, and a weight w of
each token that is written:

    retrieve          A  = s(Q) M / (s(Q) z + 1e-6)
    update, linear    M += sum_t w_t s(k_t) v_t^T
    update, delta     M += sum_t w_t s(k_t) (v_t - r_t)^T,   r_t = what M and z of before the batch answer to k_t
    both              z += sum_t w_t g_t s(k_t)

g is 1, or the gamma correction of "Associative Recurrent Memory Transformer" (Rodkin et al. 2024, arXiv:2407.04841):

    g_t = clip(1 - s(k_t) z / (|s(k_t)|^2 + 1e-5), 0, 1),    z of before the batch

s(k) z / |s(k)|^2 projects z on s(k): how often this key is counted in z so far. If z = c s(k),
only 1 - c is added, so a key counts once however often it is written, where by the plain sum a value that is written
again and again is retrieved at half its size. All s are positive, so keys that differ overlap too: after some tens of
tokens every g is close to 0 and z hardly grows. M has to stop growing with it, which only `delta` sees to.

Shape suffixes: H KV head (of one stream, or of several side by side), G query head of a KV head's group, T token, D key
dim, E value dim.
"""

from typing import Literal

import torch

UpdateRule = Literal["linear", "delta"]

NORMALIZER_EPSILON = 1e-6
GAMMA_EPSILON = 1e-5


def retrieve(query_HGTD: torch.Tensor, memory_HDE: torch.Tensor, normalizer_HD: torch.Tensor) -> torch.Tensor:
    """What the memory answers to each query: a mean of the values in it, or 0 while nothing was written.

    Args:
        query_HGTD: Queries before rotary positions, float32 or bfloat16.
        memory_HDE: M, float32.
        normalizer_HD: z, float32.

    Returns:
        Float32 [H, G, T, E].

    Raises:
        ValueError: If shapes or dtypes do not fit.
    """
    num_heads, _, _, head_dim = query_HGTD.shape
    _check_memory(memory_HDE, normalizer_HD, num_heads, head_dim)
    _check_dtype("queries", query_HGTD)
    return retrieve_reference(query_HGTD, memory_HDE, normalizer_HD)


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
    """Write one batch of tokens into the memory, in place.

    Args:
        memory_HDE: M, float32, contiguous.
        normalizer_HD: z, float32, contiguous.
        key_HTD: Keys before rotary positions, float32 or bfloat16; T may be 0.
        value_HTE: Values, float32 or bfloat16.
        weight_HT: How much of each token is written, at least 0, float32; None: all of all. Of a token with 0, key
            and value may be anything, NaN included: it changes nothing.
        rule: `linear` adds the values, `delta` only what differs from the answer that is there (all of it, as `linear`
            does, while nothing was written).
        uses_gamma: Count in z only what is not yet counted; `delta` alone.

    Raises:
        ValueError: If shapes or dtypes do not fit, M or z is not contiguous, or gamma is asked of `linear`.
    """
    num_heads, num_tokens, head_dim = key_HTD.shape
    _check_memory(memory_HDE, normalizer_HD, num_heads, head_dim)
    if value_HTE.shape != (num_heads, num_tokens, memory_HDE.shape[2]):
        raise ValueError(f"values {tuple(value_HTE.shape)} fit neither keys {tuple(key_HTD.shape)} nor the memory")
    if weight_HT is not None and weight_HT.shape != (num_heads, num_tokens):
        raise ValueError(f"weights {tuple(weight_HT.shape)} do not fit keys {tuple(key_HTD.shape)}")
    _check_dtype("keys", key_HTD)
    _check_dtype("values", value_HTE)
    if not (memory_HDE.is_contiguous() and normalizer_HD.is_contiguous()):
        raise ValueError("a memory that is not contiguous cannot be written in place")
    if rule not in ("linear", "delta"):
        raise ValueError(f"update rule {rule!r} is neither linear nor delta")
    if uses_gamma and rule != "delta":
        raise ValueError("the gamma correction keeps z from growing, and only the delta rule keeps M from growing")
    if num_tokens:
        update_reference(memory_HDE, normalizer_HD, key_HTD, value_HTE, weight_HT, rule=rule, uses_gamma=uses_gamma)


def retrieve_reference(query_HGTD: torch.Tensor, memory_HDE: torch.Tensor, normalizer_HD: torch.Tensor) -> torch.Tensor:
    """As `retrieve`, in the memory's dtype."""
    features_HGTD = features(query_HGTD.to(memory_HDE.dtype))
    count_HGT = torch.einsum("hgtd,hd->hgt", features_HGTD, normalizer_HD)
    total_HGTE = torch.einsum("hgtd,hde->hgte", features_HGTD, memory_HDE)
    return total_HGTE / (count_HGT + NORMALIZER_EPSILON)[..., None]


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
    """As `update`, in the memory's dtype."""
    dtype = memory_HDE.dtype
    key, value = key_HTD.to(dtype), value_HTE.to(dtype)
    weight = key.new_ones(key.shape[:2]) if weight_HT is None else weight_HT.to(dtype)
    is_written = (weight > 0)[..., None]
    features_HTD = features(key.where(is_written, 0))
    value = value.where(is_written, 0)
    if rule == "delta":
        value = value - retrieve_reference(key.where(is_written, 0)[:, None], memory_HDE, normalizer_HD)[:, 0]
    share_HT = weight
    if uses_gamma:
        count_HT = torch.einsum("htd,hd->ht", features_HTD, normalizer_HD)
        share_HT = weight * (1 - count_HT / (features_HTD.square().sum(dim=-1) + GAMMA_EPSILON)).clamp(0, 1)
    memory_HDE += torch.einsum("htd,ht,hte->hde", features_HTD, weight, value)
    normalizer_HD += torch.einsum("htd,ht->hd", features_HTD, share_HT)


def features(x: torch.Tensor) -> torch.Tensor:
    """s(x) = elu(x) + 1, as exp(min(x, 0)) + max(x, 0).

    What keeps a needle apart from a million other tokens are features of 1e-6 and less. Where 1 is added to exp(x) - 1,
    float32 leaves one digit of s(-14) and nothing of s(-18).
    """
    return x.clamp(max=0).exp() + x.clamp(min=0)


def _check_memory(memory_HDE: torch.Tensor, normalizer_HD: torch.Tensor, num_heads: int, head_dim: int) -> None:
    is_fitting = memory_HDE.dim() == 3 and memory_HDE.shape[:2] == (num_heads, head_dim) == normalizer_HD.shape
    if not is_fitting:
        found = f"memory {tuple(memory_HDE.shape)} and normalizer {tuple(normalizer_HD.shape)}"
        raise ValueError(f"{found} do not fit {num_heads} heads of {head_dim}")
    if not memory_HDE.dtype == normalizer_HD.dtype == torch.float32:
        raise ValueError(f"memory and normalizer must be float32, not {memory_HDE.dtype} and {normalizer_HD.dtype}")


def _check_dtype(name: str, tensor: torch.Tensor) -> None:
    if tensor.dtype not in (torch.float32, torch.bfloat16):
        raise ValueError(f"{name} must be float32 or bfloat16, not {tensor.dtype}")
