"""Lives of clients, workers and state stores over a simulated database, beside a model of what must be.

Each client writes one stream and never forgets what it has sent; workers fold the logs into hashes and commit them;
somebody forks and deletes. Requests and replies get lost, commands come late and twice, state stores die in the middle,
the database crashes, a replica takes over, clocks jump. A model that knows nothing of the rules then compares.
"""

import asyncio
import hashlib
import random
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass, field
from typing import TypeVar

import xxhash
from simulated_storage import FaultRates, ProcessDied, SimulatedDatabase, SimulatedStorage
from virtual_time import run_in_virtual_time

from eunoe.runtime.errors import (
    Conflict,
    EunoeError,
    MissingChunk,
    NotFound,
    OffsetGap,
    OffsetUnavailable,
    StateLost,
    Unavailable,
)
from eunoe.state_store import keys
from eunoe.state_store.chains import LogMark
from eunoe.state_store.config import StateStoreConfig
from eunoe.state_store.log_rules import Append
from eunoe.state_store.metadata import ChunkRef, Lease, Manifest, Settings, StreamMetadata
from eunoe.state_store.metadata_codec import decode
from eunoe.state_store.store import StateStore
from eunoe.state_store.stream_rules import Create, Fork
from eunoe.state_store.transactions import Environment

T = TypeVar("T")

TENANT = "t"
SEGMENT_BYTES = 16
SETTINGS = Settings(64, SEGMENT_BYTES, 4, 2, False)
RATES = FaultRates(
    lost_request=0.02,
    lost_reply=0.02,
    late_repeat=0.03,
    database_crash=0.004,
    promotion=0.004,
    clock_jump=0.002,
    delay_seconds=0.01,
)
_DEATH_RATE = 0.5
_NUM_CLIENTS, _NUM_WORKERS, _NUM_RECORDS = 3, 2, 14


@dataclass(kw_only=True)
class SimulationFigures:
    """What was done to how many bytes, and what came of it. `violations` says what broke, with the life's seed."""

    faults_by_kind: Counter[str] = field(default_factory=Counter)
    num_lives: int = 0
    simulated_seconds: float = 0.0
    acknowledged_bytes: int = 0
    acknowledged_bytes_lost: int = 0
    num_retries: int = 0
    records_applied_twice: int = 0
    num_checkpoints: int = 0
    num_rollbacks: int = 0
    num_rollbacks_detected: int = 0
    violations: list[str] = field(default_factory=list)
    trace_hash: str = ""

    @property
    def num_faults(self) -> int:
        """Of all kinds."""
        return self.faults_by_kind.total()


def simulate(num_faults: int, seed: int, *, loses: bool = False, stops_at_violation: bool = False) -> SimulationFigures:
    """Live lives until so many faults have happened. Blocks; no loop may be running in this thread.

    Args:
        num_faults: At least so many.
        seed: Of the first life; each further one has the next.
        loses: Promotions forget what the replica has not: then clients and workers must notice, and mend it.
        stops_at_violation: Return at the first broken promise.
    """
    figures, trace = SimulationFigures(), hashlib.sha256()
    while figures.num_faults < num_faults:
        life = _Life(seed + figures.num_lives, figures, loses)
        run_in_virtual_time(life.live, life.seed)
        figures.num_lives += 1
        figures.faults_by_kind += life.database.num_faults
        trace.update(life.database.trace_hash.encode())
        if figures.violations and stops_at_violation:
            break
    figures.trace_hash = trace.hexdigest()
    return figures


