"""The proxy harms connections as it says, and is faithful otherwise."""

import asyncio
from collections.abc import AsyncIterator

import pytest
from fault_proxy import FaultProxy

Connection = tuple[asyncio.StreamReader, asyncio.StreamWriter]


class EchoServer:
    """Sends everything back, and after the client's end b"bye".

    Attributes:
        received: All bytes of all connections.
        num_resets: Connections that were reset.
    """

    def __init__(self) -> None:
        self.received = b""
        self.num_resets = 0
        self.has_been_reset = asyncio.Event()

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while data := await reader.read(1 << 16):
                self.received += data
                writer.write(data)
                await writer.drain()
            writer.write(b"bye")
        except ConnectionResetError:
            self.num_resets += 1
            self.has_been_reset.set()
        finally:
            writer.close()


@pytest.fixture
async def echo() -> EchoServer:
    return EchoServer()


@pytest.fixture(params=["tcp", "unix"])
async def proxy(request: pytest.FixtureRequest, echo: EchoServer, tmp_path_factory) -> AsyncIterator[FaultProxy]:
    """A proxy before the echo server."""
    if request.param == "unix":
        path = tmp_path_factory.mktemp("echo") / "s"
        server = await asyncio.start_unix_server(echo.serve, path)
        target = f"unix://{path}"
    else:
        server = await asyncio.start_server(echo.serve, "127.0.0.1", 0)
        target = f"127.0.0.1:{server.sockets[0].getsockname()[1]}"
    async with server, FaultProxy(target, seed=1) as proxy:
        yield proxy


async def connected(proxy: FaultProxy) -> Connection:
    host, _, port = proxy.address.rpartition(":")
    reader, writer = await asyncio.open_connection(host, int(port))
    writer.write(b"hello")
    assert await reader.readexactly(5) == b"hello"
    return reader, writer


async def test_an_unharmed_connection_is_forwarded_to_its_end(proxy: FaultProxy) -> None:
    reader, writer = await connected(proxy)
    data = bytes(range(256)) * 2000

    writer.write(data)
    writer.write_eof()

    assert await reader.read() == data + b"bye"
    writer.close()


async def test_drips_and_delays_change_no_byte(proxy: FaultProxy) -> None:
    reader, writer = await connected(proxy)
    proxy.drip_bytes, proxy.delay_seconds = 3, 0.001

    writer.write(b"0123456789" * 5)

    assert await reader.readexactly(50) == b"0123456789" * 5
    writer.close()


async def test_a_proxy_may_listen_at_a_unix_socket(echo: EchoServer, tmp_path_factory) -> None:
    directory = tmp_path_factory.mktemp("proxy")
    async with (
        await asyncio.start_unix_server(echo.serve, directory / "s"),
        FaultProxy(f"unix://{directory}/s", listen_path=directory / "p") as proxy,
    ):
        assert proxy.address == f"unix:{directory}/p"
        reader, writer = await asyncio.open_unix_connection(directory / "p")
        writer.write(b"hello")
        assert await reader.readexactly(5) == b"hello"

        proxy.reset_all()

        assert await reader.read() == b""
        writer.close()


async def test_a_corrupted_reply_is_another_of_the_same_length(proxy: FaultProxy, echo: EchoServer) -> None:
    reader, writer = await connected(proxy)
    proxy.corrupts_replies = True

    writer.write(b"request")
    reply = await reader.readexactly(7)
    proxy.heal()

    assert reply != b"request"
    assert echo.received == b"hellorequest"
    with pytest.raises(ConnectionResetError):
        await reader.read()
    writer.close()


async def test_reset_reaches_both_sides(proxy: FaultProxy, echo: EchoServer, request) -> None:
    reader, writer = await connected(proxy)

    proxy.reset_all()

    with pytest.raises(ConnectionResetError):
        await reader.read()
    writer.close()
    if "tcp" in request.node.name:  # A unix socket knows no RST.
        await asyncio.wait_for(echo.has_been_reset.wait(), 5)


async def test_reset_after_so_many_bytes_lets_no_further_byte_through(proxy: FaultProxy, echo: EchoServer) -> None:
    reader, writer = await connected(proxy)
    proxy.reset_after(4)

    writer.write(b"12345")

    with pytest.raises(ConnectionResetError):
        await reader.read()
    writer.close()
    assert echo.received == b"hello"


async def test_lost_replies_are_those_of_requests_that_came_through(proxy: FaultProxy, echo: EchoServer) -> None:
    reader, writer = await connected(proxy)
    proxy.lose_replies()

    writer.write(b"request")
    async with asyncio.timeout(5):
        while proxy.num_lost_bytes < 7:
            await asyncio.sleep(0.001)
    proxy.heal()

    with pytest.raises(ConnectionResetError):
        await reader.read()
    writer.close()
    assert echo.received == b"hellorequest"
    _, another = await connected(proxy)
    another.close()


async def test_a_black_hole_holds_bytes_back_and_closes_nothing(proxy: FaultProxy, echo: EchoServer) -> None:
    reader, writer = await connected(proxy)
    proxy.blackhole()
    writer.write(b"late")
    with pytest.raises(TimeoutError):
        await asyncio.wait_for(reader.read(1), 0.05)
    assert echo.received == b"hello"

    proxy.heal()

    assert await reader.readexactly(4) == b"late"
    writer.close()


async def test_a_half_closed_connection_still_brings_the_reply(proxy: FaultProxy) -> None:
    reader, writer = await connected(proxy)

    proxy.half_close_all()

    assert await reader.read() == b"bye"
    writer.close()


async def test_a_new_target_takes_the_connections_to_come(proxy: FaultProxy) -> None:
    first = await connected(proxy)
    other = EchoServer()
    async with await asyncio.start_server(other.serve, "127.0.0.1", 0) as server:
        proxy.target = f"127.0.0.1:{server.sockets[0].getsockname()[1]}"
        second = await connected(proxy)
        first[1].write(b"old")
        assert await first[0].readexactly(3) == b"old"

        assert other.received == b"hello"
        for _, writer in (first, second):
            writer.close()


async def test_nobody_at_the_target_is_a_reset(proxy: FaultProxy) -> None:
    proxy.target = "unix:///nobody"

    with pytest.raises(ConnectionResetError):
        await connected(proxy)
