"""A whole database as it was when its formats were released: everything that a state store writes, key by key.

Records of streams, log indexes, sealed log records, chunks and outcomes, API keys, receipts, workers and hints. What
randomness and the clock decide is counted here instead, so that a store of today must write exactly the newest files,
and it must read every file to what was put in.
"""

import itertools
import json
import secrets
from collections.abc import AsyncIterator, Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import redis.asyncio as redis

from eunoe.internal.v1 import state_store_pb2 as pb
from eunoe.state_store.config import StateStoreConfig
from eunoe.state_store.effects import Total
from eunoe.state_store.log_rules import KIND_TEXT, KIND_TOKEN_IDS, Append
from eunoe.state_store.metadata import Lease, Source
from eunoe.state_store.metadata_codec import FORMAT
from eunoe.state_store.redis_storage import RedisStorage
from eunoe.state_store.sealing import Keyring
from eunoe.state_store.store import StateStore
from eunoe.state_store.stream_rules import Fork
from eunoe.state_store.transactions import Environment

NOW_NS = 1_700_000_000_000_000_000
WORKER = pb.Worker(worker="w1", address="host:1", model={"name": "m", "model_digest": "weights", "vocab_size": 512})
SECRET = "eunoe_0000000000000001_" + "00" * 31 + "02"
# One that no other test uses: these keys are the same in every run.
DATABASE = 9
FILES = sorted((Path(__file__).parent / "golden").glob("database_*.json"))


@pytest.fixture
async def client(redis_server: Any) -> AsyncIterator[redis.Redis]:
    """An empty database of its own."""
    async with redis.Redis.from_url(f"{redis_server.url}?db={DATABASE}") as client:
        await client.flushdb()
        yield client
        await client.flushdb()


@pytest.fixture
async def golden_caller(
    redis_server: Any, client: redis.Redis, new_caller: Any, is_encrypted: bool
) -> AsyncIterator[Any]:
    """A caller in that database."""
    storage = RedisStorage(f"{redis_server.url}?db={DATABASE}")
    await storage.load_function()
    ids = itertools.count()
    environment = Environment(
        storage=storage,
        config=StateStoreConfig(),
        keyring=Keyring(bytes(range(32)) if is_encrypted else None),
        clock_ns=lambda: NOW_NS,
        new_id=lambda: f"{next(ids):032x}",
    )
    store = StateStore(environment, pepper=b"pepper")
    yield new_caller(store, "golden")
    await store.settle()
    await storage.close()


async def write(caller: Any) -> None:
    """Something of everything."""
    store = caller.store
    await store.workers.renew(WORKER)
    await store.api_keys.create("golden", "a label")
    await caller.create("book", expire_time_ns=NOW_NS + 10**18, request_id="made", retain_log=True)
    fence = await caller.acquire(Lease("w1", 0, "host:1"), "book")
    name = caller.name("book")
    await store.logs.append(name, Append(offset=0, data=b"one \xe2\x82", source_id="file", source_offset=0))
    await store.logs.append(name, Append(offset=6, data=b"\xac two ", source_id="file", source_offset=6))
    token_ids = Append(offset=12, data=b"\1\0\0\0\2\0\0\0", kind=KIND_TOKEN_IDS, request_id="asked", outcome=b"said")
    await store.logs.append(name, token_ids)
    manifest = await caller.manifest(12, b"memory", stream_id="book")
    await store.commit(name, manifest, fence)
    await store.settle()
    await store.streams.fork(name, Fork(name=caller.name("what-if")))
    await caller.append(b"three \xc3", stream_id="what-if")
    store.backlog.note(await caller.get("what-if"))
    # Left behind: a chunk staged for a commit, another for a stream that is still to be imported.
    await caller.stage(b"next memory", stream_id="book")
    await caller.stage(b"imported memory", stream_id="later")
    await caller.create("gone")
    await caller.append(b"to be forgotten", stream_id="gone")
    await store.erasures.erase(caller.name("gone"), "erase")
    await store.settle()


