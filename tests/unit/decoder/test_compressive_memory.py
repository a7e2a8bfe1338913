from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from eunoe.decoder.checkpoint import load_weights, save_weights
from eunoe.decoder.config import CompressiveMemoryConfig, DecoderConfig, Dtypes
from eunoe.decoder.decoder import Decoder
from eunoe.decoder.memory_state import MemorySettings, MemoryState
from eunoe.decoder.tiny import tiny_config
from eunoe.decoder.weights import random_weights, weights_digest
from eunoe.eviction import DEFAULT_POLICY, HeavyHitter
from eunoe.training.decoder.differentiable import NanoConfig, NanoDecoder, SegmentPlan
from eunoe.training.decoder.export import export

LINEAR = CompressiveMemoryConfig(has_write_gate=True)
SETTINGS = MemorySettings(kv_budget_tokens=16, segment_length=16, num_sink_tokens=0)
PAPER = MemorySettings(kv_budget_tokens=0, segment_length=16, num_sink_tokens=0)
CONFIG = tiny_config(compressive_memory=LINEAR)


@pytest.fixture(scope="module")
def decoder() -> Decoder:
    return Decoder.random(CONFIG, seed=0, dtypes=Dtypes.float32())


def some_tokens(num_tokens: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, num_tokens)


def logits_of(decoder: Decoder, tokens: np.ndarray, settings: MemorySettings = SETTINGS) -> torch.Tensor:
    logits = decoder.prefill(decoder.new_state(settings), tokens, DEFAULT_POLICY, logits="all")
    assert logits is not None
    return logits


@pytest.mark.parametrize(
    "memory",
    [
        LINEAR,
        CompressiveMemoryConfig(),
        CompressiveMemoryConfig(update_rule="delta", has_write_gate=True),
        CompressiveMemoryConfig(update_rule="delta", has_write_gate=True, uses_gamma=True),
    ],
    ids=["linear gated", "linear", "delta gated", "gamma"],
)
def test_what_was_trained_is_what_is_served(tmp_path: Path, memory: CompressiveMemoryConfig) -> None:
    nano = NanoConfig(
        num_layers=3, hidden_size=32, num_query_heads=4, num_kv_heads=2, head_dim=16, intermediate_size=48,
        update_rule=memory.update_rule, has_write_gate=memory.has_write_gate, uses_gamma=memory.uses_gamma,
    )  # fmt: skip
    trained = NanoDecoder(nano)
    trained.initialize(torch.Generator().manual_seed(0))
    export(trained, tmp_path, segment_length=16, trained_length=512)
    tokens = some_tokens(16 * 9)

    served = logits_of(Decoder.load(tmp_path, Dtypes.float32()), tokens)

    hidden, _ = trained(torch.from_numpy(tokens)[None], SegmentPlan(nano, 16))
    torch.testing.assert_close(served, trained.logits(hidden)[0].detach(), atol=2e-4, rtol=1e-4)


def test_until_something_leaves_the_window_the_memory_says_nothing(decoder: Decoder) -> None:
    weights = random_weights(CONFIG, seed=0)
    plain = Decoder(replace(CONFIG, compressive_memory=None), replace(weights, memory_gates=()), Dtypes.float32())
    tokens = some_tokens(40)

    with_memory, without = logits_of(decoder, tokens), logits_of(plain, tokens)

    # The first 16 tokens leave at the second boundary, after token 32.
    torch.testing.assert_close(with_memory[:32], without[:32])
    assert not torch.allclose(with_memory[32:], without[32:], atol=1e-3)


def test_a_token_far_beyond_all_windows_still_matters(decoder: Decoder) -> None:
    tokens = some_tokens(16 * 20)
    other = tokens.copy()
    other[0] ^= 1

    assert not torch.equal(logits_of(decoder, tokens)[-1], logits_of(decoder, other)[-1])


