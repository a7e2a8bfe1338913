"""What decides without a policy's scores, and how it is recorded."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from eunoe.eviction import POLICIES, HeavyHitter, SinksRecent
from eunoe.eviction.fallback import Fallback, decided_by, policy_in_charge


def test_a_fallback_keeps_sinks_and_recent_under_the_statistics_of_the_policy(a_window: Callable[..., Any]) -> None:
    fallback, window = Fallback("late", HeavyHitter()), a_window(HeavyHitter(), 200)

    assert torch.equal(fallback.keep(window, 100), SinksRecent().keep(window, 100))
    assert fallback.statistics == HeavyHitter().statistics


def test_a_recorded_fallback_names_its_reason_and_the_policy() -> None:
    name = Fallback("late", HeavyHitter()).name

    assert name == "fallback:late:heavy-hitter/1"
    assert policy_in_charge(name) == policy_in_charge("heavy-hitter/1") == "heavy-hitter/1"
    assert decided_by(name, POLICIES) == Fallback("late", HeavyHitter())
    assert decided_by("heavy-hitter/1", POLICIES) == HeavyHitter()
    with pytest.raises(KeyError):
        decided_by("fallback:late:namm/1/of-yesterday", POLICIES)
