"""Random lives of streams, forks and crashes over the in-memory database, beside a model that keeps everything.

Whatever happens: every living stream reads as the model says, from every offset that it claims to have, and when all
are deleted nothing is left.
"""

import asyncio
import random
from collections.abc import AsyncIterator, Sequence

import pytest
import xxhash

from eunoe.runtime.errors import OffsetUnavailable, Unavailable
from eunoe.state_store.config import StateStoreConfig
from eunoe.state_store.log_rules import Append
from eunoe.state_store.memory_storage import MemoryStorage
from eunoe.state_store.metadata import ChunkRef, Lease, Manifest, Settings
from eunoe.state_store.storage import Expectation, Refusal, Write
from eunoe.state_store.store import StateStore
from eunoe.state_store.stream_rules import Create, Fork
from eunoe.state_store.transactions import Environment

TENANT = "t"
SETTINGS = Settings(64, 16, 4, 2, False)


class FaultyStorage(MemoryStorage):
    """Loses some requests and some replies, repeats some swaps later than they came."""

    def __init__(self, chance: random.Random) -> None:
        super().__init__(clock=lambda: 0.0)
        self.chance = chance
        self.is_faulty = False
        self._late: list[tuple[str, Sequence[Expectation], Sequence[Write]]] = []

    async def compare_and_swap(
        self, token: str, expectations: Sequence[Expectation], writes: Sequence[Write]
    ) -> Refusal | None:
        await asyncio.sleep(0)
        if not self.is_faulty:
            return await super().compare_and_swap(token, expectations, writes)
        if self._late and self.chance.random() < 0.3:
            await super().compare_and_swap(*self._late.pop())
        if self.chance.random() < 0.1:
            raise Unavailable("the request was lost")
        refusal = await super().compare_and_swap(token, expectations, writes)
        if self.chance.random() < 0.2:
            self._late.append((token, expectations, writes))
        if self.chance.random() < 0.1:
            raise Unavailable("the reply was lost")
        return refusal


