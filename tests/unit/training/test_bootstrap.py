import numpy as np
import pytest

from eunoe.training.bootstrap import difference_interval, mean_interval


def test_equal_values_leave_no_doubt() -> None:
    assert mean_interval([0.5] * 20) == (0.5, 0.5)


def test_the_interval_is_that_of_a_normal_mean() -> None:
    values = np.random.default_rng(0).normal(3, 2, 400)

    low, high = mean_interval(values.tolist())

    error = values.std() / 20
    assert low == pytest.approx(values.mean() - 1.96 * error, abs=0.1 * error)
    assert high == pytest.approx(values.mean() + 1.96 * error, abs=0.1 * error)


def test_pairs_are_compared_case_by_case() -> None:
    easy_and_hard = np.random.default_rng(0).normal(0, 10, 100)

    low, high = difference_interval((easy_and_hard + 1).tolist(), easy_and_hard.tolist())

    assert low == pytest.approx(1)
    assert high == pytest.approx(1)


def test_what_is_no_pair_is_refused() -> None:
    with pytest.raises(ValueError, match="zip"):
        difference_interval([1.0], [1.0, 2.0])
    with pytest.raises(ValueError, match="no values"):
        mean_interval([])
