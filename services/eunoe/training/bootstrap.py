"""How sure is a mean over cases? Resampled with replacement (Efron 1979); for two policies, over paired differences."""

from collections.abc import Sequence

import numpy as np

_NUM_RESAMPLES = 10_000


def mean_interval(values: Sequence[float], *, seed: int = 0) -> tuple[float, float]:
    """The interval from 2.5% to 97.5% of the means that resamples of the values have.

    Raises:
        ValueError: If there are no values.
    """
    if not len(values):
        raise ValueError("no values have no mean")
    given = np.asarray(values, dtype=np.float64)
    generator = np.random.default_rng(seed)
    means = [given[generator.integers(0, len(given), len(given))].mean() for _ in range(_NUM_RESAMPLES)]
    low, high = np.quantile(means, (0.025, 0.975))
    return float(low), float(high)


def difference_interval(ours: Sequence[float], others: Sequence[float], *, seed: int = 0) -> tuple[float, float]:
    """Of the mean of ours less the others', case by case: both answered the same cases in the same order.

    Raises:
        ValueError: If they are no pairs.
    """
    return mean_interval([own - other for own, other in zip(ours, others, strict=True)], seed=seed)
