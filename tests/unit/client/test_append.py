"""Appending: every byte once and in order, whatever happens to the calls."""

import io
import random
from collections.abc import AsyncIterator, Callable, Iterator
from typing import Any

import pytest

from eunoe.client import AppendProgress, AsyncClient, StateLost, StreamNotFound, Unavailable
from eunoe.client.source import RECORD_BYTES, Source
from eunoe.runtime.errors import QuotaExceeded

TEXT = random.Random(7).randbytes(5 * RECORD_BYTES + 123)


@pytest.fixture
async def client(gateway: Any) -> AsyncIterator[AsyncClient]:
    async with AsyncClient(gateway.address, retry_seconds=5.0) as client:
        yield client


def log_of(gateway: Any) -> bytes:
    return bytes(gateway.streams["tenants/default/streams/book"].log)


def pieces_of(data: bytes) -> Iterator[bytes]:
    generator = random.Random(3)
    while data:
        num_bytes = generator.randrange(1, 2 * RECORD_BYTES)
        yield data[:num_bytes]
        data = data[num_bytes:]


async def asynchronous_pieces_of(data: bytes) -> AsyncIterator[bytes]:
    for piece in pieces_of(data):
        yield piece


@pytest.mark.parametrize("source_id", ["", "book.txt"])
@pytest.mark.parametrize(
    "source_of", [bytes, io.BytesIO, pieces_of, asynchronous_pieces_of], ids=["bytes", "file", "iterable", "async"]
)
async def test_every_kind_of_source_arrives_whole(
    gateway: Any, client: AsyncClient, source_of: Callable[[bytes], Any], source_id: str
) -> None:
    stream = await client.append("book", source_of(TEXT), source_id=source_id)
    assert log_of(gateway) == TEXT
    assert stream.accepted_offset == len(TEXT)


async def test_text_is_sent_as_utf8(gateway: Any, client: AsyncClient) -> None:
    await client.append("book", "Überfluß")
    assert log_of(gateway).decode() == "Überfluß"


@pytest.mark.parametrize("source_id", ["", "book.txt"])
@pytest.mark.parametrize("cuts", [[1], [3, 1, 2], [1, 1, 1]], ids=str)
async def test_a_call_that_breaks_off_before_a_verdict_loses_and_repeats_nothing(
    gateway: Any, client: AsyncClient, source_id: str, cuts: list[int]
) -> None:
    gateway.cut_after = list(cuts)
    progress: list[AppendProgress] = []
    await client.append("book", pieces_of(TEXT), source_id=source_id, on_progress=progress.append)
    assert log_of(gateway) == TEXT
    assert progress[-1].num_reconnects >= len(cuts) - gateway.cut_after.count(1)
    assert progress[-1].source_bytes_accepted == len(TEXT)


@pytest.mark.parametrize("source_id", ["", "book.txt"])
async def test_another_writer_of_records_of_the_same_length_changes_no_order(
    gateway: Any, client: AsyncClient, source_id: str
) -> None:
    other = b"x" * RECORD_BYTES
    gateway.others = {1: other, 3: other, 4: other}
    await client.append("book", TEXT, source_id=source_id)
    log = log_of(gateway)
    assert len(log) == len(TEXT) + 3 * len(other)
    assert log.replace(other, b"") == TEXT


async def test_the_same_bytes_from_another_writer_are_not_taken_for_ours(gateway: Any, client: AsyncClient) -> None:
    gateway.others = {1: TEXT[:RECORD_BYTES]}
    await client.append("book", TEXT, source_id="book.txt")
    assert log_of(gateway) == TEXT[:RECORD_BYTES] + TEXT


async def test_a_named_source_goes_on_where_it_stopped_though_others_appended(
    gateway: Any, client: AsyncClient
) -> None:
    await client.append("book", TEXT[:1000], source_id="book.txt", finish=False)
    await client.append("book", b"between")
    await client.append("book", io.BytesIO(TEXT), source_id="book.txt")
    assert log_of(gateway) == TEXT[:1000] + b"between" + TEXT[1000:]
    before = gateway.num_records
    await client.append("book", TEXT, source_id="book.txt")
    assert gateway.num_records == before


