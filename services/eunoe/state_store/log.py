"""Logs: appending records, reading them back over the storage of every stream that a fork shares with."""

from collections.abc import AsyncIterator

from eunoe.runtime.errors import CorruptState, OutcomeNotFound, StateLost, StreamNotFound
from eunoe.runtime.failpoints import failpoint
from eunoe.state_store import keys, log_rules
from eunoe.state_store.chains import LogMark
from eunoe.state_store.effects import RecordEntry
from eunoe.state_store.log_rules import Append, Appended, LogPiece
from eunoe.state_store.metadata import StreamMetadata
from eunoe.state_store.sealing import Seal
from eunoe.state_store.transactions import (
    Environment,
    Transaction,
    member_as_entry,
    outcome_identity,
    record_identity,
    transact,
)

# Index entries read at once, and bytes of records: small enough that other calls of the process go on between.
_ENTRIES_PER_READ = 64
_BYTES_PER_READ = 1 << 20
# ... and where no record is read with them.
_ENTRIES_PER_SCAN = 1024


class Logs:
    """The logs of all streams."""

    def __init__(self, environment: Environment) -> None:
        self._environment = environment

    async def append(self, name: str, event: Append) -> tuple[StreamMetadata, Appended]:
        """Make a record durable, or say why not: (stream after it, verdict). Errors: as `log_rules.append`, and
        StreamNotFound, QuotaExceeded.
        """
        log_rules.check_append(event)
        tenant, _ = keys.parse_name(name)

        async def decide(transaction: Transaction) -> tuple[StreamMetadata, Appended]:
            metadata = await transaction.stream(name)
            start, end = log_rules.overlap(metadata, event)
            try:
                overlapping = [piece async for piece in self._pieces(tenant, metadata, start, end)]
            except CorruptState:
                # Gone because it was trimmed or deleted meanwhile? Then the record has changed: decide again.
                await transaction.check_unchanged()
                raise
            has_outcome = bool(event.request_id) and await self._outcome(tenant, metadata, event.request_id) is not None
            if has_outcome:
                # The record came between the two reads, or long before: either way, answer as of after it.
                metadata = await transaction.stream(name)
            appended = log_rules.append(
                metadata,
                event,
                overlapping=tuple(_cut(piece, end) for piece in overlapping),
                has_outcome=has_outcome,
                max_backlog_bytes=self._environment.config.max_backlog_bytes,
            )
            failpoint("store.append.before-swap")
            await transaction.commit(appended.change)
            failpoint("store.append.after-swap")
            return (appended.change.records or (metadata,))[0], appended

        return await transact(self._environment, tenant, decide)

    async def read(self, name: str, offset: int, max_bytes: int) -> AsyncIterator[LogPiece]:
        """Records from `offset` on, up to the one that reaches `max_bytes` (0: to the end as it is now).

        Raises:
            StreamNotFound, OffsetUnavailable; CorruptState if a record that must be there is gone or not what was
            written.
        """
        tenant, _ = keys.parse_name(name)
        metadata = await Transaction(self._environment, tenant).stream(name)
        log_rules.check_readable(metadata, offset)
        end = min(metadata.accepted_offset, offset + max_bytes) if max_bytes else metadata.accepted_offset
        reached = offset
        try:
            async for piece in self._pieces(tenant, metadata, offset, end):
                yield piece
                reached = piece.offset + len(piece.data)
        except CorruptState as error:
            # Trimmed or deleted while it was read? Then the newer record says so.
            newer = await Transaction(self._environment, tenant).stream(name)
            if newer.uid != metadata.uid:
                raise StreamNotFound(f"the stream {name} was deleted") from error
            log_rules.check_readable(newer, reached)
            raise CorruptState(error.message, lost_from=reached) from error

    async def check_seen(self, metadata: StreamMetadata, seen: LogMark) -> None:
        """Refuse to go on with somebody who has seen a record that the log does not have.

        Raises:
            StateLost.
        """
        tenant, _ = keys.parse_name(metadata.name)
        while True:
            at_entry = None
            if metadata.log_start_offset < seen.offset < metadata.accepted_offset:
                at_entry = await self.record_ending_at(tenant, metadata, seen.offset)
            try:
                log_rules.check_seen(metadata, seen, at_entry)
                return
            except StateLost:
                # Trimmed between the two reads? Then it cannot be checked any more, and nothing is lost.
                newer = await Transaction(self._environment, tenant).stream(metadata.name)
                if newer.uid != metadata.uid or newer.log_start_offset == metadata.log_start_offset:
                    raise
                metadata = newer

    async def outcome(self, name: str, request_id: str) -> bytes:
        """What became of a remembering call.

        Raises:
            StreamNotFound, OutcomeNotFound.
        """
        tenant, _ = keys.parse_name(name)
        metadata = await Transaction(self._environment, tenant).stream(name)
        outcome = await self._outcome(tenant, metadata, request_id)
        if outcome is None:
            raise OutcomeNotFound(f"no outcome of request {request_id} is kept")
        return outcome

    async def record_ending_at(self, tenant: str, metadata: StreamMetadata, offset: int) -> RecordEntry | None:
        """The log's record that ends at `offset`."""
        uid, _ = log_rules.span_at(metadata, offset - 1)
        index = keys.log_index(tenant, uid)
        rows = await self._environment.storage.members_by_score(index, offset - 1, offset, 1)
        return member_as_entry(*rows[0]) if rows else None

    async def first_of_kind(
        self, tenant: str, metadata: StreamMetadata, kind: int, above: int, up_to: int
    ) -> int | None:
        """Where the first record of a kind starts whose end lies in (above, up_to], both ends of records."""
        while above < up_to:
            uid, span_end = log_rules.span_at(metadata, above)
            index = keys.log_index(tenant, uid)
            rows = await self._environment.storage.members_by_score(index, above, span_end, _ENTRIES_PER_SCAN)
            if not rows:
                raise _lost(above)
            for entry in (member_as_entry(*row) for row in rows):
                if entry.end > up_to:
                    return None
                if entry.kind == kind:
                    return entry.start
                above = entry.end
        return None

    async def _outcome(self, tenant: str, metadata: StreamMetadata, request_id: str) -> bytes | None:
        (sealed,) = await self._environment.storage.get([keys.outcome(tenant, metadata.uid, request_id)])
        seal = self._environment.keyring.seal(tenant, metadata.wrapped_key)
        return None if sealed is None else seal.open(outcome_identity(metadata.uid, request_id), sealed)

    async def _pieces(self, tenant: str, metadata: StreamMetadata, offset: int, end: int) -> AsyncIterator[LogPiece]:
        """Records that overlap [offset, end), the first one cut at `offset`, the last one whole."""
        seal = self._environment.keyring.seal(tenant, metadata.wrapped_key)
        while offset < end:
            uid, span_end = log_rules.span_at(metadata, offset)
            async for piece in self._pieces_of(tenant, uid, seal, offset, min(end, span_end)):
                yield piece
                offset = piece.offset + len(piece.data)

    async def _pieces_of(self, tenant: str, uid: str, seal: Seal, offset: int, end: int) -> AsyncIterator[LogPiece]:
        storage = self._environment.storage
        while offset < end:
            rows = await storage.members_by_score(keys.log_index(tenant, uid), offset, None, _ENTRIES_PER_READ)
            entries = [entry for entry in (member_as_entry(*row) for row in rows) if entry.start < end]
            if not entries:
                raise _lost(offset)
            for batch in _batches(entries):
                values = await storage.get([keys.log_record(tenant, uid, entry.start) for entry in batch])
                for entry, sealed in zip(batch, values, strict=True):
                    if sealed is None or entry.start > offset:
                        raise _lost(offset)
                    value = seal.open(record_identity(uid, entry), sealed)
                    yield LogPiece(offset, value[offset - entry.start :], entry.kind, entry.chain)
                    offset = entry.end


def _batches(entries: list[RecordEntry]) -> list[list[RecordEntry]]:
    batches: list[list[RecordEntry]] = [[]]
    num_bytes = 0
    for entry in entries:
        num_bytes += entry.end - entry.start
        if num_bytes > _BYTES_PER_READ and batches[-1]:
            batches.append([])
            num_bytes = entry.end - entry.start
        batches[-1].append(entry)
    return batches


def _cut(piece: LogPiece, end: int) -> LogPiece:
    return LogPiece(piece.offset, piece.data[: end - piece.offset], piece.kind, piece.chain)


def _lost(offset: int) -> CorruptState:
    return CorruptState(f"the log's record at {offset} is gone", lost_from=offset)
