"""The compiled decode step equals its PyTorch reference."""

import math
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from eunoe_kernels.decode_step import DecodeStep, StreamSlots, decode_step_reference

NUM_LAYERS, DIM, HEAD_DIM, FFN_DIM, VOCAB_SIZE, CAPACITY = 2, 64, 32, 160, 500, 1100
NORM_EPS = 1e-5
# Sums run in another order. In bfloat16 that can also round a stored key the other way: half a unit of its last place.
TOLERANCE = {torch.float32: 3e-5, torch.bfloat16: 2e-3}


class _Model:
    """Random weights of one shape, with the step and the reference over them."""

    def __init__(
        self, dtype: torch.dtype, num_query_heads: int = 6, num_kv_heads: int = 2, num_threads: int = 2
    ) -> None:
        generator = torch.Generator().manual_seed(0)
        qkv_dim = (num_query_heads + 2 * num_kv_heads) * HEAD_DIM

        def matrix(num_out: int, num_in: int) -> torch.Tensor:
            return (torch.randn(num_out, num_in, generator=generator) / math.sqrt(num_in)).to(dtype)

        def norm() -> torch.Tensor:
            return (1 + 0.1 * torch.randn(DIM, generator=generator)).to(dtype)

        def layer() -> SimpleNamespace:
            return SimpleNamespace(
                attention_norm=norm(),
                query_key_value=matrix(qkv_dim, DIM),
                attention_output=matrix(DIM, num_query_heads * HEAD_DIM),
                ffn_norm=norm(),
                gate_up=matrix(2 * FFN_DIM, DIM),
                ffn_down=matrix(DIM, FFN_DIM),
            )

        self.dtype = dtype
        self.heads = {"num_query_heads": num_query_heads, "num_kv_heads": num_kv_heads}
        self.weights = SimpleNamespace(
            embedding=matrix(VOCAB_SIZE, DIM),
            layers=[layer() for _ in range(NUM_LAYERS)],
            output_norm=norm(),
            output=matrix(VOCAB_SIZE, DIM),
        )
        self.step = DecodeStep(
            self.weights, **self.heads, head_dim=HEAD_DIM, norm_eps=NORM_EPS, kv_dtype=dtype, num_threads=num_threads
        )

    def reference(self, *arguments: object) -> torch.Tensor:
        return decode_step_reference(self.weights, *arguments, **self.heads, norm_eps=NORM_EPS)


def a_stream(model: _Model, num_slots: int, seed: int = 0) -> StreamSlots:
    """Random live slots; the rest of the slabs is NaN."""
    generator = torch.Generator().manual_seed(seed)

    def slab() -> torch.Tensor:
        full = torch.full((NUM_LAYERS, model.heads["num_kv_heads"], CAPACITY, HEAD_DIM), math.nan, dtype=model.dtype)
        full[:, :, :num_slots] = torch.randn(full[:, :, :num_slots].shape, generator=generator)
        return full

    return StreamSlots(keys=slab(), rotated_keys=slab(), values=slab(), num_slots=num_slots)


def a_copy(stream: StreamSlots) -> StreamSlots:
    slabs = {name: getattr(stream, name).clone() for name in ("keys", "rotated_keys", "values")}
    return replace(stream, **slabs)


def some_angles(num_streams: int) -> tuple[torch.Tensor, torch.Tensor]:
    angles = torch.randn(num_streams, HEAD_DIM // 2, generator=torch.Generator().manual_seed(1))
    return angles.cos(), angles.sin()


def assert_equals_reference(model: _Model, streams: list[StreamSlots]) -> None:
    token_ids = [(7 * index) % VOCAB_SIZE for index in range(len(streams))]
    expected_streams = [a_copy(stream) for stream in streams]
    tolerance = TOLERANCE[model.dtype]

    logits = model.step(token_ids, streams, *some_angles(len(streams)))

    expected = model.reference(token_ids, expected_streams, *some_angles(len(streams)))
    torch.testing.assert_close(logits, expected, atol=tolerance, rtol=0)
    for stream, expected_stream in zip(streams, expected_streams, strict=True):
        for name in ("keys", "rotated_keys", "values"):
            actual, wanted = getattr(stream, name), getattr(expected_stream, name)
            one_ulp = 2**-7 if model.dtype == torch.bfloat16 else 1e-5
            # A key that rounds the other way moves its rotated pair as far, however small that pair's numbers are.
            key_ulp = one_ulp * float(expected_stream.keys.nan_to_num().abs().max()) if name == "rotated_keys" else 0.0
            torch.testing.assert_close(actual, wanted, atol=max(tolerance, key_ulp), rtol=one_ulp, equal_nan=True)


@pytest.fixture(scope="module", params=[torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def model(request: pytest.FixtureRequest) -> _Model:
    return _Model(request.param)


@pytest.mark.parametrize("num_slots", [0, 1, 63, 200, 1024])
def test_one_stream_equals_the_reference(model: _Model, num_slots: int) -> None:
    assert_equals_reference(model, [a_stream(model, num_slots)])


@pytest.mark.parametrize("num_streams", [2, 3, 8, 16])
def test_streams_of_different_lengths_equal_the_reference(model: _Model, num_streams: int) -> None:
    assert_equals_reference(model, [a_stream(model, (67 * seed) % 700, seed) for seed in range(num_streams)])


@pytest.mark.parametrize(("num_query_heads", "num_kv_heads"), [(1, 1), (4, 2), (4, 1), (8, 1), (5, 1)])
def test_every_size_of_a_query_head_group_equals_the_reference(num_query_heads: int, num_kv_heads: int) -> None:
    model = _Model(torch.float32, num_query_heads, num_kv_heads)

    assert_equals_reference(model, [a_stream(model, 301)])


def test_logits_do_not_depend_on_the_number_of_threads() -> None:
    one, three = (_Model(torch.float32, num_threads=num_threads) for num_threads in (1, 3))
    streams = [a_stream(one, 300, seed) for seed in range(4)]

    logits = [model.step([1] * 4, [a_copy(s) for s in streams], *some_angles(4)) for model in (one, three)]

    torch.testing.assert_close(logits[0], logits[1], atol=1e-5, rtol=0)


def test_slots_beyond_the_new_one_are_not_touched(model: _Model) -> None:
    stream = a_stream(model, 5)

    model.step([3], [stream], *some_angles(1))

    for slab in (stream.keys, stream.rotated_keys, stream.values):
        assert not slab[:, :, :6].isnan().any()
        assert slab[:, :, 6:].isnan().all()


def test_a_full_slab_is_refused(model: _Model) -> None:
    stream = replace(a_stream(model, 5), num_slots=CAPACITY)

    with pytest.raises(ValueError, match="no free slot behind 1100 of 1100"):
        model.step([3], [stream], *some_angles(1))


def test_slabs_of_another_dtype_are_refused() -> None:
    stream = a_stream(_Model(torch.bfloat16), 5)

    with pytest.raises(ValueError, match=r"contiguous torch\.float32"):
        _Model(torch.float32).step([3], [stream], *some_angles(1))


@pytest.mark.parametrize("num_streams", [0, 17])
def test_too_few_or_many_streams_are_refused(model: _Model, num_streams: int) -> None:
    streams = [a_stream(model, 1)] * num_streams

    with pytest.raises(ValueError, match=f"{num_streams} streams, of 1 to 16"):
        model.step([1] * num_streams, streams, *some_angles(num_streams))
