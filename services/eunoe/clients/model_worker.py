"""Calls to model workers: directly, and through Ray Serve's proxy for a stream's first placement.

Nothing is repeated here: a call that failed may have to go to another worker, which only the caller can choose.
"""

from collections.abc import AsyncGenerator, Callable, Iterator
from contextlib import contextmanager
from operator import attrgetter
from typing import Any

import grpc

from eunoe.api.v1 import long_context_pb2 as api
from eunoe.internal.v1 import model_worker_pb2 as pb
from eunoe.internal.v1 import model_worker_pb2_grpc
from eunoe.internal.v1.state_store_pb2 import Lease
from eunoe.runtime.errors import Unavailable, from_rpc_error, from_status

# Taking a stream probes its former owner and reads its newest checkpoint.
TAKE_SECONDS = 20.0
# Shorter: where Serve hangs, the caller has the worker directory.
PLACE_SECONDS = 5.0
ADVANCE_SECONDS = 5.0


class ModelWorkerClient:
    """Calls of one worker. Every method that takes a lease raises NotOwner where it is not the worker's."""

    def __init__(self, channel: grpc.aio.Channel) -> None:
        self._stub = model_worker_pb2_grpc.ModelWorkerServiceStub(channel)

    async def take_stream(self, name: str, suspect: Lease | None = None) -> Lease:
        """Ask the worker to take a stream that nobody living has; returns the owner's lease, whoever that is."""
        with _translated_errors():
            request = pb.TakeStreamRequest(name=name, suspect=suspect)
            response: pb.TakeStreamResponse = await self._stub.TakeStream(request, timeout=TAKE_SECONDS)
            return response.lease

    async def advance(self, name: str, lease: Lease, accepted_offset: int) -> pb.AdvanceResponse:
        """Hint that the log has grown; returns at once."""
        with _translated_errors():
            request = pb.AdvanceRequest(name=name, lease=lease, accepted_offset=accepted_offset)
            response: pb.AdvanceResponse = await self._stub.Advance(request, timeout=ADVANCE_SECONDS)
            return response

    def flush(self, name: str, lease: Lease, accepted_offset: int) -> AsyncGenerator[pb.FlushResponse, None]:
        """Fold and commit all full segments below the offset; the last response has `is_committed`."""
        return _responses(self._stub.Flush(pb.FlushRequest(name=name, lease=lease, accepted_offset=accepted_offset)))

    def generate(
        self, request: api.GenerateRequest, lease: Lease, timeout_seconds: float | None = None
    ) -> AsyncGenerator[api.GenerateResponse, None]:
        """Answer from the stream's memory. Closing the generator cancels the call, as in the methods below."""
        call = self._stub.Generate(pb.GenerateRequest(lease=lease, request=request), timeout=timeout_seconds)
        return _responses(call, attrgetter("response"))

    def score(
        self, request: api.ScoreRequest, lease: Lease, timeout_seconds: float | None = None
    ) -> AsyncGenerator[api.ScoreResponse, None]:
        """Score a text given the stream's memory."""
        call = self._stub.Score(pb.ScoreRequest(lease=lease, request=request), timeout=timeout_seconds)
        return _responses(call, attrgetter("response"))

    def inspect_memory(
        self, request: api.InspectMemoryRequest, lease: Lease, timeout_seconds: float | None = None
    ) -> AsyncGenerator[api.InspectMemoryResponse, None]:
        """Which tokens the committed memory keeps."""
        call = self._stub.InspectMemory(pb.InspectMemoryRequest(lease=lease, request=request), timeout=timeout_seconds)
        return _responses(call, attrgetter("response"))

    def verify_stream(
        self, request: api.VerifyStreamRequest, timeout_seconds: float | None = None
    ) -> AsyncGenerator[api.VerifyStreamResponse, None]:
        """Check a stream of the worker's model against its past; the last response has the summary."""
        call = self._stub.VerifyStream(pb.VerifyStreamRequest(request=request), timeout=timeout_seconds)
        return _responses(call, attrgetter("response"))


class PlacementClient:
    """First placement of a stream through Ray Serve's gRPC proxy, whose router keeps a stream on one replica."""

    def __init__(self, channel: grpc.aio.Channel) -> None:
        self._stub = model_worker_pb2_grpc.PlacementServiceStub(channel)

    async def place_stream(self, name: str, model: str, suspect: Lease | None = None) -> Lease:
        """The lease of the worker that has the stream now.

        Raises:
            Unavailable: If the proxy cannot be reached or finds no replica. Replicas answer their own errors in band.
        """
        try:
            response: pb.PlaceStreamResponse = await self._stub.PlaceStream(
                pb.PlaceStreamRequest(name=name, suspect=suspect),
                metadata=(("application", model), ("session_id", name)),
                timeout=PLACE_SECONDS,
            )
        except grpc.aio.AioRpcError as error:
            raise Unavailable(f"Serve placed no stream: {error.code().name}") from error
        if response.WhichOneof("outcome") == "lease":
            return response.lease
        raise from_status(response.error)


async def _responses(
    call: Any, unwrapped: Callable[[Any], Any] = lambda response: response
) -> AsyncGenerator[Any, None]:
    try:
        with _translated_errors():
            async for response in call:
                yield unwrapped(response)
    finally:
        call.cancel()


@contextmanager
def _translated_errors() -> Iterator[None]:
    try:
        yield
    except grpc.aio.AioRpcError as error:
        # CANCELLED comes from a worker that stopped: our own cancellation is a CancelledError.
        if error.code() == grpc.StatusCode.CANCELLED:
            raise Unavailable("the worker ended the call") from error
        raise from_rpc_error(error) from error
