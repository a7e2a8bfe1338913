"""Refuses a Redis that may lose what was acknowledged.

Under any `appendfsync` but `always`, Redis acknowledges writes before they are on disk; without `noeviction`, it may
drop staged chunks; and a command named WAITAOF has been seen to answer before the sync. So the settings are read, and
a write is made and read back, before anything is served.
"""

import asyncio
import logging
import os
import secrets
from pathlib import Path

from redis.exceptions import RedisError, ResponseError

from eunoe.runtime.errors import Unavailable
from eunoe.state_store.redis_storage import RedisStorage

logger = logging.getLogger(__name__)

_REQUIRED = {"appendonly": "yes", "appendfsync": "always", "maxmemory-policy": "noeviction"}
_OLDEST_VERSION = (7, 0)
_SELF_TEST_KEY = "eunoe:self-test"
_DATA_ID_KEY = "eunoe:data-id"


class UnsafeRedisError(Exception):
    """Redis is set up so that it may lose acknowledged writes; the message names the setting and the remedy."""


async def check_server(storage: RedisStorage, *, allow_unsafe: bool, marker_file: Path | None = None) -> None:
    """Check the server and load the function into it.

    Args:
        storage: Connected to the server.
        allow_unsafe: Warn about unsafe settings instead of refusing them.
        marker_file: Names the data that this store has served from before; made at the first start.

    Raises:
        UnsafeRedisError: If a setting is unsafe and that is not allowed, the server is too old, or it does not have the
            data that the marker names: a primary that was reborn empty looks like a new one.
        Unavailable: If it cannot be reached, does not keep what is written, or has too few replicas.
    """
    client = storage.client
    try:
        info = await client.info()
        version = str(info["redis_version"])
        if tuple(int(part) for part in version.split(".")[:2]) < _OLDEST_VERSION:
            raise UnsafeRedisError(f"Redis {version} has no functions: version 7.0 or later is needed")
        if info.get("role") != "master":
            raise UnsafeRedisError("this Redis is a replica: point redis_url at its master")
        for problem in await _problems(storage):
            if not allow_unsafe:
                raise UnsafeRedisError(f"{problem} (or set allow_unsafe_redis=true and accept lost data)")
            logger.warning("serving from an unsafe Redis", extra={"problem": problem})
        token = secrets.token_hex(16)
        await client.set(_SELF_TEST_KEY, token)
        if await client.get(_SELF_TEST_KEY) != token.encode():
            raise Unavailable("Redis does not give back what was written to it")
        # A failed sync shows here under the settings above; Redis stops rather than lie about it.
        status = (await client.info("persistence")).get("aof_last_write_status", "ok")
        if status != "ok" and not allow_unsafe:
            raise UnsafeRedisError(f"Redis could not write its append-only file: aof_last_write_status is {status}")
    except (RedisError, OSError) as error:
        raise Unavailable(f"Redis cannot be reached: {error}") from error
    await storage.load_function()
    await storage.check_replicas()
    if marker_file is not None:
        await _check_marker(storage, marker_file)
    logger.info("Redis is safe to serve from", extra={"redis_version": version})


async def _check_marker(storage: RedisStorage, marker_file: Path) -> None:
    known = await asyncio.to_thread(_read_marker, marker_file)
    if not known:
        # Of several stores that start on new data one names it.
        await storage.client.set(_DATA_ID_KEY, secrets.token_hex(16), nx=True)
    found = _text(await storage.client.get(_DATA_ID_KEY) or b"")
    if known and known != found:
        raise UnsafeRedisError(
            f"this Redis has {'other data' if found else 'lost the data'}: {marker_file} names what it must have. "
            "Restore that, or remove that file to start anew"
        )
    if not known:
        await asyncio.to_thread(_write_marker, marker_file, found)


def _read_marker(path: Path) -> str:
    return path.read_text().strip() if path.exists() else ""


def _write_marker(path: Path, data_id: str) -> None:
    partial = path.with_name(f"{path.name}.{os.getpid()}")
    partial.write_text(data_id)
    partial.replace(path)


async def _problems(storage: RedisStorage) -> list[str]:
    """Each unsafe setting with its remedy."""
    try:
        found = await storage.client.config_get(*_REQUIRED, "no-appendfsync-on-rewrite")
    except ResponseError as error:
        return [f"Redis does not tell its settings ({error}): allow this user `CONFIG GET`"]
    settings = {_text(name): _text(value) for name, value in found.items()}
    return [
        f"Redis has {name} {settings.get(name, 'unknown')!r}, which may lose acknowledged data: "
        f"run `CONFIG SET {name} {wanted}` and put `{name} {wanted}` into redis.conf"
        for name, wanted in {**_REQUIRED, "no-appendfsync-on-rewrite": "no"}.items()
        if settings.get(name) != wanted
    ]


def _text(value: bytes | str) -> str:
    return value.decode() if isinstance(value, bytes) else value
