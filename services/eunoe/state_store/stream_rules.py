"""How streams come to be and go. Pure: (records, event, uid, clock) -> decision."""

from collections.abc import Mapping
from dataclasses import dataclass, replace

from eunoe.runtime.errors import AlreadyExists, InvalidRequest, OffsetUnavailable, VocabularyMismatch
from eunoe.state_store.checkpoint_rules import (
    MAX_READ_AHEAD_BYTES,
    check_manifest,
    kept,
    owned,
    without_unneeded_checkpoints,
)
from eunoe.state_store.effects import (
    AddToTotal,
    Change,
    Effect,
    ForgetPendingKey,
    ListName,
    RecordEntry,
    Total,
    UnlistName,
)
from eunoe.state_store.metadata import Hold, Manifest, Reference, Settings, StreamMetadata


@dataclass(frozen=True, slots=True, kw_only=True)
class Create:
    """A stream to make, empty or (an import) from a manifest whose chunks are staged."""

    name: str
    model: str
    settings: Settings
    expire_time_ns: int | None = None
    request_id: str = ""
    manifest: Manifest | None = None
    log_start_offset: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Rebuild:
    """A memory to fold anew, by a model, under settings; its token ids may be those of the parent's model."""

    model: str
    settings: Settings
    shares_vocabulary: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Fork:
    """A stream to make that shares the past of another: its log and memory, or the log alone, to rebuild a memory from.

    `at_offset` None means the accepted offset.
    """

    name: str
    at_offset: int | None = None
    expire_time_ns: int | None = None
    request_id: str = ""
    rebuild: Rebuild | None = None


def same_request(existing: StreamMetadata, request_id: str) -> StreamMetadata:
    """The stream that a repeated request made before.

    Raises:
        AlreadyExists: If another request made it.
    """
    if request_id and existing.create_request_id == request_id:
        return existing
    raise AlreadyExists(f"{existing.name} exists already")


def create(event: Create, *, uid: str, wrapped_key: str, now_ns: int) -> Change:
    """Make a stream where there is none of that name.

    Args:
        event: The stream.
        uid: Of the stream.
        wrapped_key: Of the stream, and of the chunks that were staged for it.
        now_ns: Clock.

    Raises:
        InvalidRequest: If model, settings or manifest cannot work.
    """
    settings, manifest = event.settings, event.manifest
    if not event.model:
        raise InvalidRequest("a stream needs a model")
    _check_settings(settings)
    _check_expiry(event.expire_time_ns, now_ns)
    metadata = StreamMetadata(
        name=event.name,
        uid=uid,
        model=event.model,
        settings=settings,
        create_time_ns=now_ns,
        expire_time_ns=event.expire_time_ns,
        create_request_id=event.request_id,
        wrapped_key=wrapped_key,
    )
    effects: tuple[Effect, ...] = (AddToTotal(Total.STREAMS, 1), ListName(event.name))
    if wrapped_key:
        # The next stream of the name must have a key of its own, which lives and goes with it.
        effects += (ForgetPendingKey(event.name),)
    if manifest is not None:
        check_manifest(manifest)
        if manifest.version < 1 or manifest.applied_offset != event.log_start_offset:
            raise InvalidRequest("an import's log starts at its checkpoint's applied offset")
        metadata = replace(
            metadata,
            own_start_offset=event.log_start_offset,
            accepted_offset=event.log_start_offset,
            start_version=manifest.version,
            checkpoints=(
                owned(manifest, uid, read_to=manifest.applied_offset + MAX_READ_AHEAD_BYTES, chain=manifest.chain),
            ),
        )
        effects += kept(manifest, metadata)
    elif event.log_start_offset:
        raise InvalidRequest("without a checkpoint a log starts at 0")
    return Change((metadata,), effects=effects)


