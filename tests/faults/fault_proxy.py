"""A TCP proxy that does to connections what networks do: delays, drips, resets, half-closes, black holes, lost replies.

async with FaultProxy("unix:///run/redis.sock") as proxy:
    client = connect(proxy.address)
    proxy.lose_replies()
"""

import asyncio
import contextlib
import random
import socket
import struct
from pathlib import Path
from typing import Self

_READ_BYTES = 1 << 16
_LINGER_ZERO = struct.pack("ii", 1, 0)


class FaultProxy:
    """Forwards every connection to `target`, and does harm to it.

    Whatever is set holds for the connections that are open and for those to come, until `heal`.

    Args:
        target: Where to: "host:port" or "unix:///path". May be set anew: connections to come go there.
        seed: Of the sizes and pauses of delays and drips, and of what is corrupted.
        listen_path: Where to listen, as a unix socket; None picks a port of loopback.

    Attributes:
        delay_seconds: Longest pause before a piece is forwarded.
        drip_bytes: Most bytes that are forwarded at once; 0 is no limit.
        corrupts_replies: Whether a byte of each piece of a reply is changed.
        num_lost_bytes: Bytes of replies that were thrown away.
        num_connections: Connections taken so far.
    """

    def __init__(self, target: str, seed: int = 0, listen_path: Path | None = None) -> None:
        self.target = target
        self.delay_seconds = 0.0
        self.drip_bytes = 0
        self.corrupts_replies = False
        self.num_lost_bytes = 0
        self.num_connections = 0
        self._listen_path = listen_path
        self._randomness = random.Random(seed)
        self._loses_replies = False
        self._bytes_to_reset: int | None = None
        self._is_open = asyncio.Event()
        self._is_open.set()
        self._links: dict[asyncio.Task[None], _Link] = {}
        self._server: asyncio.Server

    async def __aenter__(self) -> Self:
        if self._listen_path is None:
            self._server = await asyncio.start_server(self._serve, "127.0.0.1", 0)
        else:
            self._server = await asyncio.start_unix_server(self._serve, self._listen_path)
        return self

    async def __aexit__(self, *_: object) -> None:
        self._server.close()
        self.reset_all()
        while self._links:
            await asyncio.wait(self._links)
        await self._server.wait_closed()

    @property
    def address(self) -> str:
        """host:port of this proxy, or unix:path."""
        if self._listen_path is not None:
            return f"unix:{self._listen_path}"
        host, port = self._server.sockets[0].getsockname()
        return f"{host}:{port}"

    def heal(self) -> None:
        """Forward faithfully again. A connection of which bytes were lost or changed is reset: it could not go on."""
        self.delay_seconds = 0.0
        self.drip_bytes = 0
        self.corrupts_replies = False
        self._loses_replies = False
        self._bytes_to_reset = None
        self._is_open.set()
        for link in self._links.values():
            if link.has_lost_bytes or link.has_corrupted_bytes:
                link.reset()

    def drip(self, bytes_per_second: int) -> None:
        """Forward about so many bytes a second, in pieces of half a second's on average."""
        self.drip_bytes, self.delay_seconds = bytes_per_second, 1.0

    def reset_all(self) -> None:
        """Reset every open connection, as RST on both sides; what is on its way is lost."""
        for link in self._links.values():
            link.reset()

    def reset_after(self, num_bytes: int) -> None:
        """Reset every connection once so many more bytes, of all of them together, were forwarded."""
        self._bytes_to_reset = num_bytes

    def half_close_all(self) -> None:
        """Tell every server that its client will send no more, and let the replies through."""
        for link in self._links.values():
            link.half_close()

    def blackhole(self) -> None:
        """Forward nothing, and close nothing; after `heal` it comes late, as retransmissions do."""
        self._is_open.clear()

    def lose_replies(self) -> None:
        """Throw away whatever servers send from now on; requests go through."""
        self._loses_replies = True

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.num_connections += 1
        link = _Link(reader, writer)
        task = asyncio.current_task()
        assert task is not None
        self._links[task] = link
        carrying = asyncio.create_task(self._carry(link))
        resetting = asyncio.create_task(link.is_reset.wait())
        try:
            await asyncio.wait({carrying, resetting}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            carrying.cancel()
            resetting.cancel()
            await asyncio.gather(carrying, resetting, return_exceptions=True)
            del self._links[task]
            link.close()

    async def _carry(self, link: "_Link") -> None:
        await self._is_open.wait()
        if await link.connect(self.target):
            async with asyncio.TaskGroup() as directions:
                directions.create_task(self._forward(link, link.client_reader, link.server_writer, is_reply=False))
                directions.create_task(self._forward(link, link.server_reader, link.client_writer, is_reply=True))

    async def _forward(
        self, link: "_Link", reader: asyncio.StreamReader, writer: asyncio.StreamWriter, *, is_reply: bool
    ) -> None:
        try:
            while data := await reader.read(_READ_BYTES):
                await self._is_open.wait()
                while data:
                    size = self._randomness.randint(1, self.drip_bytes) if self.drip_bytes else len(data)
                    piece, data = data[:size], data[size:]
                    if self.delay_seconds:
                        await asyncio.sleep(self._randomness.uniform(0.0, self.delay_seconds))
                    if is_reply and (self._loses_replies or link.has_lost_bytes):
                        self.num_lost_bytes += len(piece)
                        link.has_lost_bytes = True
                        continue
                    if is_reply and self.corrupts_replies:
                        piece = self._corrupted(piece)
                        link.has_corrupted_bytes = True
                    if self._is_due_to_reset(len(piece)):
                        self.reset_all()
                        return
                    writer.write(piece)
                    await writer.drain()
            # The end of this direction alone: the other one may go on.
            writer.write_eof()
        except (ConnectionError, OSError, RuntimeError):
            link.reset()

    def _corrupted(self, piece: bytes) -> bytes:
        changed = bytearray(piece)
        changed[self._randomness.randrange(len(changed))] ^= self._randomness.randint(1, 255)
        return bytes(changed)

    def _is_due_to_reset(self, num_bytes: int) -> bool:
        if self._bytes_to_reset is None:
            return False
        self._bytes_to_reset -= num_bytes
        if self._bytes_to_reset >= 0:
            return False
        self._bytes_to_reset = None
        return True


class _Link:
    """One connection: both of its sockets."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.client_reader, self.client_writer = reader, writer
        self.server_reader: asyncio.StreamReader
        self.server_writer: asyncio.StreamWriter
        self.is_reset = asyncio.Event()
        self.has_lost_bytes = False
        self.has_corrupted_bytes = False
        self._is_connected = False

    async def connect(self, target: str) -> bool:
        """Open the server's side; False if nobody is there, and the client's side is reset."""
        try:
            if target.startswith("unix://"):
                opened = await asyncio.open_unix_connection(target.removeprefix("unix://"))
            else:
                host, _, port = target.rpartition(":")
                opened = await asyncio.open_connection(host, int(port))
        except OSError:
            self.reset()
            return False
        self.server_reader, self.server_writer = opened
        self._is_connected = True
        return True

    def reset(self) -> None:
        self.is_reset.set()

    def half_close(self) -> None:
        if self._is_connected and not self.is_reset.is_set():
            with contextlib.suppress(OSError, RuntimeError):
                self.server_writer.write_eof()

    def close(self) -> None:
        for writer in (self.client_writer, *([self.server_writer] if self._is_connected else [])):
            if self.is_reset.is_set():
                # Linger of 0: RST instead of FIN, and unsent bytes are thrown away.
                with contextlib.suppress(OSError):
                    writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _LINGER_ZERO)
                writer.transport.abort()
            else:
                writer.close()
