"""NAMM as published, claim by claim. The truth is a small float64 version written here from the equations alone."""

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pytest
import torch

from eunoe.decoder.config import Dtypes
from eunoe.decoder.decoder import Decoder
from eunoe.decoder.memory_state import MemorySettings, MemoryState
from eunoe.decoder.state_codec import decode, encode, state_digest
from eunoe.decoder.tiny import tiny_config
from eunoe.eviction.backward_attention import NUM_PARAMETERS, SLICES, BackwardAttention
from eunoe.eviction.namm import Namm, Normalization, age_embedding
from eunoe.eviction.spectrogram import AttentionSpectrogram

Array = npt.NDArray[np.float64]
DECAY = 0.99**16
EXACT = AttentionSpectrogram(is_packed=False)
HEADS, GROUP, DIM = 2, 3, 16


def true_attention(query: Array, key: Array, num_past: int) -> Array:
    """[H, G, T, N]: a softmax over the past and, causally, over the segment. The mask comes from both lengths alone."""
    score = np.einsum("hgtd,hnd->hgtn", query, key) / math.sqrt(query.shape[-1])
    score[..., np.arange(key.shape[1]) > num_past + np.arange(query.shape[2])[:, None]] = -math.inf
    weight = np.exp(score - score.max(-1, keepdims=True))
    return weight / weight.sum(-1, keepdims=True)


def true_update(attention: Array, mean: Array, tail: Array, *, has_birth_mask: bool = True) -> tuple[Array, Array]:
    """One update of the spectrogram: attention [H, G, T, N], mean [H, S, 17] and tail [H, S, 16] of the past."""
    num_past, num_columns, num_frames = mean.shape[1], attention.shape[3], attention.shape[2] // 16
    series = attention.mean(1).transpose(0, 2, 1)
    before = np.zeros((*series.shape[:2], 16))
    before[:, :num_past] = tail
    series = np.concatenate([before, series], axis=2)
    window = 0.5 - 0.5 * np.cos(2 * np.pi * np.arange(32) / 32)
    updated = np.zeros((len(series), num_columns, 17))
    updated[:, :num_past] = DECAY**num_frames * mean
    for frame in range(num_frames):
        is_born = (np.arange(num_columns) - num_past) // 16 <= frame
        magnitude = np.abs(np.fft.rfft(series[:, :, 16 * frame : 16 * frame + 32] * window))
        if has_birth_mask:
            magnitude *= is_born[:, None]
        updated += (1 - DECAY) * DECAY ** (num_frames - 1 - frame) * magnitude
    return updated, series[:, :, -16:]


def true_scores(parameters: Array, x: Array) -> Array:
    """Scores of one head's slots, x [n, 25]."""
    ends = np.cumsum([25 * 96, 96, 32 * 50, 50, 25, 1])
    qkv_weight, qkv_bias, out_weight, out_bias, weight, bias = np.split(parameters, ends[:-1])
    query, key, value = np.split(x @ qkv_weight.reshape(25, 96) + qkv_bias, 3, axis=1)
    score = query @ key.T / math.sqrt(32)
    score[np.tril_indices(len(x), -1)] = -math.inf
    weights = np.exp(score - score.max(1, keepdims=True))
    seen = weights / weights.sum(1, keepdims=True) @ value
    residual, multiplier = np.split(seen @ out_weight.reshape(32, 50) + out_bias, 2, axis=1)
    scores: Array = (x * (1 + multiplier) + residual) @ weight + bias[0]
    return scores


def random(*shape: int, seed: int = 0) -> Array:
    return np.random.default_rng(seed).standard_normal(shape)


def some_parameters(scale: float = 0.3, seed: int = 7) -> torch.Tensor:
    return torch.from_numpy(scale * random(NUM_PARAMETERS, seed=seed)).float()


def single(array: Array) -> torch.Tensor:
    return torch.from_numpy(array).float()


class Slots:
    """Statistics of one layer's slots, driven pass by pass without a model."""

    def __init__(self, statistics: AttentionSpectrogram = EXACT) -> None:
        self.statistics = statistics
        self.packed = torch.zeros(HEADS, 0, statistics.num_bytes, dtype=torch.uint8)
        self.key = np.zeros((HEADS, 0, DIM))

    def take(self, query: Array, key: Array) -> None:
        """A pass: queries [H, G, T, D] and keys [H, T, D]."""
        new = torch.zeros(HEADS, key.shape[1], self.statistics.num_bytes, dtype=torch.uint8)
        self.packed = torch.cat([self.packed, new], dim=1)
        self.statistics.observe(self.packed, single(query), single(key), single(self.key))
        self.key = np.concatenate([self.key, key], axis=1)

    def keep(self, kept: npt.NDArray[np.int64]) -> None:
        """Leave the slots of these indices [H, n]."""
        self.key = np.take_along_axis(self.key, kept[..., None], 1)
        self.packed = self.packed.gather(1, torch.from_numpy(kept)[..., None].expand(-1, -1, self.packed.shape[-1]))

    @property
    def mean(self) -> Array:
        return self.statistics.unpack(self.packed)[0].double().numpy()

    @property
    def tail(self) -> Array:
        tail = self.statistics.unpack(self.packed)[1]
        assert tail is not None
        return tail.double().numpy()