async def test_a_source_shorter_than_what_was_accepted_of_it_is_refused(gateway: Any, client: AsyncClient) -> None:
    await client.append("book", TEXT[:1000], source_id="book.txt")
    with pytest.raises(ValueError, match="ends before byte 1000"):
        await client.append("book", TEXT[:10], source_id="book.txt")


async def test_what_the_server_lost_is_sent_again_from_a_source_that_can_go_back(
    gateway: Any, client: AsyncClient
) -> None:
    gateway.cut_after = [3]

    def roll_back(progress: AppendProgress) -> None:
        stream = gateway.streams["tenants/default/streams/book"]
        if not gateway.cut_after and progress.num_reconnects == 0 and len(stream.log) > RECORD_BYTES:
            del stream.log[RECORD_BYTES:]
            stream.sources["book.txt"] = RECORD_BYTES

    await client.append("book", io.BytesIO(TEXT), source_id="book.txt", on_progress=roll_back)
    assert log_of(gateway) == TEXT


async def test_what_others_wrote_since_a_rollback_does_not_hide_it(gateway: Any, client: AsyncClient) -> None:
    gateway.cut_after = [3]

    def roll_back(progress: AppendProgress) -> None:
        stream = gateway.streams["tenants/default/streams/book"]
        if not gateway.cut_after and progress.num_reconnects == 0 and len(stream.log) > RECORD_BYTES:
            stream.log[RECORD_BYTES:] = b"x" * len(stream.log[RECORD_BYTES:])
            stream.sources["book.txt"] = RECORD_BYTES

    await client.append("book", io.BytesIO(TEXT), source_id="book.txt", on_progress=roll_back)

    own, others = log_of(gateway)[:RECORD_BYTES], log_of(gateway)[RECORD_BYTES:]
    assert own + others.lstrip(b"x") == TEXT


async def test_what_the_server_lost_of_a_source_that_cannot_go_back_is_an_error(
    gateway: Any, client: AsyncClient
) -> None:
    gateway.cut_after = [2]

    def roll_back(progress: AppendProgress) -> None:
        if progress.source_bytes_accepted:
            gateway.streams["tenants/default/streams/book"].log.clear()

    with pytest.raises(StateLost) as caught:
        await client.append("book", pieces_of(TEXT), on_progress=roll_back)

    assert caught.value.lost_from == 0


async def test_a_platform_that_stays_away_ends_in_unavailable(gateway: Any) -> None:
    gateway.faults = [Unavailable("away", retry_after_seconds=0.0)] * 100
    async with AsyncClient(gateway.address, retry_seconds=0.5) as client:
        with pytest.raises(Unavailable, match="away"):
            await client.append("book", TEXT)


async def test_what_waiting_cannot_help_is_raised_at_once(gateway: Any, client: AsyncClient) -> None:
    with pytest.raises(StreamNotFound):
        await client.append("nothing", TEXT)
    gateway.faults = [QuotaExceeded("full", quota="max_log_bytes")]
    with pytest.raises(QuotaExceeded) as caught:
        await client.append("book", TEXT)
    assert caught.value.quota == "max_log_bytes"


async def test_an_error_of_the_source_reaches_the_caller(gateway: Any, client: AsyncClient) -> None:
    def broken() -> Iterator[bytes]:
        yield b"good"
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        await client.append("book", broken())
    assert log_of(gateway) == b"good"


async def test_a_read_that_is_cancelled_loses_no_piece() -> None:
    import asyncio

    gate = asyncio.Event()

    async def slow() -> AsyncIterator[bytes]:
        await gate.wait()
        yield b"first"
        yield b"second"

    source = Source(slow())
    reading = asyncio.create_task(source.read())
    await asyncio.sleep(0)
    reading.cancel()
    with pytest.raises(asyncio.CancelledError):
        await reading
    gate.set()
    assert [await source.read() for _ in range(3)] == [b"first", b"second", b""]
    assert source.position == 11
