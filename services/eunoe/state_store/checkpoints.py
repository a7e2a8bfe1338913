"""Checkpoints: staging chunks, committing a manifest that names them, reading them back."""

import asyncio
import logging
from collections.abc import AsyncIterable, AsyncIterator, Sequence

import xxhash
from prometheus_client import Counter

from eunoe.runtime.errors import CorruptState, InvalidRequest, MissingChunk, QuotaExceeded, StreamNotFound
from eunoe.runtime.failpoints import failpoint
from eunoe.state_store import checkpoint_rules, keys
from eunoe.state_store.chains import LogMark
from eunoe.state_store.checkpoint_rules import MAX_CHUNK_BYTES
from eunoe.state_store.effects import Total
from eunoe.state_store.log import Logs
from eunoe.state_store.metadata import ChunkRef, Manifest, StreamMetadata
from eunoe.state_store.sealing import Seal
from eunoe.state_store.storage import Delete, IndexAdd, IndexRemove
from eunoe.state_store.transactions import Environment, Transaction, transact

logger = logging.getLogger(__name__)

QUARANTINES = Counter("eunoe_store_quarantines", "Times that a stored chunk was found damaged and put in quarantine")

# Chunks of a checkpoint written at once: other clients of Redis wait for as many at worst, and the disk is kept busy.
_CHUNKS_IN_FLIGHT = 2
_CHUNKS_PER_READ = 2


