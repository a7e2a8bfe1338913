import random
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from eunoe.training.evolution import DivergedReplay, Evolution, EvolutionSettings, Generation
from eunoe.training.racing import RaceSettings, Unit
from eunoe.training.strategy import Parameters

SETTINGS = EvolutionSettings(
    population=8, sigma=0.3, num_prompts=8, num_validation_prompts=2, validation_interval=3, race=RaceSettings()
)
START = np.ones(10, dtype=np.float32)


def evaluate(members: Parameters, units: list[Unit]) -> list[float]:
    """Prompts agree on the best parameters up to noise that is always the same."""
    found = {}
    # In any order.
    for member, prompt in random.sample(units, len(units)):
        target = 0.05 * np.random.default_rng(prompt).normal(size=members.shape[1])
        found[member, prompt] = float(-((members[member] - target) ** 2).sum())
    return [found[unit] for unit in units]


def run(num_generations: int, settings: EvolutionSettings = SETTINGS, past: Any = ()) -> list[Generation]:
    evolution = Evolution(settings, START, 20, evaluate, past)
    generations = list(past)
    while evolution.num_generations < num_generations:
        generations.append(evolution.step())
    return [replace(generation, seconds=0.0) for generation in generations]


def test_the_mean_gets_better_on_prompts_that_it_never_saw() -> None:
    evolution = Evolution(SETTINGS, START, 20, evaluate)

    generations = [evolution.step() for _ in range(61)]

    assert generations[0].validation == pytest.approx(-10, rel=0.2)
    assert evolution.best_validation > -0.1
    assert evolution.best_validation == max(each.validation for each in generations if each.validation is not None)
    assert evolution.best_generation % 3 == 0
    assert np.abs(evolution.best).max() < 0.2


def test_a_generation_has_prompts_of_its_own_and_none_for_validation() -> None:
    asked: list[set[int]] = []

    def listen(members: Parameters, units: list[Unit]) -> list[float]:
        asked.append({prompt for _, prompt in units})
        return evaluate(members, units)

    evolution = Evolution(replace(SETTINGS, race=None), START, 20, listen)
    for _ in range(3):
        evolution.step()

    validation, first, second = asked
    assert validation == {0, 1}
    assert first != second
    assert all(len(prompts) == 8 and prompts.isdisjoint(validation) for prompts in (first, second))


def test_the_same_seed_gives_the_same_run_and_another_does_not() -> None:
    assert run(6) == run(6)
    assert run(6) != run(6, replace(SETTINGS, seed=1))


@pytest.mark.parametrize("num_done", [-1, 0, 1, 4])
def test_a_run_that_goes_on_from_its_log_is_the_run_that_never_stopped(num_done: int) -> None:
    whole = run(7)

    assert run(7, past=whole[: num_done + 1]) == whole


def test_the_best_mean_is_known_after_a_resumption() -> None:
    whole = Evolution(SETTINGS, START, 20, evaluate)
    log = [whole.step() for _ in range(6)]

    again = Evolution(SETTINGS, START, 20, evaluate, log)

    assert again.best_generation == whole.best_generation
    np.testing.assert_array_equal(again.best, whole.best)


def test_a_log_that_does_not_come_out_the_same_is_refused() -> None:
    log = run(3)
    log[2] = replace(log[2], ranking=log[2].ranking[::-1])

    with pytest.raises(DivergedReplay, match="generation 2"):
        run(4, past=log)


def test_a_fitness_that_is_not_a_number_is_an_error_with_its_unit() -> None:
    evolution = Evolution(SETTINGS, START, 20, lambda members, units: [float("nan")] * len(units))

    with pytest.raises(ValueError, match="member 0 on prompt 0"):
        evolution.step()


def test_too_few_prompts_are_refused() -> None:
    with pytest.raises(ValueError, match="9 prompts are too few"):
        Evolution(SETTINGS, START, 9, evaluate)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("population", 3),
        ("sigma", 0.0),
        ("sigma", float("nan")),
        ("sigma", float("inf")),
        ("num_prompts", 0),
        ("num_validation_prompts", 0),
        ("validation_interval", 0),
    ],
)
def test_settings_that_cannot_work_are_refused(name: str, value: Any) -> None:
    with pytest.raises(ValueError, match=f"{name}={value}"):
        EvolutionSettings(**{name: value})
