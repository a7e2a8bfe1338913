import numpy as np
import pytest

from eunoe.training.bootstrap import difference_interval, mean_interval, share_interval


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


def test_forty_right_answers_of_forty_leave_a_doubt() -> None:
    assert share_interval(40, 40) == (pytest.approx(0.912, abs=5e-4), 1.0)
    # Wilson's for 3 of 10, as in Agresti and Coull's tables.
    assert share_interval(3, 10) == pytest.approx((0.108, 0.603), abs=5e-4)


@pytest.mark.parametrize(("num_right", "count"), [(0, 0), (2, 1), (-1, 4)])
def test_what_is_no_share_is_refused(num_right: int, count: int) -> None:
    with pytest.raises(ValueError, match="no share"):
        share_interval(num_right, count)
