"""The directory of a training run: what it was told to do, and a durable log of what it did.

run.json        the settings; a run is only resumed with the same ones
log.jsonl       a line a generation
"""

import dataclasses
import fcntl
import json
import os
from pathlib import Path
from typing import Any, Self

from eunoe.training.evolution import Generation

_VERSION = 1


class BadRunDirectory(ValueError):
    """A directory belongs to another run, is in use, or holds no run."""


class RunDirectory:
    """One run's directory, held by one process at a time.

    Args:
        path: Made if missing.
        settings: Of the run, as JSON.

    Attributes:
        path: Where it is.
        settings: As they are in run.json.
        generations: What the log holds.

    Raises:
        BadRunDirectory: If another process holds it, or a run with other settings began there.
    """

    def __init__(self, path: Path, settings: dict[str, Any]) -> None:
        self.path = path
        path.mkdir(parents=True, exist_ok=True)
        self._log = (path / "log.jsonl").open("a+b")
        try:
            fcntl.flock(self._log, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self._log.close()
            raise BadRunDirectory(f"another process trains in {path}") from None
        try:
            self.settings = self._checked_settings(settings)
            self.generations = self._read_log()
        except BaseException:
            self._log.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._log.close()

    def append(self, generation: Generation) -> None:
        """Add a line to the log; it is on disk when this returns."""
        self._log.write(json.dumps(dataclasses.asdict(generation)).encode() + b"\n")
        self._log.flush()
        os.fsync(self._log.fileno())
        self.generations.append(generation)

    def _checked_settings(self, settings: dict[str, Any]) -> dict[str, Any]:
        path = self.path / "run.json"
        wanted: dict[str, Any] = json.loads(json.dumps({"version": _VERSION} | settings))
        if not path.exists():
            write_whole(path, json.dumps(wanted, indent=2).encode() + b"\n")
            return wanted
        try:
            found = json.loads(path.read_bytes())
        except ValueError:
            raise BadRunDirectory(f"{path} is no JSON") from None
        differing = _differing(found, wanted)
        if differing:
            raise BadRunDirectory(f"{self.path} holds a run with other settings: {', '.join(differing)}")
        return wanted

    def _read_log(self) -> list[Generation]:
        self._log.seek(0)
        lines = self._log.read().splitlines(keepends=True)
        # A process was killed while it wrote: that generation was never finished.
        if lines and not lines[-1].endswith(b"\n"):
            self._log.truncate(self._log.tell() - len(lines.pop()))
        try:
            found = [json.loads(line) for line in lines]
            lists = ("ranking", "fitness", "num_prompts")
            generations = [Generation(**line | {name: tuple(line[name]) for name in lists}) for line in found]
        except (ValueError, TypeError, KeyError) as error:
            raise BadRunDirectory(f"{self.path / 'log.jsonl'} is damaged: {error}") from None
        if [generation.number for generation in generations] != list(range(len(generations))):
            raise BadRunDirectory(f"{self.path / 'log.jsonl'} is damaged: generations are missing")
        return generations


def write_whole(path: Path, content: bytes) -> None:
    """Write a file, or leave what was there."""
    beside = path.with_name(path.name + ".new")
    with beside.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    os.replace(beside, path)


def _differing(found: Any, wanted: Any, name: str = "") -> list[str]:
    """Names of the fields that differ, with both values."""
    if not isinstance(found, dict) or not isinstance(wanted, dict):
        return [] if found == wanted else [f"{name} was {found!r}, not {wanted!r}"]
    names = sorted(found.keys() | wanted.keys())
    return [
        text
        for each in names
        for text in _differing(found.get(each), wanted.get(each), f"{name}.{each}" if name else each)
    ]
