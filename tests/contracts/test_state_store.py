"""What the state store promises about streams, logs and leases, over every database driver."""

import asyncio
from dataclasses import replace

import pytest

from eunoe.internal.v1 import state_store_pb2 as pb
from eunoe.runtime.errors import (
    AlreadyExists,
    BadTokenId,
    CarryOpen,
    ContentMismatch,
    InvalidRequest,
    InvalidUtf8,
    LeaseLost,
    NotOwner,
    OffsetGap,
    OffsetUnavailable,
    OutcomeNotFound,
    RecordTooLarge,
    StreamNotFound,
)
from eunoe.state_store import keys
from eunoe.state_store.effects import Total
from eunoe.state_store.log_rules import KIND_TEXT, KIND_TOKEN_IDS, Append
from eunoe.state_store.metadata import Lease, StreamMetadata
from eunoe.state_store.stream_rules import Fork

WORKER = Lease("w1", 0, "host:1")
OTHER_WORKER = Lease("w2", 0, "host:2")


class TestStreams:
    async def test_a_new_stream_is_empty_and_unowned(self, caller) -> None:
        made = await caller.create()

        assert made == await caller.get()
        assert (made.accepted_offset, made.applied_offset, made.version, made.lease) == (0, 0, 0, None)
        assert made.checkpoint_offsets == (0,)

    async def test_a_repeated_creation_answers_the_same_stream_and_another_is_refused(self, caller) -> None:
        made = await caller.create(request_id="r1")

        assert await caller.create(request_id="r1") == made
        with pytest.raises(AlreadyExists):
            await caller.create(request_id="r2")
        with pytest.raises(AlreadyExists):
            await caller.create()
        assert await caller.used(Total.STREAMS) == 1

    async def test_of_concurrent_creations_one_wins(self, caller) -> None:
        results = await asyncio.gather(*(caller.create() for _ in range(8)), return_exceptions=True)

        assert sum(isinstance(result, StreamMetadata) for result in results) == 1
        assert sum(isinstance(result, AlreadyExists) for result in results) == 7

    async def test_pages_are_sorted_and_complete(self, caller) -> None:
        for stream_id in ("c", "B", "a", "a.1"):
            await caller.create(stream_id)

        first, has_more = await caller.store.streams.page(caller.tenant, "", 3)
        rest, ends = await caller.store.streams.page(caller.tenant, "a.1", 3)

        assert [s.name.rpartition("/")[2] for s in first] == ["B", "a", "a.1"]
        assert (has_more, ends) == (True, False)
        assert [s.name.rpartition("/")[2] for s in rest] == ["c"]

    async def test_another_tenant_sees_nothing(self, caller) -> None:
        await caller.create()
        stranger = type(caller)(caller.store, f"other-{caller.tenant}"[:64])

        with pytest.raises(StreamNotFound):
            await stranger.get()
        assert await caller.store.streams.page(stranger.tenant, "", 10) == ([], False)

    async def test_a_deleted_stream_leaves_nothing_and_frees_its_name(self, caller) -> None:
        made = await caller.create()
        end = await caller.append(b"one", b"two")
        manifest = await caller.commit(await caller.acquire(), end)

        await caller.store.streams.delete(caller.name())

        with pytest.raises(StreamNotFound):
            await caller.get()
        with pytest.raises(StreamNotFound):
            await caller.store.streams.delete(caller.name())
        storage = caller.store.environment.storage
        left = [keys.chunk(caller.tenant, manifest.chunks[0].chunk_id), keys.log_record(caller.tenant, made.uid, 0)]
        assert await storage.get(left) == [None, None]
        assert all(used == 0 for used, _ in (await caller.store.usage(caller.tenant)).values())
        assert (await caller.create()).uid != made.uid

    async def test_an_expired_stream_is_nowhere_to_be_found(self, caller, clock) -> None:
        await caller.create(expire_time_ns=clock() + 5_000_000_000)
        fence = await caller.acquire()
        manifest = await caller.manifest(0)
        clock.advance(5)

        for call in (
            caller.get(),
            caller.append(b"x"),
            caller.read(),
            caller.acquire(),
            caller.store.commit(caller.name(), manifest, fence),
            caller.store.streams.fork(caller.name(), Fork(name=caller.name("b"))),
            caller.store.streams.delete(caller.name()),
        ):
            with pytest.raises(StreamNotFound):
                await call
        assert await caller.store.streams.page(caller.tenant, "", 10) == ([], False)
        assert (await caller.create()).expire_time_ns is None

    async def test_the_sweep_deletes_what_has_expired(self, caller, clock) -> None:
        await caller.create(expire_time_ns=clock() + 1)
        await caller.append(b"text")
        clock.advance(1)

        await caller.store.streams.sweep_stream(caller.tenant, caller.name())

        assert await caller.used(Total.STREAMS) == await caller.used(Total.LOG_BYTES) == 0

    @pytest.mark.parametrize("name", ["a", "tenants/T/streams/a", "tenants/t/streams/", "tenants/t/streams/a/b"])
    async def test_a_bad_name_is_refused(self, caller, name: str) -> None:
        with pytest.raises(InvalidRequest):
            await caller.store.streams.get(name)


