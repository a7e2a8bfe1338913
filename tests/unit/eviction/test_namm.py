from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from eunoe.decoder.config import Dtypes
from eunoe.decoder.decoder import Decoder
from eunoe.decoder.memory_state import MemorySettings
from eunoe.decoder.state_codec import state_digest
from eunoe.decoder.tiny import tiny_config
from eunoe.eviction import Namm, SinksRecent
from eunoe.eviction.backward_attention import NUM_PARAMETERS, BackwardAttention
from eunoe.eviction.namm import Normalization
from eunoe.eviction.spectrogram import AttentionSpectrogram

MakeWindow = Callable[..., Any]
SETTINGS = MemorySettings(kv_budget_tokens=48, segment_length=32, num_sink_tokens=4)


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def a_namm(seed: int = 0, **settings: Any) -> Namm:
    normalization = Normalization(torch.full((17,), 0.01), torch.full((17,), 0.02))
    settings = {"num_recent_tokens": 8, "statistics": AttentionSpectrogram()} | settings
    return Namm(BackwardAttention(0.3 * random(NUM_PARAMETERS, seed=seed)), normalization, **settings)


@pytest.fixture(scope="module")
def decoder() -> Decoder:
    return Decoder.random(tiny_config(), seed=0, dtypes=Dtypes.float32())


def test_an_untrained_namm_keeps_what_sinks_and_recent_do(a_window: MakeWindow) -> None:
    policy = Namm.untrained()
    window = a_window(policy, 200)

    assert torch.equal(policy.keep(window, 100), SinksRecent().keep(window, 100))


def test_the_best_scores_stay(a_window: MakeWindow) -> None:
    policy = a_namm()
    window = a_window(policy, 200)

    kept, scores = policy.keep(window, 100), policy.scores(policy.features(window))

    is_kept = torch.zeros_like(scores, dtype=torch.bool).scatter_(2, kept, value=True)
    free = slice(4, 192)
    for head_scores, head_kept in zip(scores[..., free].flatten(0, 1), is_kept[..., free].flatten(0, 1), strict=True):
        assert head_kept.sum() == 100 - 4 - 8
        assert head_scores[head_kept].min() >= head_scores[~head_kept].max()


def test_slots_stay_within_budget_and_segment_at_every_step(decoder: Decoder) -> None:
    policy = a_namm()
    state = decoder.new_state(SETTINGS, policy)

    for token in np.random.default_rng(0).integers(0, 512, 300):
        decoder.decode([state], [int(token)], policy)

        assert state.num_slots <= SETTINGS.kv_budget_tokens + SETTINGS.segment_length
        if state.num_tokens % SETTINGS.segment_length == 0:
            assert state.num_slots <= SETTINGS.kv_budget_tokens
    assert (state.positions_LHS[..., :4] == torch.arange(4)).all()


def test_heads_keep_different_tokens(decoder: Decoder) -> None:
    policy = a_namm()
    state = decoder.new_state(SETTINGS, policy)

    decoder.prefill(state, np.random.default_rng(0).integers(0, 512, 320), policy)

    heads = {tuple(row.tolist()) for row in state.positions_LHS.flatten(0, 1)}
    assert len(heads) == 4


@pytest.mark.parametrize("num_observed_queries", [None, 128])
def test_packed_statistics_take_at_most_54_bytes_and_lose_little(num_observed_queries: int | None) -> None:
    statistics = AttentionSpectrogram(num_observed_queries)
    exact = replace(statistics, is_packed=False)
    means = []
    for layout in (statistics, exact):
        slots = torch.zeros(2, 900, layout.num_bytes, dtype=torch.uint8)
        for start in (0, 300, 600):
            query, key = 3 * random(2, 3, 300, 16, seed=start), random(2, 900, 16)
            layout.observe(slots[:, : start + 300], query, key[:, start : start + 300], key[:, :start])
        means.append(layout.unpack(slots)[0])

    packed, expected = means
    assert statistics.num_bytes <= 54
    error = (packed - expected).norm(dim=-1) / expected.norm(dim=-1)
    assert error.max() < 0.01


def test_few_observed_queries_are_the_newest_with_their_weights() -> None:
    query, key = 3 * random(1, 2, 256, 16), random(1, 256, 16)
    few, silent = AttentionSpectrogram(64, is_packed=False), AttentionSpectrogram(is_packed=False)
    seen = torch.zeros(1, 256, few.num_bytes, dtype=torch.uint8)
    expected = torch.zeros(1, 256, silent.num_bytes, dtype=torch.uint8)

    few.observe(seen, query, key, key[:, :0])
    # Frames of the first 192 queries are seen, and then forgotten all but the half frame that goes on.
    silent.observe(expected[:, :192], query[:, :, :192], key[:, :192], key[:, :0])
    silent.unpack(expected)[0].zero_()
    silent.observe(expected, query[:, :, 192:], key[:, 192:], key[:, :192])

    torch.testing.assert_close(few.unpack(seen)[0], silent.unpack(expected)[0], atol=1e-7, rtol=1e-5)


