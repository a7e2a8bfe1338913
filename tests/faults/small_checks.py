"""What must hold in every state of the small model, said without the rules that are to keep it."""

from dataclasses import replace

from small_model import (
    CHILD,
    PARENT,
    RECORD_BYTES,
    UIDS,
    Bounds,
    Message,
    Violation,
    World,
    collect,
    content_of,
    stored_at,
    truth,
)

from eunoe.runtime.errors import EunoeError
from eunoe.state_store import checkpoint_rules
from eunoe.state_store.metadata import StreamMetadata


def check_world(world: World, bounds: Bounds) -> None:
    """Raise Violation unless all promises about what is stored hold."""
    for stream in (PARENT, CHILD):
        metadata = world.streams[stream]
        if metadata is not None and not metadata.is_deleted:
            _check_log(world, stream, metadata, bounds)
            _check_checkpoints(world, stream, metadata)
            _check_refusals(metadata)
    _check_nothing_is_left_over(world)


def check_nothing_goes(before: World, after: World) -> None:
    """Raise Violation if a living stream has lost what was accepted and so perhaps acknowledged."""
    for former, metadata in zip(before.streams, after.streams, strict=True):
        if former is None or former.is_deleted:
            continue
        if metadata is None or metadata.accepted_offset < former.accepted_offset:
            raise Violation("what was acknowledged is not in the log any more")
        if metadata.version < former.version:
            raise Violation("a committed checkpoint is forgotten")


def check_commit(before: World, after: World, message: Message) -> None:
    """Raise Violation unless the commit that took effect was its stream's owner's next one."""
    metadata, manifest = before.streams[message.stream], message.manifest
    newest = after.streams[message.stream]
    assert metadata is not None
    assert manifest is not None
    assert newest is not None
    lease = metadata.lease
    if lease is None or (lease.worker, lease.epoch) != (message.worker, message.epoch):
        raise Violation("a commit under a lease that is not the stream's took effect")
    if newest.version != metadata.version + 1 or manifest.version != newest.version:
        raise Violation("a commit does not count the version up by one")
    if manifest.applied_offset < metadata.applied_offset:
        raise Violation("a commit goes back behind an earlier one")


def _check_log(world: World, stream: int, metadata: StreamMetadata, bounds: Bounds) -> None:
    expected = truth(world, stream)
    if stream == PARENT and len(expected) > bounds.num_records:
        raise Violation("the log has more records than were sent")
    for number in range(metadata.log_start_offset // RECORD_BYTES, len(expected)):
        stored = stored_at(world, metadata, number * RECORD_BYTES)
        if stored is None:
            raise Violation(f"record {number} of {UIDS[stream]} is gone")
        if stored.tag != expected[number]:
            raise Violation(f"record {number} of {UIDS[stream]} is {stored.tag!r}, not {expected[number]!r}")


def _check_checkpoints(world: World, stream: int, metadata: StreamMetadata) -> None:
    expected = truth(world, stream)
    for manifest in metadata.retained:
        if not world.chunks.issuperset(manifest.chunks):
            raise Violation(f"checkpoint {manifest.version} of {UIDS[stream]} has lost its chunk")
        num = manifest.applied_offset // RECORD_BYTES
        if content_of(manifest) != expected[:num]:
            raise Violation(f"checkpoint {manifest.version} of {UIDS[stream]} is not of its log's first {num} records")


def _check_refusals(metadata: StreamMetadata) -> None:
    """A buggy owner's commits: none of them may take effect."""
    newest, lease = metadata.newest, metadata.lease
    if newest is None or lease is None:
        return
    base = replace(newest, version=newest.version + 1, owner_uid="", read_to=0, chain="")
    for name, wrong in (
        ("skips a version", replace(base, version=base.version + 1)),
        ("goes back", replace(base, applied_offset=newest.applied_offset - 1)),
        ("is ahead of the log", replace(base, applied_offset=metadata.accepted_offset + 1)),
        ("has fewer tokens", replace(base, tokens=newest.tokens - 1)),
        ("has no chunks", replace(base, chunks=())),
        ("has other weights", replace(base, model_digest="other")),
    ):
        try:
            change = checkpoint_rules.commit(metadata, wrong, lease.fence)
        except EunoeError:
            continue
        if change.records:
            raise Violation(f"a commit that {name} is taken")


def _check_nothing_is_left_over(world: World) -> None:
    """Once the collectors have nothing to do, exactly what living streams need is there."""
    present = [metadata for metadata in world.streams if metadata is not None]
    if any(collect(world, metadata) is not None for metadata in present):
        return
    living = [metadata for metadata in present if not metadata.is_deleted]
    needed = {chunk for metadata in living for manifest in metadata.retained for chunk in manifest.chunks}
    # What a fork shares, a checkpoint and the log behind it, it gives back as a whole.
    references = [reference for metadata in living for reference in metadata.references]
    for reference in references:
        owner = world.streams[UIDS.index(reference.owner_uid)]
        shared = () if owner is None else owner.checkpoints
        needed |= {chunk for manifest in shared if manifest.version == reference.version for chunk in manifest.chunks}
    if world.chunks != needed:
        raise Violation(f"chunks are left over: {sorted(world.chunks - needed)}")
    records = {
        stored
        for metadata in living
        for start in range(metadata.log_start_offset, metadata.accepted_offset, RECORD_BYTES)
        if (stored := stored_at(world, metadata, start)) is not None
    }
    records |= {
        stored
        for reference in references
        for stored in world.logs[UIDS.index(reference.owner_uid)]
        if reference.log_from < stored.entry.end <= reference.log_to
    }
    if {stored for log in world.logs for stored in log} != records:
        raise Violation("records of the log are left over")