class _Life:
    def __init__(self, seed: int, figures: SimulationFigures, loses: bool) -> None:
        self.seed = seed
        self.chance = random.Random(seed)
        self.figures = figures
        self.database = SimulatedDatabase(self.chance, FaultRates(), waits_for_replica=not loses)
        self.loses = loses
        self.clients = [_Client(self, f"tenants/{TENANT}/streams/s{i}") for i in range(_NUM_CLIENTS)]
        self.num_running = 0
        self._ids = (f"{i:032x}" for i in range(1 << 60))

    def new_store(self, *, dies: bool = True) -> StateStore:
        """A state store process, which may die in the middle of anything."""
        dies_at = self.chance.randint(3, 150) if dies and self.chance.random() < _DEATH_RATE else None
        storage = SimulatedStorage(self.database, dies_at=dies_at, dies_before=self.chance.random() < 0.5)
        environment = Environment(
            storage=storage,
            config=StateStoreConfig(),
            clock_ns=lambda: int(self.database.clock() * 1e9),
            new_id=lambda: next(self._ids),
        )
        return StateStore(environment)

    def violation(self, text: str) -> None:
        self.figures.violations.append(f"seed {self.seed}: {text}")

    async def live(self) -> None:
        for client in self.clients:
            await client.create()
        self.database.replicate()
        self.database.rates = RATES
        self.database.on_loss = self._note_rollbacks
        self.num_running = len(self.clients)
        workers = [asyncio.create_task(_Worker(self, i).run()) for i in range(_NUM_WORKERS)]
        meddling = asyncio.create_task(_Meddler(self).run())
        await asyncio.gather(*(client.run() for client in self.clients))
        self.database.calm()
        for client in self.clients:
            await client.append(b"the end")
        await asyncio.gather(meddling, *workers)
        await self._check()
        self.figures.simulated_seconds += asyncio.get_running_loop().time()

    def _note_rollbacks(self) -> None:
        """Which clients' acknowledged bytes are gone now."""
        for client in self.clients:
            data = self.database.record(keys.live_stream(client.name))
            is_rolled_back = decode(data).accepted_offset < client.num_acknowledged
            self.figures.num_rollbacks += is_rolled_back and not client.is_rolled_back
            client.is_rolled_back |= is_rolled_back

    async def _check(self) -> None:
        store = self.new_store(dies=False)
        for client in self.clients:
            await _check_stream(self, store, client.name, client.sent, client.num_acknowledged)
            self.figures.acknowledged_bytes += client.num_acknowledged
            if client.is_rolled_back:
                self.violation(f"{client.name} was never told of its rollback")
        for stream in (await store.streams.page(TENANT, "", 999))[0]:
            await store.streams.delete(stream.name)
        await store.sweeper.sweep()
        await store.settle()
        used = {total: count for total, (count, _) in (await store.usage(TENANT)).items()}
        if any(used.values()):
            self.violation(f"something is left of deleted streams: {used}")


class _Actor:
    """Somebody with a state store to talk to; where it dies there is another one."""

    def __init__(self, life: _Life) -> None:
        self.life = life
        self.store = life.new_store()

    async def insist(self, call: Callable[[StateStore], Awaitable[T]]) -> T:
        """Call until there is an answer, as every client of the state store does."""
        while True:
            try:
                return await call(self.store)
            except Unavailable:
                self.life.figures.num_retries += 1
                await asyncio.sleep(0.01)
            except ProcessDied:
                self.life.figures.faults_by_kind["process_death"] += 1
                self.store = self.life.new_store()
                await asyncio.sleep(0.1)


