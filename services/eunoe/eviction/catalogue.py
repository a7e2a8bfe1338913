"""Which stream has which policy: `rules.toml` in the directory of the policies' files.

    default = "sinks-recent/1"
    [[rules]]                             # the first rule that matches a stream's full name counts
    streams = "tenants/acme/streams/*"
    policy = "mine"                       # mine.safetensors; or the name of a policy without parameters
    shadow = "heavy-hitter/1"             # scored beside it, never applied

Rules and files are followed together or not at all: while one of them is broken, every stream keeps what it has.
"""

import logging
import tomllib
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from eunoe.eviction import EvictionPolicy, ScoringPolicy
from eunoe.eviction.policy_files import PolicyFiles

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Choice:
    """What decides for a stream, and what is scored beside it for comparison."""

    policy: EvictionPolicy
    shadow: ScoringPolicy | None = None


@dataclass(frozen=True, slots=True)
class _Rule:
    streams: str
    choice: Choice


class PolicyCatalogue:
    """The rules. Safe to use from any thread.

    Args:
        files: Where policies come from.
        default: For streams that no rule matches, unless the rules name another.

    Raises:
        ValueError: If a file is broken, or something names a policy that is not there.
    """

    def __init__(self, files: PolicyFiles, default: str) -> None:
        self.files = files
        self._default = default
        self._rules = self._read()

    def choose(self, stream: str) -> Choice:
        """What the first rule that matches a stream's full name says."""
        return next(rule.choice for rule in self._rules if fnmatchcase(stream, rule.streams))

    def refresh(self) -> bool:
        """Read everything again if something has changed; whether there are new rules now. Broken ones are logged."""
        if not self.files.refresh():
            return False
        try:
            self._rules = self._read()
        except ValueError as error:
            logger.error("the rules stay as they were", extra={"problem": str(error)})
            return False
        logger.info("there are new policies or rules", extra={"num_rules": len(self._rules)})
        return True

    def _read(self) -> tuple[_Rule, ...]:
        """The rules, the last of which matches every stream."""
        for name, problem in self.files.broken.items():
            raise ValueError(f"{name} cannot be read: {problem}")
        values = _parsed(self.files.directory / "rules.toml") if self.files.directory is not None else {}
        last = Choice(self.files.named(values.get("default", self._default)))
        return (*map(self._rule, values.get("rules", [])), _Rule("*", last))

    def _rule(self, values: dict[str, Any]) -> _Rule:
        if not {"streams", "policy"} <= values.keys() <= {"streams", "policy", "shadow"}:
            raise ValueError(f"a rule has streams, policy and perhaps shadow, not {sorted(values)}")
        policy = self.files.named(values["policy"])
        if "shadow" not in values:
            return _Rule(values["streams"], Choice(policy))
        shadow = self.files.named(values["shadow"])
        if not isinstance(shadow, ScoringPolicy):
            raise ValueError(f"{shadow.name} has no scores, so it is no shadow")
        if shadow.statistics is not None and (
            policy.statistics is None or policy.statistics.name != shadow.statistics.name
        ):
            # A memory state has the statistics of the policy that decides, and of no other.
            raise ValueError(f"{shadow.name} is no shadow of {policy.name}, under which nobody observes what it scores")
        return _Rule(values["streams"], Choice(policy, shadow))


def _parsed(path: Path) -> dict[str, Any]:
    try:
        values = tomllib.loads(path.read_text())
    except FileNotFoundError:
        return {}
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise ValueError(f"{path} is no TOML that can be read: {error}") from None
    if unknown := values.keys() - {"default", "rules"}:
        raise ValueError(f"{path}: {sorted(unknown)[0]!r} is neither default nor rules")
    return values
