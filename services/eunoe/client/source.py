"""Where an append's bytes come from: bytes, text, a binary file, or any iterable of pieces."""

import asyncio
import io
from collections.abc import AsyncIterable, AsyncIterator, Iterable, Iterator
from typing import IO, cast

RECORD_BYTES = 128 * 1024

SourceLike = bytes | str | IO[bytes] | Iterable[bytes | str] | AsyncIterable[bytes | str]


class Source:
    """Reads pieces of at most 128 KiB, and can go back if what it reads from can.

    A file is read from where it stands. Blocking reads run on a thread, so that a source may wait for its data.

    Attributes:
        position: Bytes read so far, from the source's start.
        can_go_back: Whether `move` also moves backwards.
    """

    def __init__(self, source: SourceLike) -> None:
        self.position = 0
        self._file: IO[bytes] | None = None
        self._pieces: Iterator[bytes | str] | AsyncIterator[bytes | str] = iter(())
        # What an iterable gave beyond one record.
        self._rest = b""
        self._reading: asyncio.Future[bytes] | None = None
        if isinstance(source, str):
            source = source.encode()
        if isinstance(source, bytes | bytearray | memoryview):
            self._file = io.BytesIO(source)
        elif hasattr(source, "read"):
            self._file = cast(IO[bytes], source)
        elif isinstance(source, AsyncIterable):
            self._pieces = aiter(source)
        elif isinstance(source, Iterable):
            self._pieces = iter(source)
        else:
            raise ValueError(
                f"a source is bytes, str, a binary file or an iterable of them, not {type(source).__name__}"
            )
        self.can_go_back = self._file is not None and self._file.seekable()
        self._start = self._file.tell() if self._file is not None and self.can_go_back else 0

    async def read(self) -> bytes:
        """The next piece; b"" at the end.

        A read that is cancelled loses nothing: the next one gets its piece.
        """
        if self._reading is None:
            self._reading = asyncio.ensure_future(self._read())
        piece = await asyncio.shield(self._reading)
        self._reading = None
        self.position += len(piece)
        return piece

    async def move(self, position: int) -> None:
        """Go to a position: by seeking, or forwards by reading.

        Raises:
            ValueError: If the source ends before it, or would have to go back and cannot.
        """
        if self.can_go_back:
            assert self._file is not None
            if self._reading is not None:
                await self._reading
                self._reading = None
            if position > self._file.seek(0, io.SEEK_END) - self._start:
                raise ValueError(
                    f"the source ends before byte {position}, up to which the stream has taken it in before"
                )
            self._file.seek(self._start + position)
            self.position, self._rest = position, b""
        if position < self.position:
            raise ValueError(f"the source cannot go back to byte {position}")
        while self.position < position:
            piece = await self.read()
            if not piece:
                raise ValueError(
                    f"the source ends before byte {position}, up to which the stream has taken it in before"
                )
            if self.position > position:
                surplus = self.position - position
                self._rest = piece[-surplus:] + self._rest
                self.position = position

    async def _read(self) -> bytes:
        if not self._rest:
            if self._file is not None:
                self._rest = await asyncio.to_thread(self._file.read, RECORD_BYTES)
            else:
                self._rest = await self._next_nonempty()
        piece, self._rest = self._rest[:RECORD_BYTES], self._rest[RECORD_BYTES:]
        return piece

    async def _next_nonempty(self) -> bytes:
        while True:
            if isinstance(self._pieces, AsyncIterator):
                piece = await anext(self._pieces, None)
            else:
                piece = await asyncio.to_thread(next, self._pieces, None)
            if piece is None:
                return b""
            if piece:
                return piece.encode() if isinstance(piece, str) else bytes(piece)
