"""The state store as a process: it refuses an unsafe Redis, and what it acknowledged outlives every kill."""

import asyncio
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from eunoe.api.v1 import long_context_pb2 as api
from eunoe.clients.state_store import StateStoreClient
from eunoe.embedded.redis_server import DURABLE_SETTINGS
from eunoe.internal.v1 import state_store_pb2 as pb
from eunoe.runtime.errors import Unavailable
from eunoe.runtime.grpc_channel import open_channel
from eunoe.state_store.redis_storage import RedisStorage
from eunoe.state_store.server_check import UnsafeRedisError, check_server


async def check(
    url: str, *, allow_unsafe: bool = False, num_replicas: int = 0, marker_file: Path | None = None
) -> None:
    storage = RedisStorage(url, num_replicas=num_replicas, wait_seconds=1.0)
    try:
        await check_server(storage, allow_unsafe=allow_unsafe, marker_file=marker_file)
    finally:
        await storage.close()


@pytest.fixture
def start_state_store(tmp_path: Path) -> Iterator:
    """Starts `python -m eunoe.state_store` with variables EUNOE_STATE_STORE_<name>; (process, address or None)."""
    processes = []

    def launch(ready_file: Path, **variables: str) -> subprocess.Popen[bytes]:
        settings = {"listen_address": "127.0.0.1:0", "ready_file": str(ready_file), **variables}
        environment = {f"EUNOE_STATE_STORE_{name.upper()}": value for name, value in settings.items()}
        services = str(Path(__file__).parents[2] / "services")
        processes.append(
            subprocess.Popen(
                [sys.executable, "-m", "eunoe.state_store"],
                env={**os.environ, **environment, "PYTHONPATH": services},
                stderr=subprocess.PIPE,
            )
        )
        return processes[-1]

    async def start(**variables: str) -> tuple[subprocess.Popen[bytes], str | None]:
        ready_file = tmp_path / f"ready{len(processes)}"
        process = launch(ready_file, **variables)
        while process.poll() is None:
            if ready_file.exists():
                return process, json.loads(ready_file.read_text())["address"]
            await asyncio.sleep(0.02)
        return process, None

    yield start
    for process in processes:
        process.kill()
        process.wait()
        process.stderr.close()


async def test_a_durable_redis_is_accepted(redis_server) -> None:
    await check(redis_server.url)


async def test_an_unsafe_setting_is_named_with_its_remedy(start_redis) -> None:
    url = start_redis("--appendonly", "yes", "--appendfsync", "everysec").url

    with pytest.raises(UnsafeRedisError, match=r"appendfsync 'everysec'.*CONFIG SET appendfsync always"):
        await check(url)
    await check(url, allow_unsafe=True)
    storage = RedisStorage(url)
    client = storage.client
    await client.config_set("appendfsync", "always")
    await client.config_set("maxmemory-policy", "allkeys-lru")
    with pytest.raises(UnsafeRedisError, match=r"maxmemory-policy 'allkeys-lru'.*noeviction"):
        await check(url)
    await client.config_set("maxmemory-policy", "noeviction")
    await client.config_set("appendonly", "no")
    with pytest.raises(UnsafeRedisError, match=r"appendonly 'no'.*CONFIG SET appendonly yes"):
        await check(url)
    await storage.close()


async def test_fewer_replicas_than_asked_for_are_refused(start_replicated_redis, redis_server) -> None:
    pair = start_replicated_redis()

    await check(pair.primary.url, num_replicas=1)
    with pytest.raises(UnsafeRedisError, match="0 replicas connected, num_replicas is 1: connect more"):
        await check(redis_server.url, num_replicas=1)
    with pytest.raises(UnsafeRedisError, match="is a replica"):
        await check(pair.replica.url, num_replicas=1)
    # It is connected still, and acknowledges nothing.
    pair.replica.pause()
    with pytest.raises(UnsafeRedisError, match="0 of 1 replicas acknowledged"):
        await check(pair.primary.url, num_replicas=1)
    await check(pair.primary.url, num_replicas=1, allow_unsafe=True)


