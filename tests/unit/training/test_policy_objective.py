from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from eunoe.decoder.config import Dtypes
from eunoe.decoder.decoder import Decoder
from eunoe.decoder.memory_state import MemorySettings
from eunoe.decoder.tiny import tiny_config
from eunoe.eviction import EvictionPolicy, Namm, SinksRecent
from eunoe.eviction.backward_attention import NUM_PARAMETERS, BackwardAttention
from eunoe.eviction.spectrogram import AttentionSpectrogram
from eunoe.training.policy_objective import ObjectiveSettings, PolicyObjective
from eunoe.training.spectrogram_moments import normalization_of
from eunoe.training.tasks.case import Case

MEMORY = MemorySettings(kv_budget_tokens=48, segment_length=32, num_sink_tokens=4)
SETTINGS = ObjectiveSettings(memory=MEMORY, reading_weight=0.5)


@pytest.fixture(scope="module")
def decoder() -> Decoder:
    return Decoder.random(tiny_config(), seed=0, dtypes=Dtypes.float32())


def a_case(num_context_tokens: int = 150, seed: int = 0, **parts: Any) -> Case:
    ids = np.random.default_rng(seed).integers(0, 512, num_context_tokens + 20)
    pieces = {"context": ids[:-20], "question": ids[-20:-12], "answer": ids[-12:]} | parts
    return Case(task="", kind="", haystack="book", is_held_out=False, needles=(), **pieces)


def a_namm(seed: int = 0) -> Namm:
    parameters = 0.3 * torch.randn(NUM_PARAMETERS, generator=torch.Generator().manual_seed(seed))
    return replace(Namm.untrained(), network=BackwardAttention(parameters), num_recent_tokens=8)


def an_objective(decoder: Decoder, *cases: Case, settings: ObjectiveSettings = SETTINGS) -> PolicyObjective:
    return PolicyObjective(decoder, cases, AttentionSpectrogram(), settings)


def likelihoods(decoder: Decoder, case: Case, policy: EvictionPolicy, memory: MemorySettings) -> tuple[float, float]:
    """Of the answer, and of the context after token 128, a token: without anything prepared."""
    state = decoder.new_state(memory, policy)
    context = decoder.prefill(state, case.context, policy, logits="all")
    rest = decoder.prefill(state, np.concatenate([case.question, case.answer]), policy, logits="all")
    assert context is not None
    assert rest is not None
    answer = rest.log_softmax(-1)[len(case.question) - 1 : -1][range(len(case.answer)), case.answer]
    reading = context.log_softmax(-1)[128:-1][range(len(case.context) - 129), case.context[129:]]
    return float(answer.double().mean()), float(reading.double().mean())


@pytest.mark.parametrize("policy", [a_namm(), Namm.untrained(), SinksRecent()], ids=["namm", "untrained", "recent"])
def test_fitness_is_what_is_lost_against_a_full_cache(decoder: Decoder, policy: EvictionPolicy) -> None:
    cases = [a_case(seed=seed) for seed in range(4)]
    objective = an_objective(decoder, *cases)

    losses = []
    for prompt, case in enumerate(cases):
        answer, reading = likelihoods(decoder, case, policy, MEMORY)
        full_answer, full_reading = likelihoods(decoder, case, SinksRecent(), replace(MEMORY, kv_budget_tokens=200))
        losses.append(min(0, answer - full_answer) + 0.5 * min(0, reading - full_reading))
        assert objective.fitness(policy, prompt) == pytest.approx(losses[-1], abs=1e-5)
    assert min(losses) < -0.01


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


def test_without_weight_reading_does_not_count(decoder: Decoder) -> None:
    case = a_case()
    answers = replace(SETTINGS, reading_weight=0.0)

    without = an_objective(decoder, case, settings=answers).fitness(a_namm(), 0)

    answer, _ = likelihoods(decoder, case, a_namm(), MEMORY)
    full_answer, _ = likelihoods(decoder, case, SinksRecent(), replace(MEMORY, kv_budget_tokens=200))
    assert without == pytest.approx(min(0, answer - full_answer), abs=1e-5)


@pytest.mark.parametrize("num_context_tokens", [64, 65, 96, 97])
def test_contexts_around_a_boundary_have_a_fitness(decoder: Decoder, num_context_tokens: int) -> None:
    assert -20 < an_objective(decoder, a_case(num_context_tokens)).fitness(a_namm(), 0) <= 0


@pytest.mark.parametrize(
    ("case", "reason"),
    [
        (a_case(63), "nothing is evicted before 64"),
        (a_case(question=np.empty(0, np.int64)), "no question"),
        (a_case(answer=np.empty(0, np.int64)), "or no answer"),
    ],
    ids=["short", "no question", "no answer"],
)
def test_cases_that_say_nothing_are_refused(decoder: Decoder, case: Case, reason: str) -> None:
    with pytest.raises(ValueError, match=f"case 1 .*{reason}"):
        an_objective(decoder, a_case(), case)


def test_a_negative_weight_is_refused() -> None:
    with pytest.raises(ValueError, match="reading_weight"):
        ObjectiveSettings(reading_weight=-1.0)


def test_normalization_is_of_all_slots_at_every_boundary_of_a_full_cache(decoder: Decoder) -> None:
    cases = [a_case(100), a_case(150, seed=1)]
    objective = an_objective(decoder, *cases)

    normalization = normalization_of([objective.moments(0), objective.moments(1)])

    seen = []
    policy, statistics = Namm.untrained(), AttentionSpectrogram()
    for case in cases:
        state = decoder.new_state(replace(MEMORY, kv_budget_tokens=200), policy)
        for start in range(0, len(case.context) - 31, 32):
            decoder.prefill(state, case.context[start : start + 32], policy)
            assert state.statistics_LHSB is not None
            seen.append(statistics.unpack(state.statistics_LHSB)[0].flatten(0, -2))
    bins = torch.cat(seen).double()
    torch.testing.assert_close(normalization.mean, bins.mean(dim=0).float())
    torch.testing.assert_close(normalization.variance, bins.var(dim=0, correction=0).float())
