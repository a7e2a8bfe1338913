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
    wrapped_key: str
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
    wrapped_key: str
    request_id: str
    outcome: bytes


@dataclass(frozen=True, slots=True)
class RemoveOutcome:
    """Remove an outcome, whose time may have come already."""

    uid: str
    request_id: str


@dataclass(frozen=True, slots=True)
class KeepChunk:
    """Require that a chunk is staged with its length, and make it last."""

    uid: str
    chunk: ChunkRef
    wrapped_key: str


@dataclass(frozen=True, slots=True)
class RemoveChunk:
    """Remove a chunk."""

    chunk: ChunkRef


@dataclass(frozen=True, slots=True)
class ForgetStaged:
    """Take a chunk off the list of those staged for a stream; `removes` it, unless a commit has made it last."""

    uid: str
    chunk_id: str
    removes: bool


@dataclass(frozen=True, slots=True)
class ForgetPendingKey:
    """Remove the key that was kept for a stream while its chunks were staged."""

    name: str


Effect = (
    AddToTotal
    | ListName
    | UnlistName
    | WriteRecord
    | RemoveRecord
    | WriteOutcome
    | RemoveOutcome
    | KeepChunk
    | RemoveChunk
    | ForgetStaged
    | ForgetPendingKey
)


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

    @property
    def num_values_removed(self) -> int:
        """How many records of the log, chunks and outcomes it removes."""
        return sum(
            isinstance(effect, RemoveRecord | RemoveOutcome | RemoveChunk)
            or (isinstance(effect, ForgetStaged) and effect.removes)
            for effect in self.effects
        )
