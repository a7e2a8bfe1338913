"""Evolution of a parameter vector: sample a generation, race it over prompts, move; reproducible from its log alone.

What happens depends on the settings and on fitness, not on who evaluates, how many of them there are, or in which order
they answer.
"""

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np

from eunoe.training.racing import RaceSettings, Unit, race
from eunoe.training.strategy import Covariance, Parameters, Strategy

Evaluate = Callable[[Parameters, list[Unit]], list[float]]
"""Fitness of units, in their order, higher is better, given all members [members, n]."""


@dataclass(frozen=True, kw_only=True, slots=True)
class EvolutionSettings:
    """What a run fixes from its first generation to its last."""

    population: int = 32
    """Members of a generation."""
    sigma: float = 0.065
    """First standard deviation of each parameter."""
    covariance: Covariance = "separable"
    """See `Strategy`."""
    seed: int = 0
    """Of samples, and of the choice of prompts."""
    num_prompts: int = 16
    """Prompts of a generation, drawn anew for each and the same for all members."""
    race: RaceSettings | None = field(default_factory=RaceSettings)
    """None: every member gets all prompts."""
    num_validation_prompts: int = 8
    """The first prompts are kept for the mean alone, which is looked at before the first generation and then ..."""
    validation_interval: int = 5
    """... after every so many generations. The best mean is the result."""

    def __post_init__(self) -> None:
        least = {"population": 4, "num_prompts": 1, "num_validation_prompts": 1, "validation_interval": 1}
        for name, minimum in least.items():
            if getattr(self, name) < minimum:
                raise ValueError(f"{name}={getattr(self, name)} is below {minimum}")
        if not 0 < self.sigma < math.inf:
            raise ValueError(f"sigma={self.sigma} is no finite number above 0")

    def check_num_prompts(self, num_prompts: int) -> None:
        """Whether so many prompts will do.

        Raises:
            ValueError: If they are too few for validation and a generation.
        """
        if num_prompts < self.num_validation_prompts + self.num_prompts:
            raise ValueError(
                f"{num_prompts} prompts are too few: {self.num_validation_prompts} for validation and "
                f"{self.num_prompts} of the others for a generation"
            )


@dataclass(frozen=True, kw_only=True, slots=True)
class Generation:
    """What is logged of a generation, and all that it takes to do it again. Generation 0 only looks at the start.

    Attributes:
        number: From 0.
        ranking: Members from the best to the worst.
        fitness: Each member's mean.
        num_prompts: Prompts that each member got.
        sigma: After the generation.
        digest: `Strategy.digest` after the generation.
        validation: Mean fitness of the distribution's mean on the validation prompts, or None if nobody looked.
        seconds: What it took.
    """

    number: int
    ranking: tuple[int, ...]
    fitness: tuple[float, ...]
    num_prompts: tuple[int, ...]
    sigma: float
    digest: str
    validation: float | None
    seconds: float

    @property
    def best_fitness(self) -> float | None:
        """Of the member that ranks first; None of generation 0."""
        return self.fitness[self.ranking[0]] if self.ranking else None

    @property
    def mean_fitness(self) -> float | None:
        """Over all members; None of generation 0."""
        return sum(self.fitness) / len(self.fitness) if self.fitness else None

    @property
    def num_evaluations(self) -> int:
        """Units that were evaluated for the members."""
        return sum(self.num_prompts)


class DivergedReplay(ValueError):
    """A log's generations do not come out as they are written: another `cma`, numpy or processor wrote them."""


class Evolution:
    """One run.

    Args:
        settings: The same for the whole run.
        start: Parameters [n] to begin with.
        num_prompts: Prompts that there are; the first ones are for validation.
        evaluate: Fitness of units.
        past: Generations that a run with these settings, start and prompts has had.

    Attributes:
        num_generations: How many are done, generation 0 not counted.
        best: The mean that did best in validation.
        best_validation: Its fitness there.
        best_generation: After which generation it was the mean.

    Raises:
        ValueError: If there are too few prompts.
        DivergedReplay: If the past cannot be repeated here to the last bit.
    """

    def __init__(
        self,
        settings: EvolutionSettings,
        start: Parameters,
        num_prompts: int,
        evaluate: Evaluate,
        past: Sequence[Generation] = (),
    ) -> None:
        settings.check_num_prompts(num_prompts)
        self._settings = settings
        self._num_training = num_prompts - settings.num_validation_prompts
        self._evaluate = evaluate
        self._strategy = Strategy(
            start,
            sigma=settings.sigma,
            population=settings.population,
            covariance=settings.covariance,
            seed=settings.seed,
        )
        self.num_generations = -1
        self.best = self._strategy.mean
        self.best_validation = -np.inf
        self.best_generation = 0
        for generation in past:
            if generation.ranking:
                self._strategy.ask()
                self._strategy.tell(generation.ranking)
            if generation.digest != self._strategy.digest:
                raise DivergedReplay(
                    f"generation {generation.number} came to {generation.digest}, here to {self._strategy.digest}"
                )
            self._count(generation)

    def step(self) -> Generation:
        """Do the next generation.

        Raises:
            ValueError: If a fitness is not a number.
        """
        began = time.monotonic()
        settings, number = self._settings, self.num_generations + 1
        ranking, fitness, num_prompts = [], np.empty(0), np.empty(0, dtype=np.int64)
        if number > 0:
            members = self._strategy.ask()
            chosen = np.random.default_rng([settings.seed, number]).permutation(self._num_training)
            result = race(
                lambda units: self._checked(members, units),
                settings.population,
                (settings.num_validation_prompts + chosen[: settings.num_prompts]).tolist(),
                num_protected=self._strategy.num_parents,
                settings=settings.race,
            )
            ranking, fitness, num_prompts = result.ranking, result.fitness, result.num_prompts
            self._strategy.tell(ranking)
        validation = None
        if number % settings.validation_interval == 0:
            units = [(0, prompt) for prompt in range(settings.num_validation_prompts)]
            validation = float(np.mean(self._checked(self._strategy.mean[None], units)))
        generation = Generation(
            number=number,
            ranking=tuple(ranking),
            fitness=tuple(fitness.tolist()),
            num_prompts=tuple(num_prompts.tolist()),
            sigma=self._strategy.sigma,
            digest=self._strategy.digest,
            validation=validation,
            seconds=time.monotonic() - began,
        )
        self._count(generation)
        return generation

    def _checked(self, members: Parameters, units: list[Unit]) -> list[float]:
        found = self._evaluate(members, units)
        if not np.isfinite(found).all():
            member, prompt = units[int(np.argmin(np.isfinite(found)))]
            raise ValueError(f"the fitness of member {member} on prompt {prompt} is not a number")
        return found

    def _count(self, generation: Generation) -> None:
        self.num_generations = generation.number
        if generation.validation is not None and generation.validation > self.best_validation:
            self.best = self._strategy.mean
            self.best_validation, self.best_generation = generation.validation, generation.number
