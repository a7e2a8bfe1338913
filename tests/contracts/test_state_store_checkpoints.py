"""What the state store promises about checkpoints, forks and imports, over every database driver."""

from dataclasses import replace

import pytest

from eunoe.runtime.errors import (
    AlreadyExists,
    CorruptState,
    InvalidRequest,
    LeaseLost,
    MissingChunk,
    ModelMismatch,
    OffsetUnavailable,
    StreamNotFound,
    VersionConflict,
)
from eunoe.state_store import keys
from eunoe.state_store.effects import Total
from eunoe.state_store.metadata import ChunkRef, Lease
from eunoe.state_store.storage import PutValue
from eunoe.state_store.stream_rules import Fork

WORKER = Lease("w1", 0, "host:1")
OTHER_WORKER = Lease("w2", 0, "host:2")


class TestCheckpoints:
    async def test_a_commit_moves_the_applied_offset_and_reads_back(self, caller) -> None:
        await caller.create()
        await caller.append(b"some text")
        fence = await caller.acquire()
        manifest = await caller.manifest(4, b"first", b"second")

        metadata = await caller.store.commit(caller.name(), manifest, fence)

        assert (metadata.applied_offset, metadata.version) == (4, 1)
        assert await caller.chunks(manifest) == [b"first", b"second"]

    @pytest.mark.parametrize("fence", [("w1", 0), ("w1", 2), ("w2", 1)])
    async def test_only_the_newest_lease_commits(self, caller, fence: tuple[str, int]) -> None:
        await caller.create()
        await caller.acquire(WORKER)
        manifest = await caller.manifest(0)

        with pytest.raises(LeaseLost):
            await caller.store.commit(caller.name(), manifest, fence)
        assert (await caller.get()).version == 0

    async def test_a_repeated_commit_succeeds_even_after_the_lease_is_lost(self, caller) -> None:
        await caller.create()
        fence = await caller.acquire()
        manifest = await caller.commit(fence, 0)
        await caller.append(b"more")
        await caller.acquire(OTHER_WORKER)

        metadata = await caller.store.commit(caller.name(), manifest, fence)

        assert metadata.version == 1
        assert await caller.used(Total.CHECKPOINT_BYTES) == manifest.chunk_bytes

    async def test_versions_are_not_skipped_or_repeated(self, caller) -> None:
        await caller.create()
        fence = await caller.acquire()
        await caller.commit(fence, 0)

        for version in (1, 3):
            manifest = caller.a_manifest(version, 0, await caller.stage(b"x"))
            with pytest.raises(VersionConflict) as error:
                await caller.store.commit(caller.name(), manifest, fence)
            assert error.value.version == 1

    async def test_the_applied_offset_stays_between_the_last_one_and_the_carry(self, caller) -> None:
        await caller.create()
        await caller.append(b"text\xe2\x82")
        fence = await caller.acquire()
        await caller.commit(fence, 2)

        for applied_offset in (1, 5, 6, 7):
            with pytest.raises(InvalidRequest):
                await caller.commit(fence, applied_offset)
        await caller.commit(fence, 4)

    async def test_a_commit_without_its_chunks_changes_nothing(self, caller) -> None:
        await caller.create()
        fence = await caller.acquire()
        staged = await caller.stage(b"here")
        absent = ChunkRef("absent", 4, "0" * 32)

        for chunks in ((*staged, absent), (staged[0]._replace(length=3),)):
            with pytest.raises(MissingChunk):
                await caller.store.commit(caller.name(), caller.a_manifest(1, 0, chunks), fence)
        await caller.store.commit(caller.name(), caller.a_manifest(1, 0, staged), fence)

    async def test_a_chunk_belongs_to_one_checkpoint(self, caller) -> None:
        await caller.create()
        fence = await caller.acquire()
        first = await caller.commit(fence, 0)

        with pytest.raises(MissingChunk):
            await caller.store.commit(caller.name(), caller.a_manifest(2, 0, first.chunks), fence)

    async def test_other_weights_cannot_go_on(self, caller) -> None:
        await caller.create()
        fence = await caller.acquire()
        await caller.commit(fence, 0)

        manifest = replace(await caller.manifest(0), model_digest="other weights")

        with pytest.raises(ModelMismatch):
            await caller.store.commit(caller.name(), manifest, fence)

    async def test_three_checkpoints_are_retained_and_the_log_from_the_oldest_on(self, caller) -> None:
        made = await caller.create()
        await caller.append(*[b"0123456789"] * 5)
        fence = await caller.acquire()

        manifests = [await caller.commit(fence, 10 * i + 5) for i in range(5)]

        metadata = await caller.get()
        assert metadata.checkpoint_offsets == (25, 35, 45)
        assert metadata.log_start_offset == 25
        assert await caller.read(25) == b"56789" + b"0123456789" * 2
        with pytest.raises(OffsetUnavailable):
            await caller.read(24)
        with pytest.raises(MissingChunk):
            await caller.chunks(manifests[1])
        assert await caller.chunks(manifests[2]) == [b"state3"]
        storage = caller.store.environment.storage
        assert await storage.get([keys.log_record(caller.tenant, made.uid, 10)]) == [None]
        assert await caller.used(Total.LOG_BYTES) == 30
        assert await caller.used(Total.CHECKPOINT_BYTES) == 18

    async def test_a_retained_log_stays_whole(self, caller) -> None:
        await caller.create(retain_log=True)
        await caller.append(*[b"0123456789"] * 5)
        fence = await caller.acquire()

        for i in range(5):
            await caller.commit(fence, 10 * i)

        assert await caller.read(0) == b"0123456789" * 5

    async def test_a_chunk_with_other_bytes_is_corrupt(self, caller) -> None:
        await caller.create()
        manifest = await caller.commit(await caller.acquire(), 0)
        key = keys.chunk(caller.tenant, manifest.chunks[0].chunk_id)

        for data in (b"statf1", b"state"):
            await caller.store.environment.storage.apply([PutValue(key, data, 0)])
            with pytest.raises(CorruptState):
                await caller.chunks(manifest)

    async def test_chunks_of_another_stream_are_not_given_out(self, caller) -> None:
        await caller.create("a")
        await caller.create("b")
        manifest = await caller.commit(await caller.acquire(), 0)

        with pytest.raises(MissingChunk):
            await caller.chunks(manifest, "b")


