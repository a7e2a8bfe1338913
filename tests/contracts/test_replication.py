"""Redis with replicas: nothing is acknowledged that only the primary has, and no call gets another's reply."""

import asyncio
import uuid
from collections.abc import AsyncIterator

import pytest

from eunoe.runtime.errors import Unavailable
from eunoe.state_store.config import StateStoreConfig
from eunoe.state_store.log_rules import Append
from eunoe.state_store.metadata import Settings
from eunoe.state_store.redis_storage import RedisStorage
from eunoe.state_store.storage import AddTotal, ExpectStaged, ExpectVersion, Persist, PutRecord, Versioned
from eunoe.state_store.store import StateStore
from eunoe.state_store.stream_rules import Create
from eunoe.state_store.transactions import Environment

WAIT_SECONDS = 0.1


@pytest.fixture(scope="module")
def pair(start_replicated_redis):
    """A primary and a replica that these tests pause."""
    return start_replicated_redis()


@pytest.fixture
async def storage(pair) -> AsyncIterator[RedisStorage]:
    storage = RedisStorage(pair.primary.url, num_replicas=1, wait_seconds=WAIT_SECONDS)
    await storage.load_function()
    yield storage
    pair.replica.pause(False)
    await storage.close()


async def test_what_is_acknowledged_is_at_the_replica(pair, storage) -> None:
    key = f"eunoe:{{{uuid.uuid4().hex}}}"
    replica = RedisStorage(pair.replica.url)

    for i in range(20):
        await until_acknowledged(lambda: storage.compare_and_swap(f"t{i}", [], [PutRecord(f"{key}{i}", b"data")]))  # noqa: B023

        assert await replica.read([f"{key}{i}"]) == [Versioned(f"t{i}", b"data")]
    await replica.close()


async def test_a_swap_that_no_replica_has_is_unknown_until_a_repeat_finds_it_there(pair, storage) -> None:
    key = f"eunoe:{{{uuid.uuid4().hex}}}"
    swap = "t1", [ExpectVersion(key, "")], [PutRecord(key, b"one"), AddTotal(key + "t", "n", 5)]
    other = RedisStorage(pair.primary.url, num_replicas=1, wait_seconds=WAIT_SECONDS)
    pair.replica.pause()

    # The first does the work; the others, on new connections too, find it done and must not acknowledge it either.
    for each in (storage, storage, other):
        with pytest.raises(Unavailable, match="0 of 1 replicas"):
            await each.compare_and_swap(*swap)
    await other.close()
    pair.replica.pause(False)

    assert await until_acknowledged(lambda: storage.compare_and_swap(*swap)) is None
    assert await storage.totals(key + "t") == {"n": 5}
    replica = RedisStorage(pair.replica.url)
    assert await replica.read([key]) == [Versioned("t1", b"one")]
    await replica.close()


async def test_nothing_is_read_that_only_the_primary_has(pair, storage) -> None:
    key = f"eunoe:{{{uuid.uuid4().hex}}}"
    pair.replica.pause()
    with pytest.raises(Unavailable):
        await storage.compare_and_swap("t1", [], [PutRecord(key, b"one")])

    with pytest.raises(Unavailable):
        await storage.read([key])
    with pytest.raises(Unavailable):
        await storage.get([key + "value"])
    # What is staged waits for the commit's fence.
    await storage.stage([(key + "chunk", b"bytes")], 60_000)
    commit = [ExpectStaged(key + "chunk", 5)], [Persist(key + "chunk"), PutRecord(key + "manifest", b"")]
    with pytest.raises(Unavailable):
        await storage.compare_and_swap("t2", *commit)
    pair.replica.pause(False)

    assert await until_acknowledged(lambda: storage.read([key])) == [Versioned("t1", b"one")]
    replica = RedisStorage(pair.replica.url)
    assert await replica.get([key + "chunk"]) == [b"bytes"]
    await replica.close()


