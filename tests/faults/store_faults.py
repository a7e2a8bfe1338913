"""Real faults at real processes: Redis and the state store are killed and paused, connections between them broken.

Writers keep every byte that was acknowledged, and a committer keeps committing a hash of the log; after each fault the
store is asked for everything and compared. Kills stand for power loss: a process that dies loses what it had not
written, the machine's page cache stays.
"""

import asyncio
import contextlib
import hashlib
import random
import secrets
import time
from collections import Counter
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import TypeVar

import xxhash
from store_processes import StoreSite, storage_at

from eunoe.api.v1 import long_context_pb2 as api
from eunoe.clients.state_store import StateStoreClient
from eunoe.internal.v1 import state_store_pb2 as pb
from eunoe.runtime.errors import Conflict, DeadlineTooShort, EunoeError, Unavailable
from eunoe.runtime.grpc_channel import open_channel

T = TypeVar("T")

_NUM_WRITERS = 3
_SETTLE_SECONDS = 0.15
_FAILPOINTS = (
    "store.append.before-swap",
    "store.append.after-swap",
    "store.stage.done",
    "store.commit.before-swap",
    "store.commit.after-swap",
)


@dataclass(kw_only=True)
class RealFaultFigures:
    """What was done to the processes, and what it did to acknowledged bytes and committed checkpoints."""

    faults_by_kind: Counter[str] = field(default_factory=Counter)
    acknowledged_bytes: int = 0
    acknowledged_bytes_lost: int = 0
    records_applied_twice: int = 0
    num_checkpoints: int = 0
    torn_checkpoints: int = 0
    seconds: float = 0.0

    @property
    def num_faults(self) -> int:
        """Of all kinds."""
        return self.faults_by_kind.total()


@dataclass(frozen=True, slots=True, kw_only=True)
class RetryFigures:
    """Records that were sent again after their first copy was durable."""

    num_retries: int
    records_applied_twice: int
    seconds: float


class Writer:
    """Appends to one stream, the same record again and again until its fate is known, and commits hashes of the log.

    Attributes:
        log: All that was sent.
        num_acknowledged: Bytes of it that the store has said are durable.
    """

    def __init__(self, client: StateStoreClient, name: str, chance: random.Random) -> None:
        self._client = client
        self._chance = chance
        self.name = name
        self.log = b""
        self.num_acknowledged = 0
        self.num_checkpoints = 0

    async def create(self) -> None:
        settings = api.StreamSettings(
            kv_budget_tokens=64, segment_length=16, num_sink_tokens=4, positions=api.POSITION_MODE_COMPACT
        )
        await insist(
            lambda: self._client.create_stream(
                pb.CreateStreamRequest(name=self.name, model="m", settings=settings, request_id=self.name)
            )
        )

    async def append(self) -> bool:
        """Append a record; whether the log is longer than what was sent, so that something was applied twice."""
        data = self._chance.randbytes(self._chance.randint(10, 2000)).hex().encode()
        request = pb.AppendRecordRequest(
            name=self.name, offset=len(self.log), data=data, kind=api.RECORD_KIND_TEXT
        )  # fmt: skip
        self.log += data
        accepted = (await insist(lambda: self._client.append_record(request))).accepted_offset
        self.num_acknowledged = len(self.log)
        return accepted != len(self.log)

    async def commit(self) -> None:
        """Commit the hash of all that is acknowledged, as its owner."""
        by = pb.Lease(worker=f"worker of {self.name}", address="127.0.0.1:1")
        acquired = await insist(lambda: self._client.acquire_stream(pb.AcquireStreamRequest(name=self.name, by=by)))
        record, applied = acquired.record, self.num_acknowledged
        digest = hashlib.sha256(self.log[:applied]).digest()
        chunk_id = secrets.token_hex(16)
        chunk = pb.ChunkRef(chunk_id=chunk_id, length=len(digest), digest=xxhash.xxh3_128_digest(digest))
        manifest = pb.Manifest(
            encoding_version=1,
            version=record.manifest.version + 1,
            applied_offset=applied,
            tokens=applied,
            chunks=[chunk],
        )
        request = pb.CommitCheckpointRequest(
            name=self.name, lease=record.lease, manifest=manifest, parent_chain=record.manifest.chain
        )
        await insist(lambda: self._client.stage_chunks(self.name, [(chunk_id, digest)]))
        await insist(lambda: self._client.commit_checkpoint(request))
        self.num_checkpoints += 1

    async def check(self, figures: RealFaultFigures) -> None:
        """Compare what the store has with what it acknowledged."""
        record = (await insist(lambda: self._client.get_stream(pb.GetStreamRequest(name=self.name)))).record
        stream = record.stream
        figures.acknowledged_bytes_lost += max(0, self.num_acknowledged - stream.accepted_offset)
        figures.records_applied_twice += stream.accepted_offset > len(self.log)
        request = pb.ReadLogRequest(name=self.name, offset=stream.log_start_offset)
        pieces = [piece async for piece in self._client.read_log(request)]
        log = b"".join(piece.data for piece in pieces)
        if log != self.log[stream.log_start_offset : stream.accepted_offset]:
            figures.acknowledged_bytes_lost += len(log)
        if record.HasField("manifest"):
            chunks = pb.ReadChunksRequest(name=self.name, chunks=record.manifest.chunks)
            found = [chunk.data async for chunk in self._client.read_chunks(chunks)]
            expected = hashlib.sha256(self.log[: record.manifest.applied_offset]).digest()
            figures.torn_checkpoints += found != [expected]


