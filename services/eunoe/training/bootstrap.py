"""How sure is a mean over cases? Resampled with replacement (Efron 1979); for two policies, over paired differences."""

import math
from collections.abc import Sequence

import numpy as np

_NUM_RESAMPLES = 10_000
_NORMAL_975 = 1.959964


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


def share_interval(num_right: int, count: int) -> tuple[float, float]:
    """The interval of 95% of a share of which `num_right` of `count` were seen (Wilson 1927): no resample of answers
    that are all right has a wrong one.

    Raises:
        ValueError: If nothing was seen, or more than there were.
    """
    if not 0 <= num_right <= count or not count:
        raise ValueError(f"{num_right} of {count} is no share")
    share, spread = num_right / count, _NORMAL_975**2 / count
    middle = (share + spread / 2) / (1 + spread)
    half = math.sqrt(share * (1 - share) * spread + spread**2 / 4) / (1 + spread)
    return max(0.0, middle - half), min(1.0, middle + half)


def difference_interval(ours: Sequence[float], others: Sequence[float], *, seed: int = 0) -> tuple[float, float]:
    """Of the mean of ours less the others', case by case: both answered the same cases in the same order.

    Raises:
        ValueError: If they are no pairs.
    """
    return mean_interval([own - other for own, other in zip(ours, others, strict=True)], seed=seed)
