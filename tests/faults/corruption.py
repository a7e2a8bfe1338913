"""Flipped bytes in the database: each one that has a part in an answer must be noticed, none may be served."""

import random
import time
import uuid
from collections import Counter
from collections.abc import AsyncIterator
from dataclasses import dataclass

import redis.asyncio as redis
import xxhash

from eunoe.decoder import state_codec
from eunoe.decoder.decoder import Decoder
from eunoe.decoder.memory_state import MemorySettings
from eunoe.eviction import DEFAULT_POLICY
from eunoe.runtime.errors import EunoeError, StateLost
from eunoe.state_store.config import StateStoreConfig
from eunoe.state_store.log_rules import Append
from eunoe.state_store.metadata import ChunkRef, Lease, Manifest, Settings
from eunoe.state_store.redis_storage import RedisStorage
from eunoe.state_store.sealing import Keyring
from eunoe.state_store.store import StateStore
from eunoe.state_store.stream_rules import Create
from eunoe.state_store.transactions import Environment

SETTINGS = MemorySettings(kv_budget_tokens=64, segment_length=16, num_sink_tokens=4)
NUM_RECORDS = 12


@dataclass(frozen=True, slots=True, kw_only=True)
class FlipFigures:
    """What became of the flips. `silent` names each kind of value of which a flip was served as if nothing had been."""

    num_flips: int
    num_detected: int
    silent: tuple[str, ...]
    flips_by_kind: dict[str, int]
    seconds: float


@dataclass(frozen=True, slots=True)
class _Stream:
    """A stream with a log and a checkpoint of a real memory state, and all that reading it must give."""

    store: StateStore
    decoder: Decoder
    name: str
    manifest: Manifest
    expected: tuple[object, ...]

    async def read(self) -> tuple[object, ...]:
        """Everything that is served of it: its record, its log, its decoded memory state."""
        metadata = await self.store.streams.get(self.name)
        pieces = [(p.offset, p.data, p.kind, p.chain) async for p in self.store.logs.read(self.name, 0, 0)]
        chunks = [data async for _, data in self.store.checkpoints.read(self.name, self.manifest.chunks)]
        state = state_codec.decode(chunks, self.decoder.config, SETTINGS, self.decoder.dtypes)
        digest = state_codec.state_digest(state, self.manifest.applied_offset, 0)
        outcome = await self.store.logs.outcome(self.name, "request")
        return metadata, tuple(pieces), digest, outcome


async def flip_sweep(decoder: Decoder, redis_url: str, *, num_flips: int, seed: int, is_encrypted: bool) -> FlipFigures:
    """Flip one random bit of one random stored value, read everything, put it back; again and again.

    Args:
        decoder: Of a tiny model.
        redis_url: A Redis of the caller's.
        num_flips: How often.
        seed: Of the choices.
        is_encrypted: Whether the values are encrypted.
    """
    start, chance = time.monotonic(), random.Random(seed)
    storage = RedisStorage(redis_url)
    await storage.load_function()
    try:
        stream = await _made(storage, decoder, chance, Keyring(bytes(32) if is_encrypted else None))
        places = await _places(storage.client, stream.name.split("/")[1])
        flips: Counter[str] = Counter()
        silent: list[str] = []
        for _ in range(num_flips):
            place = chance.choice(places)
            flips[place.kind] += 1
            if not await _is_noticed(storage.client, stream, place, chance):
                silent.append(place.kind)
        assert await stream.read() == stream.expected, "the sweep has not put everything back"
    finally:
        await storage.close()
    return FlipFigures(
        num_flips=num_flips,
        num_detected=num_flips - len(silent),
        silent=tuple(silent),
        flips_by_kind=dict(flips),
        seconds=time.monotonic() - start,
    )


@dataclass(frozen=True, slots=True)
class _Place:
    """A stored value: at a key, in a hash's field, or a member of an index (`score` is then its own)."""

    kind: str
    key: bytes
    value: bytes
    score: float | None = None


async def _places(client: redis.Redis, tenant: str) -> list[_Place]:
    places = []
    async for key in client.scan_iter(f"eunoe:{{{tenant}}}:*"):
        # eunoe:{tenant}:KIND...
        kind = key.decode().split(":")[2]
        match await client.type(key):
            case b"string":
                places.append(_Place(kind, key, await client.get(key)))
            case b"hash" if kind == "stream":
                places.append(_Place("metadata", key, await client.hget(key, "data")))
            case b"zset" if kind == "log":
                rows = await client.zrange(key, 0, -1, withscores=True)
                places += [_Place("log index", key, member, score) for member, score in rows]
    return places


async def _is_noticed(client: redis.Redis, stream: _Stream, place: _Place, chance: random.Random) -> bool:
    flipped = bytearray(place.value)
    flipped[chance.randrange(len(flipped))] ^= 1 << chance.randrange(8)
    await _replace(client, place, place.value, bytes(flipped))
    try:
        await stream.read()
    except StateLost:
        return True
    except EunoeError:
        # Typed, but not as damage: the reader would look for the fault elsewhere.
        return False
    finally:
        await _replace(client, place, bytes(flipped), place.value)
    return False


async def _replace(client: redis.Redis, place: _Place, old: bytes, new: bytes) -> None:
    if place.score is not None:
        await client.zrem(place.key, old)
        await client.zadd(place.key, {new: place.score})
    elif place.kind == "metadata":
        await client.hset(place.key, "data", new)
    else:
        await client.set(place.key, new, keepttl=True)


async def _made(storage: RedisStorage, decoder: Decoder, chance: random.Random, keyring: Keyring) -> _Stream:
    store = StateStore(Environment(storage=storage, config=StateStoreConfig(), keyring=keyring))
    name = f"tenants/flips-{uuid.uuid4().hex}/streams/a"
    settings = Settings(SETTINGS.kv_budget_tokens, SETTINGS.segment_length, SETTINGS.num_sink_tokens, 2, True)
    await store.streams.create(Create(name=name, model="tiny", settings=settings))
    offset = 0
    for number in range(NUM_RECORDS):
        data = chance.randbytes(chance.randint(1, 200)).hex().encode()
        request_id = "request" if number == 0 else ""
        await store.logs.append(name, Append(offset=offset, data=data, request_id=request_id, outcome=b"an outcome"))
        offset += len(data)
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
    await store.commit(name, manifest, lease.fence)
    await store.settle()
    stream = _Stream(store, decoder, name, manifest, ())
    return _Stream(store, decoder, name, manifest, await stream.read())
