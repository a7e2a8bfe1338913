"""Scores of eviction_quality that outlive a run: one JSON line each, by policy, share of bytes and case."""

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass, fields
from pathlib import Path

from eunoe.training.evaluation import Score


@dataclass(frozen=True, slots=True)
class Key:
    """What was scored. A policy's name has all that decides: version, parameters, positions, model, dtype."""

    policy: str
    share: float
    case: str


class Results:
    """A file of scores. A line that a killed run left unfinished is left out."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._scores: dict[Key, Score] = {}
        path.parent.mkdir(parents=True, exist_ok=True)
        for line in path.read_text().splitlines() if path.exists() else ():
            if line.endswith("}"):
                found = json.loads(line)
                key = Key(*(found.pop(field.name) for field in fields(Key)))
                self._scores[key] = Score(**found)

    def __contains__(self, key: Key) -> bool:
        return key in self._scores

    def __getitem__(self, key: Key) -> Score:
        return self._scores[key]

    def add(self, key: Key, score: Score) -> None:
        """Remember a score, here and in the file."""
        self._scores[key] = score
        line = json.dumps(asdict(key) | asdict(score))
        # A line of its own, even behind half of one.
        with self._path.open("a") as file:
            file.write(f"\n{line}" if file.tell() else line)

    def exact(self, policy: str, share: float, cases: Iterable[str]) -> list[float]:
        """1 for each case that the policy answers, else 0."""
        return [float(self[Key(policy, share, case)].is_exact) for case in cases]

    def log_likelihoods(self, policy: str, share: float, cases: Iterable[str]) -> list[float]:
        """Of each case's answer."""
        return [self[Key(policy, share, case)].log_likelihood for case in cases]
