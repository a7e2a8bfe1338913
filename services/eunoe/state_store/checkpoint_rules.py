"""What may become a stream's committed memory state, and what a commit frees. Pure."""

from dataclasses import replace

from eunoe.runtime.errors import InvalidRequest, ModelMismatch, StateLost, VersionConflict
from eunoe.state_store.chains import checkpoint_chain
from eunoe.state_store.effects import AddToTotal, Change, Effect, KeepChunk, RemoveChunk, Total
from eunoe.state_store.lease_rules import check_fence
from eunoe.state_store.metadata import ChunkRef, Manifest, StreamMetadata

MAX_CHUNK_BYTES = 1 << 20
MAX_CHUNKS = 512
MAX_DECISIONS = 1024
# What closed the tokens of a checkpoint lies at most this far behind its applied offset: a pre-token is closed by
# force after 4 KiB, and at most one more character decides where.
MAX_READ_AHEAD_BYTES = 4099


def commit(
    metadata: StreamMetadata, manifest: Manifest, fence: tuple[str, int], *, parent_chain: str | None = None
) -> Change:
    """Make `manifest` the stream's newest checkpoint; empty if it already is one of the retained.

    Args:
        metadata: The stream.
        manifest: As its worker describes it.
        fence: The lease that it was computed under.
        parent_chain: Of the checkpoint before it, as the worker has seen it; None is not compared.

    Raises:
        LeaseLost, VersionConflict, ModelMismatch, InvalidRequest.
        StateLost: If the worker has seen commits that are gone.
    """
    if any(replace(c, read_to=0, chain="", unknown="") == owned(manifest, metadata.uid) for c in metadata.retained):
        return Change()
    check_fence(metadata, fence)
    newest, newest_chain = metadata.newest, metadata.checkpoint_chain
    num_ahead = manifest.version - metadata.version
    if parent_chain is not None and (num_ahead > 1 or (num_ahead == 1 and parent_chain != newest_chain)):
        raise StateLost(
            f"the store was rolled back: {manifest.version - 1} commits had been acknowledged, and the "
            f"{metadata.version} that it has are not the same",
            lost_from=metadata.applied_offset,
        )
    if num_ahead != 1:
        raise VersionConflict(
            f"the newest checkpoint has version {metadata.version}; {manifest.version} does not follow",
            version=metadata.version,
        )
    check_manifest(manifest)
    if newest is not None and newest.model_digest != manifest.model_digest:
        raise ModelMismatch(
            "the state was computed with other weights", expected=newest.model_digest, found=manifest.model_digest
        )
    highest = metadata.accepted_offset - len(metadata.carry)
    if not metadata.applied_offset <= manifest.applied_offset <= highest:
        raise InvalidRequest(
            f"the applied offset {manifest.applied_offset} is not within {metadata.applied_offset} to {highest}"
        )
    if newest is not None and manifest.tokens < newest.tokens:
        raise InvalidRequest(f"{manifest.tokens} tokens are fewer than the {newest.tokens} of the newest checkpoint")
    read_ahead_bytes = MAX_READ_AHEAD_BYTES if manifest.tokens else 0
    read_to = min(metadata.accepted_offset, manifest.applied_offset + read_ahead_bytes)
    chain = checkpoint_chain(newest_chain, manifest)
    checkpoint = owned(manifest, metadata.uid, read_to=read_to, chain=chain)
    after, freed = without_unneeded_checkpoints(replace(metadata, checkpoints=(*metadata.checkpoints, checkpoint)))
    return Change((after,), effects=(*kept(manifest, metadata), *freed))


def quarantine(metadata: StreamMetadata, damaged: ChunkRef) -> Change:
    """Let nothing start any more from a checkpoint that has a damaged chunk; empty if nothing does.

    It is not freed: versions and chain go on from it, and what is left of it may be looked at until it is retired.
    """
    checkpoints = tuple(
        replace(c, is_quarantined=True) if damaged in c.chunks and not c.is_quarantined else c
        for c in metadata.checkpoints
    )
    return Change() if checkpoints == metadata.checkpoints else Change((replace(metadata, checkpoints=checkpoints),))


def owned(manifest: Manifest, uid: str, *, read_to: int = 0, chain: str = "") -> Manifest:
    """A worker's manifest with the store's own facts."""
    return replace(manifest, owner_uid=uid, read_to=read_to, chain=chain)


def kept(manifest: Manifest, metadata: StreamMetadata) -> tuple[Effect, ...]:
    """Effects that make chunks last that are staged for a stream and named by its manifest."""
    return (
        AddToTotal(Total.CHECKPOINT_BYTES, manifest.chunk_bytes),
        *(KeepChunk(metadata.uid, c, metadata.wrapped_key) for c in manifest.chunks),
    )


def without_unneeded_checkpoints(metadata: StreamMetadata) -> tuple[StreamMetadata, tuple[Effect, ...]]:
    """The record without checkpoints that neither the stream nor a fork needs, and the effects that free them."""
    needed = {c.version for c in metadata.retained} | {h.version for h in metadata.holds}
    unneeded = tuple(c for c in metadata.checkpoints if c.version not in needed)
    effects: list[Effect] = []
    for manifest in unneeded:
        # The chunks of a checkpoint that a fork began with belong to its parent: the reference is released instead.
        if manifest.owner_uid == metadata.uid:
            effects.append(AddToTotal(Total.CHECKPOINT_BYTES, -manifest.chunk_bytes))
            effects.extend(RemoveChunk(chunk) for chunk in manifest.chunks)
    checkpoints = tuple(c for c in metadata.checkpoints if c.version in needed)
    return replace(metadata, checkpoints=checkpoints), tuple(effects)


def check_manifest(manifest: Manifest) -> None:
    """Refuse a manifest that no stream could have.

    Raises:
        InvalidRequest.
    """
    if not 1 <= len(manifest.chunks) <= MAX_CHUNKS:
        raise InvalidRequest(f"a manifest has 1 to {MAX_CHUNKS} chunks; this one has {len(manifest.chunks)}")
    if len(manifest.decisions) > MAX_DECISIONS:
        raise InvalidRequest(f"a manifest has at most {MAX_DECISIONS} runs; this one has {len(manifest.decisions)}")
    if len({chunk.chunk_id for chunk in manifest.chunks}) != len(manifest.chunks):
        raise InvalidRequest("a manifest names a chunk twice")
    for chunk in manifest.chunks:
        if not chunk.chunk_id or not 1 <= chunk.length <= MAX_CHUNK_BYTES or len(chunk.digest) != 32:
            raise InvalidRequest(f"chunk {chunk.chunk_id!r} needs an id, 1 to {MAX_CHUNK_BYTES} bytes and a digest")
