"""The trainable decoder with a compressive memory."""

import math

import pytest
import torch
from torch import Tensor

from eunoe.training.decoder.differentiable import (
    CompressiveAttention,
    NanoConfig,
    NanoDecoder,
    SegmentPlan,
    elu_features,
    update_delta,
)
from eunoe_kernels.compressive_memory import features_reference, update_reference

SEGMENT = 8


def _config(rule: str = "linear", *, uses_gamma: bool = False, has_write_gate: bool = True) -> NanoConfig:
    return NanoConfig(
        num_layers=3,
        hidden_size=24,
        num_query_heads=4,
        num_kv_heads=2,
        head_dim=8,
        intermediate_size=40,
        update_rule=rule,  # type: ignore[arg-type]
        uses_gamma=uses_gamma,
        has_write_gate=has_write_gate,
    )


def _model(config: NanoConfig) -> NanoDecoder:
    model = NanoDecoder(config)
    generator = torch.Generator().manual_seed(3)
    model.initialize(generator)
    for layer in model.layers:
        if config.has_write_gate:
            layer.self_attn.write_gate.weight.data.normal_(generator=generator)
    return model.double()


def _plan(config: NanoConfig, **options: object) -> SegmentPlan:
    plan = SegmentPlan(config, SEGMENT, **options)  # type: ignore[arg-type]
    plan.cosine, plan.sine = plan.cosine.double(), plan.sine.double()
    return plan


def _tokens(num_segments: int, seed: int = 0) -> Tensor:
    return torch.randint(0, 256, (2, num_segments * SEGMENT), generator=torch.Generator().manual_seed(seed))


RULES = [("linear", False, True), ("linear", False, False), ("delta", False, True), ("delta", True, True)]


@pytest.mark.parametrize(("rule", "uses_gamma", "has_write_gate"), RULES)
@torch.no_grad()
def test_segments_at_once_equal_segments_one_by_one(rule: str, uses_gamma: bool, has_write_gate: bool) -> None:
    config = _config(rule, uses_gamma=uses_gamma, has_write_gate=has_write_gate)
    model, tokens = _model(config), _tokens(6)
    scale = torch.rand(2, 6, 1, 1, 1, generator=torch.Generator().manual_seed(4)).double()
    whole, whole_states = model(tokens, _plan(config, write_scale=scale))
    states, parts = None, []
    for index in range(6):
        plan = _plan(config, write_scale=scale[:, index : index + 1])
        part, states = model(tokens[:, index * SEGMENT : (index + 1) * SEGMENT], plan, states)
        parts.append(part)
    torch.testing.assert_close(torch.cat(parts, dim=1), whole)
    assert states is not None
    for ours, theirs in zip(states, whole_states, strict=True):
        torch.testing.assert_close(ours.memory, theirs.memory)


@pytest.mark.parametrize("rule", ["linear", "delta"])
@torch.no_grad()
def test_attention_follows_the_equations_byte_by_byte(rule: str) -> None:
    config = _config(rule)
    attention: CompressiveAttention = _model(config).layers[1].self_attn
    hidden = torch.randn(1, 4 * SEGMENT, config.hidden_size, generator=torch.Generator().manual_seed(5)).double()
    attended, _ = attention(hidden, _plan(config), None)
    torch.testing.assert_close(attended, _attention_by_definition(attention, hidden))


