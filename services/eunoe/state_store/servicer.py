"""The state store's RPCs: translation to and from the store's own values, nothing else."""

from collections.abc import AsyncIterator
from typing import Any

from google.protobuf import timestamp_pb2

from eunoe.api.v1 import long_context_pb2 as api
from eunoe.internal.v1 import state_store_pb2 as pb
from eunoe.internal.v1.state_store_pb2_grpc import StateStoreServiceServicer
from eunoe.runtime.errors import EunoeError, InvalidRequest
from eunoe.state_store.api_keys import ApiKey
from eunoe.state_store.history import check_history
from eunoe.state_store.log_rules import Append
from eunoe.state_store.metadata import Lease
from eunoe.state_store.store import StateStore
from eunoe.state_store.stream_rules import Create, Fork, Rebuild
from eunoe.state_store.translation import (
    chunk_from_proto,
    history_to_proto,
    lease_to_proto,
    manifest_from_proto,
    mark_from_proto,
    receipt_to_proto,
    record_to_proto,
    settings_from_proto,
    stream_to_proto,
    time_to_proto,
)

SERVICE_NAME = "eunoe.internal.v1.StateStoreService"

_MAX_PAGE_SIZE = 1000
_DEFAULT_BACKLOG_LIMIT = 256


class StateStoreServicer(StateStoreServiceServicer):
    """Serves `store`. Errors of the tree pass through: the server maps them."""

    def __init__(self, store: StateStore) -> None:
        self._store = store

    async def CreateStream(self, request: pb.CreateStreamRequest, context: Any) -> pb.CreateStreamResponse:
        metadata = await self._store.streams.create(
            Create(
                name=request.name,
                model=request.model,
                settings=settings_from_proto(request.settings),
                expire_time_ns=_expire_time_ns(request),
                request_id=request.request_id,
            )
        )
        return pb.CreateStreamResponse(record=record_to_proto(metadata))

    async def GetStream(self, request: pb.GetStreamRequest, context: Any) -> pb.GetStreamResponse:
        metadata = await self._store.streams.get(request.name)
        if request.HasField("seen"):
            await self._store.logs.check_seen(metadata, mark_from_proto(request.seen))
        return pb.GetStreamResponse(
            record=record_to_proto(metadata), source_bytes_accepted=metadata.bytes_of_source(request.source_id)
        )

    async def ListStreams(self, request: pb.ListStreamsRequest, context: Any) -> pb.ListStreamsResponse:
        if not 1 <= request.page_size <= _MAX_PAGE_SIZE:
            raise InvalidRequest(f"a page has 1 to {_MAX_PAGE_SIZE} streams")
        streams, has_more = await self._store.streams.page(request.tenant, request.after, request.page_size)
        return pb.ListStreamsResponse(streams=[stream_to_proto(stream) for stream in streams], has_more=has_more)

    async def DeleteStream(self, request: pb.DeleteStreamRequest, context: Any) -> pb.DeleteStreamResponse:
        if not request.erase:
            await self._store.streams.delete(request.name)
            return pb.DeleteStreamResponse()
        if not request.request_id:
            raise InvalidRequest("an erasure needs a request_id: its stream is gone before it is done")
        receipt = await self._store.erasures.erase(request.name, request.request_id)
        return pb.DeleteStreamResponse(receipt=receipt_to_proto(receipt))

    async def ForkStream(self, request: pb.ForkStreamRequest, context: Any) -> pb.ForkStreamResponse:
        event = Fork(
            name=request.name,
            at_offset=request.at_offset if request.HasField("at_offset") else None,
            expire_time_ns=_expire_time_ns(request),
            request_id=request.request_id,
            rebuild=_rebuild(request) if request.model else None,
        )
        return pb.ForkStreamResponse(record=record_to_proto(await self._store.streams.fork(request.parent, event)))

    async def ImportStream(self, request: pb.ImportStreamRequest, context: Any) -> pb.ImportStreamResponse:
        metadata = await self._store.streams.create(
            Create(
                name=request.name,
                model=request.model,
                settings=settings_from_proto(request.settings),
                request_id=request.request_id,
                manifest=manifest_from_proto(request.manifest) if request.HasField("manifest") else None,
                log_start_offset=request.log_start_offset,
            )
        )
        return pb.ImportStreamResponse(record=record_to_proto(metadata))

    async def AppendRecord(self, request: pb.AppendRecordRequest, context: Any) -> pb.AppendRecordResponse:
        event = Append(
            offset=request.offset,
            data=request.data,
            kind=request.kind or api.RECORD_KIND_TEXT,
            source_id=request.source_id,
            source_offset=request.source_offset if request.HasField("source_offset") else None,
            after_chain=request.after_chain.hex(),
            request_id=request.request_id,
            outcome=request.outcome,
        )
        metadata, appended = await self._store.logs.append(request.name, event)
        self._store.backlog.note(metadata)
        return pb.AppendRecordResponse(
            accepted_offset=metadata.accepted_offset,
            applied_offset=metadata.applied_offset,
            already_exists=appended.already_exists,
            unchecked=appended.unchecked,
            lease=None if metadata.lease is None else lease_to_proto(metadata.lease),
            log_chain=bytes.fromhex(metadata.log_chain),
        )

    async def ReadLog(self, request: pb.ReadLogRequest, context: Any) -> AsyncIterator[pb.ReadLogResponse]:
        async for piece in self._store.logs.read(request.name, request.offset, request.max_bytes):
            yield pb.ReadLogResponse(
                offset=piece.offset,
                data=piece.data,
                kind=api.RecordKind.Name(piece.kind),
                chain=bytes.fromhex(piece.chain),
            )

    async def GetOutcome(self, request: pb.GetOutcomeRequest, context: Any) -> pb.GetOutcomeResponse:
        return pb.GetOutcomeResponse(outcome=await self._store.logs.outcome(request.name, request.request_id))

    async def RenewWorker(self, request: pb.RenewWorkerRequest, context: Any) -> pb.RenewWorkerResponse:
        await self._store.workers.renew(request.worker)
        return pb.RenewWorkerResponse()

    async def RemoveWorker(self, request: pb.RemoveWorkerRequest, context: Any) -> pb.RemoveWorkerResponse:
        await self._store.workers.remove(request.worker)
        return pb.RemoveWorkerResponse()

    async def ListWorkers(self, request: pb.ListWorkersRequest, context: Any) -> pb.ListWorkersResponse:
        return pb.ListWorkersResponse(workers=await self._store.workers.living(request.model))

    async def AcquireStream(self, request: pb.AcquireStreamRequest, context: Any) -> pb.AcquireStreamResponse:
        by = Lease(request.by.worker, 0, request.by.address)
        suspect = _fence(request.suspect) if request.HasField("suspect") else None
        metadata = await self._store.streams.acquire(request.name, by, suspect)
        return pb.AcquireStreamResponse(record=record_to_proto(metadata))

    async def ReleaseStream(self, request: pb.ReleaseStreamRequest, context: Any) -> pb.ReleaseStreamResponse:
        await self._store.streams.release(request.name, _fence(request.lease))
        return pb.ReleaseStreamResponse()

    async def ListBacklog(self, request: pb.ListBacklogRequest, context: Any) -> pb.ListBacklogResponse:
        rows = await self._store.backlog.largest(
            request.model, request.min_bytes, request.limit or _DEFAULT_BACKLOG_LIMIT
        )
        return pb.ListBacklogResponse(entries=[pb.BacklogEntry(name=name, backlog_bytes=size) for name, size in rows])

    async def StageChunks(
        self, request_iterator: AsyncIterator[pb.StageChunksRequest], context: Any
    ) -> pb.StageChunksResponse:
        first = await anext(request_iterator, None)
        if first is None:
            return pb.StageChunksResponse()

        async def chunks() -> AsyncIterator[tuple[str, bytes]]:
            yield first.chunk_id, first.data
            async for request in request_iterator:
                if request.name != first.name:
                    raise InvalidRequest("one call stages chunks of one stream")
                yield request.chunk_id, request.data

        try:
            return pb.StageChunksResponse(staged_bytes=await self._store.checkpoints.stage(first.name, chunks()))
        except EunoeError:
            # grpc.aio's client loses the status of a call that ends while it still writes: hear it out first.
            async for _ in request_iterator:
                pass
            raise

    async def CommitCheckpoint(self, request: pb.CommitCheckpointRequest, context: Any) -> pb.CommitCheckpointResponse:
        manifest = manifest_from_proto(request.manifest)
        metadata = await self._store.commit(
            request.name,
            manifest,
            _fence(request.lease),
            parent_chain=request.parent_chain.hex() if request.HasField("parent_chain") else None,
            read=mark_from_proto(request.read) if request.HasField("read") else None,
        )
        return pb.CommitCheckpointResponse(record=record_to_proto(metadata))

    async def ReadChunks(self, request: pb.ReadChunksRequest, context: Any) -> AsyncIterator[pb.ReadChunksResponse]:
        chunks = [chunk_from_proto(chunk) for chunk in request.chunks]
        async for chunk_id, data in self._store.checkpoints.read(request.name, chunks):
            yield pb.ReadChunksResponse(chunk_id=chunk_id, data=data)

    async def CheckHistory(
        self, request: pb.CheckHistoryRequest, context: Any
    ) -> AsyncIterator[pb.CheckHistoryResponse]:
        async for item in check_history(self._store.streams, self._store.logs, request.name):
            yield history_to_proto(item)

    async def CreateApiKey(self, request: pb.CreateApiKeyRequest, context: Any) -> pb.CreateApiKeyResponse:
        key, secret = await self._store.api_keys.create(request.tenant, request.label)
        return pb.CreateApiKeyResponse(key=_key_to_proto(key), secret=secret)

    async def RevokeApiKey(self, request: pb.RevokeApiKeyRequest, context: Any) -> pb.RevokeApiKeyResponse:
        await self._store.api_keys.revoke(request.key_id)
        return pb.RevokeApiKeyResponse()

    async def ListApiKeys(self, request: pb.ListApiKeysRequest, context: Any) -> pb.ListApiKeysResponse:
        keys = await self._store.api_keys.of_tenant(request.tenant)
        return pb.ListApiKeysResponse(keys=[_key_to_proto(key) for key in keys])

    async def Authenticate(self, request: pb.AuthenticateRequest, context: Any) -> pb.AuthenticateResponse:
        return pb.AuthenticateResponse(tenant=await self._store.api_keys.authenticate(request.secret))

    async def GetUsage(self, request: pb.GetUsageRequest, context: Any) -> pb.GetUsageResponse:
        usage = api.GetUsageResponse(tenant=request.tenant)
        for total, (used, quota) in (await self._store.usage(request.tenant)).items():
            setattr(usage, total, used)
            setattr(usage, f"max_{total.removeprefix('num_')}", quota)
        return pb.GetUsageResponse(usage=usage)


def _fence(lease: pb.Lease) -> tuple[str, int]:
    return lease.worker, lease.epoch


def _rebuild(request: pb.ForkStreamRequest) -> Rebuild:
    return Rebuild(
        model=request.model,
        settings=settings_from_proto(request.settings),
        shares_vocabulary=request.shares_vocabulary,
    )


def _expire_time_ns(request: pb.CreateStreamRequest | pb.ForkStreamRequest) -> int | None:
    if not request.HasField("expire_time"):
        return None
    timestamp: timestamp_pb2.Timestamp = request.expire_time
    return timestamp.ToNanoseconds()


def _key_to_proto(key: ApiKey) -> pb.ApiKey:
    return pb.ApiKey(
        key_id=key.key_id, tenant=key.tenant, label=key.label, create_time=time_to_proto(key.create_time_ns)
    )