class _Client(_Actor):
    def __init__(self, life: _Life, name: str) -> None:
        super().__init__(life)
        self.name = name
        self.sent = b""
        self.num_acknowledged = 0
        self.is_rolled_back = False
        self._mark = LogMark(0, "")

    async def create(self) -> None:
        event = Create(name=self.name, model="m", settings=SETTINGS, request_id=self.name)
        await self.insist(lambda store: store.streams.create(event))

    async def run(self) -> None:
        for _ in range(_NUM_RECORDS):
            await self.append(self.life.chance.randbytes(self.life.chance.randint(1, 20)).hex().encode())
            await asyncio.sleep(self.life.chance.uniform(0, 0.2))
        self.life.num_running -= 1

    async def append(self, data: bytes) -> None:
        """Append a record; what the store has lost is sent again first."""
        begin, self.sent = len(self.sent), self.sent + data
        while begin < len(self.sent):
            event = Append(offset=begin, data=self.sent[begin:], after_chain=self._chain_at(begin))
            try:
                metadata, _ = await self.insist(lambda store, event=event: store.logs.append(self.name, event))
            except (StateLost, OffsetGap) as error:
                begin = await self._found_a_loss(error)
                continue
            self._mark = LogMark(metadata.accepted_offset, metadata.log_chain)
            if metadata.accepted_offset > len(self.sent):
                self.life.figures.records_applied_twice += 1
                self.life.violation(f"{self.name} has {metadata.accepted_offset} bytes of {len(self.sent)} sent")
                return
            begin = metadata.accepted_offset
        self.num_acknowledged = len(self.sent)

    def _chain_at(self, offset: int) -> str:
        return self._mark.chain if self._mark.offset == offset else ""

    async def _found_a_loss(self, error: EunoeError) -> int:
        metadata = await self.insist(lambda store: store.streams.get(self.name))
        if not self.life.loses:
            self.life.violation(f"{self.name}: {error}")
        self.life.figures.num_rollbacks_detected += self.is_rolled_back
        self.is_rolled_back = False
        self.num_acknowledged = min(self.num_acknowledged, metadata.accepted_offset)
        self._mark = LogMark(metadata.accepted_offset, metadata.log_chain)
        begin = metadata.accepted_offset
        if self.life.loses and self.life.chance.random() < 0.5:
            # Not every client still has what was lost: other bytes come to stand there.
            self.sent = self.sent[:begin] + self.life.chance.randbytes(len(self.sent) - begin).hex().encode()
        return begin


