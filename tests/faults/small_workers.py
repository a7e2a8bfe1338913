"""The workers of the small model: they take streams, commit, give streams back, crash, and come too late."""

from collections.abc import Iterator
from dataclasses import replace

from small_checks import check_commit
from small_model import (
    RECORD_BYTES,
    UIDS,
    Bounds,
    Hold,
    Message,
    Step,
    Violation,
    World,
    applied,
    content_of,
    stored_at,
    with_item,
)

from eunoe.runtime.errors import Conflict, InvalidRequest, StateLost
from eunoe.state_store import checkpoint_rules, lease_rules, log_rules
from eunoe.state_store.chains import LogMark
from eunoe.state_store.effects import Change
from eunoe.state_store.metadata import ChunkRef, Lease, Manifest, StreamMetadata

PRESENT = ("w0", "w1")
OLDER = ("old0", "old1")
DEAD = "dead"
_NO_DIGEST = "0" * 32


def worker_steps(world: World, worker: int, bounds: Bounds, other_chunks: tuple[str, ...]) -> Iterator[Step]:
    """What one worker may do next, and what its message in the network may do.

    Args:
        world: The state; of the other worker nothing is read.
        worker: 0 or 1.
        bounds: Of the model.
        other_chunks: Chunk ids that the other worker's message names.
    """
    name, hold, message = PRESENT[worker], world.holds[worker], world.slots[worker]
    for stream, metadata in enumerate(world.streams):
        if metadata is not None and not metadata.is_deleted:
            suspect = None if metadata.lease is None else metadata.lease.fence
            after = lease_rules.acquire(metadata, Lease(name, 0, "a:1"), suspect=suspect, owner_is_alive=True)
            is_new = after.epoch != metadata.epoch
            if is_new and not world.left.leases:
                continue
            left = world.left._replace(leases=world.left.leases - is_new)
            taken = world._replace(streams=with_item(world.streams, stream, after), left=left)
            if taken != world:
                yield f"{name} acquires {UIDS[stream]}, reply lost or late", taken
            if hold is None:
                new = Hold(stream, after.epoch, after.newest, after.newest, False)
                yield f"{name} acquires {UIDS[stream]}", taken._replace(holds=with_item(world.holds, worker, new))
    owners = [m.lease.worker for m in world.streams if m is not None and m.lease is not None]
    if world.left.crashes and (hold is not None or name in owners):
        yield f"{name} crashes", _crashed(world, worker)
    if hold is not None and not hold.is_pending:
        release = Message(hold.stream, name, hold.epoch, None, "", LogMark(0, ""))
        sent = _sent(world, worker, release)
        yield f"{name} releases", sent._replace(holds=with_item(world.holds, worker, None))
        yield from _commits(world, worker, hold, bounds, other_chunks)
    if message is not None:
        yield from _deliveries(world, worker, message)


def _crashed(world: World, worker: int) -> World:
    """The worker comes back under a new name. What its message bears of its old one, leases bear as well."""
    message = world.slots[worker]
    is_in_message = message is not None and message.worker == PRESENT[worker]
    names = {PRESENT[worker]: OLDER[worker] if is_in_message else DEAD}
    if is_in_message:
        names[OLDER[worker]] = DEAD
    streams = tuple(None if m is None else with_worker_names(m, names) for m in world.streams)
    slot = message._replace(worker=OLDER[worker]) if message is not None and is_in_message else message
    return world._replace(
        streams=streams,
        left=world.left._replace(crashes=world.left.crashes - 1),
        holds=with_item(world.holds, worker, None),
        slots=with_item(world.slots, worker, slot),
    )


def with_worker_names(metadata: StreamMetadata, names: dict[str, str]) -> StreamMetadata:
    """The record with its owner renamed."""
    lease = metadata.lease
    if lease is None or lease.worker not in names:
        return metadata
    return replace(metadata, lease=lease._replace(worker=names[lease.worker]))


def _sent(world: World, worker: int, message: Message) -> World:
    """The message takes the place of the one before it, of whose sender there is no more trace in the network."""
    streams = tuple(None if m is None else with_worker_names(m, {OLDER[worker]: DEAD}) for m in world.streams)
    return world._replace(streams=streams, slots=with_item(world.slots, worker, message))


