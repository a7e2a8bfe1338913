"""Many clients and workers on few streams at once, over a database that answers each of them in random order.

Nobody may ever read a log with a hole or a checkpoint without its bytes, and when all is deleted nothing is left.
"""

import asyncio
import random
from collections.abc import AsyncIterator, Sequence

import pytest
import xxhash

from eunoe.runtime.errors import EunoeError, StateLost
from eunoe.state_store.config import StateStoreConfig
from eunoe.state_store.log_rules import Append
from eunoe.state_store.memory_storage import MemoryStorage
from eunoe.state_store.metadata import ChunkRef, Lease, Manifest, Settings
from eunoe.state_store.storage import Expectation, Refusal, Versioned, Write
from eunoe.state_store.store import StateStore
from eunoe.state_store.stream_rules import Create, Fork
from eunoe.state_store.transactions import Environment

NAMES = [f"tenants/t/streams/{letter}" for letter in "abc"]


class SlowStorage(MemoryStorage):
    """Lets others run before each answer, sometimes for long."""

    def __init__(self, chance: random.Random) -> None:
        super().__init__(clock=lambda: self.now_seconds)
        self._chance = chance
        self.now_seconds = 0.0

    async def _wait(self) -> None:
        for _ in range(self._chance.choice((0, 1, 1, 2, 9))):
            await asyncio.sleep(0)

    async def read(self, keys: Sequence[str]) -> list[Versioned]:
        await self._wait()
        return await super().read(keys)

    async def get(self, keys: Sequence[str]) -> list[bytes | None]:
        await self._wait()
        return await super().get(keys)

    async def members_by_score(self, key: str, above: int, up_to: int | None, limit: int) -> list[tuple[str, int]]:
        await self._wait()
        return await super().members_by_score(key, above, up_to, limit)

    async def compare_and_swap(
        self, token: str, expectations: Sequence[Expectation], writes: Sequence[Write]
    ) -> Refusal | None:
        await self._wait()
        return await super().compare_and_swap(token, expectations, writes)


class Actor:
    """Does one random thing after another; remembers what it was wrongly told."""

    def __init__(self, store: StateStore, chance: random.Random, number: int) -> None:
        self.store = store
        self.chance = chance
        self.worker = Lease(f"w{number}", 0, "h:1")
        self.losses: list[EunoeError] = []

    async def run(self, num_steps: int) -> None:
        steps = [self.create, self.append, self.append, self.commit, self.commit, self.fork, self.delete, self.read]
        for _ in range(num_steps):
            try:
                await self.chance.choice(steps)(self.chance.choice(NAMES))
            except StateLost as error:
                self.losses.append(error)
            except EunoeError:
                # Somebody else was first: part of life here.
                continue

    async def create(self, name: str) -> None:
        await self.store.streams.create(Create(name=name, model="m", settings=Settings(64, 16, 4, 2, False)))

    async def append(self, name: str) -> None:
        metadata = await self.store.streams.get(name)
        data = self.chance.randbytes(4).hex().encode()
        await self.store.logs.append(name, Append(offset=metadata.accepted_offset, data=data))

    async def commit(self, name: str) -> None:
        metadata = await self.store.streams.acquire(name, self.worker, None)
        assert metadata.lease is not None
        data = self.chance.randbytes(9)
        chunk = ChunkRef(data.hex(), len(data), xxhash.xxh3_128_hexdigest(data))

        async def chunks() -> AsyncIterator[tuple[str, bytes]]:
            yield chunk.chunk_id, data

        await self.store.checkpoints.stage(name, chunks())
        applied_offset = self.chance.randint(metadata.applied_offset, metadata.accepted_offset)
        manifest = Manifest(1, metadata.version + 1, applied_offset, 0, 0, 1, "d", "md", (), (chunk,))
        await self.store.commit(name, manifest, metadata.lease.fence)

    async def fork(self, name: str) -> None:
        await self.store.streams.fork(name, Fork(name=self.chance.choice(NAMES)))

    async def delete(self, name: str) -> None:
        await self.store.streams.delete(name)

    async def read(self, name: str) -> None:
        metadata = await self.store.streams.get(name)
        offset = metadata.log_start_offset
        async for piece in self.store.logs.read(name, offset, 0):
            assert piece.offset == offset
            offset += len(piece.data)
        is_same = (await self.store.streams.get(name)).uid == metadata.uid
        assert offset >= metadata.accepted_offset or not is_same
        for manifest in metadata.retained:
            async for _ in self.store.checkpoints.read(name, manifest.chunks):
                pass


@pytest.mark.parametrize("seed", range(8))
async def test_nobody_reads_what_another_frees(seed: int) -> None:
    chance = random.Random(seed)
    storage = SlowStorage(chance)
    store = StateStore(Environment(storage=storage, config=StateStoreConfig()))
    actors = [Actor(store, chance, number) for number in range(6)]

    await asyncio.gather(*(actor.run(60) for actor in actors))
    await store.settle()
    for stream in (await store.streams.page("t", "", 9))[0]:
        await actors[0].read(stream.name)
        await store.streams.delete(stream.name)
    await store.sweeper.sweep()
    await store.backlog.largest("m", 0, 9)
    await store.settle()

    assert [actor.losses for actor in actors] == [[]] * 6
    assert {count for count, _ in (await store.usage("t")).values()} == {0}
    # What was staged and never committed goes by itself.
    storage.now_seconds = 1000.0
    assert storage.keys() == {"eunoe:tenants", "eunoe:{t}:totals"}
