"""The small world that the exhaustive search walks through: two workers, a client, a stream and its fork.

The rules are the product's own, called on the product's own records. Around them stands what the product's processes
do: a careful client, workers that acquire, fold, commit and crash, collectors, and a network. What is abstracted:

- A transaction is one step. `transact` retries until its compare-and-swap found nothing changed, so every change that
  takes effect does so at one moment; that the swap is atomic is the storage contract's matter and the simulation's.
- The log is append-only and a worker's reading of it is checked by the store at the commit. So a worker reads just
  before it sends a commit: to have read earlier gives the same bytes (the invariant "content" sees to it).
- Time: an owner may be suspected at any moment, rightly or not; staged chunks are there or the commit is refused, which
  changes nothing. Epochs are only compared and counted up from the newest, so they are renumbered by rank.
- A message stays in the network, to be delivered late, again, or never, until its sender sends the next one: one commit
  or release per worker, be it of an incarnation that has crashed. Appends stay for ever.
- The client has no state of its own: whatever is accepted may have been acknowledged, so that nothing accepted may ever
  go, and everything within a window above it may be on its way. It may crash at any time and ask the store where to go
  on.
- What is left of a worker's incarnation that crashed is at most a message and its name in a lease, and names are only
  compared. So there are three: the present one, that of an older message, and that of the dead.
- Leases, crashes, forks and deletes are counted: so many in any order, at any moment.
- The two workers are interchangeable: of two states that differ in their names only, one is visited.
- Records have one length, larger than a fold ever reads ahead; the content of a state is the list of records in it.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

from eunoe.runtime.errors import EunoeError, StateLost
from eunoe.state_store import log_rules, stream_rules
from eunoe.state_store.chains import LogMark
from eunoe.state_store.effects import (
    AddToTotal,
    Change,
    KeepChunk,
    RecordEntry,
    RemoveChunk,
    RemoveRecord,
    Total,
    WriteRecord,
)
from eunoe.state_store.log_rules import Append, LogPiece
from eunoe.state_store.metadata import ChunkRef, Manifest, Settings, StreamMetadata

RECORD_BYTES = 5000
PARENT, CHILD = 0, 1
UIDS = ("parent", "child")
NAMES = ("tenants/t/streams/parent", "tenants/t/streams/child")
LETTERS = "abcdefgh"
CHILDS_RECORD = "x"
_SETTINGS = Settings(64, 16, 4, 2, False)


class Violation(Exception):
    """A promise is broken."""


@dataclass(frozen=True, kw_only=True)
class Bounds:
    """How large the model is."""

    num_records: int = 3
    window: int = 2
    num_retained: int = 1
    childs_record: bool = True
    reads_ahead: bool = True
    num_leases: int = 2
    num_crashes: int = 2
    num_deletes: int = 1


class Stored(NamedTuple):
    """A record in a stream's storage; `tag` is its content."""

    entry: RecordEntry
    tag: str


class Hold(NamedTuple):
    """What a worker believes to own: `parent` is the newest checkpoint it knows, `fold` the one its state is from."""

    stream: int
    epoch: int
    parent: Manifest | None
    fold: Manifest | None
    is_pending: bool


class Message(NamedTuple):
    """A worker's commit, or its release where there is no manifest."""

    stream: int
    worker: str
    epoch: int
    manifest: Manifest | None
    parent_chain: str
    read: LogMark


class Left(NamedTuple):
    """What may still happen."""

    forks: int
    deletes: int
    leases: int
    crashes: int


class World(NamedTuple):
    """A state of everything. Streams that are not there (any more) are None."""

    streams: tuple[StreamMetadata | None, StreamMetadata | None]
    logs: tuple[tuple[Stored, ...], tuple[Stored, ...]]
    chunks: frozenset[ChunkRef]
    left: Left
    holds: tuple[Hold | None, Hold | None]
    slots: tuple[Message | None, Message | None]


Step = tuple[str, World]


