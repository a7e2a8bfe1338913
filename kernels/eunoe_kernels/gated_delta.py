"""The gated delta rule: a compressive memory without a normalizer, which can forget.

After "Gated Delta Networks" (Yang et al. 2024, arXiv:2412.06464, eq. 10), token by token, with keys of length 1:

    M_t = a_t (I - b_t k_t^T k_t) M_{t-1} + b_t k_t^T v_t        retrieve: q M, queries of length 1

What is stored under a key is replaced by a share b (strength) of its new value, and all else fades by a (decay). The
eigenvalues of a (I - b k^T k) lie between 0 and 1, so nothing grows, however many tokens are written.

Shape suffixes: H KV head, G query head of a KV head's group, T token, D key dim, E value dim.
"""

from typing import Any

import numba
import torch

# Of a key's or query's squared length, so that a key of zeros stores nothing instead of NaN.
LENGTH_EPSILON = 1e-12


def gated_delta_retrieve(query_HGTD: torch.Tensor, memory_HDE: torch.Tensor) -> torch.Tensor:
    """What the memory returns for each query.

    Args:
        query_HGTD: Queries before rotary positions, of any length, float32 or bfloat16.
        memory_HDE: M, float32.

    Returns:
        float32 [H, G, T, E].

    Raises:
        ValueError: If shapes do not agree, or M is not float32.
    """
    num_heads, group_size, num_tokens, key_dim = query_HGTD.shape
    if (num_heads, key_dim) != memory_HDE.shape[:2]:
        raise ValueError(f"queries {tuple(query_HGTD.shape)} do not fit a memory {tuple(memory_HDE.shape)}")
    _check_dtype(memory_HDE)
    unit_HRD = _unit_length(query_HGTD.float()).view(num_heads, group_size * num_tokens, key_dim)
    return torch.bmm(unit_HRD, memory_HDE).view(num_heads, group_size, num_tokens, memory_HDE.shape[2])


def gated_delta_update(
    memory_HDE: torch.Tensor,
    key_HTD: torch.Tensor,
    value_HTE: torch.Tensor,
    decay_HT: torch.Tensor,
    strength_HT: torch.Tensor,
) -> None:
    """Write tokens into M in their order, in place.

    Args:
        memory_HDE: M, float32, contiguous, on the CPU.
        key_HTD: Keys before rotary positions, of any length, float32 or bfloat16; `value_HTE` their values.
        decay_HT: a, 0 to 1: what stays of everything stored before. 1 for padding.
        strength_HT: b, 0 to 1. At 0 the key and value contribute nothing, even if they are NaN: padding.

    Raises:
        ValueError: If shapes do not agree, or M is not float32, contiguous and on the CPU.
    """
    num_heads, key_dim, value_dim = memory_HDE.shape
    num_tokens = key_HTD.shape[1]
    if key_HTD.shape != (num_heads, num_tokens, key_dim) or value_HTE.shape != (num_heads, num_tokens, value_dim):
        found = f"keys {tuple(key_HTD.shape)} and values {tuple(value_HTE.shape)}"
        raise ValueError(f"{found} do not fit a memory {tuple(memory_HDE.shape)}")
    if not decay_HT.shape == strength_HT.shape == (num_heads, num_tokens):
        found = f"decays {tuple(decay_HT.shape)} and strengths {tuple(strength_HT.shape)}"
        raise ValueError(f"{found} must be {(num_heads, num_tokens)}")
    _check_dtype(memory_HDE)
    if not memory_HDE.is_contiguous() or memory_HDE.device.type != "cpu":
        raise ValueError("memory must be contiguous and on the CPU")
    unit_HTD = _unit_length(key_HTD.float()).numpy()
    value, decay, strength = (tensor.float().numpy() for tensor in (value_HTE, decay_HT, strength_HT))
    _write_tokens(memory_HDE.numpy(), unit_HTD, value, decay, strength)


def _check_dtype(memory_HDE: torch.Tensor) -> None:
    if memory_HDE.dtype != torch.float32:
        raise ValueError(f"memory must be float32, not {memory_HDE.dtype}")


def _unit_length(x: torch.Tensor) -> torch.Tensor:
    return x * (x.square().sum(dim=-1, keepdim=True) + LENGTH_EPSILON).rsqrt()


def gated_delta_retrieve_reference(query_HGTD: torch.Tensor, memory_HDE: torch.Tensor) -> torch.Tensor:
    """As `gated_delta_retrieve`, in the memory's own dtype."""
    return torch.einsum("hgtd,hde->hgte", _unit_length(query_HGTD.to(memory_HDE.dtype)), memory_HDE)


def gated_delta_update_reference(
    memory_HDE: torch.Tensor,
    key_HTD: torch.Tensor,
    value_HTE: torch.Tensor,
    decay_HT: torch.Tensor,
    strength_HT: torch.Tensor,
) -> None:
    """As `gated_delta_update`, in the memory's own dtype: the equation with its matrices, a token at a time."""
    dtype = memory_HDE.dtype
    identity = torch.eye(memory_HDE.shape[1], dtype=dtype)
    for head in range(memory_HDE.shape[0]):
        for token in range(key_HTD.shape[1]):
            decay, strength = decay_HT[head, token].to(dtype), strength_HT[head, token].to(dtype)
            transition, written = identity, torch.zeros_like(memory_HDE[head])
            if strength != 0:
                key = _unit_length(key_HTD[head, token].to(dtype))
                transition = identity - strength * torch.outer(key, key)
                written = strength * torch.outer(key, value_HTE[head, token].to(dtype))
            memory_HDE[head] = decay * transition @ memory_HDE[head] + written


@numba.njit(cache=True, nogil=True)
def _write_tokens(memory: Any, key: Any, value: Any, decay: Any, strength: Any) -> None:
    """Two passes over M a token, each along rows: what the key returns, then decay and a write of rank 1."""
    num_heads, key_dim, value_dim = memory.shape
    stored = memory[0, 0].copy()
    for head in range(num_heads):
        for token in range(key.shape[1]):
            kept = decay[head, token]
            share = strength[head, token]
            if share == 0:
                for row in range(key_dim):
                    for column in range(value_dim):
                        memory[head, row, column] *= kept
                continue
            stored[:] = 0
            for row in range(key_dim):
                at_key = key[head, token, row]
                for column in range(value_dim):
                    stored[column] += at_key * memory[head, row, column]
            for column in range(value_dim):
                stored[column] = share * (value[head, token, column] - kept * stored[column])
            for row in range(key_dim):
                at_key = key[head, token, row]
                for column in range(value_dim):
                    memory[head, row, column] = kept * memory[head, row, column] + at_key * stored[column]
