"""Redis under Sentinel: the state store finds the primary, and the new one after a failover."""

import asyncio
import subprocess
import time
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest
import redis

from eunoe.embedded.processes import free_ports
from eunoe.embedded.redis_server import server_binary
from eunoe.runtime.errors import Unavailable
from eunoe.state_store.redis_client import RedisTls, open_client
from eunoe.state_store.redis_storage import RedisStorage
from eunoe.state_store.storage import AddTotal, ExpectVersion, PutRecord, Versioned

PATIENCE_SECONDS = 60


@pytest.fixture
def sentinel(start_replicated_redis, tmp_path: Path) -> Iterator[tuple[redis.Redis, str]]:
    """(a connection to a Sentinel that knows of a primary and its replica, the URL for a state store)."""
    pair = start_replicated_redis()
    with redis.Redis.from_url(pair.replica.url) as replica:
        primary_port = replica.info("replication")["master_port"]
    configuration = tmp_path / "sentinel.conf"
    (port,) = free_ports(1)
    configuration.write_text(
        f"port {port}\nbind 127.0.0.1\ndir {tmp_path}\n"
        f"sentinel monitor eunoe 127.0.0.1 {primary_port} 1\n"
        "sentinel down-after-milliseconds eunoe 1000\nsentinel failover-timeout eunoe 5000\n"
    )
    process = subprocess.Popen([server_binary(), str(configuration), "--sentinel"], stdout=subprocess.DEVNULL)
    client = redis.Redis(port=port, decode_responses=True)
    try:
        wait_for(lambda: knows_replica(client))
        yield client, f"sentinel://127.0.0.1:1,127.0.0.1:{port}/eunoe"
    finally:
        client.close()
        process.terminate()
        process.wait(timeout=10)


def knows_replica(client: redis.Redis) -> bool:
    try:
        replicas = client.sentinel_slaves("eunoe")
    except redis.ConnectionError:
        return False
    return any(not r["is_sdown"] and r["master-link-status"] == "ok" for r in replicas)


def wait_for(condition) -> None:
    deadline = time.monotonic() + PATIENCE_SECONDS
    while not condition():
        assert time.monotonic() < deadline


# Ten seconds: so often does Sentinel ask a replica whether it is one.
@pytest.mark.faults
async def test_what_was_acknowledged_is_there_after_a_failover_and_the_new_primary_is_found(sentinel) -> None:
    client, url = sentinel
    storage = RedisStorage(url, num_replicas=1)
    await storage.load_function()
    key = f"eunoe:{{{uuid.uuid4().hex}}}"
    old_address = client.sentinel_get_master_addr_by_name("eunoe")
    # More than one connection must find the new primary.
    await asyncio.gather(*(swap(storage, key, i) for i in range(20)))
    await storage.stage([(key + "staged before", b"chunk")], 60_000)

    client.execute_command("SENTINEL", "FAILOVER", "eunoe")
    wait_for(lambda: client.sentinel_get_master_addr_by_name("eunoe") != old_address)

    # A swap whose outcome is unknown is repeated with its token, and counts once.
    await asyncio.gather(*(until_acknowledged(lambda i=i: swap(storage, key, i)) for i in range(20, 40)))
    assert await until_acknowledged(lambda: storage.read([f"{key}{i}" for i in range(40)])) == [
        Versioned(f"t{i}", b"%d" % i) for i in range(40)
    ]
    assert await storage.totals(key + "t") == {"n": 40}
    await until_acknowledged(lambda: storage.stage([(key + "chunk", b"chunk")], 60_000))
    assert await storage.get([key + "chunk"]) == [b"chunk"]
    new_address = client.sentinel_get_master_addr_by_name("eunoe")
    info = await storage.client.info()
    assert (info["role"], info["tcp_port"]) == ("master", new_address[1])
    await storage.close()


async def test_a_service_that_sentinel_does_not_know_is_unavailable(sentinel) -> None:
    _, url = sentinel
    storage = RedisStorage(url + "-of-another")

    with pytest.raises(Unavailable, match="No master found for 'eunoe-of-another'"):
        await storage.read(["key"])
    await storage.close()


@pytest.mark.parametrize("url", ["sentinel://host:1", "sentinel:///service", "sentinel://host:1/service/x"])
def test_a_malformed_url_is_refused(url: str) -> None:
    with pytest.raises(ValueError, match="is not sentinel://"):
        open_client(url, max_connections=1)


def test_all_parts_of_a_url_are_used() -> None:
    client = open_client("sentinels://us%40er:pass%3Aword@a:1,b/service/3", max_connections=7)

    pool = client.connection_pool
    assert (pool.service_name, pool.max_connections) == ("service", 7)
    assert {k: pool.connection_kwargs[k] for k in ("db", "username", "password")} == {
        "db": 3,
        "username": "us@er",
        "password": "pass:word",
    }
    sentinels = [s.connection_pool.connection_kwargs for s in pool.sentinel_manager.sentinels]
    assert [(s["host"], s["port"]) for s in sentinels] == [("a", 1), ("b", 26379)]


def test_files_for_tls_without_tls_are_refused() -> None:
    with pytest.raises(ValueError, match="begins with redis://, which does not use it"):
        open_client("redis://host", tls=RedisTls(ca_file=Path("ca.pem")), max_connections=1)


async def swap(storage: RedisStorage, key: str, i: int) -> None:
    writes = [PutRecord(f"{key}{i}", b"%d" % i), AddTotal(key + "t", "n", 1)]
    assert await storage.compare_and_swap(f"t{i}", [ExpectVersion(f"{key}{i}", "")], writes) is None


async def until_acknowledged(call):
    """The result of a call, repeated while the primary changes."""
    deadline = time.monotonic() + PATIENCE_SECONDS
    while True:
        try:
            return await call()
        except Unavailable:
            assert time.monotonic() < deadline