async def real_faults(num_faults: int, seed: int) -> RealFaultFigures:
    """So many faults, one after the other, while clients write and commit; everything is checked after each."""
    start, chance, figures = time.monotonic(), random.Random(seed), RealFaultFigures()
    async with StoreSite(seed=seed) as site, open_channel(site.proxy.address) as channel:
        client = StateStoreClient(channel, deadline_seconds=20.0)
        writers = [Writer(client, f"tenants/t/streams/s{number}", chance) for number in range(_NUM_WRITERS)]
        for writer in writers:
            await writer.create()
        for number in range(num_faults):
            kind, strike = _FAULTS[number % len(_FAULTS)] if number < len(_FAULTS) else chance.choice(_FAULTS)
            stop = asyncio.Event()
            working = [asyncio.create_task(work(writer, stop, figures)) for writer in writers]
            await asyncio.sleep(chance.uniform(0, _SETTLE_SECONDS))
            await strike(site, chance)
            figures.faults_by_kind[kind] += 1
            await asyncio.sleep(_SETTLE_SECONDS)
            stop.set()
            await asyncio.gather(*working)
            for writer in writers:
                await writer.check(figures)
        figures.acknowledged_bytes = sum(writer.num_acknowledged for writer in writers)
        figures.num_checkpoints = sum(writer.num_checkpoints for writer in writers)
    figures.seconds = time.monotonic() - start
    return figures


async def forced_retries(num_retries: int, seed: int) -> RetryFigures:
    """Append records; send each again, once or more, after it was acknowledged or its reply was thrown away."""
    start, chance = time.monotonic(), random.Random(seed)
    num_done, figures = 0, RealFaultFigures()
    async with StoreSite(seed=seed) as site, open_channel(site.proxy.address) as channel:
        client = StateStoreClient(channel, deadline_seconds=20.0)
        writers = [Writer(client, f"tenants/t/streams/s{number}", chance) for number in range(8)]
        for writer in writers:
            await writer.create()

        async def one(writer: Writer) -> int:
            """Append, then repeat the very same request."""
            begin = len(writer.log)
            figures.records_applied_twice += await writer.append()
            request = pb.AppendRecordRequest(
                name=writer.name, offset=begin, data=writer.log[begin:], kind=api.RECORD_KIND_TEXT
            )
            num_repeats = chance.randint(1, 4)
            for _ in range(num_repeats):
                answer = await insist(lambda: client.append_record(request))
                is_twice = not answer.already_exists or answer.accepted_offset != len(writer.log)
                figures.records_applied_twice += is_twice
            if begin > 400_000:
                await writer.commit()
            return num_repeats

        while num_done < num_retries:
            num_done += sum(await asyncio.gather(*map(one, writers)))
            if chance.random() < 0.02:
                # Replies on their way are lost: what they acknowledge is sent again by the client by itself.
                site.proxy.reset_all()
        for writer in writers:
            await writer.check(figures)
    assert figures.acknowledged_bytes_lost == 0, "bytes are gone"
    return RetryFigures(
        num_retries=num_done,
        records_applied_twice=figures.records_applied_twice,
        seconds=time.monotonic() - start,
    )


