"""Racing: members of a generation that are clearly behind are not evaluated to the end.

Rounds end at fixed numbers of prompts, so that who is dropped depends on fitness alone, never on who was fast.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Unit = tuple[int, int]
"""(member, prompt)"""
EvaluateUnits = Callable[[list[Unit]], list[float]]


@dataclass(frozen=True, kw_only=True, slots=True)
class RaceSettings:
    """When members are dropped."""

    first_round: int = 4
    """Prompts that every member gets; rounds then end at 2, 4, 8, ... times as many."""
    num_standard_errors: float = 2.0
    """A member is clearly behind another if the mean of their differences is above so many standard errors of it."""

    def __post_init__(self) -> None:
        if self.first_round < 2 or not self.num_standard_errors >= 0:
            raise ValueError(f"{self} must have first_round from 2 and num_standard_errors from 0")


@dataclass(frozen=True, slots=True)
class RaceResult:
    """What became of each member.

    Attributes:
        fitness: [members] mean over the prompts that it got.
        num_prompts: [members] how many these were.
    """

    fitness: npt.NDArray[np.float64]
    num_prompts: npt.NDArray[np.int64]

    @property
    def ranking(self) -> list[int]:
        """Members from the best to the worst: who stayed longer first, then by fitness, then by number."""
        return [int(member) for member in np.lexsort((-self.fitness, -self.num_prompts))]


def race(
    evaluate: EvaluateUnits,
    num_members: int,
    prompts: Sequence[int],
    *,
    num_protected: int,
    settings: RaceSettings | None = None,
) -> RaceResult:
    """Evaluate members on prompts; higher is better.

    Args:
        evaluate: Fitness of each unit, in the order of the units.
        num_members: Members 0 to num_members - 1.
        prompts: All get them in this order.
        num_protected: So many of the best at a round's end stay, whoever is ahead of them.
        settings: None: nobody is dropped.
    """
    values = np.full((num_members, len(prompts)), np.nan)
    is_running = np.ones(num_members, dtype=np.bool_)
    end = 0
    while end < len(prompts):
        start, end = end, len(prompts)
        if settings is not None:
            end = min(end, max(settings.first_round, 2 * start))
        # By prompt: whoever evaluates can go on with what it prepared for one.
        units = [(int(member), column) for column in range(start, end) for member in np.flatnonzero(is_running)]
        found = evaluate([(member, prompts[column]) for member, column in units])
        for (member, column), value in zip(units, found, strict=True):
            values[member, column] = value
        if settings is not None and end < len(prompts):
            running = np.flatnonzero(is_running)
            is_running[running[_is_behind(values[running, :end], num_protected, settings)]] = False
    num_prompts = (~np.isnan(values)).sum(axis=1)
    return RaceResult(np.nansum(values, axis=1) / num_prompts, num_prompts)


def _is_behind(values_MP: npt.NDArray[np.float64], num_protected: int, settings: RaceSettings) -> npt.NDArray[np.bool_]:
    """Which rows are clearly behind the row that is the last of the protected ones.

    Differences on the same prompts: how hard a prompt is does not count.
    """
    num_prompts = values_MP.shape[1]
    mean_M = values_MP.mean(axis=1)
    order_M = np.argsort(-mean_M, kind="stable")
    if len(order_M) <= num_protected:
        return np.zeros(len(order_M), dtype=np.bool_)
    last = order_M[num_protected - 1]
    ahead_MP = values_MP[last] - values_MP
    margin_M = settings.num_standard_errors * ahead_MP.std(axis=1, ddof=1) / np.sqrt(num_prompts)
    is_behind_M: npt.NDArray[np.bool_] = ahead_MP.mean(axis=1) > margin_M
    is_behind_M[order_M[:num_protected]] = False
    return is_behind_M
