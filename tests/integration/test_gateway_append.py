"""Append: verdicts, back-pressure, flush and finish, and what happens to it when workers or the gateway go away."""

import asyncio
import struct
from typing import Any

import grpc
import pytest

from eunoe.api.v1 import long_context_pb2 as api
from eunoe.runtime.errors import (
    AlreadyExists,
    BadChecksum,
    BadTokenId,
    CarryAtFinish,
    CarryOpen,
    ContentMismatch,
    InvalidRequest,
    InvalidUtf8,
    OffsetGap,
    QuotaExceeded,
    RecordTooLarge,
    StreamNotFound,
    Unavailable,
    from_rpc_error,
    from_status,
)

TEXT = b"It was the best of times, it was the worst of times, it was the age of wisdom."


async def test_records_are_durable_one_by_one(stub: Any, stream: str, append_to: Any) -> None:
    client = await append_to(stub, stream)

    verdicts = [await client.record(TEXT[:30]), await client.record(TEXT[30:])]

    assert [verdict.status.code for verdict in verdicts] == [0, 0]
    assert [verdict.accepted_offset for verdict in verdicts] == [30, len(TEXT)]
    assert (await stub.GetStream(api.GetStreamRequest(name=stream))).stream.accepted_offset == len(TEXT)


async def test_finish_answers_when_less_than_a_segment_is_unapplied(stub: Any, stream: str, append_to: Any) -> None:
    client = await append_to(stub, stream)
    await client.record(TEXT)

    finished = await client.finish()

    assert (finished.accepted_offset, finished.applied_offset) == (len(TEXT), len(TEXT) // 16 * 16)
    assert finished.state_digest
    with pytest.raises(EOFError):
        await client.next()


async def test_flush_commits_and_the_call_goes_on(stub: Any, stream: str, append_to: Any) -> None:
    client = await append_to(stub, stream)
    await client.record(TEXT)

    flushed = await client.flush()
    verdict = await client.record(TEXT)

    assert flushed.applied_offset == len(TEXT) // 16 * 16
    assert verdict.accepted_offset == 2 * len(TEXT)


async def test_the_same_bytes_in_other_records_make_the_same_memory(
    stub: Any, worker: Any, model: str, a_stream: Any, append_to: Any
) -> None:
    digests = []
    for cuts in ([len(TEXT)], [1, 7, 40, len(TEXT)], list(range(1, len(TEXT) + 1))):
        client = await append_to(stub, await a_stream(stub, model))
        start = 0
        for end in cuts:
            await client.record(TEXT[start:end])
            start = end
        digests.append((await client.finish()).state_digest)

    assert len(set(digests)) == 1


async def test_a_repeated_record_is_harmless(stub: Any, stream: str, append_to: Any) -> None:
    client = await append_to(stub, stream)
    await client.record(TEXT)

    verdict = await client.record(TEXT, offset=0)

    assert isinstance(from_status(verdict.status), AlreadyExists)
    assert (verdict.accepted_offset, verdict.unchecked) == (len(TEXT), False)


BAD_RECORDS = {
    "invalid UTF-8": ({"data": b"ab\xff"}, InvalidUtf8),
    "wrong checksum": ({"data": b"abc", "crc32c": 1}, BadChecksum),
    "gap": ({"data": b"abc", "offset": 1000}, OffsetGap),
    "other bytes": ({"data": b"another text", "offset": 0}, ContentMismatch),
    "too large": ({"data": b"x" * (1024 * 1024 + 1)}, RecordTooLarge),
    "empty": ({"data": b""}, RecordTooLarge),
    "torn token id": ({"data": b"\x00" * 5, "kind": api.RECORD_KIND_TOKEN_IDS}, BadTokenId),
    "unknown token id": ({"data": struct.pack("<I", 512), "kind": api.RECORD_KIND_TOKEN_IDS}, BadTokenId),
    "unknown kind": ({"data": b"abc", "kind": 9}, InvalidRequest),
}


@pytest.mark.parametrize(("values", "expected"), list(BAD_RECORDS.values()), ids=list(BAD_RECORDS))
async def test_a_bad_record_gets_its_verdict_and_loses_nothing(
    stub: Any, stream: str, append_to: Any, values: dict[str, Any], expected: type[Exception]
) -> None:
    client = await append_to(stub, stream)
    await client.record(TEXT)

    verdict = await client.record(**values)

    assert type(from_status(verdict.status)) is expected
    assert verdict.accepted_offset == len(TEXT)
    assert (await client.record(b" More.")).accepted_offset == len(TEXT) + 6
    assert (await client.finish()).accepted_offset == len(TEXT) + 6


async def test_a_character_may_be_cut_between_records(stub: Any, stream: str, append_to: Any) -> None:
    client = await append_to(stub, stream)
    text = "Größe".encode()
    await client.record(text[:3])

    assert (await client.record(text[3:])).status.code == 0
    assert (await client.finish()).carry_bytes == 0


async def test_token_ids_cannot_follow_a_cut_character(stub: Any, stream: str, append_to: Any) -> None:
    client = await append_to(stub, stream)
    await client.record("ö".encode()[:1])

    verdict = await client.record(struct.pack("<I", 1), kind=api.RECORD_KIND_TOKEN_IDS)

    assert isinstance(from_status(verdict.status), CarryOpen)


async def test_finish_within_a_character_is_invalid_and_keeps_the_log(stub: Any, stream: str, append_to: Any) -> None:
    client = await append_to(stub, stream)
    await client.record(b"abc" + "ö".encode()[:1])

    with pytest.raises(grpc.RpcError) as caught:
        await client.finish()

    error = from_rpc_error(caught.value)
    assert isinstance(error, CarryAtFinish)
    assert error.carry_bytes == 1
    assert (await stub.GetStream(api.GetStreamRequest(name=stream))).stream.accepted_offset == 4


async def test_an_append_of_no_stream_is_not_found(stub: Any, worker: Any, append_to: Any) -> None:
    with pytest.raises(grpc.RpcError) as caught:
        await append_to(stub, "tenants/-/streams/nothing")

    assert isinstance(from_rpc_error(caught.value), StreamNotFound)


@pytest.mark.parametrize(
    "requests",
    [
        [api.AppendRequest(flush=api.AppendFlush())],
        [api.AppendRequest()],
        [],
    ],
)
async def test_an_append_begins_with_open(stub: Any, requests: list[api.AppendRequest]) -> None:
    with pytest.raises(grpc.RpcError) as caught:
        async for _ in stub.Append(iter(requests)):
            pass

    assert isinstance(from_rpc_error(caught.value), InvalidRequest)


async def test_a_second_open_ends_the_call(stub: Any, stream: str, append_to: Any) -> None:
    client = await append_to(stub, stream)
    with pytest.raises(grpc.RpcError) as caught:
        await client.open()

    assert isinstance(from_rpc_error(caught.value), InvalidRequest)


async def test_a_broken_upload_goes_on_where_its_source_stopped(stub: Any, stream: str, append_to: Any) -> None:
    first = await append_to(stub, stream, source_id="file-1")
    await first.record(TEXT[:20])
    first.call.cancel()
    other = await append_to(stub, stream)
    await other.record(b"somebody else")

    opened = await (again := type(first)(stub, stream, "file-1")).open()

    assert opened.source_bytes_accepted == 20
    assert again.accepted == 20 + len(b"somebody else")


async def test_reading_stops_while_the_window_is_full(
    a_gateway: Any, a_worker: Any, model: str, a_stream: Any, append_to: Any, until: Any
) -> None:
    first_worker = await a_worker()
    async with a_gateway(window_bytes=64) as (_, stub):
        name = await a_stream(stub, model)
        await first_worker.kill()
        client = await append_to(stub, name)
        await client.record(b"x" * 70)
        await client.send(b"y" * 70)
        waiting = asyncio.create_task(client.next())

        done, _ = await asyncio.wait({waiting}, timeout=0.5)
        assert not done

        taker = await a_worker()
        flusher = await append_to(stub, name)
        await flusher.flush()
        verdict = (await waiting).verdict
    assert verdict.accepted_offset == 140
    assert taker.num_calls["Flush"] >= 1


async def test_progress_comes_at_most_once_a_second_while_the_memory_moves(
    a_gateway: Any, worker: Any, model: str, a_stream: Any, append_to: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("eunoe.gateway.append.PROGRESS_SECONDS", 0.05)
    async with a_gateway() as (_, stub):
        client = await append_to(stub, await a_stream(stub, model))
        await client.record(TEXT)
        waiting = asyncio.create_task(client.next())
        async with asyncio.timeout(10):
            while not client.progress or client.progress[-1].folded_offset == 0:
                await asyncio.sleep(0.01)
        client.call.cancel()
        await asyncio.gather(waiting, return_exceptions=True)

    assert client.progress[-1].accepted_offset == len(TEXT)
    assert client.progress[-1].folded_offset == len(TEXT) // 16 * 16


async def test_hints_of_growth_are_coalesced(stub: Any, worker: Any, stream: str, append_to: Any) -> None:
    client = await append_to(stub, stream)
    for _ in range(100):
        await client.record(b"0123456789")
    await client.finish()

    assert 1 <= worker.num_calls["Advance"] < 50


async def test_records_are_durable_without_any_worker(
    stub: Any, a_worker: Any, model: str, a_stream: Any, append_to: Any
) -> None:
    only = await a_worker()
    name = await a_stream(stub, model)
    await only.stop()
    client = await append_to(stub, name)

    assert (await client.record(TEXT)).status.code == 0
    finishing = asyncio.create_task(client.finish())
    await asyncio.wait({finishing}, timeout=0.3)
    assert not finishing.done()
    await a_worker()

    assert (await finishing).applied_offset == len(TEXT) // 16 * 16


async def test_a_workers_death_is_only_a_pause(
    stub: Any, a_worker: Any, model: str, a_stream: Any, append_to: Any, until: Any
) -> None:
    workers = [await a_worker(), await a_worker()]
    undisturbed, disturbed = await a_stream(stub, model), await a_stream(stub, model)
    for name in (undisturbed, disturbed):
        client = await append_to(stub, name)
        await client.record(TEXT)
        await client.flush()
        if name == disturbed:
            await next(w for w in workers if name in w.memories).kill()
        await client.record(TEXT)
        await client.finish()

    digests = [
        (await stub.GetStream(api.GetStreamRequest(name=name))).stream.state_digest for name in (undisturbed, disturbed)
    ]
    assert digests[0] == digests[1]


async def test_the_append_rate_of_a_tenant_is_limited(
    a_gateway: Any, worker: Any, model: str, a_stream: Any, append_to: Any
) -> None:
    async with a_gateway(max_tenant_append_bytes_per_second=1024 * 1024) as (_, stub):
        client = await append_to(stub, await a_stream(stub, model))
        await client.record(b"x" * 1024 * 1024)
        with pytest.raises(grpc.RpcError) as caught:
            await client.record(b"x" * 1024 * 1024)

    error = from_rpc_error(caught.value)
    assert isinstance(error, QuotaExceeded)
    assert 0 < error.retry_after_seconds <= 1


async def test_a_draining_gateway_ends_appends_and_nothing_is_lost(
    a_gateway: Any, worker: Any, model: str, a_stream: Any, append_to: Any
) -> None:
    async with a_gateway() as (gateway, stub), a_gateway() as (_, other_stub):
        name = await a_stream(stub, model)
        client = await append_to(stub, name)
        await client.record(TEXT)

        await gateway.begin_drain()
        with pytest.raises(grpc.RpcError) as caught:
            await client.next()
        again = await append_to(other_stub, name)

    assert isinstance(from_rpc_error(caught.value), Unavailable)
    assert again.accepted == len(TEXT)


async def test_a_deleted_stream_ends_its_append(stub: Any, stream: str, append_to: Any) -> None:
    client = await append_to(stub, stream)
    await client.record(TEXT)
    await stub.DeleteStream(api.DeleteStreamRequest(name=stream))

    with pytest.raises(grpc.RpcError) as caught:
        await client.next()

    assert isinstance(from_rpc_error(caught.value), StreamNotFound)