async def insist(call: Callable[[], Awaitable[T]]) -> T:
    """Repeat a call until the store answers; every one of them may be."""
    while True:
        try:
            return await call()
        except (Unavailable, DeadlineTooShort):
            await asyncio.sleep(0.02)


async def work(
    writer: Writer,
    stop: asyncio.Event,
    figures: RealFaultFigures,
    refusals: tuple[type[EunoeError], ...] = (Conflict,),
) -> None:
    """Append, and commit now and then, until it is to stop; a commit may meet these refusals."""
    while not stop.is_set():
        figures.records_applied_twice += await writer.append()
        if writer.num_acknowledged % 3 == 0:
            with contextlib.suppress(*refusals):
                await writer.commit()


async def _kill_redis(site: StoreSite, chance: random.Random) -> None:
    await site.redis.restart()


async def _kill_redis_while_it_rewrites(site: StoreSite, chance: random.Random) -> None:
    async with storage_at(site.redis.url) as storage:
        with contextlib.suppress(EunoeError):
            await storage.client.bgrewriteaof()
    await asyncio.sleep(chance.uniform(0, 0.05))
    await site.redis.restart()


async def _kill_store(site: StoreSite, chance: random.Random) -> None:
    await site.start_store()


async def _kill_store_at_failpoint(site: StoreSite, chance: random.Random) -> None:
    await site.start_store(f"{chance.choice(_FAILPOINTS)}=kill@{chance.randint(1, 6)}")
    give_up_at = time.monotonic() + 3.0
    while site.store.exit_status is None and time.monotonic() < give_up_at:
        await asyncio.sleep(0.01)
    await site.start_store()


async def _pause_redis(site: StoreSite, chance: random.Random) -> None:
    site.redis.stop_and_go(False)
    await asyncio.sleep(chance.uniform(0.2, 1.0))
    site.redis.stop_and_go(True)


async def _pause_store(site: StoreSite, chance: random.Random) -> None:
    site.store.stop_and_go(False)
    await asyncio.sleep(chance.uniform(0.2, 1.0))
    site.store.stop_and_go(True)


async def _reset_connections(site: StoreSite, chance: random.Random) -> None:
    proxy = chance.choice((site.proxy, site.redis_proxy))
    proxy.reset_after(chance.randint(0, 20_000))
    await asyncio.sleep(0.1)
    proxy.reset_all()
    proxy.heal()


async def _lose_replies(site: StoreSite, chance: random.Random) -> None:
    proxy = chance.choice((site.proxy, site.redis_proxy))
    proxy.lose_replies()
    await asyncio.sleep(chance.uniform(0.05, 0.3))
    proxy.heal()


async def _black_hole(site: StoreSite, chance: random.Random) -> None:
    proxy = chance.choice((site.proxy, site.redis_proxy))
    proxy.blackhole()
    await asyncio.sleep(chance.uniform(0.05, 0.8))
    proxy.heal()


async def _half_close(site: StoreSite, chance: random.Random) -> None:
    chance.choice((site.proxy, site.redis_proxy)).half_close_all()


_Fault = Callable[[StoreSite, random.Random], Awaitable[None]]
_FAULTS: tuple[tuple[str, _Fault], ...] = (
    ("kill Redis", _kill_redis),
    ("kill Redis while it rewrites its log", _kill_redis_while_it_rewrites),
    ("kill the state store", _kill_store),
    ("kill the state store at a failpoint", _kill_store_at_failpoint),
    ("pause Redis", _pause_redis),
    ("pause the state store", _pause_store),
    ("reset connections", _reset_connections),
    ("lose replies", _lose_replies),
    ("black hole", _black_hole),
    ("half-close", _half_close),
)
