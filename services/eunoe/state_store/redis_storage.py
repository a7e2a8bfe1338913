"""The database in production: Redis, one function, and nothing in it that decides.

redis-py repeats a command by itself after a lost connection: everything here can run twice.
"""

import asyncio
import logging
from collections.abc import Awaitable, Callable, Sequence
from typing import Any, TypeVar

import redis as blocking_redis
import redis.asyncio as redis
from redis.asyncio.retry import Retry
from redis.backoff import ExponentialBackoff
from redis.exceptions import ConnectionError as RedisConnectionError
from redis.exceptions import ReadOnlyError, RedisError, ResponseError
from redis.exceptions import TimeoutError as RedisTimeoutError
from redis.retry import Retry as BlockingRetry

from eunoe.runtime.errors import EunoeError, Unavailable
from eunoe.state_store.redis_history import RedisHistory
from eunoe.state_store.storage import (
    AddTotal,
    BuryRecord,
    Conflict,
    Delete,
    Expectation,
    ExpectRoom,
    ExpectStaged,
    ExpectVersion,
    IndexAdd,
    IndexRemove,
    NoRoom,
    NotStaged,
    Persist,
    PutRecord,
    PutValue,
    Refusal,
    Versioned,
    Write,
)

logger = logging.getLogger(__name__)

Result = TypeVar("Result")

# The number is part of the name: a newer version beside this one loads its own.
FUNCTION_NAME = "eunoe_swap_1"
FUNCTION_SOURCE = """#!lua name=eunoe_1
-- Compares, then writes: all of it or nothing. Operation i has key i, a code, and as many arguments as `arity` says.
local arity = {version = 1, staged = 1, room = 3, record = 1, bury = 1, value = 2, persist = 0, delete = 0, add = 2,
               remove = 1, total = 2}
local write = {
  record = function(key, token, data)
    redis.call('HSET', key, 'version', token, 'data', data)
    redis.call('PERSIST', key)
  end,
  bury = function(key, token, ttl)
    redis.call('HSET', key, 'version', token, 'data', '')
    redis.call('PEXPIRE', key, ttl)
  end,
  value = function(key, _, data, ttl)
    if ttl == '0' then redis.call('SET', key, data) else redis.call('SET', key, data, 'PX', ttl) end
  end,
  persist = function(key) redis.call('PERSIST', key) end,
  delete = function(key) redis.call('UNLINK', key) end,
  add = function(key, _, score, member) redis.call('ZADD', key, score, member) end,
  remove = function(key, _, member) redis.call('ZREM', key, member) end,
  total = function(key, _, name, delta) redis.call('HINCRBY', key, name, delta) end,
}
redis.register_function('eunoe_swap_1', function(keys, args)
  local token, plan, place, refusal = args[1], {}, 2, nil
  for i, key in ipairs(keys) do
    local code = args[place]
    local a, b, c = unpack(args, place + 1, place + arity[code])
    plan[i] = {code, key, a, b, c}
    place = place + 1 + arity[code]
    if code == 'version' then
      local version = redis.call('HGET', key, 'version') or ''
      if version == token then return {'done'} end
      if version ~= a then refusal = refusal or {'conflict', key} end
    elseif code == 'staged' then
      local is_staged = redis.call('STRLEN', key) == tonumber(a) and redis.call('PTTL', key) >= 0
      if not is_staged then refusal = refusal or {'not_staged', key} end
    elseif code == 'room' then
      local total = tonumber(redis.call('HGET', key, a) or 0)
      if total + tonumber(b) > tonumber(c) then refusal = refusal or {'no_room', a} end
    end
  end
  if refusal then return refusal end
  for _, operation in ipairs(plan) do
    local code, key, a, b = unpack(operation)
    if write[code] then write[code](key, token, a, b) end
  end
  return {'done'}
end)
"""