def _commits(world: World, worker: int, hold: Hold, bounds: Bounds, other_chunks: tuple[str, ...]) -> Iterator[Step]:
    name, metadata = PRESENT[worker], world.streams[hold.stream]
    gone = with_item(world.holds, worker, None)
    if metadata is None or metadata.is_deleted:
        yield f"{name} finds its stream gone", world._replace(holds=gone)
        return
    num_folded = len(content_of(hold.fold))
    tags = content_of(hold.fold)
    for number in range(num_folded, metadata.accepted_offset // RECORD_BYTES):
        start = number * RECORD_BYTES
        if start < metadata.log_start_offset:
            yield f"{name} finds the log trimmed", world._replace(holds=gone)
            return
        stored = stored_at(world, metadata, start)
        if stored is None:
            raise Violation(f"the record at {start} of {metadata.name} is gone")
        tags += stored.tag
        mark = LogMark(stored.entry.end, stored.entry.chain)
        for num_ahead in (0, 1) if bounds.reads_ahead else (0,):
            if len(tags) - num_ahead > num_folded:
                used = {*other_chunks, *(chunk.chunk_id for chunk in world.chunks)}
                manifest = _manifest(hold, tags, num_ahead, used)
                chain = "" if hold.parent is None else hold.parent.chain
                message = Message(hold.stream, name, hold.epoch, manifest, chain, mark)
                yield (
                    f"{name} sends commit {manifest.state_digest}",
                    _sent(world, worker, message)._replace(
                        holds=with_item(world.holds, worker, hold._replace(is_pending=True))
                    ),
                )


def _manifest(hold: Hold, tags: str, num_ahead: int, used: set[str]) -> Manifest:
    """The next checkpoint: all but `num_ahead` of the records read are in the state. Its chunk has an id not in use."""
    num = len(tags) - num_ahead
    version = 1 if hold.parent is None else hold.parent.version + 1
    digest = f"{tags[:num]}/{len(tags)}"
    chunk_id = next(i for n in range(9) if (i := f"{UIDS[hold.stream]}.{version}.{digest}.{n}") not in used)
    chunk = ChunkRef(chunk_id, 100, _NO_DIGEST)
    return Manifest(1, version, num * RECORD_BYTES, 0, num, 1, digest, "weights", (), (chunk,))


def _deliveries(world: World, worker: int, message: Message) -> Iterator[Step]:
    hold, metadata = world.holds[worker], world.streams[message.stream]
    is_awaited = hold is not None and hold.is_pending and message.worker == PRESENT[worker]
    refused = world._replace(holds=with_item(world.holds, worker, None)) if is_awaited else None
    fence = message.worker, message.epoch
    if metadata is None or metadata.is_deleted:
        change, error = Change(), True
    else:
        change, error = _decided(world, metadata, message, fence)
    after = None if error else applied(world, change)
    if after is None:
        if refused is not None:
            yield f"commit of {message.worker} is refused", refused
        return
    if message.manifest is not None and change.records:
        check_commit(world, after, message)
    yield f"message of {message.worker} arrives, reply lost", after
    if is_awaited and metadata is not None and message.manifest is not None:
        newest = (change.records or (metadata,))[0].newest
        done = hold._replace(parent=newest, fold=message.manifest, is_pending=False)
        yield f"commit of {message.worker} is acknowledged", after._replace(holds=with_item(after.holds, worker, done))


def _decided(world: World, metadata: StreamMetadata, message: Message, fence: tuple[str, int]) -> tuple[Change, bool]:
    try:
        if message.manifest is None:
            released = lease_rules.release(metadata, fence)
            return Change((released,) if released != metadata else ()), False
        change = checkpoint_rules.commit(metadata, message.manifest, fence, parent_chain=message.parent_chain)
        if change.records:
            mark = message.read
            is_inside = metadata.log_start_offset < mark.offset < metadata.accepted_offset
            stored = stored_at(world, metadata, mark.offset - RECORD_BYTES) if is_inside else None
            log_rules.check_seen(metadata, mark, None if stored is None else stored.entry)
    except StateLost as error:
        raise Violation("a loss is told that never was") from error
    except (Conflict, InvalidRequest):
        return Change(), True
    return change, False