class TestLog:
    async def test_the_log_reads_as_it_was_appended(self, caller) -> None:
        await caller.create()
        await caller.append(b"hello ", b"world")
        await caller.append(b"\x01\0\0\0", kind=KIND_TOKEN_IDS)

        pieces = [(p.offset, p.data, p.kind) async for p in caller.store.logs.read(caller.name(), 3, 0)]

        assert pieces == [
            (3, b"lo ", KIND_TEXT),
            (6, b"world", KIND_TEXT),
            (11, b"\x01\0\0\0", KIND_TOKEN_IDS),
        ]

    async def test_reading_stops_after_the_record_that_reaches_the_limit(self, caller) -> None:
        await caller.create()
        await caller.append(b"aaaa", b"bbbb", b"cccc")

        assert await caller.read(0, max_bytes=5) == b"aaaabbbb"
        assert await caller.read(2, max_bytes=2) == b"aa"
        assert await caller.read(12) == b""

    async def test_many_small_records_read_whole(self, caller) -> None:
        await caller.create()
        data = bytes(ord("a") + i % 26 for i in range(200))
        await caller.append(*(data[i : i + 1] for i in range(200)))

        assert await caller.read() == data

    async def test_reading_beyond_the_end_is_refused(self, caller) -> None:
        await caller.create()

        with pytest.raises(OffsetUnavailable):
            await caller.read(1)

    async def test_a_gap_names_the_expected_offset(self, caller) -> None:
        await caller.create()
        await caller.append(b"abc")

        with pytest.raises(OffsetGap) as error:
            await caller.store.logs.append(caller.name(), Append(offset=4, data=b"x"))
        assert error.value.expected_offset == 3

    @pytest.mark.parametrize(("offset", "data"), [(0, b"abc"), (3, b"def"), (1, b"bcd"), (2, b"cdefXYZ")])
    async def test_a_retry_is_harmless_and_takes_nothing_new(self, caller, offset: int, data: bytes) -> None:
        await caller.create()
        await caller.append(b"abc", b"def")

        metadata, appended = await caller.store.logs.append(caller.name(), Append(offset=offset, data=data))

        assert (appended.already_exists, appended.unchecked) == (True, False)
        assert metadata.accepted_offset == 6
        assert await caller.read() == b"abcdef"

    @pytest.mark.parametrize(
        "event", [Append(offset=0, data=b"abX"), Append(offset=4, data=b"exX"), Append(offset=0, data=b"abcd", kind=2)]
    )
    async def test_other_bytes_or_another_kind_are_a_mismatch(self, caller, event: Append) -> None:
        await caller.create()
        await caller.append(b"abc", b"def")

        with pytest.raises(ContentMismatch):
            await caller.store.logs.append(caller.name(), event)
        assert await caller.read() == b"abcdef"

    async def test_a_retry_below_the_log_start_is_unchecked(self, caller) -> None:
        await caller.create()
        await caller.append(b"abc", b"def", b"ghi")
        fence = await caller.acquire()
        for _ in range(3):
            await caller.commit(fence, 4)

        below = await caller.store.logs.append(caller.name(), Append(offset=0, data=b"???"))
        across = await caller.store.logs.append(caller.name(), Append(offset=0, data=b"????ef"))

        assert [verdict.unchecked for _, verdict in (below, across)] == [True, True]
        with pytest.raises(ContentMismatch):
            await caller.store.logs.append(caller.name(), Append(offset=0, data=b"????eX"))

    async def test_a_character_may_be_cut_between_records(self, caller) -> None:
        await caller.create()
        text = "aß€😀".encode()

        await caller.append(*(text[i : i + 1] for i in range(len(text))))

        assert await caller.read() == text
        assert (await caller.get()).carry == b""

    async def test_bytes_that_are_not_utf8_are_refused_and_lose_nothing(self, caller) -> None:
        await caller.create()
        await caller.append(b"ok \xe2\x82")

        with pytest.raises(InvalidUtf8) as error:
            await caller.store.logs.append(caller.name(), Append(offset=5, data=b"x"))
        assert error.value.offset == 5
        assert await caller.append(b"\xac!") == 7

    async def test_token_ids_cannot_follow_a_cut_character(self, caller) -> None:
        await caller.create()
        await caller.append(b"\xf0\x9f\x98")

        with pytest.raises(CarryOpen) as error:
            await caller.append(b"\0\0\0\0", kind=KIND_TOKEN_IDS)
        assert error.value.carry_bytes == 3

    async def test_records_of_a_wrong_size_are_refused(self, caller) -> None:
        await caller.create()

        for data in (b"", b"x" * (2**20 + 1)):
            with pytest.raises(RecordTooLarge):
                await caller.store.logs.append(caller.name(), Append(offset=0, data=data))
        with pytest.raises(BadTokenId):
            await caller.store.logs.append(caller.name(), Append(offset=0, data=b"123", kind=KIND_TOKEN_IDS))

    async def test_concurrent_appends_at_one_offset_take_one(self, caller) -> None:
        await caller.create()

        results = await asyncio.gather(
            *(caller.store.logs.append(caller.name(), Append(offset=0, data=b"%d" % i)) for i in range(8)),
            return_exceptions=True,
        )

        assert sum(isinstance(result, ContentMismatch) for result in results) == 7
        assert (await caller.get()).accepted_offset == 1

    async def test_the_bytes_of_the_last_eight_sources_are_remembered(self, caller) -> None:
        await caller.create()
        for i in range(9):
            offset = (await caller.get()).accepted_offset
            event = Append(offset=offset, data=b"x" * (i + 1), source_id=f"s{i}")
            await caller.store.logs.append(caller.name(), event)
        await caller.store.logs.append(caller.name(), Append(offset=45, data=b"yy", source_id="s4"))

        metadata = await caller.get()

        assert [metadata.bytes_of_source(f"s{i}") for i in range(9)] == [0, 2, 3, 4, 7, 6, 7, 8, 9]

    async def test_a_known_source_goes_on_only_where_it_stopped(self, caller) -> None:
        await caller.create()
        logs, name = caller.store.logs, caller.name()
        await logs.append(name, Append(offset=0, data=b"one", source_id="s", source_offset=0))
        await caller.append(b"!!!")

        with pytest.raises(OffsetGap) as error:
            await logs.append(name, Append(offset=6, data=b"3rd", source_id="s", source_offset=6))
        await logs.append(name, Append(offset=6, data=b"two", source_id="s", source_offset=3))

        assert error.value.expected_offset == 6
        assert (await caller.get()).bytes_of_source("s") == 6

    async def test_an_outcome_is_kept_and_its_request_appends_once(self, caller) -> None:
        await caller.create()
        event = Append(offset=0, data=b"answ", kind=KIND_TOKEN_IDS, request_id="r1", outcome=b"said")
        await caller.store.logs.append(caller.name(), event)

        _, again = await caller.store.logs.append(caller.name(), replace(event, offset=4))

        assert again.already_exists
        assert (await caller.get()).accepted_offset == 4
        assert await caller.store.logs.outcome(caller.name(), "r1") == b"said"
        with pytest.raises(OutcomeNotFound):
            await caller.store.logs.outcome(caller.name(), "r2")

    async def test_the_metadata_does_not_grow_with_the_log(self, caller) -> None:
        await caller.create()
        fence = await caller.acquire()
        for i in range(5):
            await caller.append(*[b"x" * 50] * 20)
            await caller.commit(fence, 1000 * (i + 1))

        record = (await caller.store.environment.storage.read([keys.live_stream(caller.name())]))[0]

        assert len(record.data) < 2000


