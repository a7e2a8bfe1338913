import math

import pytest
import torch

from eunoe_kernels.gated_delta import (
    gated_delta_retrieve,
    gated_delta_retrieve_reference,
    gated_delta_update,
    gated_delta_update_reference,
)

# KV heads, tokens, key dim, value dim.
Shape = tuple[int, int, int, int]
SHAPES: list[Shape] = [(1, 1, 16, 16), (3, 37, 64, 64), (2, 65, 32, 48), (2, 130, 1, 7)]


def tokens(shape: Shape, dtype: torch.dtype = torch.float32, seed: int = 0) -> tuple[torch.Tensor, ...]:
    """Keys, values, decays and strengths; a third of the tokens are padding: NaN, of strength 0 and decay 1."""
    num_heads, num_tokens, key_dim, value_dim = shape
    generator = torch.Generator().manual_seed(seed)
    key = 3 * torch.randn(num_heads, num_tokens, key_dim, generator=generator)
    value = torch.randn(num_heads, num_tokens, value_dim, generator=generator)
    decay = torch.rand(num_heads, num_tokens, generator=generator) ** 0.1
    strength = torch.rand(num_heads, num_tokens, generator=generator)
    is_padding = torch.rand(num_heads, num_tokens, generator=generator) < 1 / 3
    key[is_padding], value[is_padding] = math.nan, math.nan
    decay[is_padding], strength[is_padding] = 1, 0
    return key.to(dtype), value.to(dtype), decay, strength


def a_memory(shape: Shape) -> torch.Tensor:
    return torch.randn(shape[0], *shape[2:], generator=torch.Generator().manual_seed(5))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_updates_equal_the_reference(shape: Shape, dtype: torch.dtype) -> None:
    memory, expected = a_memory(shape), a_memory(shape)

    gated_delta_update(memory, *tokens(shape, dtype))
    gated_delta_update_reference(expected, *tokens(shape, dtype))

    torch.testing.assert_close(memory, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_retrieval_equals_the_reference(shape: Shape) -> None:
    query = torch.randn(shape[0], 3, *shape[1:3], generator=torch.Generator().manual_seed(1))

    out = gated_delta_retrieve(query, a_memory(shape))

    torch.testing.assert_close(out, gated_delta_retrieve_reference(query, a_memory(shape)), atol=1e-5, rtol=1e-5)


def test_padding_changes_no_bit() -> None:
    memory = a_memory(SHAPES[1])
    key, value, decay, strength = tokens(SHAPES[1])

    gated_delta_update(
        memory, torch.full_like(key, math.nan), torch.full_like(value, math.nan), torch.ones_like(decay), 0 * strength
    )

    assert torch.equal(memory, a_memory(SHAPES[1]))


def test_a_full_write_replaces_the_value_of_a_key_of_any_length() -> None:
    key = torch.randn(1, 1, 32, generator=torch.Generator().manual_seed(1))
    one, memory = torch.ones(1, 1), torch.zeros(1, 32, 32)

    for scale, value in ((5.0, 2.0), (0.1, -3.0)):
        gated_delta_update(memory, scale * key, torch.full((1, 1, 32), value), one, one)

    torch.testing.assert_close(gated_delta_retrieve(7 * key[:, None], memory), torch.full((1, 1, 1, 32), -3.0))


def test_a_batch_in_two_halves_is_the_batch_bit_for_bit() -> None:
    whole, halves = a_memory(SHAPES[1]), a_memory(SHAPES[1])
    batch = tokens(SHAPES[1])

    gated_delta_update(whole, *batch)
    gated_delta_update(halves, *(tensor[:, :20] for tensor in batch))
    gated_delta_update(halves, *(tensor[:, 20:] for tensor in batch))

    assert torch.equal(whole, halves)


def test_no_decay_left_empties_the_memory() -> None:
    memory = a_memory(SHAPES[0])
    key, value, decay, strength = tokens(SHAPES[0])

    gated_delta_update(memory, key, value, 0 * decay, 0 * strength)

    assert torch.equal(memory, torch.zeros_like(memory))


def test_shapes_and_dtypes_that_do_not_fit_are_refused() -> None:
    key, value, decay, strength = tokens((2, 8, 16, 16))
    memory = torch.zeros(2, 16, 16)

    with pytest.raises(ValueError, match="do not fit"):
        gated_delta_update(memory, key[..., 1:], value, decay, strength)
    with pytest.raises(ValueError, match="must be"):
        gated_delta_update(memory, key, value, decay[:, 1:], strength)
    with pytest.raises(ValueError, match="float32"):
        gated_delta_update(memory.double(), key, value, decay, strength)
    with pytest.raises(ValueError, match="contiguous"):
        gated_delta_update(memory.transpose(1, 2), key, value, decay, strength)
    with pytest.raises(ValueError, match="do not fit"):
        gated_delta_retrieve(torch.zeros(1, 1, 4, 16), memory)
