"""The append-only file ends anywhere: Redis and the state store must open it and have a prefix of what was done.

A real state store does something of everything; what streams look like after each acknowledgement, and how long the
file was, is remembered. Then a Redis is started on a copy that is cut at a byte, and the state store's own code reads
everything: it must all be as of one moment, the last that was acknowledged by that byte or the one after it, and
whoever has seen a later one must be told. Afterwards clients send again what is gone.
"""

import asyncio
import contextlib
import os
import random
import shutil
import tempfile
import time
from collections.abc import AsyncIterator, Awaitable
from dataclasses import dataclass, field
from pathlib import Path

import xxhash
from store_processes import HarnessError, RedisProcess, storage_at

from eunoe.runtime.errors import EunoeError, LeaseLost, MissingChunk, StateLost, StreamNotFound
from eunoe.state_store import keys
from eunoe.state_store.chains import LogMark
from eunoe.state_store.config import StateStoreConfig
from eunoe.state_store.effects import Total
from eunoe.state_store.log_rules import Append
from eunoe.state_store.metadata import ChunkRef, Lease, Manifest, Settings, StreamMetadata
from eunoe.state_store.redis_storage import RedisStorage
from eunoe.state_store.store import StateStore
from eunoe.state_store.stream_rules import Create, Fork
from eunoe.state_store.transactions import Environment, member_as_entry

_TENANT = "t"
_BOOK, _FORK, _DRAFT = (f"tenants/{_TENANT}/streams/{name}" for name in ("book", "fork", "draft"))
_FILE = Path("appendonlydir") / "appendonly.aof.1.incr.aof"
# Staged chunks must not vanish while the cuts are tried.
_CONFIG = StateStoreConfig(staging_seconds=86_400.0)
_LANES = 2


@dataclass(frozen=True, slots=True, kw_only=True)
class CutFigures:
    """What became of cuts.

    Attributes:
        num_cuts: Files tried, of `num_places` at which something could be missing.
        num_inside: Cuts at which part of a command or transaction was in the file, and was dropped.
        num_marks: Log marks that clients had been acknowledged and presented again.
        num_gone: Of these, those whose bytes were gone; all others must be welcome.
        problems: What should not be, each with its cut.
    """

    num_cuts: int
    num_places: int
    num_inside: int
    num_marks: int
    num_gone: int
    problems: tuple[str, ...]
    seconds: float


async def file_cuts(num_cuts: int, num_last: int, seed: int, directory: Path) -> CutFigures:
    """Cut the file at random bytes and at each of the last ones, and look at what is there.

    Args:
        num_cuts: How many random ones.
        num_last: How many last ones; 6,000 reach back over a commit, an append and a deletion.
        seed: Of the choice.
        directory: For the databases; its path has at most 70 bytes.
    """
    start = time.monotonic()
    history = await _History.made(directory / "whole")
    places = range(history.moments[0].num_bytes, history.moments[-1].num_bytes + 1)
    cuts = random.Random(seed).sample(places[: len(places) - num_last], num_cuts)
    cuts += places[len(places) - num_last :]
    tally = _Tally()

    async def lane(number: int) -> None:
        for cut in cuts[number::_LANES]:
            with tempfile.TemporaryDirectory(dir=directory) as copy:
                try:
                    await _try(history, cut, Path(copy), tally)
                except (HarnessError, EunoeError) as error:
                    tally.problems.append(f"cut at {cut}: {type(error).__name__}: {error}")

    await asyncio.gather(*map(lane, range(_LANES)))
    return CutFigures(
        num_cuts=len(cuts),
        num_places=len(places),
        num_inside=tally.num_inside,
        num_marks=tally.num_marks,
        num_gone=tally.num_gone,
        problems=tuple(tally.problems),
        seconds=time.monotonic() - start,
    )


@dataclass(slots=True)
class _Tally:
    num_inside: int = 0
    num_marks: int = 0
    num_gone: int = 0
    problems: list[str] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class _Moment:
    """After an acknowledgement: how long the file was, and the records of the streams that there were."""

    num_bytes: int
    streams: dict[str, StreamMetadata]


