"""What every eviction policy promises."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from eunoe.eviction import DEFAULT_POLICY, POLICIES, EvictionPolicy, Namm, ScoringPolicy
from eunoe.eviction.backward_attention import BackwardAttention, num_parameters
from eunoe.eviction.namm import Normalization
from eunoe.eviction.novelty import NUM_NUMBERS, NovelSpectrogram, Novelty
from eunoe.eviction.spectrogram import AttentionSpectrogram

MakeWindow = Callable[..., Any]


def a_namm(num_features: int = 25, **settings: object) -> Namm:
    parameters = 0.3 * torch.randn(num_parameters(num_features), generator=torch.Generator().manual_seed(0))
    normalization = Normalization(torch.full((17,), 0.01), torch.full((17,), 0.02))
    attention = settings.pop("attention", "dense")
    return Namm(BackwardAttention(parameters, attention), normalization, **settings)  # type: ignore[arg-type]


NOVELTY = Novelty(torch.linspace(-1, 1, NUM_NUMBERS), torch.zeros(NUM_NUMBERS), torch.ones(NUM_NUMBERS))
ALL = {
    **POLICIES,
    "namm": a_namm(),
    "namm, cheaper": a_namm(attention="blocks", statistics=AttentionSpectrogram(32)),
    "namm, a threshold": a_namm(threshold=0.0),
    "namm, novelty": a_namm(26, statistics=NovelSpectrogram(NOVELTY)),
    "namm, spare slots": a_namm(num_spare_slots=16),
}
SIZES = [(200, 100), (300, 64), (65, 64), (40, 64), (64, 5), (7, 6)]


@pytest.fixture(params=ALL.values(), ids=ALL)
def policy(request: pytest.FixtureRequest) -> EvictionPolicy:
    chosen: EvictionPolicy = request.param
    return chosen


@pytest.mark.parametrize(("num_slots", "budget"), SIZES, ids=str)
def test_kept_slots_are_within_the_budget_sorted_and_unique(
    a_window: MakeWindow, policy: EvictionPolicy, num_slots: int, budget: int
) -> None:
    kept = policy.keep(a_window(policy, num_slots), budget)

    assert kept.dtype == torch.int64
    assert kept.shape[:2] == (2, 3)
    assert 0 < kept.shape[2] <= min(budget, num_slots)
    assert (kept.diff(dim=-1) > 0).all()
    assert 0 <= kept.min() <= kept.max() < num_slots


@pytest.mark.parametrize(("num_slots", "budget"), SIZES, ids=str)
def test_sinks_and_the_newest_slot_stay(
    a_window: MakeWindow, policy: EvictionPolicy, num_slots: int, budget: int
) -> None:
    kept = policy.keep(a_window(policy, num_slots), budget)

    assert (kept[..., :4] == torch.arange(4)).all()
    assert (kept[..., -1] == num_slots - 1).all()


def test_sinks_and_the_newest_slot_stay_among_infinite_scores(a_window: MakeWindow, policy: EvictionPolicy) -> None:
    if not isinstance(policy, ScoringPolicy):
        pytest.skip("it has no scores")
    window = a_window(policy, 200)

    kept = policy.keep_scored(torch.full((2, 3, 200), torch.inf), window, 100)

    assert (kept[..., :4] == torch.arange(4)).all()
    assert (kept[..., -1] == 199).all()


def test_a_recent_window_stays_but_at_most_half_of_the_budget(a_window: MakeWindow, policy: EvictionPolicy) -> None:
    for num_slots, budget, num_recent in ((200, 100, 42), (64, 30, 7)):
        kept = policy.keep(a_window(policy, num_slots), budget)

        assert (kept[..., -num_recent:] == torch.arange(num_slots - num_recent, num_slots)).all()


def test_the_same_window_gives_the_same_choice(a_window: MakeWindow, policy: EvictionPolicy) -> None:
    kept = [policy.keep(a_window(policy, 200), 100) for _ in range(2)]

    assert torch.equal(*kept)


def test_a_layer_is_judged_alike_alone_and_among_others(a_window: MakeWindow, policy: EvictionPolicy) -> None:
    window = a_window(policy, 200)
    together = policy.keep(window, 100)

    for layer in range(2):
        alone = policy.keep(window.layer(layer), 100)
        # A threshold lets all heads keep as many as the greediest of them.
        if alone.shape[2] == together.shape[2]:
            assert torch.equal(alone[0], together[layer])
        else:
            assert set(alone[0].flatten().tolist()) <= set(together[layer].flatten().tolist())


def test_a_window_is_left_as_it_was(a_window: MakeWindow, policy: EvictionPolicy) -> None:
    window, twin = (a_window(policy, 100) for _ in range(2))

    policy.keep(window, 50)

    assert torch.equal(window.keys_LHSD, twin.keys_LHSD)
    if window.statistics_LHSB is not None:
        assert torch.equal(window.statistics_LHSB, twin.statistics_LHSB)


def test_statistics_take_few_bytes_under_a_short_name(policy: EvictionPolicy) -> None:
    assert policy.statistics is None or policy.statistics.num_bytes <= 54
    assert policy.statistics is None or 0 < len(policy.statistics.name.encode()) <= 48


def test_policies_are_listed_by_name() -> None:
    assert POLICIES["sinks-recent/1"] is DEFAULT_POLICY
    assert all(name == policy.name for name, policy in POLICIES.items())
    assert len({policy.name for policy in ALL.values()}) == len(ALL)