def test_decoding_a_token_gives_what_folding_it_gives(decoder: Decoder) -> None:
    tokens = some_tokens(70)
    state = decoder.new_state(SETTINGS)
    decoder.prefill(state, tokens[:50], DEFAULT_POLICY)
    other = decoder.new_state(SETTINGS)
    decoder.prefill(other, tokens[:20], DEFAULT_POLICY)

    decoded = [decoder.decode([state, other], [token, 1], DEFAULT_POLICY)[0] for token in tokens[50:]]

    # Across the boundary after token 64, where tokens leave the window.
    torch.testing.assert_close(torch.stack(decoded), logits_of(decoder, tokens)[50:], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("settings", [PAPER, SETTINGS], ids=["no carried window", "carried window"])
def test_calls_cut_at_boundaries_equal_one_call_bit_for_bit(decoder: Decoder, settings: MemorySettings) -> None:
    tokens = some_tokens(16 * 6)
    state = decoder.new_state(settings)

    parts = [decoder.prefill(state, part, DEFAULT_POLICY, logits="all") for part in np.split(tokens, [32, 48])]

    assert torch.equal(torch.cat([part for part in parts if part is not None]), logits_of(decoder, tokens, settings))


def test_without_a_carried_window_all_that_was_read_is_in_the_memory(decoder: Decoder) -> None:
    state = decoder.new_state(PAPER)

    decoder.prefill(state, some_tokens(48), DEFAULT_POLICY)

    assert state.num_slots == 0
    assert state.normalizer is not None
    assert (state.normalizer > 0).all()


def test_what_is_kept_is_not_written_and_what_is_dropped_is_written_once() -> None:
    decoder = Decoder.random(tiny_config(compressive_memory=CompressiveMemoryConfig()), seed=0, dtypes=Dtypes.float32())
    state = decoder.new_state(MemorySettings(kv_budget_tokens=16, segment_length=16, num_sink_tokens=2))
    decoder.prefill(state, some_tokens(64), HeavyHitter())
    all_kept = decoder.new_state(MemorySettings(kv_budget_tokens=64, segment_length=16, num_sink_tokens=2))
    decoder.prefill(all_kept, some_tokens(64), DEFAULT_POLICY)
    assert state.normalizer is not None
    # Layer 0's keys do not depend on what is remembered, so its z and its window together hold every token once.
    dropped = torch.ones(2, 64, dtype=torch.bool).scatter_(1, state.positions_LHS[0].long(), False)
    keys_HSD = all_kept.keys_LHSD[0].float()
    features = keys_HSD.clamp(max=0).exp() + keys_HSD.clamp(min=0)
    torch.testing.assert_close(state.normalizer[0], (features * dropped[..., None]).sum(1), rtol=1e-4, atol=1e-4)


def test_a_copy_is_independent(decoder: Decoder) -> None:
    state = decoder.new_state(SETTINGS)
    decoder.prefill(state, some_tokens(64), DEFAULT_POLICY)
    assert state.memory is not None
    before = state.memory.clone()

    decoder.prefill(state.copy(), some_tokens(64, seed=1), DEFAULT_POLICY)

    assert torch.equal(state.memory, before)


def test_state_bytes_are_114_times_below_the_peers_at_the_papers_shape() -> None:
    # Table 2: 12 layers, 8 heads of 128; Memorizing Transformers cache 2,048 tokens a layer and 65K in one of them.
    config = replace(
        tiny_config(compressive_memory=CompressiveMemoryConfig()),
        num_layers=12, kv_source=(), num_query_heads=8, num_kv_heads=8, head_dim=128,
    )  # fmt: skip
    ours = MemoryState(config, MemorySettings(kv_budget_tokens=0, segment_length=1, num_sink_tokens=0), torch.float32)
    peer = 2 * 128 * 8 * (65_000 + 2048 * 12) * 4

    assert ours.state_bytes == 1_585_152 * 4
    # The paper divides rounded millions of parameters: 183 by 1.6.
    assert round(peer / 4e6) / round(ours.state_bytes / 4e6, 1) == pytest.approx(114, abs=0.5)


def test_saved_weights_are_read_back(tmp_path: Path) -> None:
    for memory in (LINEAR, CompressiveMemoryConfig(update_rule="delta")):
        config = tiny_config(compressive_memory=memory)
        weights = random_weights(config, seed=3)
        save_weights(tmp_path, config, weights)

        read = load_weights(tmp_path, torch.float32)

        assert weights_digest(config, read) == weights_digest(config, weights)


def test_other_gates_have_another_digest(decoder: Decoder) -> None:
    weights = random_weights(CONFIG, seed=0)
    gates = (replace(weights.memory_gates[0], mixing=weights.memory_gates[0].mixing + 1), *weights.memory_gates[1:])

    assert weights_digest(CONFIG, replace(weights, memory_gates=gates)) != decoder.model_digest


def test_gates_of_some_layers_are_refused() -> None:
    weights = random_weights(CONFIG, seed=0)

    with pytest.raises(ValueError, match="memory gates"):
        Decoder(CONFIG, replace(weights, memory_gates=weights.memory_gates[:1]), Dtypes.float32())


@pytest.mark.parametrize(
    "memory",
    [
        {"update_rule": "gated", "has_write_gate": True, "uses_gamma": False},
        {"update_rule": "linear", "has_write_gate": True, "uses_gamma": True},
        {"update_rule": "linear", "has_write_gate": True},
        {"update_rule": "linear", "has_write_gate": True, "uses_gamma": False, "forgets": True},
    ],
    ids=["unknown rule", "gamma of linear", "too little", "too much"],
)
def test_a_config_that_we_do_not_run_is_refused(memory: dict[str, object]) -> None:
    with pytest.raises(ValueError, match=r"update_rule|uses_gamma|compressive_memory"):
        DecoderConfig.from_hf(CONFIG.to_hf() | {"compressive_memory": memory})


def test_a_config_is_written_and_read_back() -> None:
    assert DecoderConfig.from_hf(CONFIG.to_hf()) == CONFIG


def test_a_plain_llama_without_a_window_is_refused() -> None:
    with pytest.raises(ValueError, match="remember nothing"):
        MemoryState(tiny_config(), PAPER, torch.float32)