class Checkpoints:
    """The checkpoints of all streams."""

    def __init__(self, environment: Environment, logs: Logs) -> None:
        self._environment = environment
        self._logs = logs

    async def stage(self, name: str, chunks: AsyncIterable[tuple[str, bytes]]) -> int:
        """Stage (chunk id, bytes) pairs until a commit or the end of their time, and return how many bytes they have.

        The stream need not exist yet: an import stages first.

        Raises:
            InvalidRequest, QuotaExceeded; StreamNotFound if it was deleted meanwhile.
        """
        tenant, _ = keys.parse_name(name)
        totals = await self._environment.storage.totals(keys.totals(tenant))
        room_bytes = self._environment.quota(Total.CHECKPOINT_BYTES) - totals.get(Total.CHECKPOINT_BYTES, 0)
        ttl_ms = int(self._environment.config.staging_seconds * 1000)
        staged_bytes = 0
        storage = self._environment.storage
        uid, wrapped_key = await self._staged_for(name)
        seal = self._environment.keyring.seal(tenant, wrapped_key)
        chunk_ids: list[str] = []
        slots = asyncio.Semaphore(_CHUNKS_IN_FLIGHT)

        async def write(chunk_id: str, data: bytes) -> None:
            try:
                sealed = seal.close(_chunk_identity(chunk_id), data)
                staging = [storage.stage([(keys.chunk(tenant, chunk_id), sealed)], ttl_ms)]
                if uid:
                    # A deletion must find it although no commit names it.
                    end_ms = self._environment.now_ms() + ttl_ms
                    staging.append(storage.apply([IndexAdd(keys.staged_index(tenant, uid), end_ms, chunk_id)]))
                await asyncio.gather(*staging)
            finally:
                slots.release()

        tasks: list[asyncio.Task[None]] = []
        try:
            async for chunk_id, data in chunks:
                if not chunk_id or not 1 <= len(data) <= MAX_CHUNK_BYTES:
                    raise InvalidRequest(f"chunk {chunk_id!r} needs an id and 1 to {MAX_CHUNK_BYTES} bytes")
                staged_bytes += len(data)
                if staged_bytes > room_bytes:
                    raise QuotaExceeded(
                        f"the tenant's quota {Total.CHECKPOINT_BYTES} is used up",
                        quota=Total.CHECKPOINT_BYTES,
                        retry_after_seconds=60.0,
                    )
                await slots.acquire()
                chunk_ids.append(chunk_id)
                tasks.append(asyncio.create_task(write(chunk_id, data)))
            await asyncio.gather(*tasks)
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
        if uid:
            await self._check_still_there(name, uid, chunk_ids)
        failpoint("store.stage.done")
        return staged_bytes

    async def commit(
        self,
        name: str,
        manifest: Manifest,
        fence: tuple[str, int],
        *,
        parent_chain: str | None = None,
        read: LogMark | None = None,
    ) -> StreamMetadata:
        """Make a manifest the stream's newest checkpoint; repeating it is harmless.

        Args:
            name: The stream.
            manifest: As its worker describes it, the chunks staged.
            fence: The lease that it was computed under.
            parent_chain: As in `checkpoint_rules.commit`.
            read: Where the worker's reading of the log ends.

        Raises:
            StreamNotFound, MissingChunk, QuotaExceeded; StateLost if the worker has read what the log does not have;
            as `checkpoint_rules.commit`.
        """

        async def decide(transaction: Transaction) -> StreamMetadata:
            metadata = await transaction.stream(name)
            try:
                change = checkpoint_rules.commit(metadata, manifest, fence, parent_chain=parent_chain)
            except InvalidRequest:
                # A state of a log that was rolled back since may lie beyond its end now: that is no worker's mistake.
                if read is not None:
                    await self._logs.check_seen(metadata, read)
                raise
            if read is not None and change.records:
                await self._logs.check_seen(metadata, read)
            failpoint("store.commit.before-swap")
            await transaction.commit(change)
            failpoint("store.commit.after-swap")
            return (change.records or (metadata,))[0]

        return await transact(self._environment, keys.parse_name(name)[0], decide)

    async def read(self, name: str, chunks: Sequence[ChunkRef]) -> AsyncIterator[tuple[str, bytes]]:
        """Chunks of a checkpoint that the stream has, with their bytes, in order.

        Raises:
            StreamNotFound; MissingChunk if the stream has no such chunk (any more); CorruptState if its bytes are not
            those that were committed. The checkpoint is in quarantine then, and the stream's newest is an older one.
        """
        tenant, _ = keys.parse_name(name)
        metadata = await Transaction(self._environment, tenant).stream(name)
        present = _chunks_of(metadata)
        seal = self._environment.keyring.seal(tenant, metadata.wrapped_key)
        for start in range(0, len(chunks), _CHUNKS_PER_READ):
            batch = chunks[start : start + _CHUNKS_PER_READ]
            values = await self._environment.storage.get([keys.chunk(tenant, chunk.chunk_id) for chunk in batch])
            if None in values:
                # A checkpoint that went while it was read is gone, not corrupt.
                present = _chunks_of(await Transaction(self._environment, tenant).stream(name))
            for chunk, sealed in zip(batch, values, strict=True):
                if chunk not in present:
                    raise MissingChunk(f"the stream has no chunk {chunk.chunk_id}")
                try:
                    yield chunk.chunk_id, _opened(chunk, sealed, seal)
                except CorruptState:
                    yield chunk.chunk_id, await self._second_look(name, chunk, seal)

    async def _second_look(self, name: str, chunk: ChunkRef, seal: Seal) -> bytes:
        """The chunk's bytes after all, if they were damaged only on their way here.

        Raises:
            CorruptState: If they are damaged where they are stored; what they belong to is in quarantine now.
        """
        tenant, _ = keys.parse_name(name)
        (sealed,) = await self._environment.storage.get([keys.chunk(tenant, chunk.chunk_id)])
        try:
            return _opened(chunk, sealed, seal)
        except CorruptState as error:
            damage = error

        async def decide(transaction: Transaction) -> None:
            change = checkpoint_rules.quarantine(await transaction.stream(name), chunk)
            await transaction.commit(change)
            for metadata in change.records:
                QUARANTINES.inc()
                newest = 0 if metadata.newest is None else metadata.newest.version
                logger.error(
                    "a checkpoint is damaged; an older one takes its place",
                    extra={"stream": name, "problem": str(damage), "version": newest},
                )

        await transact(self._environment, tenant, decide)
        raise damage

    async def _staged_for(self, name: str) -> tuple[str, str]:
        """(uid, wrapped key) of the stream; of one that is still to be imported, "" and a key that its creation takes
        up. One that has expired does not count: the creation begins with removing it, and its key.
        """
        tenant, stream_id = keys.parse_name(name)
        metadata = await Transaction(self._environment, tenant).stream_or_none(name)
        if metadata is not None and not metadata.is_expired(self._environment.clock_ns()):
            return metadata.uid, metadata.wrapped_key
        wrapped_key = self._environment.keyring.new_key(tenant)
        if wrapped_key:
            ttl_ms = int(self._environment.config.staging_seconds * 1000)
            pending = keys.pending_key(tenant, stream_id)
            await self._environment.storage.stage([(pending, wrapped_key.encode())], ttl_ms)
        return "", await new_stream_key(self._environment, name) if wrapped_key else ""

    async def _check_still_there(self, name: str, uid: str, chunk_ids: Sequence[str]) -> None:
        """Remove what was staged for a stream that was deleted meanwhile: its deletion may not have seen it.

        Raises:
            StreamNotFound.
        """
        tenant, _ = keys.parse_name(name)
        metadata = await Transaction(self._environment, tenant).stream_or_none(name)
        if metadata is None or metadata.uid != uid:
            index = keys.staged_index(tenant, uid)
            removals = [(Delete(keys.chunk(tenant, each)), IndexRemove(index, each)) for each in chunk_ids]
            await self._environment.storage.apply([write for pair in removals for write in pair])
            raise StreamNotFound(f"the stream {name} was deleted")


async def new_stream_key(environment: Environment, name: str) -> str:
    """The wrapped key for a stream to make: the one that chunks were staged for it with, else a new one."""
    tenant, stream_id = keys.parse_name(name)
    (pending,) = await environment.storage.get([keys.pending_key(tenant, stream_id)])
    return environment.keyring.new_key(tenant) if pending is None else pending.decode()


def _opened(chunk: ChunkRef, sealed: bytes | None, seal: Seal) -> bytes:
    """The bytes of a stored chunk.

    Raises:
        CorruptState.
    """
    data = b"" if sealed is None else seal.open(_chunk_identity(chunk.chunk_id), sealed)
    if len(data) != chunk.length or xxhash.xxh3_128_hexdigest(data) != chunk.digest:
        raise CorruptState(f"chunk {chunk.chunk_id} does not have its digest")
    return data


def _chunks_of(metadata: StreamMetadata) -> frozenset[ChunkRef]:
    return frozenset(chunk for manifest in metadata.checkpoints for chunk in manifest.chunks)


def _chunk_identity(chunk_id: str) -> str:
    return f"chunk {chunk_id}"