_CODES: dict[type, str] = {
    ExpectVersion: "version",
    ExpectStaged: "staged",
    ExpectRoom: "room",
    PutRecord: "record",
    BuryRecord: "bury",
    PutValue: "value",
    Persist: "persist",
    Delete: "delete",
    IndexAdd: "add",
    IndexRemove: "remove",
    AddTotal: "total",
}
_REFUSALS: dict[bytes, Callable[[str], Refusal]] = {
    b"conflict": Conflict,
    b"not_staged": NotStaged,
    b"no_room": NoRoom,
}
_NUM_RETRIES = 3
_SOCKET_TIMEOUT_SECONDS = 5.0
_MAX_STAGING_CONNECTIONS = 8
# How long replicas may take: less than the socket's time, or the answer would never be heard.
_REPLICA_MS = 2_000
_REPLICATION_PROBE = "eunoe:replication-probe"
# Replies to one MGET of records stay far below what would stall the server's other clients.
_KEYS_PER_READ = 8


class RedisStorage:
    """`Storage` in the Redis at `url`.

    Args:
        url: As StateStoreConfig.redis_url.
        num_replicas: How many replicas must have a swap before it counts as done.
        max_connections: Calls at once.
    """

    def __init__(self, url: str, *, num_replicas: int = 0, max_connections: int = 64) -> None:
        self._num_replicas = num_replicas
        pool = redis.BlockingConnectionPool.from_url(
            url,
            max_connections=max_connections,
            timeout=_SOCKET_TIMEOUT_SECONDS,
            socket_timeout=_SOCKET_TIMEOUT_SECONDS,
            socket_connect_timeout=_SOCKET_TIMEOUT_SECONDS,
            retry=Retry(ExponentialBackoff(cap=0.5, base=0.02), _NUM_RETRIES),
        )
        self.client = redis.Redis(connection_pool=pool)
        # For chunks of a MiB: asyncio's streams copy what they send several times, and take twice the processor time.
        blocking_pool = blocking_redis.BlockingConnectionPool.from_url(
            url,
            max_connections=_MAX_STAGING_CONNECTIONS,
            timeout=_SOCKET_TIMEOUT_SECONDS,
            socket_timeout=_SOCKET_TIMEOUT_SECONDS,
            socket_connect_timeout=_SOCKET_TIMEOUT_SECONDS,
            retry=BlockingRetry(ExponentialBackoff(cap=0.5, base=0.02), _NUM_RETRIES),
        )
        self._blocking_client = blocking_redis.Redis(connection_pool=blocking_pool)
        self._history = RedisHistory(self.client)

    async def load_function(self) -> None:
        """Load the one function that swaps; harmless if it is there."""
        await self._guarded(self.client.function_load(FUNCTION_SOURCE, replace=True))

    async def read(self, keys: Sequence[str]) -> list[Versioned]:
        pipeline = self.client.pipeline(transaction=len(keys) > 1)
        for key in keys:
            pipeline.hmget(key, "version", "data")
        rows = await self._guarded(pipeline.execute())
        return [Versioned("", b"") if version is None else Versioned(version.decode(), data) for version, data in rows]

    async def compare_and_swap(
        self, token: str, expectations: Sequence[Expectation], writes: Sequence[Write]
    ) -> Refusal | None:
        operations = [*expectations, *writes]
        arguments: list[Any] = [token]
        for operation in operations:
            arguments.append(_CODES[type(operation)])
            arguments.extend(operation[1:])
        call = [len(operations), *(operation.key for operation in operations), *arguments]
        try:
            reply = await self._guarded(self._swap(call), passes=ResponseError)
        except ResponseError as error:
            if "Function not found" not in str(error):
                raise _unavailable(error) from error
            logger.warning("the function was gone from Redis; loading it again")
            await self.load_function()
            reply = await self._guarded(self._swap(call))
        if reply[0] == b"done":
            return None
        return _REFUSALS[reply[0]](reply[1].decode())

    async def check_replicas(self) -> None:
        """Write something, and wait for the replicas.

        Raises:
            Unavailable: If fewer have it than must.
        """
        pipeline = self.client.pipeline(transaction=False)
        await self._guarded(self._replicated(pipeline))

    async def _swap(self, call: Sequence[Any]) -> list[bytes]:
        pipeline = self.client.pipeline(transaction=False)
        pipeline.fcall(FUNCTION_NAME, *call)
        reply: list[bytes] = (await self._replicated(pipeline))[0]
        return reply

    async def _replicated(self, pipeline: Any) -> list[Any]:
        """The pipeline's replies, once enough replicas have all that it wrote, and all that was written before.

        WAIT, not WAITAOF: that one is absent before Redis 7.2, and Valkey answers it before the sync under everysec.
        """
        if self._num_replicas:
            # By its documentation WAIT is about the connection's own writes, and a swap that is repeated on another
            # connection writes none, as it was done before: this write stands for it.
            pipeline.set(_REPLICATION_PROBE, b"", px=_REPLICA_MS)
            pipeline.execute_command("WAIT", self._num_replicas, _REPLICA_MS)
        replies: list[Any] = await pipeline.execute()
        if self._num_replicas and replies[-1] < self._num_replicas:
            raise Unavailable(f"only {replies[-1]} of {self._num_replicas} replicas have the write: it may be lost")
        return replies

    async def apply(self, writes: Sequence[Write]) -> None:
        pipeline = self.client.pipeline(transaction=False)
        for write in writes:
            match write:
                case PutValue(key, data, ttl_ms):
                    pipeline.set(key, data, px=ttl_ms or None)
                case Delete(key):
                    pipeline.unlink(key)
                case IndexAdd(key, score, member):
                    pipeline.zadd(key, {member: score})
                case IndexRemove(key, member):
                    pipeline.zrem(key, member)
                case _:
                    raise AssertionError(f"{type(write).__name__} needs a swap")
        await self._guarded(pipeline.execute())

    async def stage(self, values: Sequence[tuple[str, bytes]], ttl_ms: int) -> None:
        pipeline = self._blocking_client.pipeline(transaction=False)
        for key, data in values:
            # NX and XX: a command that comes late, after the commit, must neither change a chunk nor give it a TTL.
            pipeline.set(key, data, px=ttl_ms, nx=True)
            pipeline.pexpire(key, ttl_ms, xx=True)
        await self._guarded(asyncio.to_thread(pipeline.execute))

    async def get(self, keys: Sequence[str]) -> list[bytes | None]:
        values: list[bytes | None] = []
        for start in range(0, len(keys), _KEYS_PER_READ):
            values.extend(await self._guarded(self.client.mget(keys[start : start + _KEYS_PER_READ])))
        return values

    async def totals(self, key: str) -> dict[str, int]:
        fields = await self._guarded(self.client.hgetall(key))
        return {name.decode(): int(value) for name, value in fields.items()}

    async def members_after(self, key: str, after: str, limit: int) -> list[str]:
        lowest = f"({after}" if after else "-"
        members = await self._guarded(self.client.zrangebylex(key, lowest, "+", start=0, num=limit))
        return [_text(member) for member in members]

    async def members_by_score(self, key: str, above: int, up_to: int | None, limit: int) -> list[tuple[str, int]]:
        highest = "+inf" if up_to is None else up_to
        rows = await self._guarded(
            self.client.zrangebyscore(key, f"({above}", highest, start=0, num=limit, withscores=True)
        )
        return [(_text(row[0]), int(row[1])) for row in rows]

    async def highest_members(self, key: str, at_least: int, limit: int) -> list[tuple[str, int]]:
        rows = await self._guarded(
            self.client.zrevrangebyscore(key, "+inf", at_least, start=0, num=limit, withscores=True)
        )
        return [(_text(row[0]), int(row[1])) for row in rows]

    async def erase_history(self) -> None:
        await self._guarded(self._history.erase())

    async def close(self) -> None:
        await self.client.aclose()
        await self.client.connection_pool.disconnect()
        self._blocking_client.close()
        self._blocking_client.connection_pool.disconnect()

    async def _guarded(self, call: Awaitable[Result], *, passes: type[Exception] | tuple[()] = ()) -> Result:
        """Await a call to Redis; what the caller can only wait for becomes Unavailable."""
        try:
            return await call
        except passes:
            raise
        except (TimeoutError, RedisError, OSError) as error:
            raise _unavailable(error) from error


def _text(member: bytes) -> str:
    # A damaged member may be no UTF-8: whoever looks up what it names then finds nothing, or other bytes.
    return member.decode(errors="replace")


def _unavailable(error: BaseException) -> EunoeError:
    if isinstance(error, (RedisConnectionError, RedisTimeoutError, ReadOnlyError, OSError, asyncio.TimeoutError)):
        return Unavailable(f"Redis cannot be reached: {error}")
    logger.error("Redis refused a command", extra={"error": str(error)})
    return Unavailable(f"Redis refused a command: {error}")
