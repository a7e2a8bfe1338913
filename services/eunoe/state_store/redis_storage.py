"""The database in production: Redis, one function, and nothing in it that decides.

redis-py repeats a command by itself after a lost connection: everything here can run twice.

With replicas, what is acknowledged is on `num_replicas` of them too. The proof is a fence: a write and WAIT on the
connection of the write or read that it is for, in one pipeline, because WAIT speaks for its own connection's writes
alone. Reads of records and values have a fence as well: whoever repeats a write whose WAIT fell short is answered
from what was read ("you have appended that already"), and that is an acknowledgement like any other.

WAITAOF is not used: it is absent before 7.2, and under `appendfsync everysec` Valkey answers it before the sync. A
primary with `appendfsync always` answers nothing before its sync, so WAIT's count is all that is missing.
"""

import asyncio
import logging
from collections.abc import Awaitable, Callable, Sequence
from typing import Any, TypeVar

from redis.asyncio.client import Pipeline
from redis.exceptions import ConnectionError as RedisConnectionError
from redis.exceptions import NoPermissionError, ReadOnlyError, RedisError, ResponseError
from redis.exceptions import TimeoutError as RedisTimeoutError

from eunoe.runtime.errors import EunoeError, Unavailable
from eunoe.state_store.redis_client import (
    RedisTls,
    close_blocking_client,
    close_client,
    open_blocking_client,
    open_client,
)
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
    Shorten,
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
_MAX_STAGING_CONNECTIONS = 8
# Replicas answer in a round trip; below the socket's timeout, so that the count comes and not a broken connection.
_WAIT_SECONDS = 2.0
# A message that nobody hears is a write to the replicas and not to the append-only file: a fence costs no sync.
_FENCE_CHANNEL = "eunoe:fence"
# Replies to one MGET of records stay far below what would stall the server's other clients.
_KEYS_PER_READ = 8