def _attention_by_definition(attention: CompressiveAttention, hidden: Tensor) -> Tensor:
    """Equations 6 to 10 for one sequence, a query at a time; positions count from the sequence's start."""
    config = attention.config
    length, size = hidden.shape[1], config.head_dim
    queries = attention.q_proj(hidden)[0].view(length, config.num_query_heads, size)
    keys = attention.k_proj(hidden)[0].view(length, config.num_kv_heads, size)
    values = attention.v_proj(hidden)[0].view(length, config.num_kv_heads, size)
    outputs = torch.zeros_like(queries)
    for head in range(config.num_query_heads):
        kv_head = head // (config.num_query_heads // config.num_kv_heads)
        memory, normalizer = torch.zeros(size, size).double(), torch.zeros(size).double()
        gate = torch.sigmoid(attention.memory_gate[head])
        for segment in range(length // SEGMENT):
            if segment >= 2:
                written = range((segment - 2) * SEGMENT, (segment - 1) * SEGMENT)
                old_memory, old_normalizer = memory.clone(), normalizer.clone()
                for i in written:
                    feature, value = _feature(keys[i, kv_head]), values[i, kv_head]
                    weight = torch.sigmoid(
                        keys[i, kv_head] @ attention.write_gate.weight[kv_head] + attention.write_gate.bias[kv_head]
                    )
                    if config.update_rule == "delta" and segment > 2:
                        value = value - feature @ old_memory / (feature @ old_normalizer + 1e-6)
                    memory += weight * torch.outer(feature, value)
                    normalizer += weight * feature
            for i in range(segment * SEGMENT, (segment + 1) * SEGMENT):
                seen = range(max(0, (segment - 1) * SEGMENT), i + 1)
                turned = _turn(queries[i, head], i)
                scores = torch.stack([turned @ _turn(keys[j, kv_head], j) for j in seen]) / math.sqrt(size)
                local = torch.softmax(scores, 0) @ torch.stack([values[j, kv_head] for j in seen])
                feature = _feature(queries[i, head])
                if segment < 2:
                    outputs[i, head] = local
                else:
                    outputs[i, head] = gate * (feature @ memory) / (feature @ normalizer + 1e-6) + (1 - gate) * local
    return attention.o_proj(outputs.view(1, length, -1))


def _feature(x: Tensor) -> Tensor:
    return torch.where(x > 0, x + 1, x.exp())


def _turn(x: Tensor, position: int) -> Tensor:
    half = x.shape[0] // 2
    angles = position / 10_000.0 ** (torch.arange(half).float() / half).double()
    turned = torch.complex(x[:half], x[half:]) * torch.polar(torch.ones(half).double(), angles)
    return torch.cat([turned.real, turned.imag])


@torch.no_grad()
def test_without_memory_a_byte_beyond_the_windows_of_all_layers_does_not_matter() -> None:
    config = _config()
    model = _model(config)
    tokens = _tokens(9)
    other = tokens.clone()
    other[:, :SEGMENT] = (other[:, :SEGMENT] + 1) % 256
    last = slice(-SEGMENT, None)
    window_only = _plan(config, uses_memory=False)
    assert torch.equal(model(tokens, window_only)[0][:, last], model(other, window_only)[0][:, last])
    assert not torch.allclose(model(tokens, _plan(config))[0][:, last], model(other, _plan(config))[0][:, last])


@torch.no_grad()
def test_padding_is_never_written() -> None:
    config = _config()
    model, tokens = _model(config), _tokens(3)
    padded = torch.cat([tokens, torch.zeros(2, 2 * SEGMENT, dtype=torch.int64)], dim=1)
    is_real = torch.cat([torch.ones(1, 3), torch.zeros(1, 2)], dim=1).double()[:, :, None, None, None]
    _, states = model(padded, _plan(config, write_scale=is_real))
    _, more = model(torch.cat([tokens, _tokens(1, seed=9)], dim=1), _plan(config))
    for ours, theirs in zip(states, more, strict=True):
        torch.testing.assert_close(ours.memory, theirs.memory)


@torch.no_grad()
def test_writing_a_segment_more_often_equals_a_larger_write_scale() -> None:
    config = _config()
    attention: CompressiveAttention = _model(config).layers[0].self_attn
    segment = torch.randn(1, SEGMENT, config.hidden_size, generator=torch.Generator().manual_seed(1)).double()
    end = torch.randn(1, 2 * SEGMENT, config.hidden_size, generator=torch.Generator().manual_seed(2)).double()
    _, repeated = attention(torch.cat([segment] * 3 + [end], dim=1), _plan(config), None)
    scale = torch.tensor([3.0, 1.0, 1.0]).double().view(1, 3, 1, 1, 1)
    _, scaled = attention(torch.cat([segment, end], dim=1), _plan(config, write_scale=scale), None)
    torch.testing.assert_close(repeated.memory, scaled.memory)


@pytest.mark.parametrize("uses_gamma", [False, True])
@torch.no_grad()
def test_the_delta_rule_writes_as_the_kernel_that_serves_it(uses_gamma: bool) -> None:
    generator = torch.Generator().manual_seed(6)
    memory, expected, normalizer = torch.zeros(1, 2, 8, 9), torch.zeros(2, 8, 8), torch.zeros(2, 8)
    # The later batches write far more than the first.
    for num_tokens, weight in ((4, 0.1), (64, 0.9), (64, 0.9), (64, 0.9)):
        keys, values = (torch.randn(2, num_tokens, 8, generator=generator) for _ in range(2))
        weights = torch.full((2, num_tokens), weight)
        update_reference(expected, normalizer, keys, values, weights, rule="delta", uses_gamma=uses_gamma)
        features = elu_features(keys)[None]
        memory = update_delta(memory, features, values[None], weights[None, ..., None], uses_gamma=uses_gamma)
    torch.testing.assert_close(memory[0, ..., :-1], expected, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(memory[0, ..., -1], normalizer, atol=1e-4, rtol=1e-4)


def test_features_of_very_negative_numbers_keep_their_digits() -> None:
    x = torch.linspace(-60, 5, 200)
    torch.testing.assert_close(elu_features(x), features_reference(x.double()).float(), atol=0.0, rtol=1e-5)


def test_gates_and_write_gates_receive_gradients() -> None:
    config = _config("delta")
    model = _model(config)
    hidden, _ = model(_tokens(4), _plan(config))
    model.logits(hidden).square().mean().backward()
    for layer in model.layers:
        for parameter in (layer.self_attn.memory_gate, layer.self_attn.write_gate.weight):
            assert parameter.grad is not None
            assert parameter.grad.abs().min() > 0


def test_half_a_segment_is_refused() -> None:
    config = _config()
    with pytest.raises(ValueError, match="whole segments"):
        _model(config)(_tokens(2)[:, :-1], _plan(config))
