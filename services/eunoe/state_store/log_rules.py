"""What may be appended to a log. Pure: (record, event, facts read beside the record) -> decision."""

from dataclasses import dataclass, replace

from eunoe.runtime.errors import (
    BadTokenId,
    CarryOpen,
    ContentMismatch,
    InvalidRequest,
    OffsetGap,
    OffsetUnavailable,
    Overloaded,
    RecordTooLarge,
    StateLost,
)
from eunoe.state_store.chains import LogMark, record_chain
from eunoe.state_store.effects import AddToTotal, Change, Effect, RecordEntry, Total, WriteOutcome, WriteRecord
from eunoe.state_store.metadata import Reference, StreamMetadata
from eunoe.state_store.text_carry import carry_after

MAX_RECORD_BYTES = 1 << 20
MAX_ID_BYTES = 128
KIND_TEXT = 1
KIND_TOKEN_IDS = 2


@dataclass(frozen=True, slots=True, kw_only=True)
class Append:
    """One record to append. `source_offset` is None where the caller does not order by source, `after_chain` is ""
    where the caller has not seen the log's chain at `offset`.
    """

    offset: int
    data: bytes
    kind: int = KIND_TEXT
    source_id: str = ""
    source_offset: int | None = None
    after_chain: str = ""
    request_id: str = ""
    outcome: bytes = b""

    @property
    def end(self) -> int:
        return self.offset + len(self.data)


@dataclass(frozen=True, slots=True)
class LogPiece:
    """Bytes of one record of the log, from `offset` to its end, where the log's chain is `chain`."""

    offset: int
    data: bytes
    kind: int
    chain: str


@dataclass(frozen=True, slots=True)
class Appended:
    """The verdict; `change` is empty where the record was there already."""

    change: Change
    already_exists: bool = False
    unchecked: bool = False


def check_append(event: Append) -> None:
    """Refuse what no stream could take.

    Raises:
        RecordTooLarge, BadTokenId, InvalidRequest.
    """
    if not 1 <= len(event.data) <= MAX_RECORD_BYTES:
        raise RecordTooLarge(
            f"a record has 1 to {MAX_RECORD_BYTES} bytes; this one has {len(event.data)}", limit_bytes=MAX_RECORD_BYTES
        )
    if event.kind not in (KIND_TEXT, KIND_TOKEN_IDS):
        raise InvalidRequest(f"a record's kind is text or token ids, not {event.kind}")
    if event.kind == KIND_TOKEN_IDS and len(event.data) % 4:
        raise BadTokenId(f"token ids take 4 bytes each; the record has {len(event.data)}")
    for name, value in (("source_id", event.source_id), ("request_id", event.request_id)):
        if len(value.encode()) > MAX_ID_BYTES:
            raise InvalidRequest(f"{name} is longer than {MAX_ID_BYTES} bytes")


def overlap(metadata: StreamMetadata, event: Append) -> tuple[int, int]:
    """The range of the log that a record must equal to count as a retry; empty where nothing can be compared."""
    start = max(event.offset, metadata.log_start_offset)
    return start, max(start, min(event.end, metadata.accepted_offset))


