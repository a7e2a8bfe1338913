"""The policies of an installation, and which stream has which: a directory whose files may change at any time.

    <stem>.safetensors    a NAMM; rules may name it by its stem, decisions name it by its digest
    rules.toml            default = "sinks-recent/1"
                          [[rules]]
                          streams = "tenants/acme/streams/*"    the first rule that matches a stream's name counts
                          policy = "<stem>"                     or the name of a policy that has no parameters
                          shadow = "heavy-hitter/1"             scored beside it, never applied

Files are put there whole (written beside and renamed). All are read together or none: while one of them is broken, what
was there before stays. A policy that was loaded once stays for those who name it by its digest.
"""

import logging
import tomllib
from collections import ChainMap
from collections.abc import Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from eunoe.eviction import POLICIES, EvictionPolicy, Namm, ScoringPolicy
from eunoe.runtime.errors import UnknownVersion

logger = logging.getLogger(__name__)

_RULES_FILE = "rules.toml"

_Signature = tuple[tuple[str, int, int, int], ...]


@dataclass(frozen=True, slots=True)
class Choice:
    """What decides for a stream, and what is scored beside it for comparison."""

    policy: EvictionPolicy
    shadow: ScoringPolicy | None = None


@dataclass(frozen=True, slots=True)
class _Rule:
    streams: str
    choice: Choice


@dataclass(frozen=True, slots=True)
class _Loaded:
    signature: _Signature
    by_stem: Mapping[str, EvictionPolicy]
    default: EvictionPolicy
    rules: tuple[_Rule, ...] = ()
    by_name: Mapping[str, EvictionPolicy] = field(default_factory=dict)


class PolicyCatalogue:
    """Safe to use from any thread.

    Args:
        directory: Where files are; None knows only the policies without parameters.
        default: For streams that no rule matches, unless the rules name another.

    Raises:
        ValueError: If a file is broken, or something names a policy that is not there.
    """

    def __init__(self, directory: Path | None, default: str) -> None:
        self._directory = directory
        self._default = default
        self._loaded = self._load(_signature(directory), {})
        self._broken: _Signature | None = None

    @property
    def policies(self) -> Mapping[str, EvictionPolicy]:
        """All that are here and were since the start, by the names that decisions have."""
        return ChainMap(POLICIES, dict(self._loaded.by_name))

    @property
    def default(self) -> EvictionPolicy:
        """For streams that no rule matches."""
        return self._loaded.default

    @property
    def largest(self) -> EvictionPolicy:
        """One that has the memory state remember the most bytes of a slot."""
        return max(self.policies.values(), key=lambda each: each.statistics.num_bytes if each.statistics else 0)

    def choose(self, stream: str) -> Choice:
        """What the first rule that matches a stream's full name says."""
        loaded = self._loaded
        return next((rule.choice for rule in loaded.rules if fnmatchcase(stream, rule.streams)), Choice(loaded.default))

    def refresh(self) -> bool:
        """Read the files again if they have changed; whether what is here is another now. Broken ones are logged."""
        try:
            signature = _signature(self._directory)
        except OSError:
            return False  # In the middle of a change.
        if signature in (self._loaded.signature, self._broken):
            return False
        try:
            self._loaded = self._load(signature, self._loaded.by_name)
        except ValueError as error:
            self._broken = signature
            logger.error("the policies stay as they were", extra={"problem": str(error)})
            return False
        self._broken = None
        logger.info("policies are loaded", extra={"policies": sorted(self._loaded.by_name)})
        return True

    def _load(self, signature: _Signature, former: Mapping[str, EvictionPolicy]) -> _Loaded:
        by_stem: dict[str, EvictionPolicy] = {}
        default = self._default
        rules: list[dict[str, Any]] = []
        for name, *_ in signature:
            assert self._directory is not None
            path = self._directory / name
            try:
                if name == _RULES_FILE:
                    default, rules = _parsed(path, default)
                else:
                    by_stem[path.stem] = Namm.load(path)
            except (OSError, UnknownVersion) as error:
                raise ValueError(f"{path} cannot be read: {error}") from None
        by_name = {**former, **{policy.name: policy for policy in by_stem.values()}}
        known = ChainMap(by_stem, dict(POLICIES), by_name)
        return _Loaded(signature, by_stem, _named(default, known), tuple(_rule(r, known) for r in rules), by_name)


def _signature(directory: Path | None) -> _Signature:
    """What changes whenever a file does."""
    if directory is None:
        return ()
    paths = sorted(path for path in directory.glob("*") if path.suffix == ".safetensors" or path.name == _RULES_FILE)
    return tuple((path.name, stat.st_mtime_ns, stat.st_size, stat.st_ino) for path in paths for stat in [path.stat()])


def _parsed(path: Path, default: str) -> tuple[str, list[dict[str, Any]]]:
    try:
        values = tomllib.loads(path.read_text())
    except (UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise ValueError(f"{path} is no TOML: {error}") from None
    if unknown := values.keys() - {"default", "rules"}:
        raise ValueError(f"{path}: {sorted(unknown)[0]!r} is neither default nor rules")
    rules = values.get("rules", [])
    for rule in rules:
        if not {"streams", "policy"} <= rule.keys() <= {"streams", "policy", "shadow"}:
            raise ValueError(f"{path}: a rule has streams, policy and perhaps shadow, not {sorted(rule)}")
    return values.get("default", default), rules


def _rule(values: dict[str, Any], known: Mapping[str, EvictionPolicy]) -> _Rule:
    policy = _named(values["policy"], known)
    if "shadow" not in values:
        return _Rule(values["streams"], Choice(policy))
    shadow = _named(values["shadow"], known)
    if not isinstance(shadow, ScoringPolicy):
        raise ValueError(f"{shadow.name} has no scores, so it is no shadow")
    if shadow.statistics is not None and (
        policy.statistics is None or policy.statistics.name != shadow.statistics.name
    ):
        # A memory state has the statistics of the policy that decides, and of no other.
        raise ValueError(f"{shadow.name} is no shadow of {policy.name}, under which nobody observes what it scores")
    return _Rule(values["streams"], Choice(policy, shadow))


def _named(name: str, known: Mapping[str, EvictionPolicy]) -> EvictionPolicy:
    if name not in known:
        raise ValueError(f"there is no policy {name!r}, only {', '.join(sorted(known))}")
    return known[name]
