import math

import pytest
import torch

from eunoe_kernels.attention_received import (
    _attention_received_triton,
    attention_received,
    attention_received_reference,
)
from eunoe_kernels.attention_spectrogram import (
    _attention_spectrogram_triton,
    attention_spectrogram,
    attention_spectrogram_reference,
)

# KV heads, group size, tokens, past slots, head dim, observed queries.
Shape = tuple[int, int, int, int, int, int]
SHAPES: list[Shape] = [
    (1, 1, 16, 0, 16, 16),
    (2, 3, 48, 100, 64, 48),
    (2, 1, 65, 1, 64, 64),
    (1, 4, 37, 65, 80, 32),
    (1, 2, 100, 63, 32, 80),
]
TOLERANCE = 1e-6


def an_input(
    shape: Shape, dtype: torch.dtype = torch.float32, past_dtype: torch.dtype | None = None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Queries, keys, and past keys that are the live part of a slab with NaN behind it."""
    num_heads, group_size, num_tokens, num_slots, head_dim, num_rows = shape
    generator = torch.Generator().manual_seed(0)

    def random(*sizes: int) -> torch.Tensor:
        return torch.randn(sizes, generator=generator)

    slab = torch.full((num_heads, num_slots + 7, head_dim), math.nan, dtype=past_dtype or dtype)
    slab[:, :num_slots] = random(num_heads, num_slots, head_dim)
    query = 2 * random(num_heads, group_size, num_rows, head_dim)
    return query.to(dtype), random(num_heads, num_tokens, head_dim).to(dtype), slab[:, :num_slots]


def a_tail(shape: Shape) -> torch.Tensor:
    return torch.rand(shape[0], shape[3], 16, generator=torch.Generator().manual_seed(1)) / 50


def cases() -> list[tuple[Shape, bool]]:
    return [(shape, has_tail) for shape in SHAPES for has_tail in (True, False) if has_tail or shape[5] > 16]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("shape", "has_tail"), cases(), ids=str)
def test_cpu_spectrogram_equals_the_reference(shape: Shape, has_tail: bool, dtype: torch.dtype) -> None:
    given = (*an_input(shape, dtype), a_tail(shape) if has_tail else None)

    for got, expected in zip(attention_spectrogram(*given), attention_spectrogram_reference(*given), strict=True):
        torch.testing.assert_close(got, expected, atol=TOLERANCE, rtol=1e-5)


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU runs the kernel itself")
@pytest.mark.parametrize(
    ("dtype", "past_dtype"),
    [(torch.float32, torch.float32), (torch.float32, torch.bfloat16), (torch.bfloat16, torch.bfloat16)],
    ids=str,
)
@pytest.mark.parametrize(("shape", "has_tail"), cases(), ids=str)
def test_triton_spectrogram_equals_the_reference(
    shape: Shape, has_tail: bool, dtype: torch.dtype, past_dtype: torch.dtype
) -> None:
    given = (*an_input(shape, dtype, past_dtype), a_tail(shape) if has_tail else None)

    got, expected = _attention_spectrogram_triton(*given), attention_spectrogram_reference(*given)

    for part, expected_part in zip(got, expected, strict=True):
        torch.testing.assert_close(part, expected_part, atol=TOLERANCE, rtol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_received_attention_equals_the_reference(shape: Shape, dtype: torch.dtype) -> None:
    given = an_input(shape, dtype)

    expected = attention_received_reference(*given)

    torch.testing.assert_close(attention_received(*given), expected, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(_attention_received_triton(*given), expected, atol=1e-5, rtol=1e-5)


def test_any_number_of_queries_can_be_summed() -> None:
    for num_rows in (1, 31, 33, 70):
        given = an_input((1, 2, 70, 20, 16, num_rows))

        expected = attention_received_reference(*given)

        torch.testing.assert_close(attention_received(*given), expected, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(_attention_received_triton(*given), expected, atol=1e-5, rtol=1e-5)


def test_scores_of_any_size_do_not_overflow() -> None:
    query, key, past = an_input((2, 3, 48, 20, 16, 48))
    given = (query * 1e4, key, past, None)

    expected, _ = attention_spectrogram_reference(*given)

    torch.testing.assert_close(attention_spectrogram(*given)[0], expected, atol=1e-4, rtol=0)
    torch.testing.assert_close(_attention_spectrogram_triton(*given)[0], expected, atol=1e-4, rtol=0)


def test_inputs_that_do_not_fit_are_refused() -> None:
    query, key, past = an_input((2, 3, 48, 20, 16, 48))

    with pytest.raises(ValueError, match="multiple of 16"):
        attention_spectrogram(query[:, :, :17], key, past, None)
    with pytest.raises(ValueError, match="at least 32"):
        attention_spectrogram(query[:, :, :16], key, past, None)
    with pytest.raises(ValueError, match="tail"):
        attention_spectrogram(query, key, past, torch.zeros(2, 19, 16))
    with pytest.raises(ValueError, match="48 queries of a segment of 47"):
        attention_received(query, key[:, :47], past)
    with pytest.raises(ValueError, match="do not fit"):
        attention_received(query, key, past[:1])


@pytest.mark.gpu
def test_gpu_equals_the_reference() -> None:
    shape = (3, 3, 512, 1024, 64, 512)
    given = [part.cuda() for part in (*an_input(shape), a_tail(shape))]

    for got, expected in zip(attention_spectrogram(*given), attention_spectrogram_reference(*given), strict=True):
        torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-4)
    expected = attention_received_reference(*given[:3])
    torch.testing.assert_close(attention_received(*given[:3]), expected, atol=1e-4, rtol=1e-4)
