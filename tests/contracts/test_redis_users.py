"""The users of deploy/redis/users.conf: they can do all that a state store does, and nothing else."""

import asyncio
import os
import subprocess
import sys
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import redis.asyncio as redis
from redis.exceptions import NoPermissionError

from eunoe.embedded.redis_server import DURABLE_SETTINGS
from eunoe.internal.v1 import state_store_pb2 as pb
from eunoe.runtime.errors import StreamNotFound, Unavailable
from eunoe.state_store.effects import Total
from eunoe.state_store.log_rules import Append
from eunoe.state_store.metadata import Lease
from eunoe.state_store.redis_storage import FUNCTION_SOURCE, RedisStorage
from eunoe.state_store.server_check import check_server
from eunoe.state_store.stream_rules import Fork

WORKER = Lease("w1", 0, "host:1")
REPOSITORY = Path(__file__).parents[2]
STORE_USER = {"username": "eunoe-state-store", "password": "change-me"}
DEPLOY_USER = {"username": "eunoe-deploy", "password": "change-me-too"}


@pytest.fixture(scope="module")
def server(start_redis):
    return start_redis(*DURABLE_SETTINGS, "--include", str(REPOSITORY / "deploy/redis/users.conf"))


@pytest.fixture
async def storage(server) -> AsyncIterator[RedisStorage]:
    async with redis.Redis.from_url(server.url, **DEPLOY_USER) as deployer:
        await deployer.function_load(FUNCTION_SOURCE, replace=True)
    storage = RedisStorage(url_as(STORE_USER, server.url))
    yield storage
    await storage.close()


def url_as(user: dict[str, str], url: str) -> str:
    return url.replace("unix://", f"unix://{user['username']}:{user['password']}@")


async def test_a_state_store_does_all_it_does_as_its_user(storage, caller, clock, tmp_path: Path) -> None:
    await check_server(storage, allow_unsafe=False, marker_file=tmp_path / "marker")
    store = caller.store
    worker = pb.Worker(worker=WORKER.worker, address=WORKER.address, model={"name": "m"})

    await store.workers.renew(worker)
    assert await store.workers.living("m") == [worker]
    await caller.create(expire_time_ns=clock() + 10**12)
    await caller.append(b"0123456789", b"abcdef")
    fence = await caller.acquire(WORKER)
    manifest = await caller.commit(fence, 10)
    assert await caller.chunks(manifest) == [b"state1"]
    assert await caller.read(10) == b"abcdef"
    # A repeat is compared with what is there.
    await store.logs.append(caller.name(), Append(offset=10, data=b"abcdef"))
    await store.backlog.largest("m", 1, 10)
    await store.streams.fork(caller.name(), Fork(name=caller.name("b")))
    assert [found.name for found in (await store.streams.page(caller.tenant, "", 10))[0]] == [
        caller.name(),
        caller.name("b"),
    ]
    await store.streams.release(caller.name(), fence)
    assert await caller.used(Total.STREAMS) == 2
    key, secret = await store.api_keys.create(caller.tenant, "label")
    assert await store.api_keys.authenticate(secret) == caller.tenant
    assert [found.key_id for found in await store.api_keys.of_tenant(caller.tenant)] == [key.key_id]
    await store.api_keys.revoke(key.key_id)
    await store.streams.delete(caller.name("b"))
    await store.environment.storage.erase_history()
    clock.advance(2000)
    await store.sweeper.sweep()
    await store.workers.remove(WORKER.worker)
    await store.settle()
    # With replicas, with another database, for probes.
    for command in ("PUBLISH eunoe:fence x", "WAIT 0 1", "SELECT 1", "PING"):
        await storage.client.execute_command(*command.split())

    assert await caller.used(Total.STREAMS) == 0
    with pytest.raises(StreamNotFound):
        await caller.get()


@pytest.mark.parametrize(
    "command",
    [
        "FLUSHALL",
        "FLUSHDB",
        "KEYS *",
        "SCAN 0",
        "EVAL return 0",
        "CONFIG SET appendfsync no",
        "CONFIG REWRITE",
        "FUNCTION FLUSH",
        "FUNCTION LOAD x",
        "SCRIPT FLUSH",
        "SHUTDOWN",
        "REPLICAOF NO ONE",
        "ACL LIST",
        "MONITOR",
        "GET other:key",
        "SET other:key x",
        "FCALL eunoe_swap_1 1 other:key token delete",
        "PUBLISH other x",
        "CLIENT LIST",
    ],
)
async def test_the_state_stores_user_cannot(storage, command: str) -> None:
    with pytest.raises(NoPermissionError):
        await storage.client.execute_command(*command.split())


async def test_the_deploying_user_can_read_and_write_nothing(server) -> None:
    async with redis.Redis.from_url(server.url, **DEPLOY_USER) as deployer:
        for command in ("GET eunoe:installation", "FCALL eunoe_swap_1 0 token", "INFO", "FUNCTION DELETE eunoe_1"):
            with pytest.raises(NoPermissionError):
                await deployer.execute_command(*command.split())


async def test_without_the_function_the_refusal_says_how_to_load_it(start_redis) -> None:
    server = start_redis(*DURABLE_SETTINGS, "--include", str(REPOSITORY / "deploy/redis/users.conf"))
    storage = RedisStorage(url_as(STORE_USER, server.url))

    with pytest.raises(Unavailable, match=r"print-function \| redis-cli -x FUNCTION LOAD REPLACE"):
        await check_server(storage, allow_unsafe=False)
    printed = await asyncio.to_thread(
        subprocess.run,
        [sys.executable, "-m", "eunoe.state_store", "print-function"],
        env={**os.environ, "PYTHONPATH": str(REPOSITORY / "services")},
        capture_output=True,
        check=True,
    )
    async with redis.Redis.from_url(server.url, **DEPLOY_USER) as deployer:
        await deployer.function_load(printed.stdout)
    await check_server(storage, allow_unsafe=False)
    await storage.close()