async def check(caller: Any) -> None:
    """Everything reads as `write` has put it in."""
    store = caller.store
    assert await store.workers.living("m") == [WORKER]
    assert await store.api_keys.authenticate(SECRET) == "golden"
    (key,) = await store.api_keys.of_tenant("golden")
    assert (key.label, key.create_time_ns) == ("a label", NOW_NS)

    book, child = await caller.get("book"), await caller.get("what-if")
    assert (book.accepted_offset, book.applied_offset, book.version, book.carry) == (20, 12, 1, b"")
    assert (book.create_request_id, book.expire_time_ns, book.epoch) == ("made", NOW_NS + 10**18, 1)
    assert (book.lease, book.sources) == (Lease("w1", 1, "host:1"), (Source("file", 12),))
    assert (child.accepted_offset, child.own_start_offset, child.carry, child.lease) == (27, 20, b"\xc3", None)
    assert child.settings == book.settings
    assert child.settings.retain_log

    pieces = [(p.offset, p.data, p.kind) async for p in store.logs.read(caller.name("book"), 0, 0)]
    assert pieces == [
        (0, b"one \xe2\x82", KIND_TEXT),
        (6, b"\xac two ", KIND_TEXT),
        (12, b"\1\0\0\0\2\0\0\0", KIND_TOKEN_IDS),
    ]
    assert await caller.read(12, "what-if") == b"\1\0\0\0\2\0\0\0three \xc3"
    assert await store.logs.outcome(caller.name("book"), "asked") == b"said"
    for stream_id, metadata in (("book", book), ("what-if", child)):
        assert metadata.newest is not None
        assert await caller.chunks(metadata.newest, stream_id) == [b"memory"]
        expected = caller.a_manifest(1, 12, metadata.newest.chunks)
        assert replace(metadata.newest, owner_uid="", read_to=0, chain="") == expected

    receipt = await store.erasures.erase(caller.name("gone"), "erase")
    assert (receipt.delete_time_ns, receipt.erase_time_ns, receipt.num_values_removed) == (NOW_NS, NOW_NS, 1)
    assert [await caller.used(total) for total in Total] == [2, 27, 6]


async def dump(client: redis.Redis) -> dict[str, Any]:
    """All of a database by key: strings, hashes, sorted sets; bytes as text in which each byte is a character."""
    found: dict[str, Any] = {}
    for key in sorted([key async for key in client.scan_iter()]):
        match await client.type(key):
            case b"string":
                found[_text(key)] = _text(await client.get(key))
            case b"hash":
                found[_text(key)] = {_text(f): _text(v) for f, v in sorted((await client.hgetall(key)).items())}
            case b"zset":
                rows = await client.zrange(key, 0, -1, withscores=True)
                found[_text(key)] = [[_text(member), int(score)] for member, score in rows]
    return found


async def load(client: redis.Redis, found: dict[str, Any]) -> None:
    """What `dump` gave, into an empty database; nothing of it has a time to live."""
    for key, value in found.items():
        match value:
            case str():
                await client.set(_bytes(key), _bytes(value))
            case dict():
                await client.hset(_bytes(key), mapping={_bytes(f): _bytes(v) for f, v in value.items()})
            case list():
                await client.zadd(_bytes(key), {_bytes(member): score for member, score in value})


def counted_secrets(monkeypatch: pytest.MonkeyPatch) -> None:
    """Random bytes are numbers from 1 on, as long as they are asked for."""
    numbers = itertools.count(1)
    monkeypatch.setattr(secrets, "token_bytes", lambda num_bytes: next(numbers).to_bytes(num_bytes, "big"))


@pytest.mark.parametrize("is_encrypted", [False, True], ids=["plain", "encrypted"])
async def test_the_newest_version_is_written_as_ever(
    golden_caller: Any,
    is_encrypted: bool,
    client: redis.Redis,
    golden: Callable[[str, bytes], bytes],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    counted_secrets(monkeypatch)

    await write(golden_caller)

    written = json.dumps(await dump(client), indent=1, sort_keys=True).encode() + b"\n"
    golden(f"database_{FORMAT}_{'encrypted' if is_encrypted else 'plain'}.json", written)


@pytest.mark.parametrize(
    ("path", "is_encrypted"),
    [(path, "encrypted" in path.stem) for path in FILES],
    ids=lambda value: getattr(value, "stem", ""),
)
async def test_a_database_of_every_version_reads(golden_caller: Any, path: Path, client: redis.Redis) -> None:
    await load(client, json.loads(path.read_text()))

    await check(golden_caller)


def _text(data: bytes) -> str:
    return data.decode("latin-1")


def _bytes(text: str) -> bytes:
    return text.encode("latin-1")