def a_pass(num_tokens: int, seed: int) -> tuple[Array, Array]:
    return 3 * random(HEADS, GROUP, num_tokens, DIM, seed=seed), random(HEADS, num_tokens, DIM, seed=seed + 100)


def as_published(parameters: torch.Tensor, statistics: AttentionSpectrogram = EXACT, threshold: float = 0.0) -> Namm:
    normalization = Normalization(torch.full((17,), 0.01), torch.full((17,), 0.02))
    return Namm(BackwardAttention(parameters), normalization, statistics, num_recent_tokens=1, threshold=threshold)


@dataclass(frozen=True)
class Shape:
    """What a choice needs to know of a memory without sink tokens."""

    num_slots: int
    num_sink_tokens: int = 0


def published_choice(scores_LHS: torch.Tensor) -> torch.Tensor:
    """What the policy keeps as it is published: by the threshold alone, in a budget that has room for all."""
    num_slots = scores_LHS.shape[-1]
    return as_published(torch.zeros(NUM_PARAMETERS)).keep_scored(scores_LHS, Shape(num_slots), num_slots)


def test_zero_parameters_keep_everything_and_change_nothing() -> None:
    decoder = Decoder.random(tiny_config(), seed=0, dtypes=Dtypes.float32())
    tokens = np.random.default_rng(0).integers(0, 512, 96)
    settings = MemorySettings(kv_budget_tokens=200, segment_length=32, num_sink_tokens=0)
    evicting, plain = decoder.new_state(settings), decoder.new_state(settings)
    policy = as_published(torch.zeros(NUM_PARAMETERS))

    logits = decoder.prefill(evicting, tokens, policy, logits="all")
    kept = policy.keep(evicting, evicting.num_slots)
    expected = decoder.prefill(plain, tokens, NothingKnown(), logits="all")

    assert (policy.scores(policy.features(evicting)) == 0).all()
    assert torch.equal(kept, torch.arange(96).expand(2, 2, 96))
    assert logits is not None
    assert expected is not None
    assert torch.equal(logits, expected)


class NothingKnown:
    """No policy at all: it is never asked."""

    name = "none/1"
    statistics = None

    def keep(self, window: object, budget: int) -> torch.Tensor:
        raise AssertionError


def test_4172_parameters_lie_in_the_published_order() -> None:
    parameters = some_parameters()
    x = random(40, 25)

    scores = BackwardAttention(parameters)(single(x)[None])

    assert NUM_PARAMETERS == 4172
    ends = [(0, 2400), (2400, 2496), (2496, 4096), (4096, 4146), (4146, 4171), (4171, 4172)]
    assert [(part.start, part.stop) for part in SLICES.values()] == ends
    expected = true_scores(parameters.double().numpy(), x.astype(np.float32).astype(np.float64))
    np.testing.assert_allclose(scores[0].numpy(), expected, rtol=1e-4, atol=1e-4)
    with pytest.raises(ValueError, match="4172"):
        BackwardAttention(parameters[:-1])


def test_the_first_window_begins_with_zeros_and_later_ones_with_the_tail() -> None:
    slots = Slots()
    (query, key), (query2, key2) = a_pass(64, 1), a_pass(64, 2)
    none = np.zeros((HEADS, 0, 17)), np.zeros((HEADS, 0, 16))

    slots.take(query, key)
    mean, tail = true_update(true_attention(query, key, 0), *none)
    np.testing.assert_allclose(slots.mean, mean, atol=1e-6)
    np.testing.assert_allclose(slots.tail, tail, atol=1e-6)

    slots.take(query2, key2)
    attention = true_attention(query2, np.concatenate([key, key2], axis=1), 64)
    np.testing.assert_allclose(slots.mean, true_update(attention, mean, tail)[0], atol=1e-6)
    without_tail = true_update(attention, mean, 0 * tail)[0]
    assert np.abs(slots.mean - without_tail)[:, :64].max() > 1e-4