class _Worker(_Actor):
    """Folds segments into a hash: equal hashes, equal logs."""

    def __init__(self, life: _Life, number: int) -> None:
        super().__init__(life)
        self._by = Lease(f"w{number}", 0, "h:1")

    async def run(self) -> None:
        while self.life.num_running:
            client = self.life.chance.choice(self.life.clients)
            try:
                await self._serve(client.name, self.life.chance.randint(1, 5))
            except (Conflict, NotFound, OffsetUnavailable, MissingChunk):
                # Another worker's by now, whose commits have trimmed the log, or staged chunks whose time has come.
                pass
            except StateLost as error:
                if not self.life.loses:
                    self.life.violation(f"a worker was told of a loss: {error}")
            except EunoeError as error:
                self.life.violation(f"a worker met {type(error).__name__}: {error}")
            await asyncio.sleep(self.life.chance.uniform(0, 0.3))

    async def _serve(self, name: str, num_commits: int) -> None:
        suspect = (await self.insist(lambda store: store.streams.get(name))).lease
        fence = None if suspect is None else suspect.fence
        metadata = await self.insist(lambda store: store.streams.acquire(name, self._by, fence))
        lease = metadata.lease
        assert lease is not None
        folded, digest, mark = await self._loaded(name, metadata)
        for _ in range(num_commits):
            pieces = await self.insist(lambda store, at=folded: _read(store, name, at))
            data = b"".join(data for data, _ in pieces)
            if pieces:
                mark = pieces[-1][1]
            for start in range(0, len(data) // SEGMENT_BYTES * SEGMENT_BYTES, SEGMENT_BYTES):
                digest = _folded(digest, data[start : start + SEGMENT_BYTES])
                folded += SEGMENT_BYTES
            # Folding takes time, in which the log may go on, or back.
            await asyncio.sleep(self.life.chance.choice((0.0, 0.1, 0.5)))
            if folded > metadata.applied_offset:
                metadata = await self._commit(name, metadata, lease, folded, digest, mark)
            # As long as a worker may hang without knowing it.
            await asyncio.sleep(self.life.chance.choice((0.0, 0.1, 1.0)))

    async def _loaded(self, name: str, metadata: StreamMetadata) -> tuple[int, bytes, LogMark | None]:
        if metadata.newest is None:
            return 0, b"", None
        chunks = metadata.newest.chunks
        (digest,) = await self.insist(lambda store: _chunks(store, name, chunks))
        return metadata.applied_offset, digest, None

    async def _commit(
        self, name: str, metadata: StreamMetadata, lease: Lease, folded: int, digest: bytes, mark: LogMark | None
    ) -> StreamMetadata:
        chunk = ChunkRef(f"{self.life.chance.getrandbits(128):x}", len(digest), xxhash.xxh3_128_hexdigest(digest))
        version, parent_chain = metadata.version + 1, "" if metadata.newest is None else metadata.newest.chain
        manifest = Manifest(1, version, folded, 0, folded, 32, digest.hex(), "weights", (), (chunk,))

        async def chunks() -> AsyncIterator[tuple[str, bytes]]:
            yield chunk.chunk_id, digest

        await self.insist(lambda store: store.checkpoints.stage(name, chunks()))
        after = await self.insist(
            lambda store: store.commit(name, manifest, lease.fence, parent_chain=parent_chain, read=mark)
        )
        self.life.figures.num_checkpoints += 1
        return after


class _Meddler(_Actor):
    """Forks streams, looks at the forks, and deletes them."""

    async def run(self) -> None:
        number = 0
        while self.life.num_running:
            number += 1
            client, name = self.life.chance.choice(self.life.clients), f"tenants/{TENANT}/streams/f{number}"
            event = Fork(name=name, request_id=name)
            try:
                child = await self.insist(lambda store, c=client, e=event: store.streams.fork(c.name, e))
                if not self.life.loses:
                    await _check_stream(self.life, self.store, name, client.sent[: child.accepted_offset], 0)
                if self.life.chance.random() < 0.7:
                    await self.insist(lambda store, n=name: store.streams.delete(n))
            except (NotFound, Unavailable):
                pass
            except ProcessDied:
                self.store = self.life.new_store()
            except StateLost as error:
                if not self.life.loses:
                    self.life.violation(f"a fork was told of a loss: {error}")
            await asyncio.sleep(self.life.chance.uniform(0, 1))


async def _check_stream(life: _Life, store: StateStore, name: str, sent: bytes, num_acknowledged: int) -> None:
    """Compare a stream's log and checkpoints with the bytes that were sent to it."""
    metadata = await store.streams.get(name)
    start = metadata.log_start_offset
    log = b"".join(data for data, _ in await _read(store, name, start))
    if metadata.accepted_offset < num_acknowledged:
        life.figures.acknowledged_bytes_lost += num_acknowledged - metadata.accepted_offset
        life.violation(f"{name} has lost what was acknowledged")
    if log != sent[start : metadata.accepted_offset]:
        life.violation(f"the log of {name} is not what was sent")
    for manifest in metadata.retained:
        digest = b""
        for begin in range(0, manifest.applied_offset, SEGMENT_BYTES):
            digest = _folded(digest, sent[begin : begin + SEGMENT_BYTES])
        if await _chunks(store, name, manifest.chunks) != [digest]:
            life.violation(f"checkpoint {manifest.version} of {name} is not of its log")


async def _read(store: StateStore, name: str, offset: int) -> list[tuple[bytes, LogMark]]:
    pieces = [piece async for piece in store.logs.read(name, offset, 0)]
    return [(piece.data, LogMark(piece.offset + len(piece.data), piece.chain)) for piece in pieces]


async def _chunks(store: StateStore, name: str, chunks: tuple[ChunkRef, ...]) -> list[bytes]:
    return [data async for _, data in store.checkpoints.read(name, chunks)]


def _folded(digest: bytes, segment: bytes) -> bytes:
    return hashlib.sha256(digest + segment).digest()
