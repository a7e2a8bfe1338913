"""Damage in the database: each value that has a part in an answer is damaged, and none of that may be served.

A bit is flipped, a value is cut short, extended, gone, or an older version of itself. The readers are those who would
be served: somebody who has seen the stream's newest record, its worker, and the holders of API keys.
"""

import contextlib
import random
import time
import uuid
from collections import Counter
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, replace

import redis.asyncio as redis
import xxhash

from eunoe.decoder import state_codec
from eunoe.decoder.decoder import Decoder
from eunoe.decoder.memory_state import MemorySettings
from eunoe.eviction import DEFAULT_POLICY
from eunoe.runtime.errors import EunoeError, LeaseLost, StateLost, StreamNotFound, Unauthenticated
from eunoe.state_store import checkpoint_rules, keys
from eunoe.state_store.chains import LogMark
from eunoe.state_store.config import StateStoreConfig
from eunoe.state_store.log_rules import Append
from eunoe.state_store.metadata import ChunkRef, Lease, Manifest, Settings, StreamMetadata
from eunoe.state_store.redis_storage import RedisStorage
from eunoe.state_store.sealing import Keyring
from eunoe.state_store.store import StateStore
from eunoe.state_store.stream_rules import Create
from eunoe.state_store.transactions import Environment

SETTINGS = MemorySettings(kv_budget_tokens=64, segment_length=16, num_sink_tokens=4)
NUM_RECORDS = 12


DAMAGES = ("flip", "cut", "extended", "missing", "older")
# What the reader may be told instead of CORRUPT_STATE: there is nothing, which is so, or a worker's lease is not known.
_ALSO_NOTICED: dict[tuple[str, str], type[EunoeError]] = {
    ("missing", "metadata"): StreamNotFound,
    ("missing", "API key"): Unauthenticated,
    ("older", "metadata"): LeaseLost,
}


@dataclass(frozen=True, slots=True, kw_only=True)
class DamageFigures:
    """What became of the damage.

    Attributes:
        num_by_damage: How often of each kind.
        num_by_value: The same by kind of value.
        silent: (kind of damage, kind of value) of each that was served as if nothing had been, or mistaken.
    """

    num_by_damage: dict[str, int]
    num_by_value: dict[str, int]
    silent: tuple[tuple[str, str], ...]
    seconds: float


@dataclass(frozen=True, slots=True)
class _Stream:
    """A stream with a log and a checkpoint of a real memory state, two API keys, and all that reading them must give.

    Attributes:
        seen: Newest mark of the log that somebody has seen.
        lease: Of the worker that committed `manifest`.
        secrets: Of API keys, each of a tenant of its own.
        older: Versions that values had before, by key.
    """

    store: StateStore
    decoder: Decoder
    name: str
    manifest: Manifest
    seen: LogMark
    lease: Lease
    secrets: tuple[str, ...]
    older: dict[bytes, list[bytes]]

    async def read(self) -> tuple[object, ...]:
        """Everything that is served: the tenants of the keys, the stream's record, its log, its decoded memory state.

        Raises:
            EunoeError: Whatever a reader, or the worker, is told instead.
        """
        tenants = [await self.store.api_keys.authenticate(secret) for secret in self.secrets]
        for secret in self.secrets:
            with contextlib.suppress(Unauthenticated):
                tenants.append(await self.store.api_keys.authenticate(secret[:-1] + "-"))
        metadata = await self.store.streams.get(self.name)
        await self.store.logs.check_seen(metadata, self.seen)
        self._check_commit(metadata)
        pieces = [(p.offset, p.data, p.kind, p.chain) async for p in self.store.logs.read(self.name, 0, 0)]
        chunks = [data async for _, data in self.store.checkpoints.read(self.name, self.manifest.chunks)]
        state = state_codec.decode(chunks, self.decoder.config, SETTINGS, self.decoder.dtypes)
        digest = state_codec.state_digest(state, self.manifest.applied_offset, 0)
        outcome = await self.store.logs.outcome(self.name, "request")
        return tenants, metadata, tuple(pieces), digest, outcome

    def _check_commit(self, metadata: StreamMetadata) -> None:
        """What the store would say to the worker's next checkpoint."""
        following = replace(self.manifest, version=self.manifest.version + 1)
        checkpoint_rules.commit(metadata, following, self.lease.fence, parent_chain=self.manifest.chain)


