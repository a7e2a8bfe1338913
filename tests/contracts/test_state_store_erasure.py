"""An erased stream has left the database's files, too; and an erasure that failed can be made again."""

import asyncio
import secrets
import struct
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any
from unittest.mock import AsyncMock

import pytest

from eunoe.api.v1 import long_context_pb2 as api
from eunoe.embedded.redis_server import DURABLE_SETTINGS
from eunoe.internal.v1 import state_store_pb2 as pb
from eunoe.runtime.errors import CorruptState, InvalidRequest, StreamNotFound, Unavailable
from eunoe.state_store import keys
from eunoe.state_store.log_rules import KIND_TOKEN_IDS, Append
from eunoe.state_store.redis_storage import RedisStorage
from eunoe.state_store.sealing import Keyring
from eunoe.state_store.store import StateStore
from eunoe.state_store.stream_rules import Create, Fork
from eunoe.state_store.transactions import Environment


class TestErasure:
    async def test_the_receipt_says_what_went(self, caller: Any, clock: Any) -> None:
        made = await caller.create()
        end = await caller.append(b"one", b"two")
        await caller.commit(await caller.acquire(), end)
        event = Append(offset=end, data=b"three", request_id="r", outcome=b"answer")
        await caller.store.logs.append(caller.name(), event)

        receipt = await caller.store.erasures.erase(caller.name(), "e")

        assert (receipt.name, receipt.uid, receipt.is_shared) == (caller.name(), made.uid, False)
        assert (receipt.delete_time_ns, receipt.erase_time_ns) == (clock(), clock())
        assert receipt.num_values_removed == 3 + 1 + 1
        storage = caller.store.environment.storage
        assert await storage.get([keys.outcome(caller.tenant, made.uid, "r")]) == [None]
        assert await caller.store.erasures.erase(caller.name(), "e") == receipt
        with pytest.raises(StreamNotFound):
            await caller.store.erasures.erase(caller.name(), "another")

    async def test_a_shared_past_stays_until_the_last_fork_goes(self, caller: Any) -> None:
        await caller.create()
        await caller.append(b"shared")
        await caller.store.streams.fork(caller.name(), Fork(name=caller.name("child")))

        parent = await caller.store.erasures.erase(caller.name(), "parent")
        text = await caller.read(stream_id="child")
        child = await caller.store.erasures.erase(caller.name("child"), "child")

        assert (parent.is_shared, parent.num_values_removed) == (True, 0)
        assert text == b"shared"
        assert (child.is_shared, child.num_values_removed) == (False, 1)

    async def test_a_fork_whose_parent_lives_says_that_it_shared(self, caller: Any) -> None:
        await caller.create()
        await caller.append(b"shared")
        await caller.store.streams.fork(caller.name(), Fork(name=caller.name("child")))

        receipt = await caller.store.erasures.erase(caller.name("child"), "child")

        assert (receipt.is_shared, receipt.num_values_removed) == (True, 0)

    async def test_a_failed_erasure_is_made_again_although_the_stream_is_gone(
        self, caller: Any, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        await caller.create()
        await caller.append(b"one")
        with monkeypatch.context() as patched:
            failing = AsyncMock(side_effect=Unavailable("the disk is full"))
            patched.setattr(caller.store.environment.storage, "erase_history", failing)
            with pytest.raises(Unavailable):
                await caller.store.erasures.erase(caller.name(), "e")
        newer = await caller.create()

        receipt = await caller.store.erasures.erase(caller.name(), "e")

        assert (receipt.num_values_removed, receipt.erase_time_ns > 0) == (1, True)
        assert (await caller.get()).uid == newer.uid
        with pytest.raises(InvalidRequest):
            await caller.store.erasures.erase(caller.name("other"), "e")

    async def test_chunks_that_were_staged_and_never_committed_go_too(self, caller: Any) -> None:
        await caller.create()
        (chunk,) = await caller.stage(b"never committed")

        receipt = await caller.store.erasures.erase(caller.name(), "e")

        assert receipt.num_values_removed == 1
        assert await caller.store.environment.storage.get([keys.chunk(caller.tenant, chunk.chunk_id)]) == [None]

    async def test_a_staging_repeated_after_its_commit_costs_a_fork_nothing(self, caller: Any) -> None:
        await caller.create()
        manifest = await caller.commit(await caller.acquire(), 0)
        caller.num_staged = 0
        assert await caller.stage(b"state1") == manifest.chunks
        await caller.store.streams.fork(caller.name(), Fork(name=caller.name("child")))

        await caller.store.streams.delete(caller.name())

        assert await caller.chunks(manifest, "child") == [b"state1"]

    async def test_what_is_staged_while_the_stream_goes_does_not_stay(self, caller: Any) -> None:
        made = await caller.create()

        async def chunks() -> AsyncIterator[tuple[str, bytes]]:
            yield "early", b"1"
            await caller.store.streams.delete(caller.name())
            yield "late", b"2"

        with pytest.raises(StreamNotFound):
            await caller.store.checkpoints.stage(caller.name(), chunks())

        storage = caller.store.environment.storage
        assert await storage.get([keys.chunk(caller.tenant, name) for name in ("early", "late")]) == [None, None]
        assert await storage.members_by_score(keys.staged_index(caller.tenant, made.uid), -1, None, 9) == []

    async def test_an_outcome_leaves_its_index_when_its_time_has_come(self, caller: Any, clock: Any) -> None:
        made = await caller.create()
        event = Append(offset=0, data=b"one", request_id="r", outcome=b"answer")
        await caller.store.logs.append(caller.name(), event)
        index = keys.outcome_index(caller.tenant, made.uid)
        storage = caller.store.environment.storage

        await caller.store.streams.sweep_stream(caller.tenant, caller.name())
        before = await storage.members_by_score(index, -1, None, 9)
        clock.advance(caller.store.environment.config.outcome_seconds)
        await caller.store.streams.sweep_stream(caller.tenant, caller.name())

        assert [member for member, _ in before] == ["r"]
        assert await storage.members_by_score(index, -1, None, 9) == []

    async def test_a_damaged_receipt_is_noticed(self, caller: Any) -> None:
        await caller.create()
        await caller.store.erasures.erase(caller.name(), "e")
        storage = caller.store.environment.storage
        key = keys.erasure(caller.tenant, "e")
        (sealed,) = await storage.get([key])

        await storage.stage([(keys.erasure(caller.tenant, "moved"), sealed)], 60_000)

        with pytest.raises(CorruptState):
            await caller.store.erasures.erase(caller.name(), "moved")


async def test_a_key_that_waits_for_an_import_serves_one_stream_only(caller: Any) -> None:
    chunks = await caller.stage(b"state", stream_id="new")
    event = Create(name=caller.name("new"), model="m", settings=(await caller.create()).settings)
    manifest = caller.a_manifest(1, 0, chunks)
    first = await caller.create("new", manifest=manifest)
    text = await caller.chunks(manifest, "new")
    await caller.store.streams.delete(caller.name("new"))

    second = await caller.store.streams.create(event)

    assert text == [b"state"]
    assert first.wrapped_key != second.wrapped_key or first.wrapped_key == ""


async def test_an_import_over_an_expired_stream_can_be_read(caller: Any, clock: Any) -> None:
    await caller.create("new", expire_time_ns=clock() + 1)
    clock.advance(1)
    chunks = await caller.stage(b"state", stream_id="new")
    manifest = caller.a_manifest(1, 0, chunks)

    await caller.create("new", manifest=manifest)

    assert await caller.chunks(manifest, "new") == [b"state"]


class Disk:
    """A Redis of the test's own, a store over it, and what its files hold."""

    def __init__(self, server: Any, storage: RedisStorage, caller: Any) -> None:
        self.storage = storage
        self.caller = caller
        self._directory = Path(server.url.removeprefix("unix://")).parent
        self.canary = secrets.token_hex(24).encode()
        self.ids = struct.pack("<16I", *(secrets.randbits(31) for _ in range(16)))

    def num_hits(self) -> int:
        """How often a canary stands in the server's files."""
        files = [path for path in self._directory.rglob("*") if path.is_file()]
        assert any("appendonly" in path.name for path in files)
        contents = [path.read_bytes() for path in files]
        return sum(content.count(canary) for content in contents for canary in (self.canary, self.ids))

    async def write(self) -> None:
        """A stream that holds the canaries in records of both kinds, checkpoints, an outcome and a staged chunk."""
        caller = self.caller
        await caller.create()
        fence = await caller.acquire()
        end = await caller.append(b"before " + self.canary)
        end = await caller.append(self.ids, kind=KIND_TOKEN_IDS)
        event = Append(offset=end, data=b"x", request_id="r", outcome=b"answer " + self.canary)
        await caller.store.logs.append(caller.name(), event)
        for _ in range(2):
            manifest = await caller.manifest(end, self.canary + b"state" + self.ids)
            await caller.store.commit(caller.name(), manifest, fence)
        await caller.store.settle()
        await caller.stage(self.ids + self.canary)
        await self.storage.client.bgrewriteaof()
        while (await self.storage.client.info("persistence"))["aof_rewrite_in_progress"]:
            await asyncio.sleep(0.01)
        # Into the base, the increment and the snapshot.
        await caller.append(self.canary)
        await self.storage.client.save()


@pytest.fixture(params=["plain", "encrypted"])
async def disk(
    request: pytest.FixtureRequest, start_redis: Any, tenant: str, config: Any, new_caller: Any
) -> AsyncIterator[Disk]:
    # Uncompressed: a canary that a snapshot had packed would not be found although it is there.
    server = start_redis(*DURABLE_SETTINGS, "--rdbcompression", "no", "--save", "3600 1")
    storage = RedisStorage(server.url)
    await storage.load_function()
    keyring = Keyring(secrets.token_bytes(32) if request.param == "encrypted" else None)
    store = StateStore(Environment(storage=storage, config=config, keyring=keyring))
    yield Disk(server, storage, new_caller(store, tenant))
    await store.settle()
    await storage.close()


@pytest.mark.parametrize("is_forked", [False, True], ids=["alone", "forked"])
async def test_no_byte_of_an_erased_stream_is_left_on_disk(
    disk: Disk, is_forked: bool, request: pytest.FixtureRequest, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(0)
    caller = disk.caller
    await disk.write()
    num_before = disk.num_hits()
    if is_forked:
        await caller.store.streams.fork(caller.name(), Fork(name=caller.name("child")))

    receipts = [await caller.store.erasures.erase(caller.name(), "e")]
    num_between = disk.num_hits()
    if is_forked:
        receipts.append(await caller.store.erasures.erase(caller.name("child"), "c"))

    is_encrypted = "encrypted" in request.node.name
    assert (num_before == 0) == is_encrypted
    assert (num_between > 0) == (is_forked and not is_encrypted)
    assert [receipt.is_shared for receipt in receipts] == ([True, False] if is_forked else [False])
    assert disk.num_hits() == 0
    assert disk.canary.decode() not in caplog.text
    # Beside the mark that stops late commands, the tenant's totals and the receipts.
    kinds = {key.decode().split(":")[2] for key in await disk.storage.client.keys("eunoe:{*")}
    assert kinds == {"stream", "totals", "erasure"}


async def test_a_deletion_without_erasing_leaves_the_files_as_they_are(disk: Disk) -> None:
    await disk.write()
    num_rewrites = (await disk.storage.client.info())["aof_rewrites"]

    await disk.caller.store.streams.delete(disk.caller.name())

    assert (await disk.storage.client.info())["aof_rewrites"] == num_rewrites


async def test_one_rewrite_serves_all_who_wait_for_it(disk: Disk) -> None:
    before = (await disk.storage.client.info())["aof_rewrites"]

    await asyncio.gather(*(disk.storage.erase_history() for _ in range(20)))

    assert (await disk.storage.client.info())["aof_rewrites"] == before + 1


async def test_a_rewrite_that_runs_already_does_not_count(disk: Disk) -> None:
    client = disk.storage.client
    await client.config_set("rdb-key-save-delay", 20_000)
    for i in range(20):
        await client.set(f"filler{i}", b"x")
    await client.bgrewriteaof()
    running = (await client.info())["aof_rewrites"]

    await disk.storage.erase_history()

    assert (await client.info())["aof_rewrites"] == running + 1


async def test_a_redis_that_keeps_old_files_or_forbids_rewrites_is_refused(disk: Disk) -> None:
    client = disk.storage.client
    await client.config_set("aof-disable-auto-gc", "yes")
    with pytest.raises(Unavailable, match="aof-disable-auto-gc"):
        await disk.storage.erase_history()
    await client.config_set("aof-disable-auto-gc", "no")
    await client.acl_setuser("default", enabled=True, nopass=True, commands=["-bgrewriteaof"])

    with pytest.raises(Unavailable):
        await disk.storage.erase_history()


async def test_erasing_through_the_wire(state_store: Any) -> None:
    client, name = state_store.client, f"tenants/{state_store.tenant}/streams/a"
    settings = api.StreamSettings(kv_budget_tokens=64, segment_length=16)
    await client.create_stream(pb.CreateStreamRequest(name=name, model="m", settings=settings))
    await client.append_record(pb.AppendRecordRequest(name=name, offset=0, data=b"abc"))
    request = pb.DeleteStreamRequest(name=name, erase=True, request_id="e")

    receipt = (await client.delete_stream(request)).receipt
    again = (await client.delete_stream(request)).receipt

    assert (receipt.name, receipt.num_values_removed, receipt.is_shared) == (name, 1, False)
    assert receipt.erase_time.ToNanoseconds() >= receipt.delete_time.ToNanoseconds()
    assert again == receipt
    with pytest.raises(InvalidRequest):
        await client.delete_stream(pb.DeleteStreamRequest(name=name, erase=True))
