from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from eunoe.training.strategy import Strategy

Values = npt.NDArray[Any]


def sphere(x: Values) -> Values:
    return (x**2).sum(axis=-1)


def ellipsoid(x: Values) -> Values:
    return (10 ** (4 * np.linspace(0, 1, x.shape[-1])) * x**2).sum(axis=-1)


def a_strategy(num_parameters: int = 20, **settings: Any) -> Strategy:
    defaults: dict[str, Any] = {"sigma": 0.3, "population": 12, "covariance": "separable", "seed": 0}
    return Strategy(np.ones(num_parameters), **defaults | settings)


def advance(strategy: Strategy, num_generations: int, cost: Any = sphere) -> list[list[int]]:
    rankings = []
    for _ in range(num_generations):
        rankings.append(np.argsort(cost(strategy.ask()), kind="stable").tolist())
        strategy.tell(rankings[-1])
    return rankings


@pytest.mark.parametrize("covariance", ["separable", "full"])
@pytest.mark.parametrize("cost", [sphere, ellipsoid])
def test_what_ranks_high_is_found(covariance: str, cost: Any) -> None:
    strategy = a_strategy(covariance=covariance)

    advance(strategy, 600, cost)

    assert cost(strategy.mean) < 1e-6
    assert strategy.sigma < 1e-3


@pytest.mark.parametrize("covariance", ["separable", "full"])
def test_a_new_strategy_that_is_told_the_same_rankings_is_the_same(covariance: str) -> None:
    strategy, other = a_strategy(covariance=covariance), a_strategy(covariance=covariance)

    for ranking in advance(strategy, 30):
        np.random.seed(1)
        other.ask()
        other.tell(ranking)

    assert other.digest == strategy.digest
    np.testing.assert_array_equal(other.ask(), strategy.ask())


def test_another_seed_samples_others() -> None:
    assert not np.array_equal(a_strategy(seed=0).ask(), a_strategy(seed=1).ask())


def test_a_generation_of_a_whole_namm_has_half_of_its_members_as_parents() -> None:
    strategy = Strategy(np.zeros(4172), sigma=0.065, population=32, covariance="separable", seed=0)

    members = strategy.ask()

    assert members.shape == (32, 4172)
    assert members.dtype == np.float32
    assert strategy.num_parents == 16
    assert members.std() == pytest.approx(0.065, rel=0.02)


@pytest.mark.parametrize("settings", [{"population": 3}, {"sigma": 0.0}, {"sigma": float("nan")}, {"covariance": "?"}])
def test_settings_that_cannot_work_are_refused(settings: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(settings))):
        a_strategy(**settings)
