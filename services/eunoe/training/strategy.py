"""The evolution strategy: CMA-ES of the package `cma`, told nothing but who was better than whom.

After "The CMA Evolution Strategy: A Tutorial" (Hansen 2016, arXiv:1604.00772). `separable` learns a variance for each
parameter (Ros and Hansen 2008); `full` a covariance matrix, a thousand times slower with a NAMM's 4,172 parameters.

The optimizer's object cannot be written down, but it is a function of seed and rankings: telling a new one the same
rankings makes the same one, in 20 ms a generation.
"""

import hashlib
from collections.abc import Sequence
from typing import Literal

import cma
import numpy as np
import numpy.typing as npt

Covariance = Literal["separable", "full"]
Parameters = npt.NDArray[np.float32]


class Strategy:
    """A normal distribution over parameters that moves towards what ranks high.

    Args:
        start: Its first mean, [n].
        sigma: Its first standard deviation, the same for all parameters.
        population: Members of a generation.
        covariance: What of its shape is learned.
        seed: Of all samples.

    Raises:
        ValueError: If there are fewer than 4 members, or sigma is not above 0.
    """

    def __init__(
        self, start: npt.ArrayLike, *, sigma: float, population: int, covariance: Covariance, seed: int
    ) -> None:
        if population < 4:
            raise ValueError(f"a population of {population} is below 4")
        if not sigma > 0:
            raise ValueError(f"sigma={sigma} is not above 0")
        if covariance not in ("separable", "full"):
            raise ValueError(f"covariance={covariance!r} is neither separable nor full")
        generator = np.random.default_rng(seed)
        options = {
            "popsize": population,
            "CMA_diagonal": covariance == "separable",
            "CMA_mirrors": 0,
            "randn": lambda *shape: generator.standard_normal(shape),
            # Not numpy's global generator, of which everybody may take.
            "seed": np.nan,
            "verbose": -9,
        }
        self._optimizer = cma.CMAEvolutionStrategy(np.asarray(start, dtype=np.float64), sigma, options)
        self._members: list[npt.NDArray[np.float64]] = []

    @property
    def num_parents(self) -> int:
        """Members that pull the mean; the others are only kept away from."""
        return int(self._optimizer.sp.weights.mu)

    @property
    def sigma(self) -> float:
        """Overall step size."""
        return float(self._optimizer.sigma)

    @property
    def mean(self) -> Parameters:
        """The distribution's mean, float32 [n]."""
        return np.asarray(self._optimizer.mean, dtype=np.float32)

    @property
    def digest(self) -> str:
        """Of mean and step size, to the last bit."""
        content = np.append(self._optimizer.mean, self._optimizer.sigma).astype(np.float64)
        return hashlib.sha256(content.tobytes()).hexdigest()[:16]

    def ask(self) -> Parameters:
        """The members of the next generation, float32 [population, n]."""
        self._members = self._optimizer.ask()
        return np.asarray(self._members, dtype=np.float32)

    def tell(self, ranking: Sequence[int]) -> None:
        """Move, given the last generation's members from the best to the worst."""
        assert sorted(ranking) == list(range(len(self._members))), f"{ranking} ranks other members than were asked for"
        costs = np.empty(len(ranking))
        costs[list(ranking)] = np.arange(len(ranking))
        self._optimizer.tell(self._members, costs.tolist())
