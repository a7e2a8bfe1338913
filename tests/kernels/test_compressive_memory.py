import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from eunoe_kernels.compressive_memory import (
    _retrieve_triton,
    _update_triton,
    empty_memory,
    features_reference,
    retrieve,
    retrieve_reference,
    update,
    update_reference,
)

# KV heads, group size, tokens, key dim, value dim.
Shape = tuple[int, int, int, int, int]
SHAPES: list[Shape] = [(1, 1, 1, 16, 16), (3, 3, 37, 64, 64), (2, 1, 65, 32, 48), (1, 4, 5, 80, 80), (2, 2, 130, 1, 7)]
RULES: dict[str, dict[str, Any]] = {
    "linear": {"rule": "linear"},
    "delta": {"rule": "delta"},
    "delta+gamma": {"rule": "delta", "uses_gamma": True},
}
Batch = tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]


def tokens(shape: Shape, seed: int, dtype: torch.dtype = torch.float32, *, has_weights: bool = True) -> Batch:
    """Keys, values and write weights; a third of the tokens are padding: NaN, of weight 0."""
    num_heads, _, num_tokens, key_dim, value_dim = shape
    generator = torch.Generator().manual_seed(seed)
    key = 2 * torch.randn(num_heads, num_tokens, key_dim, generator=generator) - 0.5
    value = torch.randn(num_heads, num_tokens, value_dim, generator=generator)
    if not has_weights:
        return key.to(dtype), value.to(dtype), None
    weight = torch.rand(num_heads, num_tokens, generator=generator)
    is_padding = torch.rand(num_heads, num_tokens, generator=generator) < 1 / 3
    key[is_padding], value[is_padding], weight[is_padding] = math.nan, math.nan, 0
    return key.to(dtype), value.to(dtype), weight


