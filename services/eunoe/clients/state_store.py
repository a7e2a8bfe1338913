"""The state store as its callers see it: request message in, response message out, errors as `runtime.errors`.

Every write of the state store is idempotent, so this client repeats whatever failed as UNAVAILABLE, with back-off,
until the call's deadline. Nobody above has to.
"""

import asyncio
import random
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable
from typing import Any, TypeVar

import grpc
from google.protobuf.message import Message

from eunoe.internal.v1 import state_store_pb2 as pb
from eunoe.internal.v1 import state_store_pb2_grpc
from eunoe.runtime.errors import EunoeError, Unavailable, from_rpc_error

Response = TypeVar("Response")

# The database writes its files anew meanwhile: some seconds for each GB.
ERASE_SECONDS = 600.0
_FIRST_PAUSE_SECONDS = 0.05
_LONGEST_PAUSE_SECONDS = 1.0


class StateStoreClient:
    """Calls the state store over `channel`, which stays the caller's to close.

    Unary methods are named as the RPCs and raise what the proto names.

    Args:
        channel: An open channel.
        deadline_seconds: Longest that a call may take, its repetitions included.
    """

    def __init__(self, channel: grpc.aio.Channel, *, deadline_seconds: float = 10.0) -> None:
        self._stub: Any = state_store_pb2_grpc.StateStoreServiceStub(channel)
        self._deadline_seconds = deadline_seconds

    async def create_stream(self, request: pb.CreateStreamRequest) -> pb.CreateStreamResponse:
        return await self._call(self._stub.CreateStream, request)

    async def get_stream(self, request: pb.GetStreamRequest) -> pb.GetStreamResponse:
        return await self._call(self._stub.GetStream, request)

    async def list_streams(self, request: pb.ListStreamsRequest) -> pb.ListStreamsResponse:
        return await self._call(self._stub.ListStreams, request)

    async def delete_stream(self, request: pb.DeleteStreamRequest) -> pb.DeleteStreamResponse:
        seconds = ERASE_SECONDS if request.erase else self._deadline_seconds
        return await self._repeat(lambda left: self._stub.DeleteStream(request, timeout=left), seconds)

    async def fork_stream(self, request: pb.ForkStreamRequest) -> pb.ForkStreamResponse:
        return await self._call(self._stub.ForkStream, request)

    async def import_stream(self, request: pb.ImportStreamRequest) -> pb.ImportStreamResponse:
        return await self._call(self._stub.ImportStream, request)

    async def append_record(self, request: pb.AppendRecordRequest) -> pb.AppendRecordResponse:
        return await self._call(self._stub.AppendRecord, request)

    async def get_outcome(self, request: pb.GetOutcomeRequest) -> pb.GetOutcomeResponse:
        return await self._call(self._stub.GetOutcome, request)

    async def renew_worker(
        self, request: pb.RenewWorkerRequest, deadline_seconds: float | None = None
    ) -> pb.RenewWorkerResponse:
        """Renew within `deadline_seconds`. The client's own deadline is as long as a worker lives without renewing."""
        return await self._repeat(lambda left: self._stub.RenewWorker(request, timeout=left), deadline_seconds)

    async def remove_worker(self, request: pb.RemoveWorkerRequest) -> pb.RemoveWorkerResponse:
        return await self._call(self._stub.RemoveWorker, request)

    async def list_workers(self, request: pb.ListWorkersRequest) -> pb.ListWorkersResponse:
        return await self._call(self._stub.ListWorkers, request)

    async def acquire_stream(self, request: pb.AcquireStreamRequest) -> pb.AcquireStreamResponse:
        return await self._call(self._stub.AcquireStream, request)

    async def release_stream(self, request: pb.ReleaseStreamRequest) -> pb.ReleaseStreamResponse:
        return await self._call(self._stub.ReleaseStream, request)

    async def list_backlog(self, request: pb.ListBacklogRequest) -> pb.ListBacklogResponse:
        return await self._call(self._stub.ListBacklog, request)

    async def commit_checkpoint(self, request: pb.CommitCheckpointRequest) -> pb.CommitCheckpointResponse:
        return await self._call(self._stub.CommitCheckpoint, request)

    async def create_api_key(self, request: pb.CreateApiKeyRequest) -> pb.CreateApiKeyResponse:
        return await self._call(self._stub.CreateApiKey, request)

    async def revoke_api_key(self, request: pb.RevokeApiKeyRequest) -> pb.RevokeApiKeyResponse:
        return await self._call(self._stub.RevokeApiKey, request)

    async def list_api_keys(self, request: pb.ListApiKeysRequest) -> pb.ListApiKeysResponse:
        return await self._call(self._stub.ListApiKeys, request)

    async def authenticate(self, request: pb.AuthenticateRequest) -> pb.AuthenticateResponse:
        return await self._call(self._stub.Authenticate, request)

    async def get_usage(self, request: pb.GetUsageRequest) -> pb.GetUsageResponse:
        return await self._call(self._stub.GetUsage, request)

    async def read_log(self, request: pb.ReadLogRequest) -> AsyncIterator[pb.ReadLogResponse]:
        """Read records in order; a broken connection is taken up again where it broke."""
        pending = pb.ReadLogRequest()
        pending.CopyFrom(request)
        pauses = _Pauses(self._deadline_seconds)
        while True:
            try:
                async for piece in _responses(self._stub.ReadLog(pending, timeout=self._stream_seconds())):
                    yield piece
                    num_bytes = len(piece.data)
                    pending.offset = piece.offset + num_bytes
                    if pending.max_bytes:
                        if pending.max_bytes <= num_bytes:
                            return
                        pending.max_bytes -= num_bytes
                    pauses = _Pauses(self._deadline_seconds)
                return
            except grpc.RpcError as error:
                await pauses.wait(from_rpc_error(error))

    async def stage_chunks(self, name: str, chunks: Iterable[tuple[str, bytes]]) -> int:
        """Stage (chunk id, bytes) pairs for a commit and return how many bytes that were."""
        requests = [pb.StageChunksRequest(name=name, chunk_id=chunk_id, data=data) for chunk_id, data in chunks]

        def start(_: float) -> Awaitable[pb.StageChunksResponse]:
            call: Awaitable[pb.StageChunksResponse] = self._stub.StageChunks(
                iter(requests), timeout=self._stream_seconds()
            )
            return call

        return (await self._repeat(start)).staged_bytes

    async def read_chunks(self, request: pb.ReadChunksRequest) -> AsyncIterator[pb.ReadChunksResponse]:
        """Read the request's chunks in its order; a broken connection is taken up again where it broke."""
        pending = pb.ReadChunksRequest()
        pending.CopyFrom(request)
        pauses = _Pauses(self._deadline_seconds)
        while pending.chunks:
            try:
                async for chunk in _responses(self._stub.ReadChunks(pending, timeout=self._stream_seconds())):
                    yield chunk
                    del pending.chunks[0]
                    pauses = _Pauses(self._deadline_seconds)
                return
            except grpc.RpcError as error:
                await pauses.wait(from_rpc_error(error))

    async def check_history(self, request: pb.CheckHistoryRequest) -> AsyncIterator[pb.CheckHistoryResponse]:
        """Check a stream's hash chains: progress, then the history. A broken connection begins anew.

        It may take as long as it goes on: a retained log has no limit but its quota.
        """
        pauses = _Pauses(self._deadline_seconds)
        while True:
            try:
                async for response in self._stub.CheckHistory(request):
                    yield response
                    pauses = _Pauses(self._deadline_seconds)
                return
            except grpc.RpcError as error:
                await pauses.wait(from_rpc_error(error))

    def _stream_seconds(self) -> float:
        # A stream of messages moves up to hundreds of MiB: several times what one message may take.
        return 6 * self._deadline_seconds

    async def _call(self, method: Callable[..., Awaitable[Response]], request: Message) -> Response:
        return await self._repeat(lambda seconds: method(request, timeout=seconds))

    async def _repeat(
        self, start: Callable[[float], Awaitable[Response]], deadline_seconds: float | None = None
    ) -> Response:
        pauses = _Pauses(self._deadline_seconds if deadline_seconds is None else deadline_seconds)
        while True:
            try:
                return await start(pauses.seconds_left())
            except grpc.RpcError as error:
                await pauses.wait(from_rpc_error(error))


async def _responses(call: Any) -> AsyncIterator[Any]:
    """A call's responses; closing the iterator cancels the call, which else would wait for a reader to its deadline."""
    try:
        async for response in call:
            yield response
    finally:
        call.cancel()


class _Pauses:
    """Back-off of one call: waits after UNAVAILABLE while there is time, raises everything else."""

    def __init__(self, deadline_seconds: float) -> None:
        self._end = time.monotonic() + deadline_seconds
        self._pause_seconds = _FIRST_PAUSE_SECONDS

    def seconds_left(self) -> float:
        return max(self._end - time.monotonic(), 0.001)

    async def wait(self, error: EunoeError) -> None:
        """Sleep before the next try, or raise `error` if there is none."""
        pause_seconds = self._pause_seconds * random.uniform(0.5, 1.0)
        if not isinstance(error, Unavailable) or pause_seconds >= self.seconds_left():
            raise error
        self._pause_seconds = min(2 * self._pause_seconds, _LONGEST_PAUSE_SECONDS)
        await asyncio.sleep(pause_seconds)
