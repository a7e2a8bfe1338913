"""Between the internal protos and the store's own values."""

from google.protobuf import timestamp_pb2

from eunoe.api.v1 import long_context_pb2 as api
from eunoe.internal.v1 import state_store_pb2 as pb
from eunoe.runtime.errors import InvalidRequest
from eunoe.state_store.chains import LogMark
from eunoe.state_store.erasure import Receipt
from eunoe.state_store.history import Checked, Difference, History
from eunoe.state_store.metadata import ChunkRef, DecisionRun, Lease, Manifest, Settings, StreamMetadata


def stream_to_proto(metadata: StreamMetadata) -> api.Stream:
    """What users see of a stream."""
    settings, newest = metadata.settings, metadata.newest
    stream = api.Stream(
        name=metadata.name,
        model=metadata.model,
        settings=api.StreamSettings(
            kv_budget_tokens=settings.kv_budget_tokens,
            segment_length=settings.segment_length,
            num_sink_tokens=settings.num_sink_tokens,
            positions=api.PositionMode.Name(settings.positions),
            retain_log=settings.retain_log,
        ),
        create_time=time_to_proto(metadata.create_time_ns),
        accepted_offset=metadata.accepted_offset,
        applied_offset=metadata.applied_offset,
        carry_bytes=len(metadata.carry),
        log_start_offset=metadata.log_start_offset,
        checkpoint_version=metadata.version,
        checkpoint_chain=bytes.fromhex(metadata.checkpoint_chain),
        log_chain=bytes.fromhex(metadata.log_chain),
    )
    if metadata.expire_time_ns is not None:
        stream.expire_time.CopyFrom(time_to_proto(metadata.expire_time_ns))
    if newest is not None:
        stream.tokens = newest.tokens
        stream.state_bytes = newest.state_bytes
        stream.state_digest = newest.state_digest
        stream.policy = newest.decisions[-1].policy if newest.decisions else ""
    return stream


def record_to_proto(metadata: StreamMetadata) -> pb.StreamRecord:
    """What processes see of a stream."""
    record = pb.StreamRecord(stream=stream_to_proto(metadata), checkpoint_offsets=metadata.checkpoint_offsets)
    if metadata.newest is not None:
        record.manifest.CopyFrom(manifest_to_proto(metadata.newest))
    farthest = max(metadata.retained, key=lambda checkpoint: checkpoint.tokens, default=None)
    if farthest is not None and (metadata.newest is None or farthest.tokens > metadata.newest.tokens):
        record.recorded_tokens = farthest.tokens
        record.recorded_decisions.extend(_decisions_to_proto(farthest))
    if metadata.lease is not None:
        record.lease.CopyFrom(lease_to_proto(metadata.lease))
    return record


def history_to_proto(item: Checked | History) -> pb.CheckHistoryResponse:
    """A sign of progress, or the end."""
    if isinstance(item, Checked):
        return pb.CheckHistoryResponse(log_bytes_checked=item.done_bytes, log_bytes=item.log_bytes)
    history = pb.History(
        record=record_to_proto(item.metadata), checkpoints=[manifest_to_proto(c) for c in item.metadata.retained]
    )
    if item.difference is not None:
        history.difference.CopyFrom(_difference_to_proto(item.difference))
    return pb.CheckHistoryResponse(history=history)


def _difference_to_proto(difference: Difference) -> api.Difference:
    return api.Difference(
        part=api.VERIFIED_PART_LOG if difference.of_log else api.VERIFIED_PART_COMMITS,
        offset=difference.offset,
        recorded=difference.recorded,
        found=difference.found,
        message=difference.message,
    )


def receipt_to_proto(receipt: Receipt) -> api.DeletionReceipt:
    return api.DeletionReceipt(
        name=receipt.name,
        uid=receipt.uid,
        delete_time=time_to_proto(receipt.delete_time_ns),
        erase_time=time_to_proto(receipt.erase_time_ns),
        is_shared=receipt.is_shared,
        num_values_removed=receipt.num_values_removed,
    )


def manifest_to_proto(manifest: Manifest) -> pb.Manifest:
    return pb.Manifest(
        encoding_version=manifest.encoding_version,
        version=manifest.version,
        applied_offset=manifest.applied_offset,
        applied_pretoken_tokens=manifest.applied_pretoken_tokens,
        tokens=manifest.tokens,
        state_bytes=manifest.state_bytes,
        state_digest=manifest.state_digest,
        model_digest=manifest.model_digest,
        decisions=_decisions_to_proto(manifest),
        chunks=[
            pb.ChunkRef(chunk_id=chunk.chunk_id, length=chunk.length, digest=bytes.fromhex(chunk.digest))
            for chunk in manifest.chunks
        ],
        chain=bytes.fromhex(manifest.chain),
    )


def _decisions_to_proto(manifest: Manifest) -> list[pb.DecisionRun]:
    return [pb.DecisionRun(**run._asdict()) for run in manifest.decisions]


def manifest_from_proto(manifest: pb.Manifest) -> Manifest:
    return Manifest(
        encoding_version=manifest.encoding_version,
        version=manifest.version,
        applied_offset=manifest.applied_offset,
        applied_pretoken_tokens=manifest.applied_pretoken_tokens,
        tokens=manifest.tokens,
        state_bytes=manifest.state_bytes,
        state_digest=manifest.state_digest,
        model_digest=manifest.model_digest,
        decisions=tuple(DecisionRun(r.first_segment, r.policy, r.numerics_id) for r in manifest.decisions),
        chunks=tuple(chunk_from_proto(chunk) for chunk in manifest.chunks),
        chain=manifest.chain.hex(),
    )


def mark_from_proto(mark: api.LogMark) -> LogMark:
    return LogMark(mark.offset, mark.chain.hex())


def chunk_from_proto(chunk: pb.ChunkRef) -> ChunkRef:
    return ChunkRef(chunk.chunk_id, chunk.length, chunk.digest.hex())


def settings_from_proto(settings: api.StreamSettings) -> Settings:
    """The settings as stored.

    Raises:
        InvalidRequest: If the position mode is none that this version knows.
    """
    if settings.positions not in api.PositionMode.values():
        raise InvalidRequest(f"there is no position mode {settings.positions}")
    return Settings(
        settings.kv_budget_tokens,
        settings.segment_length,
        settings.num_sink_tokens,
        settings.positions,
        settings.retain_log,
    )


def lease_to_proto(lease: Lease) -> pb.Lease:
    return pb.Lease(worker=lease.worker, epoch=lease.epoch, address=lease.address)


def time_to_proto(time_ns: int) -> timestamp_pb2.Timestamp:
    timestamp = timestamp_pb2.Timestamp()
    timestamp.FromNanoseconds(time_ns)
    return timestamp
