"""What decides in place of a policy whose scores cannot be had.

It is recorded as `fallback:<reason>:<policy>`, so that whoever folds the log again knows whose statistics went on.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from eunoe.eviction.policy import EvictionPolicy, Statistics, Window
from eunoe.eviction.sinks_recent import SinksRecent

_PREFIX = "fallback:"


@dataclass(frozen=True, slots=True)
class Fallback:
    """Sinks and recent, while the statistics are those of the policy that is to come back.

    Attributes:
        reason: One word, without a colon.
        instead_of: The policy in charge.
    """

    reason: str
    instead_of: EvictionPolicy

    @property
    def name(self) -> str:
        """See `EvictionPolicy`."""
        return f"{_PREFIX}{self.reason}:{self.instead_of.name}"

    @property
    def statistics(self) -> Statistics | None:
        """See `EvictionPolicy`."""
        return self.instead_of.statistics

    def keep(self, window: Window, budget: int) -> torch.Tensor:
        """See `EvictionPolicy.keep`."""
        return SinksRecent().keep(window, budget)


def policy_in_charge(decision: str) -> str:
    """The name of the policy of a recorded decision, of the one that was in charge if it is a fallback."""
    return decision.split(":", 2)[-1] if decision.startswith(_PREFIX) else decision


def decided_by(decision: str, policies: Mapping[str, EvictionPolicy]) -> EvictionPolicy:
    """What decides as it was recorded.

    Raises:
        KeyError: If the policy in charge is not among `policies`.
    """
    policy = policies[policy_in_charge(decision)]
    return Fallback(decision.split(":", 2)[1], policy) if decision.startswith(_PREFIX) else policy