def test_two_updates_of_512_equal_one_streaming_pass() -> None:
    slots = Slots()
    passes = [a_pass(512, 1), a_pass(512, 2)]

    for query, key in passes:
        slots.take(query, key)

    query, key = (
        np.concatenate(parts, axis=axis) for parts, axis in zip(zip(*passes, strict=True), (2, 1), strict=True)
    )
    none = np.zeros((HEADS, 0, 17)), np.zeros((HEADS, 0, 16))
    mean, tail = true_update(true_attention(query, key, 0), *none)
    np.testing.assert_allclose(slots.mean, mean, atol=1e-6)
    np.testing.assert_allclose(slots.tail, tail, atol=1e-6)


def test_a_new_token_has_only_the_frames_since_its_birth() -> None:
    slots = Slots()
    query, key = a_pass(64, 1)
    none = np.zeros((HEADS, 0, 17)), np.zeros((HEADS, 0, 16))
    attention = true_attention(query, key, 0)

    slots.take(query, key)

    # Nobody attends to a token before its birth, so that the mask of the paper takes nothing away.
    masked, unmasked = (true_update(attention, *none, has_birth_mask=has_mask)[0] for has_mask in (True, False))
    np.testing.assert_allclose(slots.mean, masked, atol=1e-6)
    np.testing.assert_array_equal(masked, unmasked)
    # The weights of the frames that a token of the last block lived through: one of four.
    series = np.concatenate([np.zeros((HEADS, 16)), attention.mean(1)[:, :, 63]], axis=1)[:, -32:]
    window = 0.5 - 0.5 * np.cos(2 * np.pi * np.arange(32) / 32)
    np.testing.assert_allclose(slots.mean[:, 63], (1 - DECAY) * np.abs(np.fft.rfft(series * window)), atol=1e-6)


def test_features_of_an_old_token_leave_the_scores_of_newer_ones_unchanged() -> None:
    network = BackwardAttention(some_parameters())
    x = single(random(1, 50, 25))
    changed = x.clone()
    changed[:, 20] += 5

    before, after = network(x), network(changed)

    assert torch.equal(before[:, 21:], after[:, 21:])
    assert (before[:, :21] != after[:, :21]).all()


def test_the_newest_token_is_always_kept() -> None:
    assert torch.equal(published_choice(torch.full((1, 3, 20), -5.0)), torch.full((1, 3, 1), 19))


def test_all_heads_keep_as_many_as_the_greediest_and_a_head_alone_exactly_its_own() -> None:
    scores = torch.from_numpy(random(4, 200, seed=3)).float() + torch.tensor([-1.0, -0.5, 0.0, 0.5])[:, None]
    above = [set(np.flatnonzero((row >= 0).numpy())) | {199} for row in scores]

    kept = published_choice(scores[None])[0]
    alone = [published_choice(row[None, None])[0, 0] for row in scores]

    assert kept.shape == (4, max(map(len, above)))
    for row, head, wanted in zip(scores, kept, above, strict=True):
        assert head.tolist() == sorted(head.tolist())
        assert wanted <= set(head.tolist())
        evicted = sorted(set(range(200)) - set(head.tolist()))
        assert not evicted or row[evicted].max() <= row[head[:-1]].min()
    for head, wanted in zip(alone, above, strict=True):
        assert head.tolist() == sorted(wanted)


def test_the_causal_mask_comes_from_the_numbers_of_slots_not_from_positions() -> None:
    """4,096 tokens are read and few slots are left: all of them are visible, in a pass and in a decode step."""
    decoder = Decoder.random(tiny_config(num_layers=1), seed=0, dtypes=Dtypes.float32())
    settings = MemorySettings(kv_budget_tokens=64, segment_length=128, num_sink_tokens=0)
    policy = as_published(some_parameters())
    state = decoder.new_state(settings)
    decoder.prefill(state, np.random.default_rng(0).integers(0, 512, 4096), policy)
    num_left = state.num_slots
    decoded = state.copy()

    in_a_pass = decoder.prefill(state, [7], policy, logits="last")
    in_a_step = decoder.decode([decoded], [7], policy)[0]
    blind = decoder.prefill(decoder.new_state(settings), [7], policy, logits="last")

    assert num_left <= 64
    assert blind is not None
    torch.testing.assert_close(in_a_step, in_a_pass, atol=1e-4, rtol=0)
    assert not torch.allclose(in_a_step, blind, atol=1e-2)
    query, key = a_pass(128, 1)
    past = random(HEADS, 1024, DIM, seed=9)
    attention = true_attention(query, np.concatenate([past, key], axis=1), 1024)
    slots = Slots()
    slots.key, slots.packed = past, torch.zeros(HEADS, 1024, EXACT.num_bytes, dtype=torch.uint8)
    slots.take(query, key)
    np.testing.assert_allclose(slots.tail, attention.mean(1).transpose(0, 2, 1)[..., -16:], atol=1e-6)
    assert (slots.tail[:, :1024] > 0).all()


