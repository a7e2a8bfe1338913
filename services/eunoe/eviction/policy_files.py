"""The eviction policies of an installation: those without parameters, those that come with it (checkpoints/), and those
in the files of a directory.

`<stem>.safetensors` is a NAMM, which people name by its stem and decisions by its digest. Files are put there whole
(written beside and renamed), at any time.
"""

import logging
import os
from collections import ChainMap
from collections.abc import Mapping
from pathlib import Path

from eunoe.eviction import POLICIES, EvictionPolicy, Namm
from eunoe.runtime.errors import UnknownVersion

logger = logging.getLogger(__name__)

_Signature = tuple[tuple[str, int, int, int], ...]

SHIPPED = Path(__file__).parents[1] / "checkpoints"


class PolicyFiles:
    """Policies by name. Safe to use from any thread.

    A file that cannot be read is logged and passed over; while the directory cannot be listed, all stays as it was. A
    policy that was loaded once stays for those who name it by its digest, whatever becomes of its file.

    Args:
        directory: None has no files. One of a shipped policy's stem takes its place.

    Attributes:
        broken: Why files could not be read, by their names.

    Raises:
        ValueError: If the directory cannot be read.
    """

    def __init__(self, directory: Path | None) -> None:
        self.directory = directory
        self.broken: Mapping[str, str] = {}
        self._signature: _Signature | None = None
        self._problem: str | None = None
        shipped = sorted(SHIPPED.glob("*.safetensors"))
        self._shipped: dict[str, EvictionPolicy] = {path.stem: Namm.load(path) for path in shipped}
        self._by_stem: Mapping[str, EvictionPolicy] = {}
        self._by_name: Mapping[str, EvictionPolicy] = {policy.name: policy for policy in self._shipped.values()}
        try:
            self._refresh()
        except OSError as error:
            raise ValueError(f"policies cannot be read: {error}") from None

    @property
    def by_name(self) -> Mapping[str, EvictionPolicy]:
        """All that are here and were since the start, by the names that decisions have."""
        return ChainMap(POLICIES, dict(self._by_name))

    @property
    def largest(self) -> EvictionPolicy:
        """One that has the memory state remember the most bytes of a slot."""
        return max(self.by_name.values(), key=lambda each: each.statistics.num_bytes if each.statistics else 0)

    def named(self, name: str) -> EvictionPolicy:
        """The policy of that name, or in the file of that stem.

        Raises:
            ValueError: If there is none.
        """
        known = ChainMap(dict(self._by_stem), POLICIES, self._shipped, dict(self._by_name))
        if name not in known:
            raise ValueError(f"there is no policy {name!r}, only {', '.join(sorted(known))}")
        return known[name]

    def refresh(self) -> bool:
        """Read the files again if something in the directory has changed or was broken; whether anything is new."""
        try:
            is_new = self._refresh()
        except OSError as error:
            if str(error) != self._problem:
                logger.error("policies stay as they are: the directory cannot be read", extra={"problem": str(error)})
            self._problem = str(error)
            return False
        self._problem = None
        return is_new

    def _refresh(self) -> bool:
        signature = _signature(self.directory)
        # What cannot be read may be readable by now and look the same: permissions change no time of a file.
        is_same = signature == self._signature
        if is_same and not self.broken:
            return False
        by_stem, broken = dict(self._by_stem) if is_same else {}, {}
        for name, *_ in signature:
            if not name.endswith(".safetensors") or (is_same and name not in self.broken):
                continue
            assert self.directory is not None
            try:
                by_stem[name.removesuffix(".safetensors")] = Namm.load(self.directory / name)
            except (OSError, ValueError, UnknownVersion) as error:
                broken[name] = str(error)
                if broken[name] != self.broken.get(name):
                    logger.error("a policy cannot be read", extra={"file": name, "problem": str(error)})
        self._by_name = {**self._by_name, **{policy.name: policy for policy in by_stem.values()}}
        has_changed = not is_same or broken != self.broken
        self._by_stem, self.broken, self._signature = by_stem, broken, signature
        return has_changed


def _signature(directory: Path | None) -> _Signature:
    """What changes whenever a file does.

    Raises:
        OSError: If there is no such directory, or it cannot be listed.
    """
    if directory is None:
        return ()
    with os.scandir(directory) as entries:
        return tuple(sorted(_mark(entry) for entry in entries if entry.name.endswith((".safetensors", ".toml"))))


def _mark(entry: os.DirEntry[str]) -> tuple[str, int, int, int]:
    try:
        stat = entry.stat()
    except OSError:
        return entry.name, 0, 0, 0  # A link to nothing, say: reading it will tell.
    return entry.name, stat.st_mtime_ns, stat.st_size, stat.st_ino
