"""What was damaged, moved or swapped in the database is CORRUPT_STATE, never served; encrypted values show nothing."""

from typing import Any

import pytest

from eunoe.runtime.errors import CorruptState, KeyUnavailable
from eunoe.state_store import keys
from eunoe.state_store.log_rules import Append
from eunoe.state_store.sealing import Keyring
from eunoe.state_store.storage import IndexAdd, IndexRemove, PutValue
from eunoe.state_store.store import StateStore
from eunoe.state_store.stream_rules import Fork
from eunoe.state_store.transactions import Environment


async def raw(caller: Any, key: str) -> bytes:
    (value,) = await caller.store.environment.storage.get([key])
    assert value is not None
    return value


async def put(caller: Any, key: str, value: bytes) -> None:
    await caller.store.environment.storage.apply([PutValue(key, value, 0)])


async def record_keys(caller: Any, *starts: int, stream_id: str = "a") -> list[str]:
    uid = (await caller.get(stream_id)).uid
    return [keys.log_record(caller.tenant, uid, start) for start in starts]


async def test_a_flipped_byte_of_a_record_is_noticed(caller: Any) -> None:
    await caller.create()
    await caller.append(b"one")
    (key,) = await record_keys(caller, 0)
    value = await raw(caller, key)

    await put(caller, key, value[:-1] + bytes([value[-1] ^ 1]))

    with pytest.raises(CorruptState):
        await caller.read()
    with pytest.raises(CorruptState):
        await caller.store.logs.append(caller.name(), Append(offset=0, data=b"one"))


async def test_a_damaged_record_of_a_trimmed_log_is_corrupt_and_named(caller: Any) -> None:
    await caller.create()
    await caller.append(b"0123456789")
    fence = await caller.acquire()
    for offset in (1, 5, 10):
        await caller.commit(fence, offset)
    await caller.append(b"abc", b"def")
    (key,) = await record_keys(caller, 13)

    await put(caller, key, (await raw(caller, key))[:-1])

    with pytest.raises(CorruptState) as error:
        await caller.read(1)
    assert error.value.lost_from == 13


async def test_records_of_equal_length_cannot_change_places(caller: Any) -> None:
    await caller.create()
    await caller.append(b"one", b"two")
    first, second = await record_keys(caller, 0, 3)
    values = [await raw(caller, key) for key in (first, second)]

    await put(caller, first, values[1])
    await put(caller, second, values[0])

    with pytest.raises(CorruptState):
        await caller.read()


async def test_a_chunk_of_another_stream_is_no_chunk_of_this_one(caller: Any) -> None:
    manifests = []
    for stream_id in ("a", "b"):
        await caller.create(stream_id)
        await caller.append(b"text", stream_id=stream_id)
        fence = await caller.acquire(stream_id=stream_id)
        manifests.append(await caller.commit(fence, 4, stream_id=stream_id))
    mine, other = (keys.chunk(caller.tenant, manifest.chunks[0].chunk_id) for manifest in manifests)

    await put(caller, mine, await raw(caller, other))

    with pytest.raises(CorruptState):
        await caller.chunks(manifests[0])


@pytest.mark.parametrize(
    "change", ["0:2:0:{chain}", "0:1:1:{chain}", "0:1:0:" + "00" * 16, "1:1:0:{chain}", "0:1:0", "x"]
)
async def test_what_the_index_says_of_a_record_cannot_change(caller: Any, change: str) -> None:
    await caller.create()
    await caller.append(b"abcd")
    metadata = await caller.get()
    index = keys.log_index(caller.tenant, metadata.uid)
    storage = caller.store.environment.storage

    await storage.apply(
        [
            IndexRemove(index, f"0:1:0:{metadata.log_chain}"),
            IndexAdd(index, 4, change.format(chain=metadata.log_chain)),
        ]
    )

    with pytest.raises(CorruptState):
        await caller.read()


async def test_forks_and_imports_open_what_their_origin_closed(caller: Any) -> None:
    await caller.create()
    await caller.append(b"one", b"two")
    manifest = await caller.commit(await caller.acquire(), 3)
    child = await caller.store.streams.fork(caller.name(), Fork(name=caller.name("child")))
    chunks = await caller.stage(b"imported", stream_id="import")
    settings = {"manifest": caller.a_manifest(1, 3, chunks), "log_start_offset": 3}
    imported = await caller.create("import", **settings)

    assert await caller.read(3, stream_id="child") == b"two"
    assert await caller.chunks(manifest, stream_id="child") == await caller.chunks(manifest)
    assert await caller.chunks(imported.newest, stream_id="import") == [b"imported"]
    assert child.wrapped_key == (await caller.get()).wrapped_key


async def test_an_encrypted_stream_needs_its_key(caller: Any, keyring: Keyring) -> None:
    await caller.create()
    await caller.append(b"a canary sings")
    (key,) = await record_keys(caller, 0)
    environment = caller.store.environment
    without_key = StateStore(Environment(storage=environment.storage, config=environment.config))

    is_encrypted = bool(keyring.new_key("t"))

    assert (b"canary" in await raw(caller, key)) != is_encrypted
    if is_encrypted:
        with pytest.raises(KeyUnavailable):
            await without_key.logs.append(caller.name(), Append(offset=14, data=b"more"))