class Walk:
    """A store and the model of what it must hold: each stream's whole log."""

    def __init__(self, seed: int) -> None:
        self.chance = random.Random(seed)
        self.storage = FaultyStorage(self.chance)
        ids = (f"{i:032x}" for i in range(10**9))
        config = StateStoreConfig()
        self.store = StateStore(Environment(storage=self.storage, config=config, new_id=lambda: next(ids)))
        self.logs: dict[str, bytes] = {}
        self.ends: dict[str, list[int]] = {}
        self.states: dict[tuple[str, int], bytes] = {}
        self.num_names = 0

    def any_name(self) -> str:
        return self.chance.choice(sorted(self.logs))

    async def insist(self, call):  # type: ignore[no-untyped-def]
        """Call until the database answers, as every client does."""
        while True:
            try:
                return await call()
            except Unavailable:
                continue

    async def create(self) -> None:
        # Names come back after a deletion.
        free = sorted({f"tenants/{TENANT}/streams/s{i}" for i in range(6)} - self.logs.keys())
        if free:
            name = self.chance.choice(free)
            request_id = str(self.chance.random())
            settings = SETTINGS._replace(retain_log=self.chance.random() < 0.2)
            event = Create(name=name, model="m", settings=settings, request_id=request_id)
            await self.insist(lambda: self.store.streams.create(event))
            self.logs[name], self.ends[name] = b"", [0]

    async def append(self) -> None:
        name = self.any_name()
        data = self.chance.randbytes(self.chance.randint(1, 20)).hex().encode()
        event = Append(offset=len(self.logs[name]), data=data)
        metadata, _ = await self.insist(lambda: self.store.logs.append(name, event))
        self.logs[name] += data
        self.ends[name].append(len(self.logs[name]))
        assert metadata.accepted_offset == len(self.logs[name])

    async def commit(self) -> None:
        name = self.any_name()
        by = Lease(f"w{self.chance.randint(0, 1)}", 0, "h:1")
        metadata = await self.insist(lambda: self.store.streams.acquire(name, by, None))
        data = self.chance.randbytes(9)
        chunk = ChunkRef(str(self.chance.random()), len(data), xxhash.xxh3_128_hexdigest(data))
        applied_offset = self.chance.randint(metadata.applied_offset, metadata.accepted_offset)
        version = metadata.version + 1
        manifest = Manifest(1, version, applied_offset, 0, version, 1, "d", "md", (), (chunk,))

        async def stage_and_commit() -> None:
            async def chunks() -> AsyncIterator[tuple[str, bytes]]:
                yield chunk.chunk_id, data

            await self.store.checkpoints.stage(name, chunks())
            await self.store.commit(name, manifest, metadata.lease.fence)

        await self.insist(stage_and_commit)
        self.states[name, version] = data

    async def fork(self) -> None:
        parent = self.any_name()
        self.num_names += 1
        name = f"tenants/{TENANT}/streams/f{self.num_names}"
        at_offset = self.chance.choice([None, *self.ends[parent]])
        event = Fork(name=name, at_offset=at_offset, request_id=name)
        before = await self.store.streams.get(parent)
        try:
            child = await self.insist(lambda: self.store.streams.fork(parent, event))
        except OffsetUnavailable:
            assert at_offset is not None
            assert at_offset != before.accepted_offset
            return
        end = len(self.logs[parent]) if at_offset is None else at_offset
        assert child.accepted_offset == end
        self.logs[name] = self.logs[parent][:end]
        self.ends[name] = [offset for offset in self.ends[parent] if offset <= end]
        for manifest in child.checkpoints:
            self.states[name, manifest.version] = self.states[parent, manifest.version]

    async def delete(self) -> None:
        name = self.any_name()
        await self.insist(lambda: self.delete_if_there(name))
        del self.logs[name], self.ends[name]

    async def delete_if_there(self, name: str) -> None:
        if await self.store.environment.storage.members_after(f"eunoe:{{{TENANT}}}:streams", "", 999):
            metadata = [s for s in (await self.store.streams.page(TENANT, "", 999))[0] if s.name == name]
            if metadata:
                await self.store.streams.delete(name)

    async def check(self) -> None:
        listed = [stream.name for stream in (await self.store.streams.page(TENANT, "", 999))[0]]
        assert listed == sorted(self.logs)
        for name, log in self.logs.items():
            metadata = await self.store.streams.get(name)
            assert metadata.accepted_offset == len(log)
            assert metadata.applied_offset >= metadata.log_start_offset
            start = metadata.log_start_offset
            assert b"".join([p.data async for p in self.store.logs.read(name, start, 0)]) == log[start:]
            for manifest in metadata.retained:
                chunks = [data async for _, data in self.store.checkpoints.read(name, manifest.chunks)]
                assert chunks == [self.states[name, manifest.version]]


@pytest.mark.parametrize("seed", range(10))
async def test_nothing_is_lost_torn_or_left_behind(seed: int) -> None:
    walk = Walk(seed)
    steps = [walk.create, walk.append, walk.append, walk.append, walk.commit, walk.commit, walk.fork, walk.delete]

    for _ in range(120):
        walk.storage.is_faulty = True
        await (walk.chance.choice(steps) if walk.logs else walk.create)()
        await walk.store.settle()
        walk.storage.is_faulty = False
        await walk.check()
    for name in list(walk.logs):
        await walk.store.streams.delete(name)
    await walk.store.sweeper.sweep()
    assert await walk.store.backlog.largest("m", 0, 999) == []
    await walk.store.settle()

    used = {total: count for total, (count, _) in (await walk.store.usage(TENANT)).items()}
    assert set(used.values()) == {0}
    assert walk.storage.keys() == {"eunoe:tenants", "eunoe:{t}:totals"}
