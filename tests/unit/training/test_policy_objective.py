from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from eunoe.decoder.config import Dtypes
from eunoe.decoder.decoder import Decoder
from eunoe.decoder.memory_state import MemorySettings
from eunoe.decoder.tiny import tiny_config
from eunoe.decoder.tokenizer import Tokenizer
from eunoe.eviction import Namm
from eunoe.eviction.backward_attention import NUM_PARAMETERS, BackwardAttention
from eunoe.eviction.spectrogram import AttentionSpectrogram
from eunoe.training.evaluation import Evaluation
from eunoe.training.policy_objective import ObjectiveSettings, PolicyObjective
from eunoe.training.spectrogram_moments import normalization_of
from eunoe.training.tasks.case import Case
from eunoe.training.tasks.continuation import continuations

SETTINGS = ObjectiveSettings(share=0.5, segment_length=32, reading_weight=0.5)


@pytest.fixture(scope="module")
def decoder() -> Decoder:
    return Decoder.random(tiny_config(), seed=0, dtypes=Dtypes.float32())


def a_case(num_context_tokens: int = 150, seed: int = 0, **parts: Any) -> Case:
    ids = np.random.default_rng(seed).integers(0, 512, num_context_tokens + 20)
    pieces = {"context": ids[:-20], "question": ids[-20:-12], "answer": ids[-12:], "task": "single"} | parts
    return Case(kind="", haystack="book", is_held_out=False, needles=(), **pieces)


def a_namm(seed: int = 0) -> Namm:
    parameters = 0.3 * torch.randn(NUM_PARAMETERS, generator=torch.Generator().manual_seed(seed))
    return replace(Namm.untrained(), network=BackwardAttention(parameters), num_recent_tokens=8)


def an_objective(decoder: Decoder, *cases: Case, **settings: Any) -> PolicyObjective:
    return PolicyObjective(decoder, cases, AttentionSpectrogram(), replace(SETTINGS, **settings))


@pytest.mark.parametrize("share", [0.3, 0.5, 0.9])
@pytest.mark.parametrize("num_context_tokens", [127, 128, 129, 150])
def test_fitness_is_what_is_lost_a_token_against_a_full_cache(
    decoder: Decoder, share: float, num_context_tokens: int
) -> None:
    cases = [a_case(num_context_tokens, seed) for seed in range(4)]
    evaluation = Evaluation(decoder=decoder, share=share, segment_length=32)
    objective = an_objective(decoder, *cases, share=share)

    for prompt, case in enumerate(cases):
        # Read from the start, without anything prepared.
        bounded, full = evaluation.score(case, a_namm()), evaluation.score(case, None)
        loss = min(0.0, bounded.log_likelihood - full.log_likelihood) / 12
        assert objective.fitness(a_namm(), prompt) == loss


def test_fitness_does_not_depend_on_what_was_asked_before(decoder: Decoder) -> None:
    cases = [a_case(seed=seed) for seed in range(20)]
    used = an_objective(decoder, *cases)
    for prompt in range(20):
        used.fitness(a_namm(prompt), prompt)

    again = [used.fitness(a_namm(1), prompt) for prompt in (19, 0, 0)]

    fresh = an_objective(decoder, *cases)
    assert again == [fresh.fitness(a_namm(1), prompt) for prompt in (19, 0, 0)]


def test_what_the_policy_keeps_matters_to_fitness(decoder: Decoder) -> None:
    objective = an_objective(decoder, *(a_case(seed=seed) for seed in range(4)))

    fitness = [sum(objective.fitness(a_namm(seed), prompt) for prompt in range(4)) for seed in range(4)]

    assert len(set(fitness)) == 4


def test_reading_on_counts_by_its_weight(decoder: Decoder) -> None:
    cases = [a_case(seed=seed, task=task) for seed in range(4) for task in ("single", "continuation")]
    objective = an_objective(decoder, *cases, reading_weight=0.5)

    fitness = [objective.fitness(a_namm(), prompt) for prompt in range(8)]

    assert fitness[1::2] == [value / 2 for value in fitness[::2]]
    assert min(fitness) < 0


def test_a_share_without_room_for_more_than_sink_tokens_is_refused(decoder: Decoder) -> None:
    with pytest.raises(ValueError, match="case 1 has room for 4 slots"):
        an_objective(decoder, a_case(150), a_case(100), share=0.06)


def test_a_question_longer_than_a_segment_is_refused(decoder: Decoder) -> None:
    with pytest.raises(ValueError, match="case 1 asks 42 tokens, a segment has 32"):
        an_objective(decoder, a_case(), a_case(question=np.zeros(30, np.int64)))


@pytest.mark.parametrize("name", ["share", "reading_weight"])
@pytest.mark.parametrize("value", [-1.0, float("nan"), float("inf")])
def test_settings_that_cannot_work_are_refused(name: str, value: float) -> None:
    with pytest.raises(ValueError, match=f"{name}={value}"):
        ObjectiveSettings(**{name: value})


@pytest.mark.parametrize("share", [0.0, 1.1, 25.0])
def test_a_share_of_nothing_or_of_more_than_a_full_cache_is_refused(share: float) -> None:
    with pytest.raises(ValueError, match=f"share={share}"):
        ObjectiveSettings(share=share)


def test_normalization_is_of_all_slots_at_every_boundary_of_a_full_cache(decoder: Decoder) -> None:
    cases = [a_case(96), a_case(150, seed=1)]
    objective = an_objective(decoder, *cases)

    normalization = normalization_of([objective.moments(0), objective.moments(1)])

    seen = []
    policy, statistics = Namm.untrained(), AttentionSpectrogram()
    for case in cases:
        state = decoder.new_state(MemorySettings(kv_budget_tokens=200, segment_length=32), policy)
        for start in range(0, len(case.context), 32):
            decoder.prefill(state, case.context[start : start + 32], policy)
            assert state.statistics_LHSB is not None
            seen.append(statistics.unpack(state.statistics_LHSB)[0].flatten(0, -2))
    bins = torch.cat(seen).double()
    torch.testing.assert_close(normalization.mean, bins.mean(dim=0).float())
    torch.testing.assert_close(normalization.variance, bins.var(dim=0, correction=0).float())


def test_a_continuation_is_a_piece_of_text_whose_answer_goes_on(tokenizer: Tokenizer) -> None:
    made = continuations(300, 4, seed=0, split="train", tokenizer=tokenizer)

    assert [case.haystack for case in made] == ["book", "code"] * 2
    assert {(len(case.context), len(case.question), len(case.answer)) for case in made} == {(300, 16, 64)}
    assert len({case.context.tobytes() for case in made}) == 4
    again = continuations(300, 4, seed=0, split="train", tokenizer=tokenizer)
    assert [case.answer.tolist() for case in again] == [case.answer.tolist() for case in made]