class _History:
    """What was done, and all bytes that were ever given to the store.

    Attributes:
        moments: In order; the first one is before the first stream.
        texts: The log of each stream.
        chunks: By id.
    """

    def __init__(self, directory: Path, store: StateStore) -> None:
        self.directory = directory
        self._store = store
        self.moments: list[_Moment] = []
        self.texts = {_BOOK: b"", _FORK: b"", _DRAFT: b""}
        self.chunks: dict[str, bytes] = {}

    @classmethod
    async def made(cls, directory: Path) -> "_History":
        """Do something of everything."""
        redis = RedisProcess(directory)
        await redis.start()
        try:
            async with _opened(redis) as store:
                history = cls(directory, store)
                await history._note()
                await history._do_everything()
        finally:
            redis.kill()
        return history

    def marks(self, name: str) -> list[LogMark]:
        """The ends of a stream's log, and the chains there, that clients were told of."""
        seen = [moment.streams[name] for moment in self.moments if name in moment.streams]
        return list(dict.fromkeys(LogMark(m.accepted_offset, m.log_chain) for m in seen if m.accepted_offset))

    def possible(self, cut: int) -> list[dict[str, StreamMetadata]]:
        """The records as of the last moment within the first `cut` bytes, and as of the one after it."""
        last = max(i for i, moment in enumerate(self.moments) if moment.num_bytes <= cut)
        return [moment.streams for moment in self.moments[last : last + 2]]

    async def _do_everything(self) -> None:
        streams = self._store.streams
        await self._create(_BOOK)
        # The second record begins within a character.
        for data in (b"In the beginning was the w\xc3", b"\xb6rd, and "):
            await self._append(_BOOK, data)
        lease = (await streams.acquire(_BOOK, Lease("worker", 0, "host:1"), None)).lease
        assert lease is not None
        await self._note()
        await self._commit(_BOOK, lease, version=1)
        await self._append(_BOOK, b"the word was ", request_id="request")
        await streams.fork(_BOOK, Fork(name=_FORK, at_offset=None))
        self.texts[_FORK] = self.texts[_BOOK]
        await self._note()
        await self._append(_FORK, b"forked.")
        await self._create(_DRAFT)
        await self._append(_DRAFT, b"Never mind.")
        for version in (2, 3, 4, 5):
            await self._append(_BOOK, b"with me. ")
            await self._commit(_BOOK, lease, version=version)
        await self._append(_FORK, b" Amen.")
        await streams.delete(_DRAFT)
        await self._note()

    async def _create(self, name: str) -> None:
        await self._store.streams.create(Create(name=name, model="m", settings=Settings(64, 16, 4, 2, True)))
        await self._note()

    async def _append(self, name: str, data: bytes, request_id: str = "") -> None:
        event = Append(offset=len(self.texts[name]), data=data, source_id="s", request_id=request_id, outcome=b"done")
        await self._store.logs.append(name, event)
        self.texts[name] += data
        await self._note()

    async def _commit(self, name: str, lease: Lease, version: int) -> None:
        contents = {f"{version}-{number}": bytes([version, number]) * 20 for number in range(2)}
        self.chunks |= contents

        async def chunks() -> AsyncIterator[tuple[str, bytes]]:
            for content in contents.items():
                yield content

        await self._store.checkpoints.stage(name, chunks())
        await self._note()
        manifest = manifest_of(version, len(self.texts[name]), contents)
        parent = self.moments[-1].streams[name].newest
        await self._store.commit(name, manifest, lease.fence, parent_chain="" if parent is None else parent.chain)
        await self._note()

    async def _note(self) -> None:
        await self._store.settle()
        num_bytes = (self.directory / _FILE).stat().st_size
        self.moments.append(_Moment(num_bytes, await _records(self._store)))


def manifest_of(version: int, applied_offset: int, contents: dict[str, bytes]) -> Manifest:
    """As a worker describes a state."""
    return Manifest(
        encoding_version=1,
        version=version,
        applied_offset=applied_offset,
        applied_pretoken_tokens=0,
        tokens=applied_offset,
        state_bytes=1,
        state_digest="",
        model_digest="m",
        decisions=(),
        chunks=tuple(ChunkRef(i, len(data), xxhash.xxh3_128_hexdigest(data)) for i, data in contents.items()),
    )


async def _records(store: StateStore) -> dict[str, StreamMetadata]:
    found = {}
    for name in (_BOOK, _FORK, _DRAFT):
        with contextlib.suppress(StreamNotFound):
            found[name] = await store.streams.get(name)
    return found


@contextlib.asynccontextmanager
async def _opened(redis: RedisProcess) -> AsyncIterator[StateStore]:
    """A state store as its process begins."""
    async with storage_at(redis.url) as storage:
        await storage.load_function()
        yield StateStore(Environment(storage=storage, config=_CONFIG))


async def _try(history: _History, cut: int, directory: Path, tally: _Tally) -> None:
    shutil.copytree(history.directory / _FILE.parent, directory / _FILE.parent)
    os.truncate(directory / _FILE, cut)
    redis = RedisProcess(directory)
    try:
        await redis.start()
        tally.num_inside += (directory / _FILE).stat().st_size < cut
        async with _opened(redis) as store:
            found = await _records(store)
            if found not in history.possible(cut):
                tally.problems.append(f"cut at {cut}: the records are of no moment")
            async for problem in _problems(history, store, found, tally):
                tally.problems.append(f"cut at {cut}: {problem}")
    finally:
        redis.kill()


