"""ModelWorkerService: translates requests; everything else is elsewhere."""

from collections.abc import AsyncIterator
from typing import TYPE_CHECKING, Any

from eunoe.internal.v1 import model_worker_pb2 as pb
from eunoe.internal.v1 import model_worker_pb2_grpc
from eunoe.model_worker.generation import Generation
from eunoe.model_worker.inspection import inspect_memory
from eunoe.model_worker.verification import Verification

if TYPE_CHECKING:
    from eunoe.model_worker.worker import ModelWorker


class ModelWorkerServicer(model_worker_pb2_grpc.ModelWorkerServiceServicer):
    """Answers for one worker."""

    def __init__(self, worker: "ModelWorker", generation: Generation, verification: Verification) -> None:
        self._worker = worker
        self._generation = generation
        self._verification = verification

    async def TakeStream(self, request: pb.TakeStreamRequest, context: Any) -> pb.TakeStreamResponse:
        suspect = request.suspect if request.HasField("suspect") else None
        return pb.TakeStreamResponse(lease=await self._worker.place(request.name, suspect))

    async def Advance(self, request: pb.AdvanceRequest, context: Any) -> pb.AdvanceResponse:
        stream = await self._worker.held(request.name, request.lease)
        stream.advance()
        return pb.AdvanceResponse(folded_offset=stream.folded_offset, applied_offset=stream.applied_offset)

    async def Flush(self, request: pb.FlushRequest, context: Any) -> AsyncIterator[pb.FlushResponse]:
        stream = await self._worker.held(request.name, request.lease)
        async for is_committed in stream.flush(request.accepted_offset):
            yield pb.FlushResponse(
                folded_offset=stream.folded_offset, applied_offset=stream.applied_offset, is_committed=is_committed
            )

    async def Generate(self, request: pb.GenerateRequest, context: Any) -> AsyncIterator[pb.GenerateResponse]:
        stream = await self._worker.held(request.request.stream, request.lease)
        async for response in self._generation.generate(stream, request.request):
            yield pb.GenerateResponse(response=response)

    async def Score(self, request: pb.ScoreRequest, context: Any) -> AsyncIterator[pb.ScoreResponse]:
        stream = await self._worker.held(request.request.stream, request.lease)
        async for response in self._generation.score(stream, request.request):
            yield pb.ScoreResponse(response=response)

    async def InspectMemory(
        self, request: pb.InspectMemoryRequest, context: Any
    ) -> AsyncIterator[pb.InspectMemoryResponse]:
        stream = await self._worker.held(request.request.name, request.lease)
        async for response in inspect_memory(self._worker.parts, stream, with_log=request.request.with_log):
            yield pb.InspectMemoryResponse(response=response)

    async def VerifyStream(
        self, request: pb.VerifyStreamRequest, context: Any
    ) -> AsyncIterator[pb.VerifyStreamResponse]:
        async for response in self._verification.verify(request.request.name):
            yield pb.VerifyStreamResponse(response=response)