class TestLeases:
    async def test_every_change_of_hands_raises_the_epoch(self, caller) -> None:
        await caller.create()

        assert await caller.acquire(WORKER) == ("w1", 1)
        assert await caller.acquire(WORKER) == ("w1", 1)
        assert await caller.acquire(OTHER_WORKER) == ("w2", 2)
        assert await caller.acquire(WORKER) == ("w1", 3)

    async def test_a_living_owner_is_named(self, caller) -> None:
        await caller.create()
        worker = f"w-{caller.tenant}"
        await caller.store.workers.renew(pb.Worker(worker=worker, address="host:1"))
        await caller.acquire(Lease(worker, 0, "host:1"))

        for suspect in (None, (worker, 2), ("w2", 1)):
            with pytest.raises(NotOwner) as error:
                await caller.acquire(OTHER_WORKER, suspect=suspect)
            assert (error.value.worker, error.value.epoch, error.value.address) == (worker, 1, "host:1")

    async def test_a_suspected_or_removed_owner_loses_the_stream(self, caller) -> None:
        worker = f"w-{caller.tenant}"
        await caller.store.workers.renew(pb.Worker(worker=worker, address="host:1"))
        for stream_id in ("a", "b"):
            await caller.create(stream_id)
            await caller.acquire(Lease(worker, 0, "host:1"), stream_id)

        suspected = await caller.acquire(OTHER_WORKER, "a", suspect=(worker, 1))
        await caller.store.workers.remove(worker)
        removed = await caller.acquire(OTHER_WORKER, "b")

        assert suspected == removed == ("w2", 2)

    async def test_of_concurrent_takers_each_epoch_has_one(self, caller) -> None:
        await caller.create()

        fences = await asyncio.gather(*(caller.acquire(Lease(f"w{i}", 0, "h:1")) for i in range(8)))

        assert sorted(epoch for _, epoch in fences) == list(range(1, 9))

    async def test_a_released_stream_is_free_and_keeps_its_epoch(self, caller) -> None:
        await caller.create()
        fence = await caller.acquire()

        await caller.store.streams.release(caller.name(), fence)
        await caller.store.streams.release(caller.name(), fence)

        assert (await caller.get()).lease is None
        assert await caller.acquire(OTHER_WORKER) == ("w2", 2)
        with pytest.raises(LeaseLost):
            await caller.store.streams.release(caller.name(), fence)
