"""The directory of living workers and the index of streams that wait for one: hints, repaired when they are wrong.

Nothing here is trusted for safety. A worker that is missing may live, and a listed stream may have no backlog.
"""

import asyncio
import logging
from collections.abc import Sequence

from eunoe.internal.v1 import state_store_pb2 as pb
from eunoe.runtime.errors import InvalidRequest, Unavailable
from eunoe.state_store import keys
from eunoe.state_store.metadata import StreamMetadata
from eunoe.state_store.metadata_codec import decode
from eunoe.state_store.storage import Delete, IndexAdd, IndexRemove, PutValue, Shorten, Storage, Write

logger = logging.getLogger(__name__)

_FLUSH_PAUSE_SECONDS = 0.02
_MAX_WORKERS = 10_000


class WorkerDirectory:
    """Workers that renewed within `worker_seconds`."""

    def __init__(self, storage: Storage, worker_seconds: float) -> None:
        self._storage = storage
        self._ttl_ms = int(worker_seconds * 1000)
        self._found_dead: set[str] = set()

    async def renew(self, worker: pb.Worker) -> None:
        if not worker.worker or not worker.address:
            raise InvalidRequest("a worker needs an incarnation and an address")
        await self._storage.apply(
            [
                PutValue(keys.worker(worker.worker), worker.SerializeToString(), self._ttl_ms),
                IndexAdd(keys.WORKERS, 0, worker.worker),
            ]
        )

    async def remove(self, worker_id: str) -> None:
        await self._storage.apply([Delete(keys.worker(worker_id)), IndexRemove(keys.WORKERS, worker_id)])

    async def is_alive(self, worker_id: str) -> bool:
        return (await self._storage.get([keys.worker(worker_id)]))[0] is not None

    async def shorten_lives(self) -> None:
        """Let every worker count as alive for at most `worker_seconds` from now.

        A database whose clock was set back would let one that does not renew any more live as much longer.
        """
        worker_ids = await all_members(self._storage, keys.WORKERS)
        if worker_ids:
            await self._storage.apply([Shorten(keys.worker(worker_id), self._ttl_ms) for worker_id in worker_ids])

    async def forget_dead(self) -> None:
        """Take those out of the directory that were dead at the last call too.

        One that is only late may renew between the look and the removal: it would live, and nobody would find it.
        """
        worker_ids = await all_members(self._storage, keys.WORKERS)
        values = await self._storage.get([keys.worker(worker_id) for worker_id in worker_ids]) if worker_ids else []
        dead = {worker_id for worker_id, value in zip(worker_ids, values, strict=True) if value is None}
        forgotten = dead & self._found_dead
        if forgotten:
            await self._storage.apply([IndexRemove(keys.WORKERS, worker_id) for worker_id in sorted(forgotten)])
        self._found_dead = dead - forgotten

    async def living(self, model: str) -> list[pb.Worker]:
        """Living workers of a model ("" for all), sorted by incarnation."""
        ids = await self._storage.members_after(keys.WORKERS, "", _MAX_WORKERS)
        values = await self._storage.get([keys.worker(worker_id) for worker_id in ids]) if ids else []
        workers = [pb.Worker.FromString(value) for value in values if value is not None]
        return [worker for worker in workers if not model or worker.model.name == model]


class BacklogIndex:
    """Streams by accepted - applied, a list for each model.

    Changes are gathered and written together a few times a hundredth of a second later: an acknowledgement never
    waits for a hint.
    """

    def __init__(self, storage: Storage) -> None:
        self._storage = storage
        self._pending: dict[str, Write] = {}
        self._has_pending = asyncio.Event()

    def note(self, metadata: StreamMetadata) -> None:
        """Remember to write down how far behind a stream is."""
        self._write_later(metadata.model, metadata.name, backlog_bytes(metadata))

    def _write_later(self, model: str, name: str, num_bytes: int) -> None:
        index = keys.backlog(model)
        self._pending[name] = IndexAdd(index, num_bytes, name) if num_bytes else IndexRemove(index, name)
        self._has_pending.set()

    async def largest(self, model: str, min_bytes: int, limit: int) -> list[tuple[str, int]]:
        """(name, backlog in bytes), most first; entries that are out of date are put right on the way."""
        await self.flush()
        rows = await self._storage.highest_members(keys.backlog(model), max(min_bytes, 1), limit)
        records = await self._storage.read([keys.live_stream(name) for name, _ in rows]) if rows else []
        entries = []
        for (name, listed_bytes), record in zip(rows, records, strict=True):
            num_bytes = backlog_bytes(decode(record.data)) if record.data else 0
            if num_bytes >= max(min_bytes, 1):
                entries.append((name, num_bytes))
            if num_bytes != listed_bytes:
                self._write_later(model, name, num_bytes)
        return sorted(entries, key=lambda entry: -entry[1])

    async def flush(self) -> None:
        """Write what is pending; a hint that cannot be written is left to the sweep."""
        pending, self._pending = self._pending, {}
        self._has_pending.clear()
        if pending:
            await self._storage.apply(list(pending.values()))

    async def run(self) -> None:
        """Flush for ever."""
        while True:
            await self._has_pending.wait()
            await asyncio.sleep(_FLUSH_PAUSE_SECONDS)
            try:
                await self.flush()
            except Unavailable as error:
                logger.warning("backlog hints were not written", extra={"error": str(error)})


def backlog_bytes(metadata: StreamMetadata) -> int:
    """accepted - applied."""
    return 0 if metadata.is_deleted else metadata.accepted_offset - metadata.applied_offset


async def all_members(storage: Storage, index: str, page_size: int = 1000) -> Sequence[str]:
    """All members of an index of equal scores."""
    members: list[str] = []
    while True:
        page = await storage.members_after(index, members[-1] if members else "", page_size)
        members += page
        if len(page) < page_size:
            return members