def append(
    metadata: StreamMetadata,
    event: Append,
    *,
    overlapping: tuple[LogPiece, ...] = (),
    has_outcome: bool = False,
    max_backlog_bytes: int,
) -> Appended:
    """Take a record, or say why not.

    A record that starts below the accepted offset is compared with what stands there; nothing beyond the accepted
    offset is taken from it.

    Args:
        metadata: The stream.
        event: The record.
        overlapping: The log's bytes in `overlap(metadata, event)`, in order.
        has_outcome: A record with this request id was taken in the last minutes.
        max_backlog_bytes: Most that accepted - applied may grow to.

    Raises:
        OffsetGap, ContentMismatch, CarryOpen, InvalidUtf8, Overloaded, StateLost; as `check_append`.
    """
    check_append(event)
    if has_outcome:
        return Appended(Change(), already_exists=True)
    if event.offset > metadata.accepted_offset:
        raise OffsetGap(
            f"the record starts at {event.offset}, the log ends at {metadata.accepted_offset}",
            expected_offset=metadata.accepted_offset,
        )
    if event.offset < metadata.accepted_offset:
        return _compared(metadata, event, overlapping)
    if event.after_chain and event.after_chain != metadata.log_chain:
        raise _rolled_back(metadata, event.offset)
    _check_source(metadata, event)
    if event.end - metadata.applied_offset > max_backlog_bytes:
        raise Overloaded(f"more than {max_backlog_bytes} bytes wait to be taken in by the memory")
    if event.kind == KIND_TEXT:
        carry = carry_after(metadata.carry, event.data, event.offset)
    elif metadata.carry:
        raise CarryOpen(
            f"a character is cut: {len(metadata.carry)} bytes of it are in the log", carry_bytes=len(metadata.carry)
        )
    else:
        carry = b""
    chain = record_chain(metadata.log_chain, event.offset, event.kind, event.data)
    after = replace(metadata, accepted_offset=event.end, carry=carry, log_chain=chain)
    if event.source_id:
        start = metadata.bytes_of_source(event.source_id) if event.source_offset is None else event.source_offset
        after = after.with_source(event.source_id, start + len(event.data))
    entry = RecordEntry(event.offset, event.end, event.kind, len(carry), chain)
    effects: list[Effect] = [
        AddToTotal(Total.LOG_BYTES, len(event.data)),
        WriteRecord(metadata.uid, metadata.wrapped_key, entry, event.data),
    ]
    if event.request_id:
        effects.append(WriteOutcome(metadata.uid, metadata.wrapped_key, event.request_id, event.outcome))
    return Appended(Change((after,), effects=tuple(effects)))


def _compared(metadata: StreamMetadata, event: Append, overlapping: tuple[LogPiece, ...]) -> Appended:
    start, end = overlap(metadata, event)
    stored = b"".join(piece.data for piece in overlapping)
    assert len(stored) == end - start, "the log was not read where the record overlaps it"
    same_kind = all(piece.kind == event.kind for piece in overlapping)
    if not same_kind or stored != event.data[start - event.offset : end - event.offset]:
        raise ContentMismatch(
            f"other bytes stand in the log from {event.offset} on", expected_offset=metadata.accepted_offset
        )
    return Appended(Change(), already_exists=True, unchecked=start > event.offset)


def _check_source(metadata: StreamMetadata, event: Append) -> None:
    """A known source goes on exactly where it stopped: else records in flight could change their order."""
    if event.source_offset is None:
        return
    known = next((s.num_bytes for s in metadata.sources if s.source_id == event.source_id), None)
    if known is not None and known != event.source_offset:
        raise OffsetGap(
            f"{known} bytes of the source are accepted, the record starts at {event.source_offset} of it",
            expected_offset=metadata.accepted_offset,
        )


def check_seen(metadata: StreamMetadata, seen: LogMark, at_entry: RecordEntry | None) -> None:
    """Refuse to go on with somebody who has seen a record that the log does not have.

    A mark at or below the log's start cannot be checked: its record is trimmed.

    Args:
        metadata: The stream.
        seen: The newest mark of the caller.
        at_entry: The log's record that ends at the mark, if there is one.

    Raises:
        StateLost: With where the log ends, or where it starts if other records have come since.
    """
    if seen.offset == metadata.accepted_offset:
        is_there = seen.chain == metadata.log_chain
    elif seen.offset > metadata.log_start_offset:
        is_there = at_entry is not None and seen.chain == at_entry.chain
    else:
        is_there = True
    if not is_there:
        raise _rolled_back(metadata, seen.offset)


def _rolled_back(metadata: StreamMetadata, seen_offset: int) -> StateLost:
    end = metadata.accepted_offset
    return StateLost(
        f"the log was rolled back: {seen_offset} bytes had been acknowledged, and what ends at {end} are not the same",
        lost_from=end if end < seen_offset else metadata.log_start_offset,
    )


def check_readable(metadata: StreamMetadata, offset: int) -> None:
    """Refuse to read where the log is not.

    Raises:
        OffsetUnavailable.
    """
    if not metadata.log_start_offset <= offset <= metadata.accepted_offset:
        raise OffsetUnavailable(
            f"the log has no offset {offset}",
            available=f"{metadata.log_start_offset} to {metadata.accepted_offset}",
        )


def span_at(metadata: StreamMetadata, offset: int) -> tuple[str, int]:
    """Whose storage holds the byte at `offset`, and up to where: (uid, end)."""
    shared: Reference | None = next((r for r in metadata.references if r.log_from <= offset < r.log_to), None)
    return (metadata.uid, metadata.accepted_offset) if shared is None else (shared.owner_uid, shared.log_to)