def queries(shape: Shape, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return (2 * torch.randn(shape[:4], generator=torch.Generator().manual_seed(9))).to(dtype)


def a_memory(shape: Shape, dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, torch.Tensor]:
    """With tokens in it."""
    memory, normalizer = (state.to(dtype) for state in empty_memory(shape[0], shape[3], shape[4]))
    update_reference(memory, normalizer, *tokens(shape, 7, has_weights=False), rule="linear")
    return memory, normalizer


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_retrieval_equals_the_reference(shape: Shape, dtype: torch.dtype) -> None:
    given = (queries(shape, dtype), *a_memory(shape))

    out = retrieve(*given)

    assert out.dtype == torch.float32
    assert out.is_contiguous()
    torch.testing.assert_close(out, retrieve_reference(*given), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("has_weights", [True, False], ids=["weights", "no weights"])
@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_updates_equal_the_reference(shape: Shape, dtype: torch.dtype, rule: str, has_weights: bool) -> None:
    (memory, normalizer), (expected_memory, expected_normalizer) = a_memory(shape), a_memory(shape)

    for seed in range(3):
        batch = tokens(shape, seed, dtype, has_weights=has_weights)
        update(memory, normalizer, *batch, **RULES[rule])
        update_reference(expected_memory, expected_normalizer, *batch, **RULES[rule])

    torch.testing.assert_close(memory, expected_memory, atol=2e-4, rtol=1e-5)
    torch.testing.assert_close(normalizer, expected_normalizer, atol=1e-5, rtol=1e-5)


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU runs the kernel itself")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_triton_retrieval_equals_the_reference(shape: Shape, dtype: torch.dtype) -> None:
    given = (queries(shape, dtype), *a_memory(shape))

    torch.testing.assert_close(_retrieve_triton(*given), retrieve_reference(*given), atol=1e-5, rtol=1e-5)


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU runs the kernel itself")
@pytest.mark.parametrize("has_weights", [True, False], ids=["weights", "no weights"])
@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_triton_updates_equal_the_reference(shape: Shape, dtype: torch.dtype, rule: str, has_weights: bool) -> None:
    (memory, normalizer), (expected_memory, expected_normalizer) = a_memory(shape), a_memory(shape)
    batch = tokens(shape, 0, dtype, has_weights=has_weights)

    _update_triton(memory, normalizer, *batch, RULES[rule]["rule"], RULES[rule].get("uses_gamma", False))
    update_reference(expected_memory, expected_normalizer, *batch, **RULES[rule])

    torch.testing.assert_close(memory, expected_memory, atol=2e-4, rtol=1e-5)
    torch.testing.assert_close(normalizer, expected_normalizer, atol=1e-5, rtol=1e-5)


@pytest.mark.gpu
@pytest.mark.parametrize("rule", RULES)
def test_gpu_equals_the_reference(rule: str) -> None:
    shape = (2, 3, 512, 128, 128)
    state, expected = ([tensor.cuda() for tensor in a_memory(shape)] for _ in range(2))
    batch = [None if tensor is None else tensor.cuda() for tensor in tokens(shape, 0, torch.bfloat16)]
    query = queries(shape, torch.bfloat16).cuda()

    update(*state, *batch, **RULES[rule])
    update_reference(*expected, *batch, **RULES[rule])

    torch.testing.assert_close(state, expected, atol=1e-3, rtol=1e-4)
    torch.testing.assert_close(retrieve(query, *state), retrieve_reference(query, *expected), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("rule", RULES)
def test_padding_changes_no_bit(rule: str) -> None:
    memory, normalizer = a_memory(SHAPES[1])
    before = memory.clone(), normalizer.clone()
    key, value, weight = tokens(SHAPES[1], 0)
    assert weight is not None

    update(memory, normalizer, key.fill_(math.nan), value.fill_(math.nan), weight.zero_(), **RULES[rule])

    assert torch.equal(memory, before[0])
    assert torch.equal(normalizer, before[1])


def test_an_empty_memory_returns_zero() -> None:
    assert torch.equal(retrieve(queries(SHAPES[1]), *empty_memory(3, 64, 64)), torch.zeros(3, 3, 37, 64))


def test_the_first_batch_of_delta_is_linear() -> None:
    batch = tokens(SHAPES[1], 0)
    linear, delta = empty_memory(3, 64, 64), empty_memory(3, 64, 64)

    update(*linear, *batch, rule="linear")
    update(*delta, *batch, rule="delta")

    assert torch.equal(linear[0], delta[0])
    assert torch.equal(linear[1], delta[1])


def test_no_tokens_change_nothing() -> None:
    memory, normalizer = a_memory(SHAPES[1])
    before = memory.clone()

    update(memory, normalizer, torch.empty(3, 0, 64), torch.empty(3, 0, 64), None, rule="delta")

    assert torch.equal(memory, before)


@pytest.mark.parametrize(("rule", "share"), [("delta", 0.5), ("delta+gamma", 1.0), ("linear", 1.0)])
def test_a_token_written_a_hundred_times_is_read_back_as(rule: str, share: float) -> None:
    key, value, _ = tokens((1, 1, 1, 16, 16), 0, has_weights=False)
    memory, normalizer = empty_memory(1, 16, 16)

    for _ in range(100):
        update(memory, normalizer, key, value, torch.tensor([[0.7]]), **RULES[rule])

    torch.testing.assert_close(retrieve(key[:, None], memory, normalizer)[:, 0], share * value, atol=1e-2, rtol=1e-2)


def test_delta_with_gamma_replaces_the_value_of_a_key() -> None:
    key, old, _ = tokens((1, 1, 1, 16, 16), 0, has_weights=False)
    new = -2 * old
    memory, normalizer = empty_memory(1, 16, 16)

    for value in (old, new):
        update(memory, normalizer, key, value, None, rule="delta", uses_gamma=True)

    torch.testing.assert_close(retrieve(key[:, None], memory, normalizer)[:, 0], new, atol=1e-3, rtol=1e-3)


def test_delta_with_gamma_survives_batches_that_grow() -> None:
    shape = (1, 1, 512, 16, 16)
    memory, normalizer = empty_memory(1, 16, 16)
    key, value, _ = tokens(shape, 0, has_weights=False)
    update(memory, normalizer, key[:, :8], value[:, :8], None, rule="delta", uses_gamma=True)

    for _ in range(100):
        update(memory, normalizer, key, value, None, rule="delta", uses_gamma=True)

    # Values are within 5, and an average of them is too.
    assert retrieve(key[:, None], memory, normalizer).abs().max() < 5


def test_features_of_very_negative_keys_keep_their_digits() -> None:
    x = torch.linspace(-60, 3, 640)
    expected = torch.where(x > 0, x.double() + 1, x.double().exp()).float()
    key = x.view(1, 1, -1)
    memory, normalizer = empty_memory(1, 640, 1)

    update(memory, normalizer, key, torch.ones(1, 1, 1), None, rule="linear")

    torch.testing.assert_close(features_reference(x), expected, atol=0, rtol=1e-6)
    torch.testing.assert_close(normalizer[0], expected, atol=0, rtol=1e-6)


def test_retrieval_is_an_average_of_the_values_that_linear_wrote() -> None:
    key, _, weight = tokens(SHAPES[1], 0)
    value = torch.full((3, 37, 64), 2.5)
    memory, normalizer = empty_memory(3, 64, 64)

    update(memory, normalizer, key, value, weight, rule="linear")

    retrieved = retrieve(queries(SHAPES[1]), memory, normalizer)
    torch.testing.assert_close(retrieved, torch.full_like(retrieved, 2.5), atol=1e-4, rtol=0)


def test_a_memory_is_114_times_smaller_than_memorizing_transformers() -> None:
    # Table 2 of the paper: 12 layers, 8 heads of 128. Its peer caches 2,048 tokens a layer and 65K in one layer.
    num_layers, num_heads, head_dim = 12, 8, 128
    ours = num_layers * sum(state.numel() for state in empty_memory(num_heads, head_dim, head_dim))
    peer = 2 * head_dim * num_heads * (65_000 + 2048 * num_layers)

    assert ours == head_dim * (head_dim + 1) * num_heads * num_layers == 1_585_152
    assert round(peer / 1e6) == 183
    # The paper divides rounded millions: 183 by 1.6.
    assert round(peer / 1e6) / round(ours / 1e6, 1) == pytest.approx(114, abs=0.5)


def test_shapes_that_do_not_fit_are_refused() -> None:
    memory, normalizer = empty_memory(2, 16, 16)
    key, value, weight = tokens((2, 1, 8, 16, 16), 0)
    assert weight is not None

    with pytest.raises(ValueError, match="do not fit"):
        update(memory, normalizer, key[..., :-1], value, weight, rule="linear")
    with pytest.raises(ValueError, match="do not fit"):
        update(memory, normalizer, key, value[:, 1:], weight, rule="linear")
    with pytest.raises(ValueError, match="write weights"):
        update(memory, normalizer, key, value, weight[:, 1:], rule="linear")
    with pytest.raises(ValueError, match="normalizer"):
        update(memory, normalizer[:1], key, value, weight, rule="linear")
    with pytest.raises(ValueError, match="do not fit"):
        retrieve(queries((3, 1, 8, 16, 16)), memory, normalizer)


def test_a_memory_of_less_than_float32_is_refused() -> None:
    memory, normalizer = empty_memory(2, 16, 16)

    with pytest.raises(ValueError, match="float32"):
        retrieve(queries((2, 1, 8, 16, 16)), memory.bfloat16(), normalizer)


def test_unknown_rules_are_refused() -> None:
    memory, normalizer = empty_memory(2, 16, 16)
    batch = tokens((2, 1, 8, 16, 16), 0)

    with pytest.raises(ValueError, match="none of"):
        update(memory, normalizer, *batch, rule="hebb")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="gamma"):
        update(memory, normalizer, *batch, rule="linear", uses_gamma=True)


def a_stream(num_batches: int, key_dim: int) -> Iterator[Batch]:
    """Batches of 512 tokens of one head; mean sigma(key) is 1.35."""
    generator = torch.Generator().manual_seed(3)
    for _ in range(num_batches):
        key = 1.65 * torch.randn(1, 512, key_dim, generator=generator)
        value = torch.randn(1, 512, key_dim, generator=generator) + key.roll(1, dims=2)
        yield key, value, torch.sigmoid(key[..., 0])


@pytest.mark.parametrize("rule", RULES)
def test_a_hundred_thousand_tokens_are_those_of_float64(rule: str) -> None:
    single = empty_memory(1, 32, 32)
    memory, normalizer = (state.double() for state in empty_memory(1, 32, 32))

    for batch in a_stream(200, 32):
        update(*single, *batch, **RULES[rule])
        update_reference(memory, normalizer, *batch, **RULES[rule])

    query = batch[0][:, None]
    for got, expected in (
        (single[0], memory),
        (single[1], normalizer),
        (retrieve(query, *single), retrieve_reference(query, memory, normalizer)),
    ):
        assert (got.double() - expected).norm() <= 1e-5 * expected.norm()


def test_float16_overflows_and_bfloat16_stops_growing() -> None:
    states = {dtype: [state.to(dtype) for state in empty_memory(1, 4, 4)] for dtype in (torch.float16, torch.bfloat16)}
    single, frozen = empty_memory(1, 4, 4), torch.empty(0)

    for index, (key, value, _) in enumerate(a_stream(600, 4)):
        for state in states.values():
            update_reference(*state, key, value, None, rule="linear")
        update(*single, key, value, None, rule="linear")
        if index == 500:
            frozen = states[torch.bfloat16][1].clone()

    assert states[torch.float16][1].isinf().all()
    assert torch.equal(states[torch.bfloat16][1], frozen)
    assert single[1].min() > 1.4 * frozen.max()
    assert single[1].mean().item() == pytest.approx(600 * 512 * 1.35, rel=0.01)