def test_a_batch_of_ragged_lengths_equals_each_sequence_alone() -> None:
    lengths = [1, 37, 130, 64]
    x = single(random(4, 130, 25))

    for attention in ("dense", "blocks"):
        network = BackwardAttention(some_parameters(), attention)  # type: ignore[arg-type]
        together = network(x, torch.tensor(lengths))
        for row, length in enumerate(lengths):
            alone = network(x[row : row + 1, :length])
            torch.testing.assert_close(together[row, :length], alone[0], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("length", [16, 128, 512])
def test_the_length_of_a_pass_does_not_matter(length: int) -> None:
    query, key = a_pass(512, 1)
    whole, parts = Slots(), Slots()
    whole.take(query, key)

    for start in range(0, 512, length):
        parts.take(query[:, :, start : start + length], key[:, start : start + length])

    np.testing.assert_allclose(parts.mean, whole.mean, atol=1e-6)
    np.testing.assert_allclose(parts.tail, whole.tail, atol=1e-6)


@pytest.mark.parametrize("statistics", [EXACT, AttentionSpectrogram(), AttentionSpectrogram(16)], ids=lambda s: s.name)
def test_a_state_saved_mid_stream_goes_on_bit_for_bit(statistics: AttentionSpectrogram) -> None:
    dtypes = Dtypes(weights=torch.bfloat16, kv=torch.bfloat16, compute=torch.float32)
    decoder = Decoder.random(tiny_config(), seed=0, dtypes=dtypes)
    settings = MemorySettings(kv_budget_tokens=40, segment_length=32)
    policy = as_published(some_parameters(), statistics)
    tokens = np.random.default_rng(0).integers(0, 512, 320)
    state = decoder.new_state(settings, policy)
    decoder.prefill(state, tokens[:160], policy)

    restored: MemoryState = decode(encode(state), decoder.config, settings, dtypes)

    assert restored.statistics_LHSB is not None
    assert torch.equal(restored.statistics_LHSB, state.statistics_LHSB)
    for each in (state, restored):
        decoder.prefill(each, tokens[160:], policy)
    assert state_digest(restored, 0, 0) == state_digest(state, 0, 0)


def test_the_mean_over_a_group_before_buffering_equals_the_mean_after() -> None:
    query, key = a_pass(64, 1)
    attention = true_attention(query, key, 0)
    none = np.zeros((HEADS, 0, 17)), np.zeros((HEADS, 0, 16))

    # A group of one whose only member is the mean: what a buffer four times as small would hold.
    averaged = true_update(attention.mean(1, keepdims=True), *none)[0]
    slots = Slots()
    slots.take(query, key)

    np.testing.assert_allclose(averaged, true_update(attention, *none)[0], atol=1e-15)
    np.testing.assert_allclose(slots.mean, averaged, atol=1e-6)


def test_an_eviction_between_updates_takes_mean_and_tail_along() -> None:
    slots = Slots()
    (query, key), (query2, key2) = a_pass(64, 1), a_pass(32, 2)
    kept = np.stack([np.arange(0, 64, 3), [*range(1, 62, 3), 63]])
    slots.take(query, key)
    none = np.zeros((HEADS, 0, 17)), np.zeros((HEADS, 0, 16))
    mean, tail = (
        np.take_along_axis(part, kept[..., None], 1) for part in true_update(true_attention(query, key, 0), *none)
    )

    slots.keep(kept)
    slots.take(query2, key2)

    left = np.take_along_axis(key, kept[..., None], 1)
    attention = true_attention(query2, np.concatenate([left, key2], axis=1), kept.shape[1])
    np.testing.assert_allclose(slots.mean, true_update(attention, mean, tail)[0], atol=1e-6)


def test_ages_are_counted_from_the_newest_slot_in_original_positions() -> None:
    positions = torch.tensor([[[0, 5, 900, 1023]]], dtype=torch.int32)

    embedding = age_embedding(positions)

    frequencies = 50000.0 ** (-np.arange(4) / 4)
    angle = np.array([1023, 1018, 123, 0])[:, None] * frequencies
    np.testing.assert_allclose(embedding[0, 0], np.concatenate([np.sin(angle), np.cos(angle)], axis=1), atol=1e-6)
