"""The storage drivers that every contract runs over, and a state store over each."""

import random
import sys
import uuid
from collections.abc import AsyncIterator, Iterable
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import xxhash

from eunoe.state_store.config import StateStoreConfig
from eunoe.state_store.effects import Total
from eunoe.state_store.log_rules import KIND_TEXT, Append
from eunoe.state_store.memory_storage import MemoryStorage
from eunoe.state_store.metadata import ChunkRef, DecisionRun, Lease, Manifest, Settings, StreamMetadata
from eunoe.state_store.redis_storage import RedisStorage
from eunoe.state_store.sealing import Keyring
from eunoe.state_store.storage import Storage
from eunoe.state_store.store import StateStore
from eunoe.state_store.stream_rules import Create
from eunoe.state_store.transactions import Environment

_HARNESS = str(Path(__file__).parents[1] / "faults")
if _HARNESS not in sys.path:
    sys.path.insert(0, _HARNESS)
from simulated_storage import SimulatedDatabase, SimulatedStorage  # noqa: E402

DRIVERS = ("memory", "redis", "redis-replicated", "simulated")


@pytest.fixture(params=DRIVERS)
async def storage(request: pytest.FixtureRequest) -> AsyncIterator[Storage]:
    """A database; Redis is shared by all tests, so keys must be the test's own."""
    if request.param == "memory":
        yield MemoryStorage()
        return
    if request.param == "simulated":
        yield SimulatedStorage(SimulatedDatabase(random.Random(0)))
        return
    if request.param == "redis-replicated":
        storage = RedisStorage(request.getfixturevalue("replicated_redis").primary.url, num_replicas=1)
    else:
        storage = RedisStorage(request.getfixturevalue("redis_server").url)
    await storage.load_function()
    yield storage
    await storage.close()


@dataclass
class FakeClock:
    """Nanoseconds since 1970, moved by the test."""

    now_ns: int = 1_700_000_000_000_000_000

    def __call__(self) -> int:
        return self.now_ns

    def advance(self, seconds: float) -> None:
        self.now_ns += int(seconds * 1e9)


@pytest.fixture
def clock() -> FakeClock:
    return FakeClock()


@pytest.fixture
def tenant() -> str:
    """A tenant that no other test uses."""
    return f"test-{uuid.uuid4().hex}"


@pytest.fixture
def config() -> StateStoreConfig:
    return StateStoreConfig(max_streams=20, max_log_bytes=1 << 20, max_checkpoint_bytes=1 << 16, staging_seconds=60)


@pytest.fixture
def keyring(request: pytest.FixtureRequest) -> Keyring:
    """Over Redis everything is encrypted, in memory nothing."""
    return Keyring(bytes(32) if "redis" in request.node.name else None)


@pytest.fixture
async def store(
    storage: Storage, clock: FakeClock, config: StateStoreConfig, keyring: Keyring
) -> AsyncIterator[StateStore]:
    """A state store without its sweeps: tests call them."""
    store = StateStore(Environment(storage=storage, config=config, keyring=keyring, clock_ns=clock))
    yield store
    await store.settle()


SETTINGS = Settings(kv_budget_tokens=64, segment_length=16, num_sink_tokens=4, positions=2, retain_log=False)
WORKER = Lease("w1", 0, "host:1")


@dataclass
class Caller:
    """A client and a worker of one tenant."""

    store: StateStore
    tenant: str
    num_staged: int = 0

    def name(self, stream_id: str = "a") -> str:
        return f"tenants/{self.tenant}/streams/{stream_id}"

    async def create(self, stream_id: str = "a", **changes: object) -> StreamMetadata:
        settings = SETTINGS._replace(retain_log=bool(changes.pop("retain_log", False)))
        event = Create(name=self.name(stream_id), model="m", settings=settings)
        return await self.store.streams.create(replace(event, **changes))  # type: ignore[arg-type]

    async def get(self, stream_id: str = "a") -> StreamMetadata:
        return await self.store.streams.get(self.name(stream_id))

    async def append(self, *records: bytes, stream_id: str = "a", kind: int = KIND_TEXT) -> int:
        for data in records:
            offset = (await self.get(stream_id)).accepted_offset
            await self.store.logs.append(self.name(stream_id), Append(offset=offset, data=data, kind=kind))
        return (await self.get(stream_id)).accepted_offset

    async def read(self, offset: int = 0, stream_id: str = "a", max_bytes: int = 0) -> bytes:
        return b"".join([p.data async for p in self.store.logs.read(self.name(stream_id), offset, max_bytes)])

    async def acquire(
        self, by: Lease = WORKER, stream_id: str = "a", suspect: tuple[str, int] | None = None
    ) -> tuple[str, int]:
        metadata = await self.store.streams.acquire(self.name(stream_id), by, suspect)
        assert metadata.lease is not None
        return metadata.lease.fence

    async def stage(self, *contents: bytes, stream_id: str = "a") -> tuple[ChunkRef, ...]:
        refs = []
        for data in contents:
            self.num_staged += 1
            refs.append(ChunkRef(f"chunk{self.num_staged}", len(data), xxhash.xxh3_128_hexdigest(data)))
        pairs = zip((ref.chunk_id for ref in refs), contents, strict=True)
        await self.store.checkpoints.stage(self.name(stream_id), _as_stream(pairs))
        return tuple(refs)

    async def manifest(self, applied_offset: int, *contents: bytes, stream_id: str = "a") -> Manifest:
        """The successor of the newest checkpoint, its chunks staged."""
        version = (await self.get(stream_id)).version + 1
        chunks = await self.stage(*(contents or (b"state%d" % version,)), stream_id=stream_id)
        return self.a_manifest(version, applied_offset, chunks)

    async def commit(self, fence: tuple[str, int], applied_offset: int, stream_id: str = "a") -> Manifest:
        manifest = await self.manifest(applied_offset, stream_id=stream_id)
        await self.store.commit(self.name(stream_id), manifest, fence)
        await self.store.settle()
        return manifest

    async def chunks(self, manifest: Manifest, stream_id: str = "a") -> list[bytes]:
        return [data async for _, data in self.store.checkpoints.read(self.name(stream_id), manifest.chunks)]

    async def used(self, total: Total) -> int:
        return (await self.store.usage(self.tenant))[total][0]

    @staticmethod
    def a_manifest(version: int, applied_offset: int, chunks: tuple[ChunkRef, ...]) -> Manifest:
        return Manifest(
            encoding_version=1,
            version=version,
            applied_offset=applied_offset,
            applied_pretoken_tokens=0,
            tokens=16 * version,
            state_bytes=100,
            state_digest=f"digest{version}",
            model_digest="weights",
            decisions=(DecisionRun(0, "sinks-recent/1", "cpu"),),
            chunks=chunks,
        )


async def _as_stream(pairs: Iterable[tuple[str, bytes]]) -> AsyncIterator[tuple[str, bytes]]:
    for pair in pairs:
        yield pair


@pytest.fixture
def caller(store: StateStore, tenant: str) -> Caller:
    return Caller(store, tenant)


@pytest.fixture
def new_caller() -> type[Caller]:
    """Makes callers of a test's own store."""
    return Caller
