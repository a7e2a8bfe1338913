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
from collections.abc import Iterator
from contextlib import contextmanager
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
        self._problem: str | None = None
        self._rules = self._read()

    def choose(self, stream: str) -> Choice:
        """What the first rule that matches a stream's full name says."""
        return next(rule.choice for rule in self._rules if fnmatchcase(stream, rule.streams))

    def refresh(self) -> bool:
        """Read everything again if something has changed; whether there are new rules now. Broken ones are logged."""
        has_changed = self.files.refresh()
        # A file that could not be read may be readable by now and look the same.
        if not has_changed and self._problem is None:
            return False
        try:
            self._rules = self._read()
        except ValueError as error:
            if has_changed or str(error) != self._problem:
                logger.error("the rules stay as they were", extra={"problem": str(error)})
            self._problem = str(error)
            return False
        self._problem = None
        logger.info("there are new policies or rules", extra={"num_rules": len(self._rules)})
        return True

    def _read(self) -> tuple[_Rule, ...]:
        """The rules, the last of which matches every stream."""
        for name, problem in self.files.broken.items():
            raise ValueError(f"{name} cannot be read: {problem}")
        if self.files.directory is None:
            return (_Rule("*", Choice(self.files.named(self._default))),)
        path = self.files.directory / "rules.toml"
        values = _parsed(path)
        with _named(f"{path}: default" if "default" in values else "the default"):
            last = _Rule("*", Choice(self.files.named(_text(values.get("default", self._default)))))
        rules = []
        for number, rule in enumerate(values.get("rules", []), 1):
            with _named(f"{path}: rule {number}"):
                rules.append(self._rule(rule))
        return (*rules, last)

    def _rule(self, values: dict[str, Any]) -> _Rule:
        if not {"streams", "policy"} <= values.keys() <= {"streams", "policy", "shadow"}:
            raise ValueError(f"a rule has streams, policy and perhaps shadow, not {sorted(values)}")
        for key, value in values.items():
            with _named(key):
                _text(value)
        policy = self.files.named(values["policy"])
        if "shadow" not in values:
            return _Rule(values["streams"], Choice(policy))
        shadow = self.files.named(values["shadow"])
        if not isinstance(shadow, ScoringPolicy):
            raise ValueError(f"{shadow.name} has no scores, so it is no shadow")
        if not is_observed(shadow, policy):
            raise ValueError(f"{shadow.name} is no shadow of {policy.name}, under which nobody observes what it scores")
        return _Rule(values["streams"], Choice(policy, shadow))


def is_observed(shadow: ScoringPolicy, policy: EvictionPolicy) -> bool:
    """Whether a memory state has what the shadow scores: it has the statistics of `policy`, and no others."""
    observed = policy.statistics.name if policy.statistics is not None else None
    return shadow.statistics is None or shadow.statistics.name == observed


def _parsed(path: Path) -> dict[str, Any]:
    """A file's values, of which `rules` is a list of tables; none if there is no file."""
    try:
        values = tomllib.loads(path.read_text())
    except FileNotFoundError:
        # Gone by itself, and not with its directory or with what it is a link to.
        if path.parent.is_dir() and not path.is_symlink():
            return {}
        raise ValueError(f"{path} is out of reach") from None
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError, RecursionError) as error:
        raise ValueError(f"{path} is no TOML that can be read: {error}") from None
    if unknown := values.keys() - {"default", "rules"}:
        raise ValueError(f"{path}: {sorted(unknown)[0]!r} is neither default nor rules")
    rules = values.get("rules", [])
    if not isinstance(rules, list) or not all(isinstance(rule, dict) for rule in rules):
        raise ValueError(f"{path}: rules is no list of tables; each begins with [[rules]]")
    return values


def _text(value: object) -> str:
    if not isinstance(value, str):
        raise ValueError(f"{value!r} is no string")
    return value


@contextmanager
def _named(place: str) -> Iterator[None]:
    """Has a ValueError say where it is."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{place}: {error}") from None
