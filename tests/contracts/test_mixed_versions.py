"""A state store of this version and one of the next, on the same streams at the same time, as in a rolling upgrade.

The next version is this one over a storage that writes fields which this one does not know: a counter into every
stream's record, and a mark into every manifest that it commits. It counts on from what it finds, so that a field which
the other store drops or brings back is noticed in the end.
"""

import asyncio
import json
import random
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from typing import Any

import pytest
import xxhash

from eunoe.runtime.errors import Conflict, ContentMismatch, OffsetGap
from eunoe.state_store import keys
from eunoe.state_store.config import StateStoreConfig
from eunoe.state_store.log_rules import Append
from eunoe.state_store.metadata import Lease, StreamMetadata
from eunoe.state_store.redis_storage import RedisStorage
from eunoe.state_store.storage import Expectation, Persist, PutRecord, Refusal, Write
from eunoe.state_store.store import StateStore
from eunoe.state_store.stream_rules import Fork
from eunoe.state_store.transactions import Environment

NUM_APPENDS, NUM_COMMITS, NUM_FORKS = 40, 12, 6


class NextVersionStorage(RedisStorage):
    """Redis as the next version uses it.

    Attributes:
        num_writes: Of each stream's record, by uid.
        marks: Of manifests, by their chains.
    """

    def __init__(self, url: str) -> None:
        super().__init__(url)
        self.num_writes: Counter[str] = Counter()
        self.marks: dict[str, str] = {}

    async def compare_and_swap(
        self, token: str, expectations: Sequence[Expectation], writes: Sequence[Write]
    ) -> Refusal | None:
        is_commit = any(isinstance(write, Persist) for write in writes)
        records = [_fields(write.data) for write in writes if isinstance(write, PutRecord)]
        for fields in records:
            fields["num_writes"] = fields.get("num_writes", 0) + 1
            if is_commit:
                newest = fields["checkpoints"][-1]
                newest["compression"] = f"of {newest['chain']}"
        remaining = iter(records)
        marked = [PutRecord(w.key, _data(next(remaining))) if isinstance(w, PutRecord) else w for w in writes]
        refusal = await super().compare_and_swap(token, expectations, marked)
        if refusal is None:
            for fields in records:
                self.num_writes[fields["uid"]] += 1
                self.marks |= _marks(fields)
        return refusal


@pytest.fixture
async def callers(redis_server: Any, new_caller: Any, tenant: str) -> AsyncIterator[list[Any]]:
    """A client and worker of the store of this version, and one of the next, of the same tenant."""
    stores = []
    for storage in (RedisStorage(redis_server.url), NextVersionStorage(redis_server.url)):
        await storage.load_function()
        stores.append(StateStore(Environment(storage=storage, config=StateStoreConfig())))
    # Their chunks must not have the same names.
    yield [new_caller(store, tenant, num_staged=1000 * number) for number, store in enumerate(stores)]
    for store in stores:
        await store.settle()
        await store.environment.storage.close()


