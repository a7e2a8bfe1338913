"""ExportStream and ImportStream: a stream as one self-describing file (`export_format`), out of and into the store."""

import uuid
from collections.abc import AsyncIterator
from typing import TypeVar

import xxhash
from google.protobuf.message import DecodeError, Message

from eunoe.api.v1 import long_context_pb2 as api
from eunoe.clients.state_store import StateStoreClient
from eunoe.gateway.export_format import PIECE_BYTES, FrameKind, FrameReader, frame, pieces
from eunoe.gateway.models import ModelDirectory, settings_in_effect
from eunoe.internal.v1 import state_store_pb2 as store_pb
from eunoe.runtime.errors import BadExport, InvalidRequest, ModelMismatch

# An export's log is what was accepted but not applied: the window of an Append, and a good margin.
MAX_LOG_BYTES = 16 * 1024 * 1024

AnyMessage = TypeVar("AnyMessage", bound=Message)


def export_stream(store: StateStoreClient, name: str) -> AsyncIterator[bytes]:
    """The export of a stream as it stands now, in pieces of at most 1 MiB."""
    return pieces(_frames(store, name))


async def _frames(store: StateStoreClient, name: str) -> AsyncIterator[bytes]:
    record = (await store.get_stream(store_pb.GetStreamRequest(name=name))).record
    record.ClearField("lease")
    yield frame(FrameKind.HEADER, record.SerializeToString())
    if record.HasField("manifest"):
        async for chunk in store.read_chunks(store_pb.ReadChunksRequest(name=name, chunks=record.manifest.chunks)):
            yield frame(FrameKind.CHUNK, chunk.SerializeToString())
    offset, end = _log_range(record)
    if offset < end:
        request = store_pb.ReadLogRequest(name=name, offset=offset, max_bytes=end - offset)
        async for piece in store.read_log(request):
            # Appended meanwhile: a record that begins at or above the accepted offset of the header.
            if piece.offset >= end:
                break
            yield frame(FrameKind.RECORD, piece.SerializeToString())
    yield frame(FrameKind.END)


async def import_stream(
    store: StateStoreClient,
    models: ModelDirectory,
    name: str,
    request_id: str,
    data: AsyncIterator[bytes],
) -> api.Stream:
    """Make the stream `name` of an export's bytes. Nothing is made of a bad one.

    Raises:
        BadExport: If the bytes are torn, corrupt, or contradict each other.
        ModelMismatch: If the export's model has another digest here.
        ModelNotFound: If it is not served here.
    """
    reader = FrameReader()
    importing = _Import(store, models, name)
    async for piece in data:
        for kind, payload in reader.feed(piece):
            if kind is FrameKind.HEADER:
                await importing.take_header(_parsed(store_pb.StreamRecord, payload))
            elif kind is FrameKind.CHUNK:
                await importing.take_chunk(_parsed(store_pb.ReadChunksResponse, payload))
            elif kind is FrameKind.RECORD:
                importing.take_record(_parsed(store_pb.ReadLogResponse, payload))
    if not reader.is_complete:
        raise BadExport("the export is torn: its end is missing")
    return await importing.commit(request_id)