@pytest.mark.parametrize("num_tokens", [64, 79, 80, 81, 95, 96, 97, 112])
def test_of_few_observed_queries_the_last_ones_count_however_long_the_pass(num_tokens: int) -> None:
    query, key = 3 * random(1, 2, 112, 16), random(1, 112, 16)
    few, all_of_them = AttentionSpectrogram(64, is_packed=False), AttentionSpectrogram(is_packed=False)
    seen, expected = (torch.zeros(1, 112, each.num_bytes, dtype=torch.uint8) for each in (few, all_of_them))
    start = 112 - num_tokens

    few.observe(seen, query[:, :, start:], key[:, start:], key[:, :start])
    # The half frame before the 64 queries is theirs too, where the pass has it.
    half = 16 if num_tokens >= 80 else 0
    all_of_them.observe(expected[:, :48], query[:, :, 48 - half : 48], key[:, 48 - half : 48], key[:, : 48 - half])
    all_of_them.unpack(expected)[0].zero_()
    all_of_them.observe(expected, query[:, :, 48:], key[:, 48:], key[:, :48])

    torch.testing.assert_close(few.unpack(seen)[0], all_of_them.unpack(expected)[0], atol=1e-7, rtol=1e-5)


def test_a_pass_shorter_than_a_frame_is_not_seen(decoder: Decoder) -> None:
    policy = a_namm()
    state = decoder.new_state(SETTINGS, policy)
    decoder.prefill(state, range(64), policy)
    assert state.statistics_LHSB is not None
    before = state.statistics_LHSB.clone()

    decoder.prefill(state, range(5), policy)
    decoder.decode([state], [7], policy)

    assert torch.equal(state.statistics_LHSB[:, :, : before.shape[2]], before)
    assert (state.statistics_LHSB[:, :, before.shape[2] :] == 0).all()


def test_block_attention_ranks_slots_much_as_dense_attention_does() -> None:
    feature = random(4, 600, 25, seed=3).cumsum(dim=1) / 10
    parameters = 0.2 * random(NUM_PARAMETERS, seed=1)

    dense, blocks = (BackwardAttention(parameters, kind)(feature) for kind in ("dense", "blocks"))  # type: ignore[arg-type]

    ranks = [scores.argsort(dim=-1).argsort(dim=-1).float() for scores in (dense, blocks)]
    for a, b in zip(*ranks, strict=True):
        assert torch.corrcoef(torch.stack([a, b]))[0, 1] > 0.9
    # The newest block sees only itself, and that exactly: 600 slots are four blocks of 128 and the oldest 88.
    torch.testing.assert_close(blocks[:, -128:], dense[:, -128:], atol=1e-4, rtol=1e-4)


def test_spare_slots_halve_the_number_of_scorings(decoder: Decoder) -> None:
    settings = MemorySettings(kv_budget_tokens=80, segment_length=32)
    counts = {}
    for num_spare_slots in (0, 32):
        policy = Counting(a_namm(num_spare_slots=num_spare_slots))
        state = decoder.new_state(settings, policy)
        for token in np.random.default_rng(0).integers(0, 512, (20, 32)):
            decoder.prefill(state, token, policy)
            assert state.num_slots <= settings.kv_budget_tokens
        counts[num_spare_slots] = policy.num_calls

    assert counts == {0: 18, 32: 9}


class Counting:
    """A policy that counts how often it is asked."""

    def __init__(self, inner: Namm) -> None:
        self.inner, self.name, self.statistics = inner, inner.name, inner.statistics
        self.num_calls = 0

    def keep(self, window: Any, budget: int) -> torch.Tensor:
        self.num_calls += 1
        return self.inner.keep(window, budget)


def test_below_a_threshold_slots_leave_within_the_budget(a_window: MakeWindow) -> None:
    policy = a_namm(threshold=-1.0)
    window = a_window(policy, 200)
    num_above = (policy.scores(policy.features(window))[..., 4:-8] >= -1).sum(dim=-1).max() + 12

    kept = policy.keep(window, 190)

    assert 64 < num_above < 190
    assert kept.shape[-1] == num_above
    assert policy.keep(window, 64).shape[-1] == 64


def test_the_name_tells_parameters_constants_and_settings_apart() -> None:
    policies = [
        a_namm(),
        a_namm(seed=1),
        a_namm(num_recent_tokens=9),
        a_namm(threshold=0.0),
        a_namm(statistics=AttentionSpectrogram(64)),
        replace(a_namm(), normalization=Normalization(torch.zeros(17), torch.ones(17))),
    ]

    assert len({policy.name for policy in policies}) == len(policies)
    assert a_namm().name == a_namm().name


def test_another_policys_statistics_start_from_zero(decoder: Decoder) -> None:
    state = decoder.new_state(SETTINGS)
    plain, policy = SinksRecent(), a_namm()
    tokens = np.random.default_rng(0).integers(0, 512, 64)
    decoder.prefill(state, tokens, plain)
    without = state_digest(state, 0, 0)
    assert state.statistics is None

    decoder.prefill(state, [], policy)
    assert state.statistics_LHSB is not None
    assert (state.statistics_LHSB == 0).all()
    with_zeros = state_digest(state, 0, 0)
    decoder.prefill(state, [], plain)

    assert state_digest(state, 0, 0) == without != with_zeros


def test_settings_that_cannot_work_are_refused() -> None:
    with pytest.raises(ValueError, match="multiple of 16"):
        AttentionSpectrogram(num_observed_queries=100)
    with pytest.raises(ValueError, match="17 bins"):
        Normalization(torch.zeros(16), torch.ones(17))
    with pytest.raises(ValueError, match="neither"):
        BackwardAttention(torch.zeros(NUM_PARAMETERS), "sparse")  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("num_recent_tokens", -1),
        ("num_recent_tokens", "8"),
        ("num_spare_slots", -20),
        ("num_spare_slots", 1.5),
        ("threshold", float("nan")),
        ("threshold", float("inf")),
        ("threshold", "high"),
    ],
)
def test_a_setting_that_would_break_streams_is_refused_with_its_name(name: str, value: Any) -> None:
    with pytest.raises(ValueError, match=f"{name}={value!r}"):
        a_namm(**{name: value})