async def _problems(
    history: _History, store: StateStore, found: dict[str, StreamMetadata], tally: _Tally
) -> AsyncIterator[str]:
    for name, metadata in found.items():
        if await _log(store, metadata) != history.texts[name][metadata.log_start_offset : metadata.accepted_offset]:
            yield f"{name} has another log"
        for manifest in metadata.checkpoints:
            chunks = {chunk_id: data async for chunk_id, data in store.checkpoints.read(name, manifest.chunks)}
            if chunks != {chunk.chunk_id: history.chunks[chunk.chunk_id] for chunk in manifest.chunks}:
                yield f"checkpoint {manifest.version} of {name} is torn"
        for mark in history.marks(name):
            is_gone = mark.offset > metadata.accepted_offset
            tally.num_marks += 1
            tally.num_gone += is_gone
            if await _is_refused(store.logs.check_seen(metadata, mark), StateLost) != is_gone:
                yield f"whoever saw {name} up to {mark.offset} is {'not ' if is_gone else ''}told of a loss"
    if _BOOK in found and not await _is_refused(_next_commit(history, store), StateLost, LeaseLost):
        yield "a worker's commit follows one that is gone"
    async for problem in _leftovers(store, found):
        yield problem
    for name, metadata in found.items():
        rest = history.texts[name][metadata.accepted_offset :]
        if rest:
            again = Append(offset=metadata.accepted_offset, data=rest, after_chain=metadata.log_chain)
            await store.logs.append(name, again)
        if await _log(store, metadata) != history.texts[name][metadata.log_start_offset :]:
            yield f"{name} does not go on"


async def _log(store: StateStore, metadata: StreamMetadata) -> bytes:
    return b"".join([piece.data async for piece in store.logs.read(metadata.name, metadata.log_start_offset, 0)])


async def _is_refused(call: Awaitable[object], *errors: type[EunoeError]) -> bool:
    try:
        await call
    except errors:
        return True
    return False


async def _next_commit(history: _History, store: StateStore) -> None:
    """What the worker would commit after the last commit that it was acknowledged, under its lease of that time."""
    last = history.moments[-1].streams[_BOOK]
    assert last.newest is not None
    assert last.lease is not None
    manifest = manifest_of(last.version + 1, last.accepted_offset, {"not staged": b"-"})
    read = LogMark(last.accepted_offset, last.log_chain)
    try:
        await store.commit(_BOOK, manifest, last.lease.fence, parent_chain=last.newest.chain, read=read)
    except MissingChunk:
        # It was let in, so the commit before it must be there.
        if (await store.streams.get(_BOOK)).newest == last.newest:
            raise LeaseLost("nothing is gone") from None


async def _leftovers(store: StateStore, found: dict[str, StreamMetadata]) -> AsyncIterator[str]:
    """After a sweep every value must be named, every name have its value, and the totals be theirs."""
    await store.settle()
    await store.sweeper.sweep()
    storage = store.environment.storage
    assert isinstance(storage, RedisStorage)
    rows: set[str] = set()
    values: set[str] = set()
    num_bytes = 0
    async for key in storage.client.scan_iter(f"{keys.log_index(_TENANT, '*')}"):
        name = key.decode()
        if await storage.client.type(key) == b"string":
            values.add(name)
            continue
        for member, end in await storage.client.zrange(key, 0, -1, withscores=True):
            entry = member_as_entry(member.decode(), int(end))
            rows.add(f"{name}:{entry.start}")
            num_bytes += entry.end - entry.start
    if rows != values:
        yield f"the log's index and its records differ in {rows ^ values}"
    lasting = {
        key.decode().rpartition(":")[2]
        async for key in storage.client.scan_iter(keys.chunk(_TENANT, "*"))
        if await storage.client.ttl(key) == -1
    }
    named = {c.chunk_id: c for metadata in found.values() for m in metadata.checkpoints for c in m.chunks}
    if lasting != named.keys():
        yield f"chunks and manifests differ in {lasting ^ named.keys()}"
    totals = await storage.totals(keys.totals(_TENANT))
    expected = {
        Total.STREAMS: len(found),
        Total.LOG_BYTES: num_bytes,
        Total.CHECKPOINT_BYTES: sum(chunk.length for chunk in named.values()),
    }
    if any(totals.get(total, 0) != expected[total] for total in Total):
        yield f"the totals are {totals}, and should be {expected}"
