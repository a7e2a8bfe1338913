"""Refuses a Redis that may lose what was acknowledged, or that has lost it already.

Checked at start: its version, that it is a primary, its settings, that a write reaches its append-only file and as
many replicas as are asked for, and that it is the Redis that the data marker names.

Not checked, because no client can: that the disk keeps what was synced; that the settings stay as they are; that
replicas sync what they acknowledge (give them the same settings).
"""

import logging
import os
import secrets
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

from redis.exceptions import RedisError, ResponseError

from eunoe.runtime.errors import Unavailable
from eunoe.state_store.redis_storage import RedisStorage

logger = logging.getLogger(__name__)

_REQUIRED = {
    "appendonly": "yes",
    # Under any other, writes are acknowledged before they are on disk.
    "appendfsync": "always",
    "no-appendfsync-on-rewrite": "no",
    # Under any other, staged chunks may vanish before their commit.
    "maxmemory-policy": "noeviction",
}
_OLDEST_VERSION = (7, 0)
_SELF_TEST_KEY = "eunoe:self-test"
_INSTALLATION_KEY = "eunoe:installation"


class UnsafeRedisError(Exception):
    """Redis may lose acknowledged writes, or has lost them; the message names the reason and the remedy."""


async def check_server(storage: RedisStorage, *, allow_unsafe: bool, marker_file: Path | None = None) -> None:
    """Check the server and load the function into it.

    Args:
        storage: Connected to the server.
        allow_unsafe: Warn of what is unsafe instead of refusing it.
        marker_file: As `StateStoreConfig.data_marker_file`.

    Raises:
        UnsafeRedisError: If it is unsafe and that is not allowed, or the server is too old, or a replica.
        Unavailable: If it cannot be reached or does not keep what is written.
    """
    client = storage.client
    try:
        info = await client.info()
        version = str(info["redis_version"])
        if tuple(int(part) for part in version.split(".")[:2]) < _OLDEST_VERSION:
            raise UnsafeRedisError(f"Redis {version} has no functions: version 7.0 or later is needed")
        if info.get("role") != "master":
            raise UnsafeRedisError("this Redis is a replica: point redis_url at its master")
        async for problem in _problems(storage, info, marker_file):
            if not allow_unsafe:
                raise UnsafeRedisError(f"{problem} (or set allow_unsafe_redis=true and accept lost data)")
            logger.warning("serving from an unsafe Redis", extra={"problem": problem})
    except (RedisError, OSError) as error:
        raise Unavailable(f"Redis cannot be reached: {error}") from error
    await storage.load_function()
    logger.info("Redis passed the checks", extra={"redis_version": version})


async def _problems(storage: RedisStorage, info: dict[str, Any], marker_file: Path | None) -> AsyncIterator[str]:
    """What is unsafe, each with its remedy."""
    try:
        found = await storage.client.config_get(*_REQUIRED, "min-replicas-to-write")
    except ResponseError as error:
        yield f"Redis does not tell its settings ({error}): allow this user `CONFIG GET`"
    else:
        settings = {_text(name): _text(value) for name, value in found.items()}
        for name, wanted in _REQUIRED.items():
            if settings.get(name) != wanted:
                yield (
                    f"Redis has {name} {settings.get(name, 'unknown')!r}, which may lose acknowledged data: "
                    f"run `CONFIG SET {name} {wanted}` and put `{name} {wanted}` into redis.conf"
                )
        if int(settings.get("min-replicas-to-write", 0)) < storage.num_replicas:
            # No danger: WAIT decides. But a primary cut off from its replicas then fails at once, not after a wait.
            logger.warning(
                "advice: set min-replicas-to-write in Redis to num_replicas",
                extra={"num_replicas": storage.num_replicas},
            )
    if info["connected_slaves"] < storage.num_replicas:
        yield f"Redis has {info['connected_slaves']} replicas connected, {_remedy(storage)}"
    else:
        async for problem in _self_test(storage, info):
            yield problem
    if marker_file is not None:
        async for problem in _compare_marker(storage, marker_file):
            yield problem


async def _self_test(storage: RedisStorage, before: dict[str, Any]) -> AsyncIterator[str]:
    """Write and look for the write: in Redis, in as many replicas as are asked for, in the append-only file."""
    token = secrets.token_hex(16)
    try:
        await storage.put(_SELF_TEST_KEY, token.encode())
    except Unavailable as error:
        if not storage.num_replicas:
            raise
        yield f"a write did not get through ({error}), {_remedy(storage)}"
        return
    if await storage.client.get(_SELF_TEST_KEY) != token.encode():
        raise Unavailable("Redis does not give back what was written to it")
    after = await storage.client.info("persistence")
    # A failed sync shows here; Redis stops rather than lie about it.
    if (status := after.get("aof_last_write_status", "ok")) != "ok":
        yield f"Redis could not write its append-only file, aof_last_write_status is {status}: see its log and its disk"
    if before.get("aof_enabled") and after.get("aof_enabled"):
        # Not ">": a rewrite may have ended in between.
        if after["aof_current_size"] == before["aof_current_size"]:
            yield "an acknowledged write is not in Redis's append-only file: see its log and its disk"
        if after.get("aof_pending_bio_fsync", 0):
            yield "Redis syncs in the background, after it acknowledged: run `CONFIG SET appendfsync always`"


async def _compare_marker(storage: RedisStorage, marker_file: Path) -> AsyncIterator[str]:
    """Compare the id in Redis with the one in the file; make what is not there yet of the one that is."""
    in_file = _read(marker_file)
    if in_file is None:
        # Redis first: after a crash in between, the next start takes up the id from there. So does a second process.
        await storage.put(_INSTALLATION_KEY, secrets.token_hex(16).encode(), only_if_absent=True)
    in_redis = _text(await storage.client.get(_INSTALLATION_KEY) or b"")
    if in_file is None:
        _write_durably(marker_file, in_redis)
    elif in_file != in_redis:
        yield (
            f"this Redis is {'another one' if in_redis else 'empty'}, not the one that has this installation's data "
            f"(id {in_file} in {marker_file}): restore that one, or delete the file to start anew"
        )


def _read(path: Path) -> str | None:
    return path.read_text().strip() if path.exists() else None


def _write_durably(path: Path, text: str) -> None:
    """A file that is there whole after a crash, or not at all."""
    unfinished = path.with_name(f"{path.name}.{secrets.token_hex(4)}")
    with unfinished.open("w") as file:
        file.write(text + "\n")
        file.flush()
        os.fsync(file.fileno())
    unfinished.replace(path)
    directory = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(directory)
    finally:
        os.close(directory)


def _remedy(storage: RedisStorage) -> str:
    return f"num_replicas is {storage.num_replicas}: connect more (`REPLICAOF` there), or lower num_replicas"


def _text(value: bytes | str) -> str:
    return value.decode() if isinstance(value, bytes) else value
