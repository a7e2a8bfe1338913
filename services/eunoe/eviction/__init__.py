"""Eviction policies: pure functions of a memory state. One method, one file, one dataclass; `POLICIES` lists them.

To add one, write `<method>.py` with a frozen dataclass that fulfils `EvictionPolicy`, and add it to `POLICIES`.
"""

from eunoe.eviction.policy import EvictionPolicy, Window
from eunoe.eviction.sinks_recent import SinksRecent

DEFAULT_POLICY: EvictionPolicy = SinksRecent()
POLICIES: dict[str, EvictionPolicy] = {policy.name: policy for policy in (DEFAULT_POLICY,)}

__all__ = ["DEFAULT_POLICY", "POLICIES", "EvictionPolicy", "SinksRecent", "Window"]
