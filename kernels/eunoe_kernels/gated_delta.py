"""Gated delta rule: a compressive memory without a normalizer, that forgets.

After "Gated Delta Networks: Improving Mamba2 with Delta Rule" (Yang et al. 2024, arXiv:2412.06464), equation 10, with M
the transpose of its S. Token by token, in order, with unit vectors k^ = k / |k|:

    M <- a_t (I - b_t k^_t k^_t^T) M + b_t k^_t v_t^T         retrieve: q^^T M

What M answers to a key moves towards its value by the share b (strength), after all has faded by a (decay). M holds
values and no sums of them, so nothing grows with the stream.

Shape suffixes: H KV head (of one stream, or of several side by side), G query head of a KV head's group, T token, D key
dim, E value dim.
"""

import torch

NORM_EPSILON = 1e-6


def gated_delta_retrieve(query_HGTD: torch.Tensor, memory_HDE: torch.Tensor) -> torch.Tensor:
    """What the memory answers to each query.

    Args:
        query_HGTD: Queries before rotary positions, of any length, float32 or bfloat16.
        memory_HDE: M, float32.

    Returns:
        Float32 [H, G, T, E].

    Raises:
        ValueError: If shapes or dtypes do not fit.
    """
    _check_memory(memory_HDE, query_HGTD.shape[0], query_HGTD.shape[-1])
    _check_dtype("queries", query_HGTD)
    return gated_delta_retrieve_reference(query_HGTD, memory_HDE)


def gated_delta_update(
    memory_HDE: torch.Tensor,
    key_HTD: torch.Tensor,
    value_HTE: torch.Tensor,
    decay_HT: torch.Tensor,
    strength_HT: torch.Tensor,
) -> None:
    """Write tokens into the memory one after the other, in place: one batch or several in a row are the same.

    Args:
        memory_HDE: M, float32, contiguous.
        key_HTD: Keys before rotary positions, of any length, float32 or bfloat16; T may be 0.
        value_HTE: Values, float32 or bfloat16.
        decay_HT: What each token leaves of the memory, 0 to 1, float32.
        strength_HT: How much of each token is written, 0 to 1, float32. With 0, key and value may be anything, NaN
            included: the token changes nothing but by its decay. Padding is strength 0 and decay 1.

    Raises:
        ValueError: If shapes or dtypes do not fit, or M is not contiguous.
    """
    num_heads, num_tokens, head_dim = key_HTD.shape
    _check_memory(memory_HDE, num_heads, head_dim)
    if value_HTE.shape != (num_heads, num_tokens, memory_HDE.shape[2]):
        raise ValueError(f"values {tuple(value_HTE.shape)} fit neither keys {tuple(key_HTD.shape)} nor the memory")
    if not decay_HT.shape == strength_HT.shape == (num_heads, num_tokens):
        found = f"decays {tuple(decay_HT.shape)} and strengths {tuple(strength_HT.shape)}"
        raise ValueError(f"{found} do not fit keys {tuple(key_HTD.shape)}")
    _check_dtype("keys", key_HTD)
    _check_dtype("values", value_HTE)
    if not memory_HDE.is_contiguous():
        raise ValueError("a memory that is not contiguous cannot be written in place")
    gated_delta_update_reference(memory_HDE, key_HTD, value_HTE, decay_HT, strength_HT)


def gated_delta_retrieve_reference(query_HGTD: torch.Tensor, memory_HDE: torch.Tensor) -> torch.Tensor:
    """As `gated_delta_retrieve`, in the memory's dtype."""
    return torch.einsum("hgtd,hde->hgte", _unit(query_HGTD.to(memory_HDE.dtype)), memory_HDE)


def gated_delta_update_reference(
    memory_HDE: torch.Tensor,
    key_HTD: torch.Tensor,
    value_HTE: torch.Tensor,
    decay_HT: torch.Tensor,
    strength_HT: torch.Tensor,
) -> None:
    """As `gated_delta_update`, in the memory's dtype."""
    dtype = memory_HDE.dtype
    is_written = (strength_HT > 0)[..., None]
    key, value = key_HTD.to(dtype).where(is_written, 0), value_HTE.to(dtype).where(is_written, 0)
    decay, strength, key = decay_HT.to(dtype), strength_HT.to(dtype), _unit(key)
    for token in range(key.shape[1]):
        memory_HDE *= decay[:, token, None, None]
        answer_HE = torch.einsum("hd,hde->he", key[:, token], memory_HDE)
        error_HE = strength[:, token, None] * (value[:, token] - answer_HE)
        memory_HDE += key[:, token, :, None] * error_HE[:, None]


def _unit(x: torch.Tensor) -> torch.Tensor:
    return x / (x.square().sum(dim=-1, keepdim=True) + NORM_EPSILON).sqrt()


def _check_memory(memory_HDE: torch.Tensor, num_heads: int, head_dim: int) -> None:
    if memory_HDE.dim() != 3 or memory_HDE.shape[:2] != (num_heads, head_dim):
        raise ValueError(f"memory {tuple(memory_HDE.shape)} does not fit {num_heads} heads of {head_dim}")
    if memory_HDE.dtype != torch.float32:
        raise ValueError(f"memory must be float32, not {memory_HDE.dtype}")


def _check_dtype(name: str, tensor: torch.Tensor) -> None:
    if tensor.dtype not in (torch.float32, torch.bfloat16):
        raise ValueError(f"{name} must be float32 or bfloat16, not {tensor.dtype}")