class TestForks:
    async def test_a_fork_at_the_end_reads_like_its_parent_and_goes_its_own_way(self, caller) -> None:
        await caller.create()
        await caller.append(b"one ", b"two ")
        manifest = await caller.commit(await caller.acquire(), 4)

        child = await caller.store.streams.fork(caller.name(), Fork(name=caller.name("b")))
        await caller.append(b"parent")
        await caller.append(b"child", stream_id="b")

        assert (child.accepted_offset, child.applied_offset, child.version, child.epoch) == (8, 4, 1, 0)
        assert await caller.read(4) == b"two parent"
        assert await caller.read(4, "b") == b"two child"
        assert await caller.chunks(manifest, "b") == [b"state1"]

    async def test_a_repeated_fork_answers_the_same_child(self, caller) -> None:
        await caller.create()
        fork = Fork(name=caller.name("b"), request_id="r")

        first = await caller.store.streams.fork(caller.name(), fork)

        assert await caller.store.streams.fork(caller.name(), fork) == first
        with pytest.raises(AlreadyExists):
            await caller.store.streams.fork(caller.name(), replace(fork, request_id="other"))

    async def test_a_fork_in_the_past_starts_from_a_checkpoint_that_had_not_read_on(self, caller) -> None:
        await caller.create()
        fence = await caller.acquire()
        for i in range(3):
            await caller.append(b"0123456789")
            await caller.commit(fence, 10 * i + 8)

        child = await caller.store.streams.fork(caller.name(), Fork(name=caller.name("b"), at_offset=20))

        assert (child.accepted_offset, child.applied_offset, child.version) == (20, 18, 2)
        assert await caller.read(18, "b") == b"89"

    @pytest.mark.parametrize("at_offset", [0, 7, 9, 11, 31])
    async def test_offsets_without_a_start_are_unavailable(self, caller, at_offset: int) -> None:
        await caller.create()
        fence = await caller.acquire()
        for i in range(3):
            await caller.append(b"0123456789")
            await caller.commit(fence, 10 * i + 8)

        with pytest.raises(OffsetUnavailable, match=str(at_offset)):
            await caller.store.streams.fork(caller.name(), Fork(name=caller.name("b"), at_offset=at_offset))

    async def test_an_offset_inside_a_character_is_unavailable(self, caller) -> None:
        await caller.create()
        await caller.append(b"a\xe2\x82", b"\xacb", b"\xc3")

        for at_offset in (3, 6, None):
            with pytest.raises(OffsetUnavailable):
                await caller.store.streams.fork(caller.name(), Fork(name=caller.name("b"), at_offset=at_offset))
        child = await caller.store.streams.fork(caller.name(), Fork(name=caller.name("b"), at_offset=5))
        assert await caller.read(0, "b") == "a€b".encode()
        assert child.carry == b""

    async def test_trimming_and_deleting_the_parent_frees_nothing_that_a_child_needs(self, caller) -> None:
        await caller.create()
        await caller.append(b"0123456789", b"abcdefghij")
        fence = await caller.acquire()
        shared = await caller.commit(fence, 5)
        await caller.store.streams.fork(caller.name(), Fork(name=caller.name("b")))
        await caller.append(b"more")
        for _ in range(4):
            await caller.commit(fence, 24)

        trimmed = await caller.read(5, "b"), await caller.chunks(shared, "b")
        await caller.store.streams.delete(caller.name())
        deleted = await caller.read(5, "b"), await caller.chunks(shared, "b")

        assert trimmed == deleted == (b"56789abcdefghij", [b"state1"])

    async def test_the_last_to_need_something_frees_it(self, caller) -> None:
        await caller.create("a")
        await caller.append(b"0123456789")
        await caller.commit(await caller.acquire(), 5)
        await caller.store.streams.fork(caller.name("a"), Fork(name=caller.name("b")))
        await caller.append(b"abc", stream_id="b")
        await caller.store.streams.fork(caller.name("b"), Fork(name=caller.name("c")))

        for stream_id in ("a", "b"):
            await caller.store.streams.delete(caller.name(stream_id))
            assert await caller.read(5, "c") == b"56789abc"
        await caller.store.streams.delete(caller.name("c"))

        assert all(used == 0 for used, _ in (await caller.store.usage(caller.tenant)).values())
        assert await caller.store.environment.storage.members_after(keys.deleted_uids(caller.tenant), "", 9) == []

    async def test_a_child_that_moved_on_gives_back_what_it_shared(self, caller) -> None:
        await caller.create("a")
        await caller.append(b"0123456789")
        await caller.commit(await caller.acquire(), 5)
        await caller.store.streams.fork(caller.name("a"), Fork(name=caller.name("b")))
        await caller.store.streams.delete(caller.name("a"))
        fence = await caller.acquire(stream_id="b")
        await caller.append(b"abc", stream_id="b")

        for _ in range(3):
            await caller.commit(fence, 13, "b")

        assert (await caller.get("b")).references == ()
        assert await caller.used(Total.LOG_BYTES) == 0
        assert await caller.used(Total.CHECKPOINT_BYTES) == 18

    async def test_a_name_used_again_does_not_disturb_the_forks_of_the_former_stream(self, caller) -> None:
        await caller.create()
        await caller.append(b"old")
        await caller.store.streams.fork(caller.name(), Fork(name=caller.name("b")))
        await caller.store.streams.delete(caller.name())

        await caller.create()
        await caller.append(b"new!")
        await caller.store.streams.delete(caller.name())

        assert await caller.read(0, "b") == b"old"

    async def test_a_fork_of_another_tenants_stream_is_not_found(self, caller) -> None:
        stranger = type(caller)(caller.store, f"other-{caller.tenant}"[:64])
        await caller.create()

        with pytest.raises(StreamNotFound):
            await caller.store.streams.fork(caller.name(), Fork(name=stranger.name("b")))

    async def test_forks_outlive_an_expired_parent(self, caller, clock) -> None:
        await caller.create(expire_time_ns=clock() + 1_000_000_000)
        await caller.append(b"text")
        await caller.store.streams.fork(caller.name(), Fork(name=caller.name("b")))
        clock.advance(2)

        await caller.store.streams.sweep_stream(caller.tenant, caller.name())

        assert await caller.read(0, "b") == b"text"


