"""What the state store keeps of a stream: one small record, replaced as a whole by every change.

The record holds no text and does not grow with the log: records of the log and chunks of checkpoints are values of
their own, found through the `uid` that a stream gets at creation. A name can be used again after a deletion, a uid
never is.

Sharing. A fork names what it reads of other streams as `References`; each owner counts them as `Hold`s. Both change
in the same atomic step, so nothing that a fork needs is ever freed, and nothing is kept that no one needs.
"""

from dataclasses import dataclass, replace
from typing import NamedTuple

NUM_RETAINED_CHECKPOINTS = 3
NUM_SOURCES = 8


class ChunkRef(NamedTuple):
    """An immutable piece of a checkpoint: `length` in bytes, `digest` is XXH3-128 in hex."""

    chunk_id: str
    length: int
    digest: str


class DecisionRun(NamedTuple):
    """Segments from `first_segment` on were folded under one policy and numerics."""

    first_segment: int
    policy: str
    numerics_id: str


class Lease(NamedTuple):
    """Who may commit; (worker, epoch) is the fence, the address only says where to call."""

    worker: str
    epoch: int
    address: str

    @property
    def fence(self) -> tuple[str, int]:
        return self.worker, self.epoch


class Source(NamedTuple):
    """How many bytes of something that clients upload were accepted."""

    source_id: str
    num_bytes: int


class Hold(NamedTuple):
    """`num_holders` forks need the checkpoint of this version (0: none) and the log in [log_from, log_to)."""

    version: int
    log_from: int
    log_to: int
    num_holders: int

    @property
    def part(self) -> tuple[int, int, int]:
        return self.version, self.log_from, self.log_to


class Reference(NamedTuple):
    """What a fork needs of another stream's storage; the counterpart of one count in a Hold there."""

    owner_name: str
    owner_uid: str
    version: int
    log_from: int
    log_to: int

    @property
    def part(self) -> tuple[int, int, int]:
        return self.version, self.log_from, self.log_to


class Settings(NamedTuple):
    """Fixed at creation. `positions` is the number of eunoe.api.v1.PositionMode."""

    kv_budget_tokens: int
    segment_length: int
    num_sink_tokens: int
    positions: int
    retain_log: bool


@dataclass(frozen=True, slots=True)
class Manifest:
    """A committed memory state, as its worker described it, and two facts of the store's own.

    Attributes:
        owner_uid: Whose storage holds the chunks: a fork begins with another stream's.
        read_to: No byte at or above this offset had a part in the state. The fold reads ahead of its applied offset:
            what ends a pre-token lies behind it.
        chain: Over all commits up to this one, hex.
        is_quarantined: Its chunks were found damaged: nothing starts from it any more. It keeps its place among the
            commits, whose versions and chain go on from it.
        unknown: Fields that a later version wrote, JSON; kept for it.
    """

    encoding_version: int
    version: int
    applied_offset: int
    applied_pretoken_tokens: int
    tokens: int
    state_bytes: int
    state_digest: str
    model_digest: str
    decisions: tuple[DecisionRun, ...]
    chunks: tuple[ChunkRef, ...]
    owner_uid: str = ""
    read_to: int = 0
    chain: str = ""
    is_quarantined: bool = False
    unknown: str = ""

    @property
    def chunk_bytes(self) -> int:
        return sum(chunk.length for chunk in self.chunks)


@dataclass(frozen=True, slots=True, kw_only=True)
class StreamMetadata:
    """A stream's record.

    Attributes:
        name: tenants/{tenant}/streams/{stream}.
        uid: Names the stream's storage; random, never used again.
        wrapped_key: Of the values of the stream and its forks (see sealing); "" if they are not encrypted.
        own_start_offset: Records from here on are in the stream's own storage, those below in its references'.
        start_version: 0, or the version of the checkpoint that a fork or an import began with.
        checkpoints: Manifests by version: the retained ones, before them those that only forks still need.
        carry: Bytes at the log's end that begin a cut character, 0 to 3.
        log_chain: Over all records up to the accepted offset, hex; "" before the first.
        epoch: Of the newest lease that there ever was.
        is_deleted: Only what forks need is left; the name is free.
        unknown: Fields that a later version wrote, JSON; kept for it.
    """

    name: str
    uid: str
    model: str
    settings: Settings
    create_time_ns: int
    expire_time_ns: int | None = None
    create_request_id: str = ""
    wrapped_key: str = ""
    own_start_offset: int = 0
    start_version: int = 0
    accepted_offset: int = 0
    log_chain: str = ""
    carry: bytes = b""
    sources: tuple[Source, ...] = ()
    epoch: int = 0
    lease: Lease | None = None
    checkpoints: tuple[Manifest, ...] = ()
    holds: tuple[Hold, ...] = ()
    references: tuple[Reference, ...] = ()
    is_deleted: bool = False
    unknown: str = ""

    @property
    def version(self) -> int:
        """Of the newest commit; 0 before the first."""
        return self.checkpoints[-1].version if self.checkpoints else 0

    @property
    def checkpoint_chain(self) -> str:
        """Over all commits, hex; "" before the first."""
        return self.checkpoints[-1].chain if self.checkpoints else ""

    @property
    def newest(self) -> Manifest | None:
        """The newest checkpoint that a worker can start from; None is the empty memory at offset 0.

        After a quarantine it is an older one: the log is there from it on, and what came after is folded again.
        """
        return self.usable[-1] if self.usable else None

    @property
    def applied_offset(self) -> int:
        return 0 if self.newest is None else self.newest.applied_offset

    @property
    def retained(self) -> tuple[Manifest, ...]:
        """The checkpoints that the stream itself keeps, oldest first."""
        if self.is_deleted:
            return ()
        return tuple(c for c in self.checkpoints if c.version > self.version - NUM_RETAINED_CHECKPOINTS)

    @property
    def usable(self) -> tuple[Manifest, ...]:
        """The retained checkpoints without those in quarantine, oldest first."""
        return tuple(c for c in self.retained if not c.is_quarantined)

    @property
    def retains_beginning(self) -> bool:
        """Whether the empty memory at offset 0 still counts as the oldest retained checkpoint."""
        return self.start_version == 0 and self.version < NUM_RETAINED_CHECKPOINTS

    @property
    def checkpoint_offsets(self) -> tuple[int, ...]:
        """Offsets that a fork can start from, oldest first."""
        beginning = (0,) if self.retains_beginning else ()
        return (*beginning, *(c.applied_offset for c in self.usable))

    @property
    def log_start_offset(self) -> int:
        """The lowest offset that can be read."""
        if self.settings.retain_log:
            shared = (r.log_from for r in self.references if r.log_from < r.log_to)
            return min(shared, default=self.own_start_offset)
        # Quarantine frees nothing, and what is folded again may be committed at a lower offset than before.
        return 0 if self.retains_beginning else min(c.applied_offset for c in self.retained)

    def is_expired(self, now_ns: int) -> bool:
        return self.expire_time_ns is not None and now_ns >= self.expire_time_ns

    def bytes_of_source(self, source_id: str) -> int:
        return next((s.num_bytes for s in self.sources if s.source_id == source_id), 0)

    def with_source(self, source_id: str, num_bytes: int) -> "StreamMetadata":
        """This record with `num_bytes` accepted of a source, which becomes the newest of those remembered."""
        others = tuple(s for s in self.sources if s.source_id != source_id)
        return replace(self, sources=(*others, Source(source_id, num_bytes))[-NUM_SOURCES:])
