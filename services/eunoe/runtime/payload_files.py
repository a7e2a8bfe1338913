"""Large payloads between processes of one machine: files on a directory in memory, read by who is told their name.

    0   8   "eunoepay"           24  16   XXH3-128 of the payload
    8   8   generation           40  24   zeros
    16  8   length in bytes      64       the payload

A writer has one file and overwrites it. A reader that comes late finds another generation, one that reads while it is
written finds another digest; it fails, and nothing worse happens.
"""

import errno
import os
import stat
import struct
import time
from dataclasses import dataclass
from pathlib import Path

import xxhash

INLINE_BYTES = 1 << 20
"""Up to so many bytes go inside of a message."""

_SUFFIX = ".payload"
_MAGIC = b"eunoepay"
_HEADER = struct.Struct("<8sQQ16s24x")


@dataclass(slots=True)
class PayloadWriter:
    """Writes one payload after the other into one file, "<stem>.payload"."""

    directory: Path
    stem: str
    _generation: int = 0

    @property
    def name(self) -> str:
        """Of the file, for `read_payload`."""
        return f"{self.stem}{_SUFFIX}"

    def write(self, data: memoryview) -> int:
        """Overwrite the file; returns the generation.

        Raises:
            OSError: If there is no room.
        """
        # From the clock, so that nothing of a former process of this name is taken for this one's.
        self._generation = max(self._generation + 1, time.time_ns())
        header = _HEADER.pack(_MAGIC, self._generation, data.nbytes, xxhash.xxh3_128_digest(data))
        descriptor = os.open(self.directory / self.name, os.O_WRONLY | os.O_CREAT | os.O_NOFOLLOW, 0o600)
        with os.fdopen(descriptor, "wb") as file:
            file.write(header)
            file.write(data)
        return self._generation

    def close(self) -> None:
        """Remove the file."""
        (self.directory / self.name).unlink(missing_ok=True)


def read_payload(directory: Path, name: str, generation: int, into: memoryview) -> None:
    """Read a payload of exactly the length of `into`.

    Raises:
        ValueError: If it is not there, or not the one that was meant.
    """
    if not name or "/" in name or name.startswith("."):
        raise ValueError(f"{name!r} is no payload's name")
    try:
        with open(directory / name, "rb", opener=_open_file) as file:
            header = file.read(_HEADER.size)
            num_read = file.readinto(into)
    except OSError as error:
        raise ValueError(f"the payload {name} cannot be read: {error.strerror}") from None
    if len(header) < _HEADER.size:
        raise ValueError(f"the payload {name} is cut short")
    magic, found, length, digest = _HEADER.unpack(header)
    if (magic, found) != (_MAGIC, generation):
        raise ValueError(f"the payload {name} is of generation {found}, not {generation}")
    if length != into.nbytes or num_read != length or xxhash.xxh3_128_digest(into) != digest:
        raise ValueError(f"the payload {name} is not what was written")


def _open_file(path: str, flags: int) -> int:
    """Neither follows a link nor waits for a pipe's writer."""
    descriptor = os.open(path, flags | os.O_NOFOLLOW | os.O_NONBLOCK)
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise OSError(errno.EINVAL, "it is no file")
    return descriptor


def remove_stale(directory: Path, max_age_seconds: float) -> None:
    """Remove files that nobody has written for so long: their writers have died.

    Raises:
        OSError: If one cannot be removed; all others are.
    """
    first_error = None
    for path in directory.glob(f"*{_SUFFIX}"):
        try:
            if time.time() - path.stat().st_mtime > max_age_seconds:
                path.unlink()
        except FileNotFoundError:
            continue
        except OSError as error:
            first_error = first_error or error
    if first_error is not None:
        raise first_error