def fork(
    parent: StreamMetadata,
    owners: Mapping[str, StreamMetadata],
    event: Fork,
    *,
    at_entry: RecordEntry | None,
    token_ids_at: int | None = None,
    uid: str,
    now_ns: int,
) -> Change:
    """Make a child that starts from the parent's newest usable checkpoint and shares the log from there on.

    A checkpoint is usable if no byte at or above the fork's offset had a part in it: at the accepted offset all are,
    before it those that had not read on. A rebuild starts from none, and shares the log from 0 on.

    Args:
        parent: The stream to fork.
        owners: The streams, by uid, that the parent's references name.
        event: The child.
        at_entry: The log's record that ends at the fork's offset, if there is one.
        token_ids_at: Start of the log's first record of token ids below the fork's offset, if there is one; needed
            where a rebuild does not share the vocabulary.
        uid: Of the child.
        now_ns: Clock.

    Raises:
        OffsetUnavailable, VocabularyMismatch.
    """
    _check_expiry(event.expire_time_ns, now_ns)
    at = parent.accepted_offset if event.at_offset is None else event.at_offset
    if event.rebuild is None:
        model, settings = parent.model, parent.settings
        base = _base_of_fork(parent, at, at_entry)
    else:
        model, settings = event.rebuild.model, event.rebuild.settings
        base = None
        _check_rebuild(parent, event.rebuild, at, at_entry, token_ids_at)
    start = 0 if base is None else base.applied_offset
    references = _parts_of(parent, base, start, at)
    child = StreamMetadata(
        name=event.name,
        uid=uid,
        model=model,
        settings=settings,
        create_time_ns=now_ns,
        expire_time_ns=event.expire_time_ns,
        create_request_id=event.request_id,
        wrapped_key=parent.wrapped_key,
        own_start_offset=at,
        accepted_offset=at,
        log_chain=_chain_at(parent, at, at_entry),
        start_version=0 if base is None else base.version,
        sources=parent.sources if at == parent.accepted_offset else (),
        checkpoints=() if base is None else (base,),
        references=references,
    )
    changed = {parent.uid: parent}
    for reference in references:
        owner = parent if reference.owner_uid == parent.uid else owners[reference.owner_uid]
        changed[owner.uid] = _with_holders(owner, reference, 1)
    return Change((child, *changed.values()), effects=(AddToTotal(Total.STREAMS, 1), ListName(event.name)))


def delete(metadata: StreamMetadata) -> Change:
    """Free the name at once; what is left of the stream lives on under its uid until no fork needs it."""
    rest = replace(metadata, is_deleted=True, lease=None, carry=b"", sources=())
    rest, freed = without_unneeded_checkpoints(rest)
    return Change((rest,), effects=(AddToTotal(Total.STREAMS, -1), UnlistName(metadata.name), *freed))


def unneeded_references(metadata: StreamMetadata) -> tuple[Reference, ...]:
    """References to other streams that this one can do without."""
    if metadata.is_deleted:
        return metadata.references
    used = {(c.owner_uid, c.version) for c in metadata.retained}
    return tuple(
        r
        for r in metadata.references
        if (r.owner_uid, r.version) not in used and (r.log_from == r.log_to or r.log_to <= metadata.log_start_offset)
    )


def release(holder: StreamMetadata, owner: StreamMetadata, reference: Reference) -> Change:
    """Give a reference back and free the owner's checkpoint if it was the last to need it."""
    rest = replace(holder, references=tuple(r for r in holder.references if r != reference))
    owner, freed = without_unneeded_checkpoints(_with_holders(owner, reference, -1))
    return Change((rest, owner), effects=freed)


def garbage_ranges(metadata: StreamMetadata) -> tuple[tuple[int, int], ...]:
    """Ranges (above, up_to): a record of the stream's own storage whose end lies in one is needed by nobody."""
    needed = [(h.log_from, h.log_to) for h in metadata.holds if h.log_from < h.log_to]
    end = metadata.accepted_offset
    needed.append((end, end) if metadata.is_deleted else (metadata.log_start_offset, end))
    ranges = []
    above = metadata.own_start_offset
    for start, stop in sorted(needed):
        if start > above:
            ranges.append((above, start))
        above = max(above, stop)
    return tuple(ranges)


