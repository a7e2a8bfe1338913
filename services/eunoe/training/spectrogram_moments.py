"""Mean and variance of attention spectrograms, gathered in parts: the constants that NAMM normalises with."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import reduce
from typing import Self

import numpy as np
import numpy.typing as npt
import torch

from eunoe.eviction.namm import Normalization


@dataclass(frozen=True, slots=True)
class Moments:
    """Of some slots' bins.

    Attributes:
        count: Slots, one or more.
        mean: [F] float64.
        squares: [F] float64, sum of squared distances from the mean.
    """

    count: int
    mean: npt.NDArray[np.float64]
    squares: npt.NDArray[np.float64]

    @classmethod
    def of(cls, spectrogram_SF: torch.Tensor) -> Self:
        """Of slots' spectrograms, float32 [S, F]."""
        bins = spectrogram_SF.double().numpy()
        mean = bins.mean(axis=0)
        return cls(len(bins), mean, ((bins - mean) ** 2).sum(axis=0))

    def merged(self, other: Self) -> Self:
        """Of the slots of both (Chan et al. 1979)."""
        count = self.count + other.count
        delta = other.mean - self.mean
        squares = self.squares + other.squares + delta**2 * (self.count * other.count / count)
        return type(self)(count, self.mean + delta * (other.count / count), squares)


def normalization_of(parts: Sequence[Moments]) -> Normalization:
    """The constants that all parts, one or more, together come to."""
    total = reduce(Moments.merged, parts)
    mean, variance = (torch.from_numpy(values).float() for values in (total.mean, total.squares / total.count))
    return Normalization(mean, variance)