async def damage_sweep(
    decoder: Decoder,
    redis_url: str,
    *,
    num_tries: int,
    seed: int,
    is_encrypted: bool,
    damages: Sequence[str] = DAMAGES,
) -> DamageFigures:
    """Damage one random stored value, read everything, put it back; again and again.

    Args:
        decoder: Of a tiny model.
        redis_url: A Redis of the caller's.
        num_tries: How often.
        seed: Of the choices.
        is_encrypted: Whether the stream's values are encrypted.
        damages: Some of DAMAGES.
    """
    start, chance = time.monotonic(), random.Random(seed)
    storage = RedisStorage(redis_url)
    await storage.load_function()
    by_damage: Counter[str] = Counter()
    by_value: Counter[str] = Counter()
    silent: list[tuple[str, str]] = []
    try:
        stream = await _made(storage, decoder, chance, Keyring(bytes(32) if is_encrypted else None))
        expected = await stream.read()
        places = await _places(storage.client, stream)
        for _ in range(num_tries):
            damage = chance.choice(damages)
            place = chance.choice([place for place in places if _can_be(damage, place)])
            by_damage[damage] += 1
            by_value[place.kind] += 1
            if not await _is_noticed(storage.client, stream, damage, place, chance):
                silent.append((damage, place.kind))
        assert await stream.read() == expected, "the sweep has not put everything back"
    finally:
        await storage.close()
    return DamageFigures(
        num_by_damage=dict(by_damage),
        num_by_value=dict(by_value),
        silent=tuple(silent),
        seconds=time.monotonic() - start,
    )


@dataclass(frozen=True, slots=True)
class _Place:
    """A stored value: at a key, in a hash's field, or a member of an index (`score` is then its own)."""

    kind: str
    key: bytes
    value: bytes
    score: float | None = None
    older: Sequence[bytes] = ()


async def _places(client: redis.Redis, stream: _Stream) -> list[_Place]:
    places = []
    async for key in client.scan_iter(f"eunoe:{{{stream.name.split('/')[1]}}}:*"):
        # eunoe:{tenant}:KIND...
        kind = key.decode().split(":")[2]
        match await client.type(key):
            case b"string":
                places.append(_Place(kind, key, await client.get(key)))
            case b"hash" if kind == "stream":
                places.append(_Place("metadata", key, await client.hget(key, "data"), older=stream.older[key]))
            case b"zset" if kind == "log":
                rows = await client.zrange(key, 0, -1, withscores=True)
                places += [_Place("log index", key, member, score) for member, score in rows]
    for secret in stream.secrets:
        key = keys.api_key(secret.split("_")[1]).encode()
        places.append(_Place("API key", key, await client.hget(key, "data")))
    return places


def _can_be(damage: str, place: _Place) -> bool:
    if damage == "missing":
        # An outcome goes after some minutes by itself.
        return place.kind != "outcome"
    return damage != "older" or bool(place.older)


def _damaged(damage: str, place: _Place, chance: random.Random) -> bytes | None:
    """The value as it is found; None is gone."""
    match damage:
        case "flip":
            flipped = bytearray(place.value)
            flipped[chance.randrange(len(flipped))] ^= 1 << chance.randrange(8)
            return bytes(flipped)
        case "cut":
            return place.value[: chance.randrange(1, len(place.value))]
        case "extended":
            return place.value + chance.randbytes(chance.randint(1, 64))
        case "older":
            return chance.choice(place.older)
        case _:
            return None