def first_world(bounds: Bounds) -> World:
    event = stream_rules.Create(name=NAMES[PARENT], model="m", settings=_SETTINGS)
    parent = stream_rules.create(event, uid=UIDS[PARENT], wrapped_key="", now_ns=0).records[0]
    left = Left(1, bounds.num_deletes, bounds.num_leases, bounds.num_crashes)
    return World((parent, None), ((), ()), frozenset(), left, (None, None), (None, None))


def with_item(pair: tuple[Any, Any], index: int, item: Any) -> tuple[Any, Any]:
    return (item, pair[1]) if index == 0 else (pair[0], item)


def content_of(manifest: Manifest | None) -> str:
    """The records that are in a state, by their tags."""
    return "" if manifest is None else manifest.state_digest.partition("/")[0]


def num_read(manifest: Manifest) -> int:
    """How many records had a part in a state, those that were only read ahead included."""
    return int(manifest.state_digest.partition("/")[2])


def truth(world: World, stream: int) -> str:
    """The records that a living stream's log must have: the client's in their order, the child's own one last."""
    metadata = world.streams[stream]
    assert metadata is not None
    if stream == PARENT:
        return LETTERS[: metadata.accepted_offset // RECORD_BYTES]
    num_shared = metadata.own_start_offset // RECORD_BYTES
    num_own = (metadata.accepted_offset - metadata.own_start_offset) // RECORD_BYTES
    return LETTERS[:num_shared] + CHILDS_RECORD * num_own


def stored_at(world: World, metadata: StreamMetadata, start: int) -> Stored | None:
    """The record that a reader of the stream finds at an offset."""
    uid, _ = log_rules.span_at(metadata, start)
    return next((s for s in world.logs[UIDS.index(uid)] if s.entry.start == start), None)


def applied(world: World, change: Change, tag: str = "") -> World | None:
    """The world after an atomic change; None if a chunk that it needs is not staged."""
    streams, logs, chunks = world.streams, world.logs, set(world.chunks)
    for record in change.records:
        streams = with_item(streams, UIDS.index(record.uid), record)
    for record in change.dropped:
        streams = with_item(streams, UIDS.index(record.uid), None)
    for effect in change.effects:
        match effect:
            case WriteRecord(uid, _, entry, _):
                index = UIDS.index(uid)
                others = tuple(s for s in logs[index] if s.entry.start != entry.start)
                logs = with_item(logs, index, tuple(sorted((*others, Stored(entry, tag)), key=lambda s: s.entry.start)))
            case RemoveRecord(uid, entry):
                index = UIDS.index(uid)
                logs = with_item(logs, index, tuple(s for s in logs[index] if s.entry != entry))
            case KeepChunk(chunk=chunk):
                if chunk in chunks:
                    return None
                chunks.add(chunk)
            case RemoveChunk(chunk):
                chunks.discard(chunk)
            case _:
                pass
    after = world._replace(streams=streams, logs=logs, chunks=frozenset(chunks))
    for total in Total:
        delta = sum(e.delta for e in change.effects if isinstance(e, AddToTotal) and e.total == total)
        if measured(after, total) - measured(world, total) != delta:
            raise Violation(f"{total} is counted wrongly")
    return after


def measured(world: World, total: Total) -> int:
    """What a total must be."""
    if total == Total.STREAMS:
        return sum(metadata is not None and not metadata.is_deleted for metadata in world.streams)
    if total == Total.LOG_BYTES:
        return sum(s.entry.end - s.entry.start for log in world.logs for s in log)
    return sum(chunk.length for chunk in world.chunks)


def client_steps(world: World, bounds: Bounds) -> Iterator[Step]:
    """A record of the client arrives, for the first time or again, in order or not."""
    parent, child = world.streams
    if parent is not None and not parent.is_deleted:
        num_accepted = parent.accepted_offset // RECORD_BYTES
        for number in range(min(bounds.num_records, num_accepted + bounds.window)):
            event = Append(offset=number * RECORD_BYTES, data=LETTERS[number].encode() * RECORD_BYTES)
            yield f"append {number}", _append(world, parent, event, LETTERS[number])
    if bounds.childs_record and child is not None and not child.is_deleted:
        event = Append(offset=child.own_start_offset, data=CHILDS_RECORD.encode() * RECORD_BYTES)
        yield "append to child", _append(world, child, event, CHILDS_RECORD)


def _append(world: World, metadata: StreamMetadata, event: Append, tag: str) -> World:
    start, end = log_rules.overlap(metadata, event)
    stored = stored_at(world, metadata, start) if start < end else None
    if start < end and stored is None:
        raise Violation(f"the record at {start} of {metadata.name} is gone")
    content = () if stored is None else (LogPiece(start, stored.tag.encode() * RECORD_BYTES, 1, stored.entry.chain),)
    try:
        appended = log_rules.append(metadata, event, overlapping=content, max_backlog_bytes=1 << 30)
    except StateLost as error:
        raise Violation("a loss is told that never was") from error
    except EunoeError:
        return world
    after = applied(world, appended.change, tag)
    assert after is not None
    return after


def stream_steps(world: World) -> Iterator[Step]:
    """Forks at every offset, deletes, and the collectors' small steps."""
    parent, _ = world.streams
    if world.left.forks and parent is not None and not parent.is_deleted:
        for at in (None, *range(0, parent.accepted_offset + 1, RECORD_BYTES)):
            if (forked := _fork(world, parent, at)) is not None:
                yield f"fork at {at}", forked._replace(left=world.left._replace(forks=0))
    for index, metadata in enumerate(world.streams):
        if metadata is None:
            continue
        if world.left.deletes and not metadata.is_deleted:
            deleted = applied(world, stream_rules.delete(metadata))
            assert deleted is not None
            left = world.left._replace(deletes=world.left.deletes - 1)
            yield f"delete {UIDS[index]}", deleted._replace(left=left)
        if (collected := collect(world, metadata)) is not None:
            yield f"collect {UIDS[index]}", collected


def _fork(world: World, parent: StreamMetadata, at: int | None) -> World | None:
    event = stream_rules.Fork(name=NAMES[CHILD], at_offset=at)
    is_inside = at is not None and parent.log_start_offset < at < parent.accepted_offset
    stored = stored_at(world, parent, at - RECORD_BYTES) if at is not None and is_inside else None
    entry = None if stored is None else stored.entry
    try:
        change = stream_rules.fork(parent, {}, event, at_entry=entry, uid=UIDS[CHILD], now_ns=0)
    except EunoeError:
        return None
    forked = applied(world, change)
    child = change.records[0]
    end = parent.accepted_offset if at is None else at
    if child.accepted_offset != end:
        raise Violation("a fork does not end where it was asked to")
    for base in child.checkpoints:
        if num_read(base) * RECORD_BYTES > end and end != parent.accepted_offset:
            raise Violation("a fork starts from a state that read what the fork does not have")
    return forked


def collect(world: World, metadata: StreamMetadata) -> World | None:
    """One atomic step of clearing up, as `Streams.collect` takes them; None where nothing is left to do."""
    for reference in stream_rules.unneeded_references(metadata):
        owner = world.streams[UIDS.index(reference.owner_uid)]
        if owner is None:
            raise Violation("the owner of a reference is gone")
        return applied(world, stream_rules.release(metadata, owner, reference))
    ranges = stream_rules.garbage_ranges(metadata)
    log = world.logs[UIDS.index(metadata.uid)]
    garbage = [s.entry for s in log if any(above < s.entry.end <= up_to for above, up_to in ranges)]
    if garbage:
        num_bytes = sum(entry.end - entry.start for entry in garbage)
        removals = tuple(RemoveRecord(metadata.uid, entry) for entry in garbage)
        return applied(world, Change((metadata,), effects=(*removals, AddToTotal(Total.LOG_BYTES, -num_bytes))))
    if metadata.is_deleted and not metadata.holds:
        return applied(world, Change(dropped=(metadata,)))
    return None
