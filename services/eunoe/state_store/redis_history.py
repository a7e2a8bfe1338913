"""What a Redis keeps on disk of values that are gone: how to be rid of it.

A removed value stays in the append-only file until that is rewritten, and in the last snapshot until the next one.
Counters that Redis raises as a child starts tell whether one began after the values were removed; one that was
running already may have begun before.
"""

import asyncio
import time
from typing import Any, NamedTuple

import redis.asyncio as redis
from redis.exceptions import ResponseError

from eunoe.runtime.errors import Unavailable

# A rewrite takes some seconds for each GB in memory.
_LONGEST_WAIT_SECONDS = 600.0
# Redis looks for a child's end ten times a second.
_FIRST_PAUSE_SECONDS, _LONGEST_PAUSE_SECONDS = 0.02, 0.2


class _Job(NamedTuple):
    """A command that writes a file anew, and where INFO tells of it."""

    command: tuple[str, ...]
    num_started: str
    is_running: str
    status: str


_REWRITE = _Job(("BGREWRITEAOF",), "aof_rewrites", "aof_rewrite_in_progress", "aof_last_bgrewrite_status")
_SNAPSHOT = _Job(("BGSAVE", "SCHEDULE"), "rdb_saves", "rdb_bgsave_in_progress", "rdb_last_bgsave_status")


class RedisHistory:
    """The files behind one Redis."""

    def __init__(self, client: redis.Redis) -> None:
        self._client = client
        self._running: asyncio.Task[None] | None = None
        self._next: asyncio.Task[None] | None = None

    async def erase(self) -> None:
        """Return when nothing that was removed before the call is left in the server's files.

        One rewrite serves all who wait for it to begin. Files of replicas and backups are not this server's.

        Raises:
            Unavailable: If Redis fails to write its files, keeps old ones, restarts, or takes too long.
            RedisError: If it cannot be reached or does not allow it.
        """
        if self._next is None:
            self._next = asyncio.create_task(self._round(self._running))
            # Everybody who waited for it may have been cancelled.
            self._next.add_done_callback(lambda task: task.cancelled() or task.exception())
        await asyncio.shield(self._next)

    async def _round(self, before: asyncio.Task[None] | None) -> None:
        if before is not None:
            await asyncio.wait([before])
        # Who comes from here on may have removed something that this round does not see.
        self._running, self._next = self._next, None
        info = await self._client.info()
        settings = await self._client.config_get("save", "aof-disable-auto-gc")
        named = {_text(name): _text(value) for name, value in settings.items()}
        if named.get("aof-disable-auto-gc") == "yes":
            raise Unavailable("Redis keeps old append-only files: run `CONFIG SET aof-disable-auto-gc no`")
        if info["aof_enabled"]:
            await self._written_anew(_REWRITE, info)
        # One that an earlier life of the server left behind is not seen here.
        if named.get("save") or info["rdb_saves"]:
            await self._written_anew(_SNAPSHOT, info)

    async def _written_anew(self, job: _Job, before: dict[str, Any]) -> None:
        """Wait for a run of the job that started after `before` was read."""
        give_up_at = time.monotonic() + _LONGEST_WAIT_SECONDS
        pause_seconds = _FIRST_PAUSE_SECONDS
        while time.monotonic() < give_up_at:
            info = await self._client.info()
            if info["run_id"] != before["run_id"]:
                raise Unavailable("Redis was restarted while it wrote its files anew")
            if not info[job.is_running]:
                if info[job.num_started] > before[job.num_started]:
                    if info[job.status] != "ok":
                        raise Unavailable(f"Redis could not write its files anew: {job.status} is {info[job.status]}")
                    return
                await self._start(job)
            await asyncio.sleep(pause_seconds)
            pause_seconds = min(2 * pause_seconds, _LONGEST_PAUSE_SECONDS)
        raise Unavailable(f"Redis has not written its files anew within {_LONGEST_WAIT_SECONDS} s")

    async def _start(self, job: _Job) -> None:
        try:
            await self._client.execute_command(*job.command)
        except ResponseError as error:
            # Another's began in this moment: look again.
            if "progress" not in str(error):
                raise


def _text(value: bytes | str) -> str:
    return value.decode() if isinstance(value, bytes) else value