class TestImports:
    async def test_an_import_goes_on_where_the_export_was(self, caller) -> None:
        manifest = caller.a_manifest(7, 100, await caller.stage(b"state", stream_id="new"))

        made = await caller.create("new", manifest=manifest, log_start_offset=100, request_id="r")
        again = await caller.create("new", manifest=manifest, log_start_offset=100, request_id="r")
        await caller.append(b"tail", stream_id="new")

        assert made == again
        assert (made.accepted_offset, made.applied_offset, made.version, made.epoch) == (100, 100, 7, 0)
        assert await caller.read(100, "new") == b"tail"
        assert await caller.chunks(manifest, "new") == [b"state"]
        await caller.commit(await caller.acquire(stream_id="new"), 102, "new")

    async def test_an_import_without_its_chunks_makes_nothing(self, caller) -> None:
        manifest = caller.a_manifest(7, 100, (ChunkRef("absent", 1, "0" * 32),))

        with pytest.raises(MissingChunk):
            await caller.create("new", manifest=manifest, log_start_offset=100)
        with pytest.raises(StreamNotFound):
            await caller.get("new")

    async def test_a_log_without_a_checkpoint_starts_at_its_beginning(self, caller) -> None:
        with pytest.raises(InvalidRequest):
            await caller.create("new", log_start_offset=100)
