"""Clocks of real processes jump, by minutes and by hours, while workers own a stream and clients write.

libfaketime stands between a process and its clock; the monotonic clock runs on, as it does when a machine's time is
set. Of the platform, only Redis' clock decides when something vanishes (workers' signs of life, staged chunks,
outcomes), and the state store's when a stream expires and when indexes of what has vanished are cleared; everything
else measures time with monotonic clocks. Workers here are the product's own `Ownership` over a commit loop, so that
one can go on committing without a sign of life.
"""

import asyncio
import os
import random
import secrets
import time
from collections import Counter
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from pathlib import Path

import xxhash
from google.protobuf.timestamp_pb2 import Timestamp
from store_faults import RealFaultFigures, Writer, insist, work
from store_processes import StoreSite, until

from eunoe.api.v1 import long_context_pb2 as api
from eunoe.clients.state_store import StateStoreClient
from eunoe.embedded.redis_server import bundled_server_binary
from eunoe.internal.v1 import state_store_pb2 as pb
from eunoe.model_worker.ownership import Ownership
from eunoe.runtime.errors import Conflict, MissingChunk, NotOwner, OutcomeNotFound, StreamNotFound
from eunoe.runtime.grpc_channel import open_channel

_STREAM, _KEPT = "tenants/t/streams/contested", "tenants/t/streams/kept"
_WORKER_SECONDS = 1.0
# What is staged, an outcome and the brief streams here live this long; within the slack they may go or stay.
_LIFE_SECONDS, _SLACK_SECONDS = 600, 60
_LARGE_SECONDS = 6 * 3600
_VICTIMS = (("redis",), ("store",), ("redis", "store"))
_FATES = ("lives", "hangs", "dies")


@dataclass(frozen=True, slots=True, kw_only=True)
class ClockFigures:
    """What jumps did.

    Attributes:
        jumps: By process; one at both counts twice.
        num_commits: Of the contested stream, accepted.
        num_takeovers: Times that its owner changed.
        stale_commits_refused: Under a lease that another worker had followed.
        stale_commits_accepted: The same.
        commits_lost: Acknowledged, and not there in the end.
        expired_early: What was gone before its time by the clock that decides.
        slowest_recovery_seconds: From a jump until all clients had written and a worker that was able to had committed.
    """

    jumps: dict[str, int]
    num_commits: int
    num_takeovers: int
    stale_commits_refused: int
    stale_commits_accepted: int
    commits_lost: int
    acknowledged_bytes: int
    acknowledged_bytes_lost: int
    records_applied_twice: int
    expired_early: tuple[str, ...]
    slowest_recovery_seconds: float
    seconds: float


def find_libfaketime() -> Path | None:
    """The library for processes with threads, where the package faketime is installed."""
    return next(Path("/usr/lib").glob("*/faketime/libfaketimeMT.so.1"), None)


async def clock_jumps(num_jumps: int, seed: int, directory: Path, library: Path) -> ClockFigures:
    """Let clocks jump, one after the other, and see that everything goes on after each.

    Args:
        num_jumps: How many.
        seed: Of jumps and fates.
        directory: For the files that hold the clocks.
        library: libfaketime.
    """
    start, chance, found = time.monotonic(), random.Random(seed), RealFaultFigures()
    clocks = {name: _Clock(directory / name, library) for name in ("redis", "store")}
    store_variables = {"WORKER_SECONDS": str(_WORKER_SECONDS), "SWEEP_SECONDS": "0.3"}
    ledger, jumps, early, slowest = _Ledger(), Counter[str](), list[str](), 0.0
    async with AsyncExitStack() as stack:
        site = await stack.enter_async_context(
            StoreSite(
                seed=seed,
                redis_environment=clocks["redis"].environment,
                # Debian's redis-server does not start: its jemalloc reads the clock while the library starts.
                redis_binary=bundled_server_binary(),
                store_environment={
                    **clocks["store"].environment,
                    **{f"EUNOE_STATE_STORE_{name}": value for name, value in store_variables.items()},
                },
            )
        )
        channel = await stack.enter_async_context(open_channel(site.proxy.address))
        store = StateStoreClient(channel, deadline_seconds=20.0)
        writers = [Writer(store, f"tenants/t/streams/s{number}", chance) for number in range(2)]
        for writer in writers:
            await writer.create()
        await _create(store, _STREAM)
        await _create(store, _KEPT)
        workers = [await stack.enter_async_context(_Worker(store, ledger)) for _ in range(2)]
        stop = asyncio.Event()
        async with asyncio.TaskGroup() as writing:
            for writer in writers:
                # Chunks are missing if a clock jumped over the end of their time.
                writing.create_task(work(writer, stop, found, (Conflict, MissingChunk)))
            for number in range(num_jumps):
                await ledger.commits_by(workers)
                owner = next(worker for worker in workers if worker.name == ledger.owner)
                fate, victims = chance.choice(_FATES), chance.choice(_VICTIMS)
                short_lived = await _ShortLived.made(store, number, clocks["store"])
                if fate == "hangs":
                    owner.is_able = False
                elif fate == "dies":
                    await owner.__aexit__()
                seconds = _size(chance, [clocks[name] for name in victims])
                for name in victims:
                    clocks[name].jump(seconds)
                    jumps[name] += 1
                jumped_at = time.monotonic()
                able = [worker for worker in workers if fate == "lives" or worker is not owner]
                await asyncio.gather(
                    ledger.commits_by(able, f"{seconds} s at {victims}, and the owner {fate}"),
                    *map(_one_more_record, writers),
                )
                slowest = max(slowest, time.monotonic() - jumped_at)
                early += [
                    f"{what} after {seconds} s of {victims}" for what in await short_lived.early(seconds, victims)
                ]
                owner.is_able = True
                if fate == "dies":
                    workers[workers.index(owner)] = await stack.enter_async_context(_Worker(store, ledger))
            stop.set()
        for worker in workers:
            await worker.__aexit__()
        for writer in writers:
            await writer.check(found)
        record = (await store.get_stream(pb.GetStreamRequest(name=_STREAM))).record
        assert found.torn_checkpoints == 0, "a checkpoint is torn"
    return ClockFigures(
        jumps=dict(jumps),
        num_commits=len(ledger.commits),
        num_takeovers=len(ledger.epochs),
        stale_commits_refused=ledger.num_refused,
        stale_commits_accepted=ledger.num_stale,
        commits_lost=max(0, max(ledger.commits) - record.manifest.version),
        acknowledged_bytes=sum(writer.num_acknowledged for writer in writers),
        acknowledged_bytes_lost=found.acknowledged_bytes_lost,
        records_applied_twice=found.records_applied_twice,
        expired_early=tuple(early),
        slowest_recovery_seconds=slowest,
        seconds=time.monotonic() - start,
    )