async def _is_noticed(client: redis.Redis, stream: _Stream, damage: str, place: _Place, chance: random.Random) -> bool:
    # A damaged chunk also puts a mark of quarantine into the stream's record.
    touched = {place.key, keys.live_stream(stream.name).encode()}
    saved = [(key, max(await client.pttl(key), 0), await client.dump(key)) for key in touched]
    await _replace(client, place, _damaged(damage, place, chance))
    try:
        await stream.read()
    except StateLost:
        return True
    except EunoeError as error:
        # Typed, but mostly not as damage: the reader would look for the fault elsewhere.
        return isinstance(error, _ALSO_NOTICED.get((damage, place.kind), ()))
    finally:
        for key, ttl_ms, value in saved:
            await client.restore(key, ttl_ms, value, replace=True)
    return False


async def _replace(client: redis.Redis, place: _Place, new: bytes | None) -> None:
    if place.score is not None:
        await client.zrem(place.key, place.value)
        if new is not None:
            await client.zadd(place.key, {new: place.score})
    elif new is None:
        await client.delete(place.key)
    elif place.kind in ("metadata", "API key"):
        await client.hset(place.key, "data", new)
    else:
        await client.set(place.key, new, keepttl=True)


async def _made(storage: RedisStorage, decoder: Decoder, chance: random.Random, keyring: Keyring) -> _Stream:
    store = StateStore(Environment(storage=storage, config=StateStoreConfig(), keyring=keyring))
    name = f"tenants/flips-{uuid.uuid4().hex}/streams/a"
    settings = Settings(SETTINGS.kv_budget_tokens, SETTINGS.segment_length, SETTINGS.num_sink_tokens, 2, True)
    await store.streams.create(Create(name=name, model="tiny", settings=settings))
    # The newest version of the record is what `history` has after everything else.
    record_key = keys.live_stream(name).encode()
    history = [await storage.client.hget(record_key, "data")]
    offset = 0
    for number in range(NUM_RECORDS):
        data = chance.randbytes(chance.randint(1, 200)).hex().encode()
        request_id = "request" if number == 0 else ""
        await store.logs.append(name, Append(offset=offset, data=data, request_id=request_id, outcome=b"an outcome"))
        offset += len(data)
        history.append(await storage.client.hget(record_key, "data"))
    state = decoder.new_state(SETTINGS)
    decoder.prefill(state, [chance.randrange(decoder.config.vocab_size) for _ in range(160)], DEFAULT_POLICY)
    contents = [(f"{chance.getrandbits(64):x}", data) for data in state_codec.encode(state)]

    async def chunks() -> AsyncIterator[tuple[str, bytes]]:
        for content in contents:
            yield content

    await store.checkpoints.stage(name, chunks())
    manifest = Manifest(
        encoding_version=state_codec.version(state),
        version=1,
        applied_offset=100,
        applied_pretoken_tokens=0,
        tokens=160,
        state_bytes=state.state_bytes,
        state_digest=state_codec.state_digest(state, 100, 0),
        model_digest=decoder.model_digest,
        decisions=(),
        chunks=tuple(ChunkRef(i, len(data), xxhash.xxh3_128_hexdigest(data)) for i, data in contents),
    )
    lease = (await store.streams.acquire(name, Lease("w", 0, "h:1"), None)).lease
    assert lease is not None
    history.append(await storage.client.hget(record_key, "data"))
    committed = await store.commit(name, manifest, lease.fence)
    await store.settle()
    assert committed.newest is not None
    secrets = [(await store.api_keys.create(f"{name.split('/')[1]}-{i}", ""))[1] for i in range(2)]
    return _Stream(
        store=store,
        decoder=decoder,
        name=name,
        manifest=committed.newest,
        seen=LogMark(committed.accepted_offset, committed.log_chain),
        lease=lease,
        secrets=tuple(secrets),
        older={record_key: history},
    )
