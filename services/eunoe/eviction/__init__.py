"""Eviction policies: pure functions of a memory state. One method, one file, one dataclass; `POLICIES` lists them.

To add one, write `<method>.py` with a frozen dataclass that fulfils `EvictionPolicy`, and add it to `POLICIES`. What it
needs to know of the attention that slots receive is a `Statistics`, kept in the memory state. A `Namm` has parameters,
so it is made, not listed.
"""

from eunoe.eviction.heavy_hitter import HeavyHitter
from eunoe.eviction.key_norm import KeyNorm
from eunoe.eviction.namm import Namm
from eunoe.eviction.policy import EvictionPolicy, ScoringPolicy, Statistics, Window
from eunoe.eviction.sinks_recent import SinksRecent
from eunoe.eviction.snapkv import SnapKV

DEFAULT_POLICY: EvictionPolicy = SinksRecent()
_LISTED: tuple[EvictionPolicy, ...] = (DEFAULT_POLICY, HeavyHitter(), KeyNorm(), SnapKV())
POLICIES: dict[str, EvictionPolicy] = {policy.name: policy for policy in _LISTED}

__all__ = [
    "DEFAULT_POLICY",
    "POLICIES",
    "EvictionPolicy",
    "HeavyHitter",
    "KeyNorm",
    "Namm",
    "ScoringPolicy",
    "SinksRecent",
    "SnapKV",
    "Statistics",
    "Window",
]