async def test_a_repeated_append_is_not_called_a_duplicate_while_only_the_primary_has_it(pair, storage) -> None:
    store = StateStore(Environment(storage=storage, config=StateStoreConfig(num_replicas=1)))
    name = f"tenants/test-{uuid.uuid4().hex}/streams/a"
    settings = Settings(kv_budget_tokens=64, segment_length=16, num_sink_tokens=4, positions=2, retain_log=False)
    await store.streams.create(Create(name=name, model="m", settings=settings))
    reading = asyncio.Event()
    swap = storage.compare_and_swap

    async def swap_without_replica(*arguments):
        # Not before: the read that comes first would not get through.
        pair.replica.pause()
        reading.set()
        return await swap(*arguments)

    storage.compare_and_swap = swap_without_replica
    for _ in range(2):
        with pytest.raises(Unavailable, match="0 of 1 replicas"):
            await store.logs.append(name, Append(offset=0, data=b"record", kind=1))
    assert reading.is_set()
    storage.compare_and_swap = swap
    pair.replica.pause(False)

    await until_acknowledged(lambda: store.logs.append(name, Append(offset=0, data=b"record", kind=1)))
    assert (await store.streams.get(name)).accepted_offset == len(b"record")


async def test_a_replica_is_asked_on_the_connection_that_wrote(pair) -> None:
    """With one connection for everybody a fence that waited elsewhere would have to queue behind itself."""
    storage = RedisStorage(pair.primary.url, num_replicas=1, max_connections=1)
    await storage.load_function()
    key = f"eunoe:{{{uuid.uuid4().hex}}}"

    refusals = await asyncio.gather(
        *(
            storage.compare_and_swap(f"t{i}", [ExpectVersion(f"{key}{i}", "")], [PutRecord(f"{key}{i}", b"")])
            for i in range(20)
        )
    )

    assert refusals == [None] * 20
    await storage.close()


@pytest.mark.parametrize("num_replicas", [0, 1])
async def test_cancelled_calls_leave_no_reply_for_the_next_one(pair, num_replicas: int) -> None:
    storage = RedisStorage(pair.primary.url, num_replicas=num_replicas, max_connections=50)
    await storage.load_function()
    keys = [f"eunoe:{{{uuid.uuid4().hex}}}:{i}" for i in range(50)]
    for i, key in enumerate(keys):
        await storage.compare_and_swap(f"t{i}", [], [PutRecord(key, b"%d" % i)])
        await storage.stage([(key + "v", b"v%d" % i)], 60_000)

    for _ in range(4):
        await asyncio.gather(*(storage.read([key]) for key in keys))
        pair.primary.pause()
        calls = [
            asyncio.create_task(storage.read([key]) if i % 2 else storage.get([key + "v"]))
            for i, key in enumerate(keys)
        ]
        done, _ = await asyncio.wait(calls, timeout=0.05)
        assert not done
        for call in calls:
            call.cancel()
        pair.primary.pause(False)
        ended = await asyncio.gather(*calls, return_exceptions=True)
        # Before Python 3.12 `wait_for` can swallow a cancellation: such a call goes on, and to its own reply.
        for i, end in enumerate(ended):
            own = [Versioned(f"t{i}", b"%d" % i)] if i % 2 else [b"v%d" % i]
            assert isinstance(end, asyncio.CancelledError) or end == own
        assert sum(isinstance(end, asyncio.CancelledError) for end in ended) >= 25

        read = await asyncio.gather(*(storage.read([key]) for key in keys))
        values = await asyncio.gather(*(storage.get([key + "v"]) for key in keys))
        assert read == [[Versioned(f"t{i}", b"%d" % i)] for i in range(50)]
        assert values == [[b"v%d" % i] for i in range(50)]
    await storage.close()


async def until_acknowledged(call):
    """The result of a call, repeated while the replica that was away comes back."""
    for _ in range(200):
        try:
            return await call()
        except Unavailable:
            pass
    raise AssertionError("the replica did not come back")