def _base_of_fork(parent: StreamMetadata, at: int, at_entry: RecordEntry | None) -> Manifest | None:
    """The checkpoint that a child starts from; None is the empty memory at offset 0."""
    offsets = parent.checkpoint_offsets
    if not offsets:
        raise OffsetUnavailable("every retained checkpoint is damaged", available="none")
    available = f"ends of records from {offsets[0]} to {parent.accepted_offset}; checkpoints at {list(offsets)}"
    if not offsets[0] <= at <= parent.accepted_offset:
        raise OffsetUnavailable(f"the stream cannot be forked at {at}", available=available)
    _check_end(parent, at, at_entry, available)
    usable = [c for c in parent.usable if at == parent.accepted_offset or c.read_to <= at]
    if not usable and not parent.retains_beginning:
        raise OffsetUnavailable(f"every retained checkpoint has read beyond {at}", available=available)
    return usable[-1] if usable else None


def _check_rebuild(
    parent: StreamMetadata, rebuild: Rebuild, at: int, at_entry: RecordEntry | None, token_ids_at: int | None
) -> None:
    """Refuse to fold anew what is not there as a whole, or not for this model."""
    _check_settings(rebuild.settings)
    start, end = parent.log_start_offset, parent.accepted_offset
    available = f"the log from {start} to {end}"
    if start:
        raise OffsetUnavailable(
            f"a rebuild reads the log from 0, and this one starts at {start}: only a stream that was made with "
            "retain_log=true keeps all of its log",
            available=available,
        )
    if at > end:
        raise OffsetUnavailable(f"the log has no offset {at}", available=available)
    _check_end(parent, at, at_entry, available)
    if token_ids_at is not None and not rebuild.shares_vocabulary:
        raise VocabularyMismatch(
            f"the log has token ids at {token_ids_at}, and {rebuild.model!r} is not known to share the vocabulary of "
            f"{parent.model!r}",
            offset=token_ids_at,
        )


def _check_end(parent: StreamMetadata, at: int, at_entry: RecordEntry | None, available: str) -> None:
    """Refuse an offset that is no record's end, or inside a character."""
    is_end = at == parent.accepted_offset
    if is_end or at == parent.own_start_offset:
        carry_bytes = len(parent.carry) if is_end else 0
    elif at_entry is None:
        raise OffsetUnavailable(f"no record ends at {at}", available=available)
    else:
        carry_bytes = at_entry.carry_bytes
    if carry_bytes:
        raise OffsetUnavailable(f"offset {at} is inside a character", available=available)


def _chain_at(parent: StreamMetadata, at: int, at_entry: RecordEntry | None) -> str:
    """The log's chain where a child takes it up; anew where the record before is trimmed, as no one can check it."""
    if at == parent.accepted_offset:
        return parent.log_chain
    return "" if at_entry is None else at_entry.chain


def _parts_of(parent: StreamMetadata, base: Manifest | None, start: int, at: int) -> tuple[Reference, ...]:
    """What a child needs of the parent and of those that the parent itself shares with, in the log's order."""
    owners = [(r.owner_name, r.owner_uid, r.log_from, r.log_to) for r in parent.references]
    owners.append((parent.name, parent.uid, parent.own_start_offset, parent.accepted_offset))
    references = []
    for name, uid, log_from, log_to in owners:
        version = base.version if base is not None and base.owner_uid == uid else 0
        first, last = max(log_from, start), min(log_to, at)
        if first >= last:
            first = last = 0
        if version or first < last:
            references.append(Reference(name, uid, version, first, last))
    return tuple(references)


def _with_holders(owner: StreamMetadata, reference: Reference, delta: int) -> StreamMetadata:
    num_holders = {hold.part: hold.num_holders for hold in owner.holds}
    num_holders[reference.part] = num_holders.get(reference.part, 0) + delta
    assert num_holders[reference.part] >= 0, "a reference was given back twice"
    holds = tuple(Hold(*part, count) for part, count in sorted(num_holders.items()) if count)
    return replace(owner, holds=holds)


def _check_settings(settings: Settings) -> None:
    if settings.kv_budget_tokens < 1 or settings.segment_length < 1:
        raise InvalidRequest("a stream's KV budget and segment length are at least 1 token")


def _check_expiry(expire_time_ns: int | None, now_ns: int) -> None:
    if expire_time_ns is not None and expire_time_ns <= now_ns:
        raise InvalidRequest("the expire time has passed")