async def test_two_versions_side_by_side_lose_nothing_and_read_the_same(callers: list[Any]) -> None:
    storage = callers[1].store.environment.storage
    await callers[0].create("old", retain_log=True)
    await callers[1].create("new", retain_log=True)
    accepted: dict[str, dict[int, bytes]] = {"old": {}, "new": {}}

    await asyncio.gather(
        *(append(caller, accepted, seed) for seed, caller in enumerate(callers * 2)),
        *(commit(caller, worker) for worker, caller in enumerate(callers)),
        *(fork(caller, accepted, number) for number, caller in enumerate(callers)),
    )

    for stream_id, records in accepted.items():
        found = [await everything(caller, stream_id) for caller in callers]
        assert found[0] == found[1]
        metadata, log, _ = found[0]
        first = metadata.own_start_offset
        assert log[first:] == b"".join(records[offset] for offset in sorted(records))
        assert metadata.accepted_offset == first + sum(len(data) for data in records.values())
        fields = await stored(storage, metadata)
        assert fields.get("num_writes", 0) == storage.num_writes[metadata.uid]
        for manifest in fields["checkpoints"]:
            assert manifest.get("compression") == storage.marks.get(manifest["chain"])
    assert len(accepted) == 2 + 2 * NUM_FORKS
    # Each has committed, and the next version has written to both.
    parents = [await callers[0].get(stream_id) for stream_id in ("old", "new")]
    assert sum(metadata.version for metadata in parents) == 2 * len(storage.marks) == 2 * NUM_COMMITS
    assert all(storage.num_writes[metadata.uid] > NUM_APPENDS // 2 for metadata in parents)


async def test_a_commit_through_one_version_is_repeated_through_the_other(callers: list[Any]) -> None:
    old, new = callers
    await new.create("a")
    fence = await new.acquire()
    manifest = await new.commit(fence, 0)

    repeated = await old.store.commit(old.name("a"), manifest, fence)

    assert repeated.checkpoints[0].unknown
    assert repeated.version == manifest.version


async def append(caller: Any, accepted: dict[str, dict[int, bytes]], seed: int) -> None:
    """Append records to both streams, each where the log ends when it comes."""
    chance = random.Random(seed)
    for i in range(NUM_APPENDS):
        stream_id = chance.choice(("old", "new"))
        await append_one(caller, accepted, stream_id, b"<%d of %d>" % (i, seed))


async def append_one(caller: Any, accepted: dict[str, dict[int, bytes]], stream_id: str, data: bytes) -> None:
    async def attempt() -> None:
        offset = (await caller.get(stream_id)).accepted_offset
        await caller.store.logs.append(caller.name(stream_id), Append(offset=offset, data=data))
        accepted[stream_id][offset] = data

    await until_first(attempt)


async def commit(caller: Any, worker: int) -> None:
    """Take either stream from the other version's worker and commit, again and again."""
    for i in range(NUM_COMMITS):
        stream_id = ("old", "new")[i % 2]

        async def attempt(stream_id: str = stream_id) -> None:
            fence = await caller.acquire(Lease(f"worker {worker} of {caller.tenant}", 0, "h:1"), stream_id)
            await caller.commit(fence, (await caller.get(stream_id)).accepted_offset, stream_id)

        await until_first(attempt)


async def fork(caller: Any, accepted: dict[str, dict[int, bytes]], number: int) -> None:
    """Fork both streams, and append to the children."""
    for i in range(NUM_FORKS):
        child = f"child-{number}-{i}"
        parent = caller.name(("old", "new")[i % 2])
        await caller.store.streams.fork(parent, Fork(name=caller.name(child)))
        accepted[child] = {}
        await append_one(caller, accepted, child, b"child %d" % i)


async def until_first(attempt: Callable[[], Awaitable[None]]) -> None:
    """Try until nobody else comes first."""
    while True:
        try:
            return await attempt()
        except (Conflict, ContentMismatch, OffsetGap):
            continue


async def everything(caller: Any, stream_id: str) -> tuple[StreamMetadata, bytes, list[bytes]]:
    """A stream, its log from its start, and its checkpoints' chunks, as one store reads them."""
    metadata = await caller.get(stream_id)
    log_start = metadata.log_start_offset
    log = bytes(log_start) + await caller.read(log_start, stream_id)
    chunks = [chunk for manifest in metadata.checkpoints for chunk in await caller.chunks(manifest, stream_id)]
    return metadata, log, chunks


async def stored(storage: RedisStorage, metadata: StreamMetadata) -> dict[str, Any]:
    (record,) = await storage.read([keys.live_stream(metadata.name)])
    return _fields(record.data)


def _marks(fields: dict[str, Any]) -> dict[str, str]:
    return {m["chain"]: m["compression"] for m in fields["checkpoints"] if "compression" in m}


def _fields(data: bytes) -> dict[str, Any]:
    fields: dict[str, Any] = json.loads(data[32:])
    return fields


def _data(fields: dict[str, Any]) -> bytes:
    content = json.dumps(fields, separators=(",", ":")).encode()
    return xxhash.xxh3_128_hexdigest(content).encode() + content
