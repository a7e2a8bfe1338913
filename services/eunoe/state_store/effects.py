"""What a decision asks of storage besides the new record: plain values, applied in the same atomic step."""

from dataclasses import dataclass
from enum import StrEnum

from eunoe.state_store.metadata import ChunkRef, StreamMetadata


class Total(StrEnum):
    """What is counted of a tenant; each has a quota."""

    STREAMS = "num_streams"
    LOG_BYTES = "log_bytes"
    CHECKPOINT_BYTES = "checkpoint_bytes"


@dataclass(frozen=True, slots=True)
class AddToTotal:
    """Count; refused as a whole if a growing total would exceed its quota."""

    total: Total
    delta: int


@dataclass(frozen=True, slots=True)
class ListName:
    """Put the stream into its tenant's listing."""

    name: str


@dataclass(frozen=True, slots=True)
class UnlistName:
    """Take the stream out of its tenant's listing."""

    name: str


@dataclass(frozen=True, slots=True)
class RecordEntry:
    """A record of the log without its bytes: [start, end), its RecordKind, and at its end the cut character's bytes and
    the log's chain.
    """

    start: int
    end: int
    kind: int
    carry_bytes: int
    chain: str


@dataclass(frozen=True, slots=True)
class WriteRecord:
    """Write a record of the log."""

    uid: str
    entry: RecordEntry
    data: bytes


@dataclass(frozen=True, slots=True)
class RemoveRecord:
    """Remove a record of the log."""

    uid: str
    entry: RecordEntry


@dataclass(frozen=True, slots=True)
class WriteOutcome:
    """Keep what a repeated remembering call is answered."""

    uid: str
    request_id: str
    outcome: bytes


@dataclass(frozen=True, slots=True)
class KeepChunk:
    """Require that a chunk is staged with its length, and make it last."""

    chunk: ChunkRef


@dataclass(frozen=True, slots=True)
class RemoveChunk:
    """Remove a chunk."""

    chunk: ChunkRef


Effect = (
    AddToTotal | ListName | UnlistName | WriteRecord | RemoveRecord | WriteOutcome | KeepChunk | RemoveChunk
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Change:
    """A decision: records by what they replace, and effects. Nothing is written where both are empty.

    Attributes:
        records: New records; a record with `is_deleted` lives apart from its name.
        dropped: Records to delete for good.
        effects: What else changes.
    """

    records: tuple[StreamMetadata, ...] = ()
    dropped: tuple[StreamMetadata, ...] = ()
    effects: tuple[Effect, ...] = ()
