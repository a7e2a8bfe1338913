"""The file that a stream travels in from one installation to another.

    eunoe-export 1 and a line feed                        15 bytes, the format's version in clear
    frame*        kind u8, length u32, payload, CRC-32C u32 of all of these; little-endian

The frames, in this order, each payload a message of eunoe.internal.v1:

    1 header      StreamRecord: settings, model, offsets, and the manifest with the digests of the chunks; no lease
    2 chunk*      ReadChunksResponse: the chunks of the manifest, in its order
    3 record*     ReadLogResponse: the log, from the manifest's applied offset (else the log's start) to the accepted
    4 end         empty: without it the file is torn

Chunks come before the log, so that an import can stage them as they come and holds only the short log in memory.
"""

import struct
from collections.abc import AsyncIterator, Iterator
from enum import IntEnum

import google_crc32c

from eunoe.runtime.errors import BadExport

VERSION = 1
_FIRST_WORD = b"eunoe-export "
MAGIC = _FIRST_WORD + b"%d\n" % VERSION
_MAX_MAGIC_BYTES = 32
PIECE_BYTES = 1024 * 1024

# A record or chunk of 1 MiB in its message.
_MAX_PAYLOAD_BYTES = 1024 * 1024 + 1024
_HEAD = struct.Struct("<BI")
_CHECKSUM = struct.Struct("<I")


class FrameKind(IntEnum):
    """What a frame holds."""

    HEADER = 1
    CHUNK = 2
    RECORD = 3
    END = 4


def frame(kind: FrameKind, payload: bytes = b"") -> bytes:
    """One frame, checksum included."""
    body = _HEAD.pack(kind, len(payload)) + payload
    return body + _CHECKSUM.pack(google_crc32c.value(body))


async def pieces(frames: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
    """The file of these frames, in pieces of at most 1 MiB."""
    waiting = bytearray(MAGIC)
    async for one in frames:
        waiting += one
        while len(waiting) >= PIECE_BYTES:
            yield bytes(waiting[:PIECE_BYTES])
            del waiting[:PIECE_BYTES]
    if waiting:
        yield bytes(waiting)


class FrameReader:
    """Cuts the bytes of an export, which may come in any pieces, into its frames.

    Attributes:
        is_complete: The end frame was read.
    """

    def __init__(self) -> None:
        self._waiting = bytearray()
        self._has_magic = False
        self._last_kind: FrameKind | None = None

    @property
    def is_complete(self) -> bool:
        return self._last_kind is FrameKind.END

    def feed(self, data: bytes) -> Iterator[tuple[FrameKind, bytes]]:
        """The frames that these bytes complete.

        Raises:
            BadExport: If the bytes are none that `frame` made, or the frames are out of order.
        """
        self._waiting += data
        if not self._has_magic and not self._cut_magic():
            return
        if self._waiting and self.is_complete:
            raise BadExport("there are bytes behind the export's end")
        while (found := self._cut_frame()) is not None:
            yield found
            if self._waiting and self.is_complete:
                raise BadExport("there are bytes behind the export's end")

    def _cut_magic(self) -> bool:
        line, line_feed, _ = bytes(self._waiting[:_MAX_MAGIC_BYTES]).partition(b"\n")
        word, version = line[: len(_FIRST_WORD)], line[len(_FIRST_WORD) :]
        is_ours = _FIRST_WORD.startswith(word) and (version.isdigit() or not version)
        if not is_ours or (line_feed and not version):
            raise BadExport("this is no export of a stream")
        if not line_feed and len(line) < _MAX_MAGIC_BYTES:
            return False
        if version != b"%d" % VERSION:
            raise BadExport(f"the export has version {version.decode()}, and version {VERSION} is read here")
        del self._waiting[: len(MAGIC)]
        self._has_magic = True
        return True

    def _cut_frame(self) -> tuple[FrameKind, bytes] | None:
        if len(self._waiting) < _HEAD.size:
            return None
        kind_number, length = _HEAD.unpack_from(self._waiting)
        if kind_number not in tuple(FrameKind) or length > _MAX_PAYLOAD_BYTES:
            raise BadExport("the export is corrupt: a frame has an impossible head")
        end = _HEAD.size + length
        if len(self._waiting) < end + _CHECKSUM.size:
            return None
        body = bytes(self._waiting[:end])
        if _CHECKSUM.unpack_from(self._waiting, end)[0] != google_crc32c.value(body):
            raise BadExport("the export is corrupt: a frame does not have its checksum")
        del self._waiting[: end + _CHECKSUM.size]
        kind = FrameKind(kind_number)
        if (self._last_kind is None) != (kind is FrameKind.HEADER) or (self._last_kind or kind) > kind:
            raise BadExport("the export is corrupt: its frames are out of order")
        self._last_kind = kind
        return kind, body[_HEAD.size :]
