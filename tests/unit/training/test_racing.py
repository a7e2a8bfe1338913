import numpy as np
import numpy.typing as npt
import pytest

from eunoe.training.racing import RaceResult, RaceSettings, Unit, race


def race_by_table(
    values_MP: npt.NDArray[np.float64], num_protected: int, settings: RaceSettings | None = None
) -> tuple[RaceResult, list[Unit]]:
    units: list[Unit] = []

    def evaluate(asked: list[Unit]) -> list[float]:
        units.extend(asked)
        return [float(values_MP[unit]) for unit in asked]

    num_members, num_prompts = values_MP.shape
    result = race(evaluate, num_members, range(num_prompts), num_protected=num_protected, settings=settings)
    return result, units


@pytest.mark.parametrize("seed", range(20))
def test_without_noise_the_best_are_never_dropped(seed: int) -> None:
    generator = np.random.default_rng(seed)
    quality, difficulty = generator.normal(size=16), 10 * generator.normal(size=32)

    result, units = race_by_table(quality[:, None] + difficulty, 4, RaceSettings())

    best = np.argsort(-quality)[:4].tolist()
    assert result.ranking[:4] == best
    assert (result.num_prompts[best] == 32).all()
    assert len(units) < 16 * 32 / 2


def test_who_is_not_clearly_behind_stays() -> None:
    noise = np.random.default_rng(0).normal(size=(16, 32))

    result, _ = race_by_table(noise, 4, RaceSettings(num_standard_errors=8))

    assert (result.num_prompts == 32).all()


def test_the_dropped_rank_behind_all_others_by_their_mean_so_far() -> None:
    # Member 2 does better in the end than anybody, after a beginning that nobody forgives it.
    values = np.array([[3.0] * 8, [2.0] * 8, [0.0] * 4 + [9.0] * 4, [1.0] * 8])

    result, _ = race_by_table(values, 2, RaceSettings(first_round=4))

    assert result.ranking == [0, 1, 3, 2]
    assert result.num_prompts.tolist() == [8, 8, 4, 4]
    assert result.fitness.tolist() == [3, 2, 0, 1]


def test_without_settings_everybody_gets_every_prompt_once() -> None:
    result, units = race_by_table(np.arange(12.0).reshape(3, 4), 1)

    assert sorted(units) == [(member, prompt) for member in range(3) for prompt in range(4)]
    assert result.ranking == [2, 1, 0]
    assert result.fitness.tolist() == [1.5, 5.5, 9.5]


def test_equals_rank_by_number() -> None:
    result, _ = race_by_table(np.zeros((5, 8)), 2, RaceSettings())

    assert result.ranking == [0, 1, 2, 3, 4]
    assert (result.num_prompts == 8).all()


@pytest.mark.parametrize("settings", [{"first_round": 1}, {"num_standard_errors": -1.0}])
def test_settings_that_cannot_work_are_refused(settings: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=next(iter(settings))):
        RaceSettings(**settings)  # type: ignore[arg-type]