class _Clock:
    """The wall clock of one process, ahead of ours by `offset` seconds."""

    def __init__(self, path: Path, library: Path) -> None:
        self._path = path
        self.offset = 0
        self.jump(0)
        self.environment = {
            "LD_PRELOAD": str(library),
            "FAKETIME_TIMESTAMP_FILE": str(path),
            "FAKETIME_NO_CACHE": "1",
            "DONT_FAKE_MONOTONIC": "1",
            # The library's remedy for an old glibc: with it, waits of threads take seconds too long now and then.
            "FAKETIME_FORCE_MONOTONIC_FIX": "0",
        }

    def jump(self, seconds: int) -> None:
        self.offset += seconds
        # At once: the process may read it at any moment.
        unfinished = self._path.with_suffix(".new")
        unfinished.write_text(f"{self.offset:+d}\n")
        os.replace(unfinished, self._path)


def _size(chance: random.Random, clocks: list[_Clock]) -> int:
    """Half of the jumps are within the life of what is short-lived; large ones come back when they got far."""
    if chance.random() < 0.5:
        return chance.randint(-_LIFE_SECONDS, _LIFE_SECONDS - _SLACK_SECONDS)
    size = chance.randint(_LIFE_SECONDS + _SLACK_SECONDS, _LARGE_SECONDS)
    return -size if sum(clock.offset for clock in clocks) > 0 else size


@dataclass(slots=True)
class _Ledger:
    """What workers were told: every epoch and when it was known, every accepted commit's worker by its version."""

    epochs: dict[int, float] = field(default_factory=dict)
    commits: dict[int, str] = field(default_factory=dict)
    owner: str = ""
    num_refused: int = 0
    num_stale: int = 0

    def note_lease(self, lease: pb.Lease) -> None:
        self.epochs.setdefault(lease.epoch, time.monotonic())
        if lease.epoch == max(self.epochs):
            self.owner = lease.worker

    def note_commit(self, version: int, lease: pb.Lease, sent_at: float) -> None:
        is_stale = any(epoch > lease.epoch and known_at < sent_at for epoch, known_at in self.epochs.items())
        self.num_stale += is_stale or version in self.commits
        self.commits[version] = lease.worker

    async def commits_by(self, workers: "list[_Worker]", after: str = "the start") -> None:
        """Wait for another commit by one of them.

        Raises:
            HarnessError: If none comes.
        """
        num_before, names = len(self.commits), {worker.name for worker in workers}

        async def condition() -> bool:
            return any(name in names for name in list(self.commits.values())[num_before:])

        await until(condition, f"no worker that is able to commits after {after}")