class RedisStorage:
    """`Storage` in the Redis at `url`.

    Args:
        url: As `StateStoreConfig.redis_url`.
        num_replicas: Replicas that have all that is acknowledged. Fewer within `wait_seconds`: Unavailable, as nobody
            knows then whether it lasts.
        wait_seconds: How long replicas may take.
        tls: Files for rediss:// and sentinels://.
        max_connections: Most at once; further calls queue.

    Attributes:
        client: For what is not the core's business: the checks at start.
        num_replicas: As given.
    """

    def __init__(
        self,
        url: str,
        *,
        num_replicas: int = 0,
        wait_seconds: float = _WAIT_SECONDS,
        tls: RedisTls | None = None,
        max_connections: int = 64,
    ) -> None:
        self.client = open_client(url, tls=tls, max_connections=max_connections)
        # For chunks of a MiB: asyncio's streams copy what they send several times, and take twice the processor time.
        self._blocking_client = open_blocking_client(url, tls=tls, max_connections=_MAX_STAGING_CONNECTIONS)
        self.num_replicas = num_replicas
        self._history = RedisHistory(self.client)
        self._wait_seconds = wait_seconds

    async def load_function(self) -> None:
        """Load the one function that swaps; harmless if it is there.

        Raises:
            Unavailable: Also if this user may not load it and nobody else has.
        """
        try:
            await self.client.function_load(FUNCTION_SOURCE, replace=True)
        except NoPermissionError as error:
            await self._find_function(error)
        except (RedisError, OSError) as error:
            raise _unavailable(error) from error

    async def _find_function(self, refusal: NoPermissionError) -> None:
        try:
            await self.client.fcall(FUNCTION_NAME, 0, "nothing to swap")
        except ResponseError as error:
            raise Unavailable(
                f"Redis has no function {FUNCTION_NAME}, and this user may not load it ({refusal}): load it as one who "
                "may, `python -m eunoe.state_store print-function | redis-cli -x FUNCTION LOAD REPLACE`"
            ) from error
        except (RedisError, OSError) as error:
            raise _unavailable(error) from error

    async def put(self, key: str, data: bytes, *, only_if_absent: bool = False) -> None:
        """Write a plain value that lasts; durable, on the replicas too, when it returns."""
        pipeline = self.client.pipeline(transaction=False).set(key, data, nx=only_if_absent)
        _reply((await self._fenced(pipeline))[0])

    async def read(self, keys: Sequence[str]) -> list[Versioned]:
        pipeline = self.client.pipeline(transaction=False)
        # By hand: redis-py's transactions take in all of a pipeline, and inside of one WAIT does not wait.
        pipeline.execute_command("MULTI")
        for key in keys:
            pipeline.hmget(key, ["version", "data"])
        pipeline.execute_command("EXEC")
        replies = await self._fenced(pipeline)
        rows = _reply(replies[len(keys) + 1])
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
        reply = (await self._fenced(self.client.pipeline(transaction=False).fcall(FUNCTION_NAME, *call)))[0]
        if isinstance(reply, ResponseError) and "Function not found" in str(reply):
            logger.warning("the function was gone from Redis; loading it again")
            await self.load_function()
            reply = (await self._fenced(self.client.pipeline(transaction=False).fcall(FUNCTION_NAME, *call)))[0]
        status, *place = _reply(reply)
        return None if status == b"done" else _REFUSALS[status](place[0].decode())

    async def apply(self, writes: Sequence[Write]) -> None:
        pipeline = self.client.pipeline(transaction=False)
        for write in writes:
            match write:
                case PutValue(key, data, ttl_ms):
                    pipeline.set(key, data, px=ttl_ms or None)
                case Shorten(key, ttl_ms):
                    pipeline.pexpire(key, ttl_ms, lt=True)
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
        # No fence: replicas apply writes in their order, so those that have the commit have its chunks.
        await self._guarded(asyncio.to_thread(pipeline.execute))

    async def get(self, keys: Sequence[str]) -> list[bytes | None]:
        values: list[bytes | None] = []
        for start in range(0, len(keys), _KEYS_PER_READ):
            pipeline = self.client.pipeline(transaction=False).mget(keys[start : start + _KEYS_PER_READ])
            values.extend(_reply((await self._fenced(pipeline))[0]))
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
        await close_client(self.client)
        close_blocking_client(self._blocking_client)

    async def _fenced(self, pipeline: Pipeline) -> list[Any]:
        """Replies to a pipeline, errors among them, once the replicas have all that it wrote or could see.

        Raises:
            Unavailable: Also if too few replicas have it.
        """
        if self.num_replicas:
            pipeline.publish(_FENCE_CHANNEL, "")
            pipeline.execute_command("WAIT", self.num_replicas, int(self._wait_seconds * 1000))
        replies: list[Any] = await self._guarded(pipeline.execute(raise_on_error=False))
        if not self.num_replicas:
            return replies
        *replies, _, num_acknowledged = replies
        if _reply(num_acknowledged) < self.num_replicas:
            raise Unavailable(
                f"{num_acknowledged} of {self.num_replicas} replicas acknowledged within {self._wait_seconds} s: "
                "what was written may last or not"
            )
        return replies

    async def _guarded(self, call: Awaitable[Result]) -> Result:
        """Await a call to Redis; what the caller can only wait for becomes Unavailable."""
        try:
            return await call
        except (TimeoutError, RedisError, OSError) as error:
            raise _unavailable(error) from error


def _reply(reply: Any) -> Any:
    """A reply out of a pipeline.

    Raises:
        Unavailable: If it is an error.
    """
    if isinstance(reply, Exception):
        raise _unavailable(reply) from reply
    return reply


def _text(member: bytes) -> str:
    # A damaged member may be no UTF-8: whoever looks up what it names then finds nothing, or other bytes.
    return member.decode(errors="replace")


def _unavailable(error: BaseException) -> EunoeError:
    if isinstance(error, (RedisConnectionError, RedisTimeoutError, ReadOnlyError, OSError, asyncio.TimeoutError)):
        return Unavailable(f"Redis cannot be reached: {error}")
    logger.error("Redis refused a command", extra={"error": str(error)})
    return Unavailable(f"Redis refused a command: {error}")