class _Import:
    def __init__(self, store: StateStoreClient, models: ModelDirectory, name: str) -> None:
        self._store = store
        self._models = models
        self._name = name
        self._header = store_pb.StreamRecord()
        self._settings = api.StreamSettings()
        self._import_id = uuid.uuid4().hex
        self._manifest = store_pb.Manifest()
        self._log: list[store_pb.ReadLogResponse] = []
        self._next_offset = 0

    async def take_header(self, header: store_pb.StreamRecord) -> None:
        model = await self._models.find(header.stream.model)
        if header.HasField("manifest") and header.manifest.model_digest != model.model_digest:
            raise ModelMismatch(
                f"the export's memory belongs to other weights than {model.name!r} here",
                expected=model.model_digest,
                found=header.manifest.model_digest,
            )
        self._settings = settings_in_effect(header.stream.settings, model)
        self._header = header
        self._manifest.CopyFrom(header.manifest)
        self._manifest.ClearField("chunks")
        self._next_offset, end = _log_range(header)
        if not 0 <= end - self._next_offset <= MAX_LOG_BYTES:
            raise BadExport(f"the log of an export has at most {MAX_LOG_BYTES} bytes")

    async def take_chunk(self, chunk: store_pb.ReadChunksResponse) -> None:
        index = len(self._manifest.chunks)
        named = self._header.manifest.chunks
        if index == len(named) or chunk.chunk_id != named[index].chunk_id:
            raise BadExport("the export has a chunk that its manifest does not name")
        digest = xxhash.xxh3_128_digest(chunk.data)
        if len(chunk.data) != named[index].length or digest != named[index].digest:
            raise BadExport("a chunk does not have the digest that the manifest names")
        # A new id: within one tenant the exported stream may still have the old one.
        new_id = f"{self._import_id}-{index}"
        await self._store.stage_chunks(self._name, [(new_id, chunk.data)])
        self._manifest.chunks.add(chunk_id=new_id, length=len(chunk.data), digest=digest)

    def take_record(self, record: store_pb.ReadLogResponse) -> None:
        if record.offset != self._next_offset or not record.data:
            raise BadExport("the export's log has a gap")
        self._next_offset += len(record.data)
        self._log.append(record)
        if self._next_offset > _log_range(self._header)[1]:
            raise BadExport("the export's log goes beyond its accepted offset")

    async def commit(self, request_id: str) -> api.Stream:
        if len(self._manifest.chunks) != len(self._header.manifest.chunks):
            raise BadExport("the export lacks chunks of its manifest")
        start, end = _log_range(self._header)
        if self._next_offset != end:
            raise BadExport("the export's log ends below its accepted offset")
        has_manifest = self._header.HasField("manifest")
        await self._store.import_stream(
            store_pb.ImportStreamRequest(
                name=self._name,
                model=self._header.stream.model,
                settings=self._settings,
                manifest=self._manifest if has_manifest else None,
                log_start_offset=start,
                request_id=request_id,
            )
        )
        # From here on a failure leaves a stream with less of its log: the same request_id completes it.
        for record in self._log:
            await self._store.append_record(
                store_pb.AppendRecordRequest(
                    name=self._name, offset=record.offset, data=record.data, kind=record.kind or api.RECORD_KIND_TEXT
                )
            )
        return (await self._store.get_stream(store_pb.GetStreamRequest(name=self._name))).record.stream


def _log_range(record: store_pb.StreamRecord) -> tuple[int, int]:
    """Where an export's log starts and ends."""
    has_manifest = record.HasField("manifest")
    return (
        record.manifest.applied_offset if has_manifest else record.stream.log_start_offset,
        record.stream.accepted_offset,
    )


def _parsed(kind: type[AnyMessage], payload: bytes) -> AnyMessage:
    try:
        return kind.FromString(payload)
    except DecodeError:
        raise BadExport("the export is corrupt: a frame is no message of its kind") from None


async def uploaded_pieces(
    first: api.ImportStreamRequest, requests: AsyncIterator[api.ImportStreamRequest]
) -> AsyncIterator[bytes]:
    """The bytes of an ImportStream's requests.

    Raises:
        InvalidRequest: If a request has more than 1 MiB, or a later one names the stream again.
    """
    yield _checked_piece(first.data)
    async for request in requests:
        if request.stream_id or request.request_id:
            raise InvalidRequest("stream_id and request_id belong into the first request only")
        yield _checked_piece(request.data)


def _checked_piece(data: bytes) -> bytes:
    if len(data) > PIECE_BYTES:
        raise InvalidRequest(f"a request of an ImportStream has at most {PIECE_BYTES} bytes of data")
    return data