class _Worker:
    """Takes the contested stream when it can and commits as long as it owns it; listens while it lives.

    Attributes:
        is_able: Whether it gives signs of life; it commits in any case.
    """

    def __init__(self, store: StateStoreClient, ledger: _Ledger) -> None:
        self.name = secrets.token_hex(8)
        self.is_able = True
        self._store = store
        self._ledger = ledger
        self._tasks: list[asyncio.Task[None]] = []
        self._server: asyncio.Server

    async def __aenter__(self) -> "_Worker":
        self._server = await asyncio.start_server(lambda _, writer: writer.close(), "127.0.0.1", 0)
        host, port = self._server.sockets[0].getsockname()
        ownership = Ownership(self._store, pb.Worker(worker=self.name, address=f"{host}:{port}"))
        renewing = ownership.renew_forever(_WORKER_SECONDS / 3, lambda: self.is_able)
        self._tasks = [asyncio.create_task(renewing), asyncio.create_task(self._own(ownership))]
        return self

    async def __aexit__(self, *_: object) -> None:
        """Die, leaving lease and directory as they are."""
        self._server.close()
        for task in self._tasks:
            task.cancel()
        results = await asyncio.gather(*self._tasks, return_exceptions=True)
        for result in results:
            if isinstance(result, Exception):
                raise result

    async def _own(self, ownership: Ownership) -> None:
        while True:
            try:
                record = await insist(lambda: ownership.acquire(_STREAM))
            except NotOwner:
                await asyncio.sleep(0.02)
                continue
            self._ledger.note_lease(record.lease)
            try:
                while True:
                    sent_at = time.monotonic()
                    after = await _commit(self._store, record)
                    self._ledger.note_commit(after.manifest.version, record.lease, sent_at)
                    record.manifest.CopyFrom(after.manifest)
                    await asyncio.sleep(0.01)
            except MissingChunk:
                continue
            except Conflict:
                self._ledger.num_refused += 1


class _ShortLived:
    """An outcome, a staged chunk and a stream that all have the same time to live, made before a jump."""

    def __init__(self, store: StateStoreClient, number: int) -> None:
        self._store = store
        self._request_id = f"request{number}"
        self._name = f"tenants/t/streams/brief{number}"
        self._record = pb.StreamRecord()
        self._chunk = (secrets.token_hex(16), secrets.token_bytes(100))

    @classmethod
    async def made(cls, store: StateStoreClient, number: int, clock: _Clock) -> "_ShortLived":
        made = cls(store, number)
        stream = (await store.get_stream(pb.GetStreamRequest(name=_KEPT))).record.stream
        request = pb.AppendRecordRequest(
            name=_KEPT,
            offset=stream.accepted_offset,
            data=b"remember ",
            kind=api.RECORD_KIND_TEXT,
            request_id=made._request_id,
            outcome=b"done",
        )
        await store.append_record(request)
        expire_time = Timestamp(seconds=int(time.time()) + clock.offset + _LIFE_SECONDS)
        await _create(store, made._name, expire_time)
        by = pb.Lease(worker="keeper", address="127.0.0.1:1")
        made._record = (await store.acquire_stream(pb.AcquireStreamRequest(name=_KEPT, by=by))).record
        await store.stage_chunks(_KEPT, [made._chunk])
        return made

    async def early(self, seconds: int, victims: tuple[str, ...]) -> list[str]:
        """What is gone although no clock that decides has reached the end of its time."""
        redis_seconds = seconds if "redis" in victims else 0
        store_seconds = seconds if "store" in victims else 0
        gone = []
        try:
            await self._store.get_outcome(pb.GetOutcomeRequest(name=_KEPT, request_id=self._request_id))
        except OutcomeNotFound:
            gone += ["the outcome"] if max(redis_seconds, store_seconds) < _LIFE_SECONDS - _SLACK_SECONDS else []
        try:
            await self._store.get_stream(pb.GetStreamRequest(name=self._name))
            assert store_seconds < _LIFE_SECONDS, "a stream is there after its end"
        except StreamNotFound:
            gone += ["the stream"] if store_seconds < _LIFE_SECONDS - _SLACK_SECONDS else []
        try:
            await _commit(self._store, self._record, chunk=self._chunk)
        except MissingChunk:
            gone += ["the chunk"] if redis_seconds < _LIFE_SECONDS - _SLACK_SECONDS else []
        return gone


async def _commit(
    store: StateStoreClient, record: pb.StreamRecord, chunk: tuple[str, bytes] | None = None
) -> pb.StreamRecord:
    """Commit a chunk, staged now or before, as the next version of a record's stream; gives the record after it."""
    chunk_id, data = chunk or (secrets.token_hex(16), b"state")
    name, before = record.stream.name, record.manifest
    if chunk is None:
        await insist(lambda: store.stage_chunks(name, [(chunk_id, data)]))
    reference = pb.ChunkRef(chunk_id=chunk_id, length=len(data), digest=xxhash.xxh3_128_digest(data))
    manifest = pb.Manifest(encoding_version=1, version=before.version + 1, chunks=[reference])
    request = pb.CommitCheckpointRequest(name=name, lease=record.lease, manifest=manifest, parent_chain=before.chain)
    return (await insist(lambda: store.commit_checkpoint(request))).record


async def _one_more_record(writer: Writer) -> None:
    num_before = writer.num_acknowledged

    async def condition() -> bool:
        return writer.num_acknowledged > num_before

    await until(condition, "a client cannot write")


async def _create(store: StateStoreClient, name: str, expire_time: Timestamp | None = None) -> None:
    settings = api.StreamSettings(
        kv_budget_tokens=64, segment_length=16, num_sink_tokens=4, positions=api.POSITION_MODE_COMPACT
    )
    request = pb.CreateStreamRequest(name=name, model="m", settings=settings, request_id=name, expire_time=expire_time)
    await store.create_stream(request)
