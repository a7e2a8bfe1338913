"""Streams: making, reading, listing, forking, deleting them, and clearing away what nobody needs."""

import logging
from dataclasses import replace

from eunoe.runtime.errors import CorruptState, EunoeError, StreamNotFound
from eunoe.state_store import keys, lease_rules, stream_rules
from eunoe.state_store.checkpoints import new_stream_key
from eunoe.state_store.effects import AddToTotal, Change, Effect, ForgetStaged, RemoveOutcome, RemoveRecord, Total
from eunoe.state_store.log import Logs
from eunoe.state_store.log_rules import KIND_TOKEN_IDS
from eunoe.state_store.metadata import Lease, StreamMetadata
from eunoe.state_store.metadata_codec import decode
from eunoe.state_store.storage import IndexAdd
from eunoe.state_store.stream_rules import Create, Fork
from eunoe.state_store.transactions import Environment, Transaction, member_as_entry, transact
from eunoe.state_store.workers import BacklogIndex, WorkerDirectory

logger = logging.getLogger(__name__)

# Log records removed by one atomic step.
_RECORDS_PER_STEP = 256


class Streams:
    """All streams of all tenants, without their logs' and checkpoints' bytes."""

    def __init__(
        self, environment: Environment, *, logs: Logs, workers: WorkerDirectory, backlog: BacklogIndex
    ) -> None:
        self._environment = environment
        self._logs = logs
        self._workers = workers
        self._backlog = backlog
        self._known_tenants: set[str] = set()

    async def create(self, event: Create) -> StreamMetadata:
        """Make a stream; its chunks, if it is an import, are staged.

        Raises:
            AlreadyExists, QuotaExceeded, InvalidRequest, MissingChunk.
        """
        tenant, _ = keys.parse_name(event.name)
        if tenant not in self._known_tenants:
            # Before the stream: the sweep must find it whatever happens next.
            await self._environment.storage.apply([IndexAdd(keys.TENANTS, 0, tenant)])
            self._known_tenants.add(tenant)

        async def decide(transaction: Transaction) -> StreamMetadata:
            existing = await self._unexpired_or_none(transaction, event.name)
            if existing is not None:
                return stream_rules.same_request(existing, event.request_id)
            environment = self._environment
            change = stream_rules.create(
                event,
                uid=environment.new_id(),
                wrapped_key=await new_stream_key(environment, event.name),
                now_ns=environment.clock_ns(),
            )
            await transaction.commit(change)
            return change.records[0]

        return await transact(self._environment, tenant, decide)

    async def fork(self, parent_name: str, event: Fork) -> StreamMetadata:
        """Make a child of a stream of the same tenant.

        Raises:
            StreamNotFound, AlreadyExists, OffsetUnavailable, VocabularyMismatch, QuotaExceeded, InvalidRequest.
        """
        tenant, _ = keys.parse_name(event.name)
        # (uid, offset): no token ids are below. A log that grows while it is looked through is not begun again.
        looked_through = ("", 0)
        if keys.parse_name(parent_name)[0] != tenant:
            raise StreamNotFound(f"there is no stream {parent_name}")

        async def token_ids_at(transaction: Transaction, parent: StreamMetadata) -> int | None:
            nonlocal looked_through
            if event.rebuild is None or event.rebuild.shares_vocabulary or parent.log_start_offset:
                return None
            above = looked_through[1] if looked_through[0] == parent.uid else 0
            up_to = parent.accepted_offset if event.at_offset is None else min(event.at_offset, parent.accepted_offset)
            try:
                found = await self._logs.first_of_kind(tenant, parent, KIND_TOKEN_IDS, above, up_to)
            except CorruptState:
                # Trimmed or deleted meanwhile? Then decide again.
                await transaction.check_unchanged()
                raise
            if found is None:
                looked_through = (parent.uid, up_to)
            return found

        async def decide(transaction: Transaction) -> StreamMetadata:
            existing = await self._unexpired_or_none(transaction, event.name)
            if existing is not None:
                return stream_rules.same_request(existing, event.request_id)
            environment = self._environment
            parent = await transaction.stream(parent_name)
            owners = {r.owner_uid: await transaction.owner(r) for r in parent.references}
            at_entry = (
                await self._logs.record_ending_at(tenant, parent, event.at_offset)
                if event.at_offset is not None and parent.log_start_offset < event.at_offset < parent.accepted_offset
                else None
            )
            change = stream_rules.fork(
                parent,
                owners,
                event,
                at_entry=at_entry,
                token_ids_at=await token_ids_at(transaction, parent),
                uid=environment.new_id(),
                now_ns=environment.clock_ns(),
            )
            await transaction.commit(change)
            return change.records[0]

        child = await transact(self._environment, tenant, decide)
        self._backlog.note(child)
        return child

    async def get(self, name: str) -> StreamMetadata:
        """A stream.

        Raises:
            StreamNotFound.
        """
        return await Transaction(self._environment, keys.parse_name(name)[0]).stream(name)

    async def page(self, tenant: str, after: str, page_size: int) -> tuple[list[StreamMetadata], bool]:
        """(streams with ids behind `after` in the order of their ids, whether there are more)."""
        storage, now_ns = self._environment.storage, self._environment.clock_ns()
        index = keys.stream_ids(keys.check_tenant(tenant))
        found: list[StreamMetadata] = []
        while True:
            wanted = page_size + 1 - len(found)
            ids = await storage.members_after(index, after, wanted)
            places = [keys.live_stream(f"tenants/{tenant}/streams/{stream_id}") for stream_id in ids]
            records = [decode(record.data) for record in await storage.read(places) if record.data]
            found += [metadata for metadata in records if not metadata.is_expired(now_ns)]
            if len(ids) < wanted or len(found) > page_size:
                return found[:page_size], len(found) > page_size
            after = ids[-1]

    async def delete(self, name: str) -> None:
        """Delete a stream and all of it that no fork shares.

        Raises:
            StreamNotFound: If there was none when the call came.
        """
        await self.remove(name, (await self.get(name)).uid)

    async def remove(self, name: str, uid: str) -> int:
        """Delete the stream of that name and uid if it is still there, and what is left of it that no fork shares.

        Returns:
            How many values went: records, chunks and outcomes, those of other streams among them that only it needed.
        """
        tenant, _ = keys.parse_name(name)
        metadata = await Transaction(self._environment, tenant).stream_or_none(name)
        num_removed = 0
        if metadata is not None and metadata.uid == uid:
            num_removed += await self._delete(tenant, metadata)
        return num_removed + await self.collect(tenant, name, uid)

    async def is_left(self, name: str, uid: str) -> bool:
        """Whether a stream, alive or deleted, still keeps something."""
        transaction = Transaction(self._environment, keys.parse_name(name)[0])
        return await self._by_uid(transaction, name, uid) is not None

    async def acquire(self, name: str, by: Lease, suspect: tuple[str, int] | None) -> StreamMetadata:
        """Take a stream for a worker.

        Raises:
            StreamNotFound, NotOwner.
        """

        async def decide(transaction: Transaction) -> StreamMetadata:
            metadata = await transaction.stream(name)
            lease = metadata.lease
            owner_is_alive = lease is not None and await self._workers.is_alive(lease.worker)
            after = lease_rules.acquire(metadata, by, suspect=suspect, owner_is_alive=owner_is_alive)
            await transaction.commit(Change((after,) if after != metadata else ()))
            return after

        return await transact(self._environment, keys.parse_name(name)[0], decide)

    async def release(self, name: str, fence: tuple[str, int]) -> None:
        """Give a stream back.

        Raises:
            StreamNotFound, LeaseLost.
        """

        async def decide(transaction: Transaction) -> None:
            metadata = await transaction.stream(name)
            after = lease_rules.release(metadata, fence)
            await transaction.commit(Change((after,) if after != metadata else ()))

        await transact(self._environment, keys.parse_name(name)[0], decide)

    async def sweep_stream(self, tenant: str, name: str) -> None:
        """Delete the stream if it has expired; else repair its hint and clear away what nobody needs."""
        metadata = await Transaction(self._environment, tenant).stream_or_none(name)
        if metadata is None:
            return
        if metadata.is_expired(self._environment.clock_ns()):
            await self._delete(tenant, metadata)
        else:
            self._backlog.note(metadata)
        await self.collect(tenant, name, metadata.uid)

    async def sweep_deleted(self, tenant: str, uid: str) -> None:
        """Clear away what is left of a deleted stream and not needed by a fork."""
        metadata = await Transaction(self._environment, tenant).deleted(uid)
        if metadata is not None:
            await self.collect(tenant, metadata.name, uid)

    async def collect(self, tenant: str, name: str, uid: str) -> int:
        """Clear away, in small atomic steps, what neither a stream nor its forks need. Starts anew where it stopped.
        Returns how many values went, as `remove`.

        Args:
            tenant: Whose stream.
            name: The stream's name, or its former name.
            uid: The stream, alive or deleted.
        """
        num_removed = 0

        async def step(transaction: Transaction) -> bool:
            nonlocal num_removed
            metadata = await self._by_uid(transaction, name, uid)
            if metadata is None:
                return False
            for reference in stream_rules.unneeded_references(metadata):
                owner = await transaction.owner(reference)
                change = stream_rules.release(metadata, owner, reference)
                await transaction.commit(change)
                num_removed += change.num_values_removed
                num_removed += await self.collect(tenant, reference.owner_name, reference.owner_uid)
                return True
            effects = await self._garbage(tenant, metadata)
            if effects:
                change = Change((metadata,), effects=tuple(effects))
                await transaction.commit(change)
                num_removed += change.num_values_removed
                return True
            if metadata.is_deleted and not metadata.holds:
                await transaction.commit(Change(dropped=(metadata,)))
            return False

        while await transact(self._environment, tenant, step):
            pass
        return num_removed

    async def collect_quietly(self, tenant: str, name: str, uid: str) -> None:
        """`collect` for the background: what fails is logged and left to the sweep."""
        try:
            await self.collect(tenant, name, uid)
        except EunoeError as error:
            logger.warning("a stream was not cleared up", extra={"stream": name, "error": str(error)})

    async def _garbage(self, tenant: str, metadata: StreamMetadata) -> list[Effect]:
        """Effects that remove some values that nobody needs: of the log, of a deleted stream all others too."""
        index = keys.log_index(tenant, metadata.uid)
        effects: list[Effect] = []
        num_bytes = 0
        for above, up_to in stream_rules.garbage_ranges(metadata):
            limit = _RECORDS_PER_STEP - len(effects)
            for row in await self._environment.storage.members_by_score(index, above, up_to, limit) if limit else ():
                entry = member_as_entry(*row)
                num_bytes += entry.end - entry.start
                effects.append(RemoveRecord(metadata.uid, entry))
        if effects:
            effects.append(AddToTotal(Total.LOG_BYTES, -num_bytes))
        return [*effects, *await self._short_lived_garbage(tenant, metadata)]

    async def _short_lived_garbage(self, tenant: str, metadata: StreamMetadata) -> list[Effect]:
        """Effects that remove outcomes and staged chunks: of a deleted stream, else those whose time has come."""
        storage = self._environment.storage
        up_to = None if metadata.is_deleted else self._environment.now_ms()
        uid = metadata.uid
        outcomes = await storage.members_by_score(keys.outcome_index(tenant, uid), -1, up_to, _RECORDS_PER_STEP)
        staged = await storage.members_by_score(keys.staged_index(tenant, uid), -1, up_to, _RECORDS_PER_STEP)
        # A staging that was repeated after the commit lists what a fork may need.
        lasting = {chunk.chunk_id for manifest in metadata.checkpoints for chunk in manifest.chunks}
        return [
            *(RemoveOutcome(uid, request_id) for request_id, _ in outcomes),
            *(ForgetStaged(uid, each, removes=metadata.is_deleted and each not in lasting) for each, _ in staged),
        ]

    async def _by_uid(self, transaction: Transaction, name: str, uid: str) -> StreamMetadata | None:
        metadata = await transaction.stream_or_none(name)
        if metadata is not None and metadata.uid == uid:
            return metadata
        return await transaction.deleted(uid)

    async def _delete(self, tenant: str, metadata: StreamMetadata) -> int:
        """Delete the stream, and return how many values went with that."""

        async def decide(transaction: Transaction) -> int:
            # Gone, or another stream of the name: then it was this delete, repeated, or somebody else's.
            found = await transaction.stream_or_none(metadata.name)
            if found is None or found.uid != metadata.uid:
                return 0
            change = stream_rules.delete(found)
            await transaction.commit(change)
            return change.num_values_removed

        num_removed = await transact(self._environment, tenant, decide)
        self._backlog.note(replace(metadata, is_deleted=True))
        return num_removed

    async def _unexpired_or_none(self, transaction: Transaction, name: str) -> StreamMetadata | None:
        """The stream of that name; one that has expired is deleted first, so that the name is free."""
        metadata = await transaction.stream_or_none(name)
        if metadata is None or not metadata.is_expired(self._environment.clock_ns()):
            return metadata
        await self._delete(transaction.tenant, metadata)
        return await transaction.stream_or_none(name)