async def test_a_redis_that_lost_the_data_is_refused(start_redis, tmp_path: Path) -> None:
    marker_file = tmp_path / "marker"
    redis = start_redis(*DURABLE_SETTINGS)
    await check(redis.url, marker_file=marker_file)
    redis.restart_after_kill()
    await check(redis.url, marker_file=marker_file)
    second_file = tmp_path / "marker of a second process"
    await check(redis.url, marker_file=second_file)

    assert second_file.read_text() == marker_file.read_text()
    assert sorted(tmp_path.iterdir()) == [marker_file, second_file]
    empty = start_redis(*DURABLE_SETTINGS)
    with pytest.raises(UnsafeRedisError, match=r"this Redis is empty.*delete the file to start anew"):
        await check(empty.url, marker_file=marker_file)
    await check(empty.url, marker_file=marker_file, allow_unsafe=True)
    await check(empty.url, marker_file=tmp_path / "other marker")
    with pytest.raises(UnsafeRedisError, match="this Redis is another one"):
        await check(empty.url, marker_file=marker_file)
    marker_file.unlink()
    await check(empty.url, marker_file=marker_file)


async def test_a_write_that_is_not_in_the_append_only_file_is_noticed(redis_server, monkeypatch) -> None:
    storage = RedisStorage(redis_server.url)
    info = storage.client.info
    sizes = []

    async def info_of_a_file_that_does_not_grow(*sections: str) -> dict:
        found = await info(*sections)
        sizes.append(found["aof_current_size"])
        return {**found, "aof_current_size": sizes[0]}

    monkeypatch.setattr(storage.client, "info", info_of_a_file_that_does_not_grow)
    with pytest.raises(UnsafeRedisError, match="is not in Redis's append-only file"):
        await check_server(storage, allow_unsafe=False)
    assert sizes[1] > sizes[0]
    await storage.close()


async def test_a_redis_that_is_not_there_is_unavailable(tmp_path: Path) -> None:
    with pytest.raises(Unavailable):
        await check(f"unix://{tmp_path}/nobody")


async def test_the_process_says_why_it_does_not_serve(start_state_store, start_redis) -> None:
    process, address = await start_state_store(redis_url=start_redis("--appendonly", "no").url)

    assert (address, process.returncode) == (None, 1)
    lines = process.stderr.read().decode()
    assert "appendonly 'no'" in lines
    assert "Traceback" not in lines


async def test_acknowledged_records_outlive_kills_of_store_and_redis(start_state_store, start_redis) -> None:
    redis = start_redis(*["--appendonly", "yes", "--appendfsync", "always", "--maxmemory-policy", "noeviction"])
    process, address = await start_state_store(redis_url=redis.url)
    name = "tenants/t/streams/a"
    settings = api.StreamSettings(kv_budget_tokens=64, segment_length=16)
    async with open_channel(address) as channel:
        client = StateStoreClient(channel)
        await client.create_stream(pb.CreateStreamRequest(name=name, model="m", settings=settings))
        for i in range(20):
            await client.append_record(pb.AppendRecordRequest(name=name, offset=3 * i, data=b"%03d" % i))
    process.kill()
    redis.restart_after_kill()

    process, address = await start_state_store(redis_url=redis.url)
    async with open_channel(address) as channel:
        pieces = [p.data async for p in StateStoreClient(channel).read_log(pb.ReadLogRequest(name=name))]
    process.send_signal(signal.SIGTERM)

    assert pieces == [b"%03d" % i for i in range(20)]
    assert process.wait(timeout=20) == 0


async def test_calls_go_on_after_redis_was_away(start_redis) -> None:
    redis = start_redis(*["--appendonly", "yes", "--appendfsync", "always", "--maxmemory-policy", "noeviction"])
    storage = RedisStorage(redis.url)
    await storage.load_function()
    redis.restart_after_kill()

    assert await storage.compare_and_swap("t", [], []) is None
    await storage.client.function_flush()
    assert await storage.compare_and_swap("t", [], []) is None
    await storage.close()
