"""With replicas that must have it, a write that one of them lacks is not acknowledged, however often it is repeated."""

import socket
from collections.abc import AsyncIterator, Callable
from typing import Any

import pytest
import redis.asyncio as redis

from eunoe.runtime.errors import Unavailable
from eunoe.state_store.redis_storage import RedisStorage
from eunoe.state_store.server_check import check_server
from eunoe.state_store.storage import ExpectVersion, PutRecord

SAFE = ("--appendonly", "yes", "--appendfsync", "always", "--maxmemory-policy", "noeviction", "--save", "")


@pytest.fixture(scope="module")
def pair(start_redis: Callable[..., Any]) -> tuple[str, Any, int]:
    """(primary's URL, replica's server, primary's port)."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
    primary = start_redis(*SAFE, "--port", str(port), "--bind", "127.0.0.1", "--repl-diskless-sync-delay", "0")
    return primary.url, start_redis(*SAFE), port


@pytest.fixture
async def replica(pair: tuple[str, Any, int]) -> AsyncIterator[redis.Redis]:
    """The replica, which follows."""
    _, server, port = pair
    async with redis.Redis.from_url(server.url) as client:
        await follow(client, port)
        yield client


@pytest.fixture
async def storage(pair: tuple[str, Any, int]) -> AsyncIterator[RedisStorage]:
    storage = RedisStorage(pair[0], num_replicas=1)
    await storage.load_function()
    yield storage
    await storage.close()


async def follow(client: redis.Redis, port: int) -> None:
    await client.replicaof("127.0.0.1", port)
    while (await client.info("replication"))["master_link_status"] != "up":
        pass


async def put(storage: RedisStorage, token: str, key: str) -> Any:
    return await storage.compare_and_swap(token, [ExpectVersion(key, "")], [PutRecord(key, b"data")])


async def test_what_is_acknowledged_is_at_the_replica(storage: RedisStorage, replica: redis.Redis) -> None:
    for number in range(20):
        await put(storage, f"token{number}", f"one:{number}")

        assert await replica.hget(f"one:{number}", "data") == b"data"


async def test_a_write_that_no_replica_has_is_not_acknowledged_whoever_repeats_it(
    storage: RedisStorage, replica: redis.Redis, pair: tuple[str, Any, int]
) -> None:
    other = RedisStorage(pair[0], num_replicas=1)
    # It stays connected, and does not keep up.
    pair[1].pause()

    for each in (storage, other):
        with pytest.raises(Unavailable, match="0 of 1 replicas"):
            await put(each, "token", "two")
    pair[1].pause(False)

    assert await put(other, "token", "two") is None
    assert await replica.hget("two", "data") == b"data"
    await other.close()


async def test_a_store_does_not_serve_with_too_few_replicas(storage: RedisStorage, replica: redis.Redis) -> None:
    await check_server(storage, allow_unsafe=False)
    await replica.replicaof("NO", "ONE")

    with pytest.raises(Unavailable, match="0 of 1 replicas"):
        await check_server(storage, allow_unsafe=False)
