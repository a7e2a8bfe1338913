"""Learning what marks the tokens that a question needs."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from eunoe.decoder.decoder import Decoder
from eunoe.decoder.memory_state import MemorySettings
from eunoe.decoder.tiny import tiny_config
from eunoe.eviction.novelty import NovelSpectrogram
from eunoe.training.novelty_training import NoveltyTraining, train_novelty
from eunoe.training.tasks.case import Case

TRAINING = NoveltyTraining(segment_length=64, num_unlearned_tokens=4, num_recent_tokens=8, num_observed_queries=32)
NEEDLE_TOKENS = 12


def a_case(seed: int, *, has_needle: bool = True) -> Case:
    """Forty words, in the middle of them a few of three others."""
    generator = np.random.default_rng(seed)
    context = generator.integers(0, 40, 192)
    start = int(generator.integers(10, 150))
    if has_needle:
        context[start : start + NEEDLE_TOKENS] = generator.integers(400, 403, NEEDLE_TOKENS)
    needles = ((start, start + NEEDLE_TOKENS),) if has_needle else ()
    nothing = np.zeros(1, dtype=np.int64)
    return Case(
        task="single",
        kind="others",
        haystack="book",
        is_held_out=False,
        context=context,
        question=nothing,
        answer=nothing,
        needles=needles,
    )


@pytest.fixture(scope="module")
def decoder() -> Decoder:
    return Decoder.random(tiny_config(), seed=0)


def test_what_is_of_another_sort_is_kept_in_contexts_never_seen(decoder: Decoder) -> None:
    policy = train_novelty(decoder, map(a_case, range(8)), replace(TRAINING, novelty=4.0))
    settings = MemorySettings(kv_budget_tokens=48, segment_length=64)

    kept = []
    for seed in range(100, 106):
        case = a_case(seed)
        state = decoder.new_state(settings, policy)
        decoder.prefill(state, case.context, policy)
        (needle,) = case.needles
        kept.append(torch.isin(torch.arange(*needle), state.positions_LHS[0, 0]).float().mean())

    # A fifth would be kept by chance.
    assert np.mean(kept) > 0.6


def test_equal_cases_make_equal_policies(decoder: Decoder) -> None:
    first, second = (train_novelty(decoder, map(a_case, range(3)), TRAINING) for _ in range(2))

    assert first.name == second.name
    assert isinstance(first.statistics, NovelSpectrogram)


@pytest.mark.parametrize(
    ("needles", "num_unlearned_tokens"),
    [((), 4), (((40, 52),), 64), (((128, 140),), 64), (((10, 180),), 64), (((90, 100),), 150)],
    ids=["no needle", "at the start", "at the end", "nothing else", "nothing left"],
)
def test_without_anything_to_find_between_the_ends_nothing_is_learned(
    decoder: Decoder, needles: tuple[tuple[int, int], ...], num_unlearned_tokens: int
) -> None:
    training = replace(TRAINING, num_unlearned_tokens=num_unlearned_tokens)

    with pytest.raises(ValueError, match="no case"):
        train_novelty(decoder, [replace(a_case(0), needles=needles)], training)


def test_without_protected_ends_the_whole_context_teaches(decoder: Decoder) -> None:
    training = replace(TRAINING, num_unlearned_tokens=0)

    policy = train_novelty(decoder, [replace(a_case(0), needles=((0, 4),))], training)

    assert isinstance(policy.statistics, NovelSpectrogram)


@pytest.mark.parametrize(
    ("name", "value"), [("attention", float("nan")), ("novelty", float("inf")), ("num_unlearned_tokens", -1)]
)
def test_settings_that_cannot_work_are_refused(name: str, value: Any) -> None:
    with pytest.raises(ValueError, match=f"{name}={value}"):
        NoveltyTraining(**{name: value})
