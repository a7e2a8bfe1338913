import asyncio
import json
import os
import signal
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import grpc
import pytest
from google.rpc import error_details_pb2
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_status import rpc_status

from eunoe.clients.state_store import StateStoreClient
from eunoe.internal.v1 import state_store_pb2 as pb
from eunoe.internal.v1 import state_store_pb2_grpc
from eunoe.runtime.errors import InvalidRequest, OffsetGap, Overloaded, StreamNotFound, Unavailable, from_rpc_error
from eunoe.runtime.grpc_channel import open_channel
from eunoe.runtime.grpc_server import GrpcServer, run_process


class Servicer(state_store_pb2_grpc.StateStoreServiceServicer):
    """One handler of each kind that fails, and calls that wait for a test."""

    def __init__(self) -> None:
        self.started = asyncio.Event()
        self.unwound = asyncio.Event()
        self.go_on = asyncio.Event()

    async def GetStream(self, request: pb.GetStreamRequest, context: Any) -> pb.GetStreamResponse:
        raise OffsetGap("there is a gap", expected_offset=7)

    async def DeleteStream(self, request: pb.DeleteStreamRequest, context: Any) -> pb.DeleteStreamResponse:
        raise ValueError("name is empty")

    async def GetUsage(self, request: pb.GetUsageRequest, context: Any) -> pb.GetUsageResponse:
        raise KeyError("the password is swordfish")

    async def CreateStream(self, request: pb.CreateStreamRequest, context: Any) -> pb.CreateStreamResponse:
        self.started.set()
        await self.go_on.wait()
        return pb.CreateStreamResponse()

    async def ReadLog(self, request: pb.ReadLogRequest, context: Any) -> AsyncIterator[pb.ReadLogResponse]:
        yield pb.ReadLogResponse(offset=1)
        raise StreamNotFound("it is gone")

    async def ReadChunks(self, request: pb.ReadChunksRequest, context: Any) -> AsyncIterator[pb.ReadChunksResponse]:
        try:
            while True:
                yield pb.ReadChunksResponse(chunk_id="endless")
                await asyncio.sleep(0)
        finally:
            self.unwound.set()

    async def StageChunks(self, requests: AsyncIterator[pb.StageChunksRequest], context: Any) -> Any:
        async for _ in requests:
            raise Overloaded("later", retry_after_seconds=2.5)


async def test_an_error_reaches_the_client_as_it_was_raised(serve: Any) -> None:
    async with serve(Servicer()) as (_, stub):
        with pytest.raises(grpc.RpcError) as caught:
            await stub.GetStream(pb.GetStreamRequest())

    error = from_rpc_error(caught.value)
    assert isinstance(error, OffsetGap)
    assert (error.message, error.expected_offset) == ("there is a gap", 7)
    assert caught.value.code() == grpc.StatusCode.OUT_OF_RANGE


async def test_who_stops_reading_chunks_ends_the_call_at_the_server(serve: Any) -> None:
    servicer = Servicer()
    async with serve(servicer) as (server, _), open_channel(server.address) as channel:
        request = pb.ReadChunksRequest(name="a", chunks=[pb.ChunkRef(chunk_id="endless")] * 2)
        chunks = StateStoreClient(channel).read_chunks(request)
        await anext(chunks)
        await chunks.aclose()

        async with asyncio.timeout(5):
            await servicer.unwound.wait()


async def test_a_write_that_met_a_broken_connection_is_unavailable(serve: Any) -> None:
    class Broken(Servicer):
        async def ReadLog(self, request: pb.ReadLogRequest, context: Any) -> AsyncIterator[pb.ReadLogResponse]:
            yield pb.ReadLogResponse(offset=1)
            raise grpc.aio.InternalError("the batch failed")

    async with serve(Broken()) as (_, stub):
        with pytest.raises(grpc.RpcError) as caught:
            async for _ in stub.ReadLog(pb.ReadLogRequest()):
                pass

    assert isinstance(from_rpc_error(caught.value), Unavailable)


async def test_an_error_behind_the_first_response_of_a_stream_reaches_the_client(serve: Any) -> None:
    responses = []
    async with serve(Servicer()) as (_, stub):
        with pytest.raises(grpc.RpcError) as caught:
            async for response in stub.ReadLog(pb.ReadLogRequest()):
                responses.append(response.offset)

    assert responses == [1]
    assert isinstance(from_rpc_error(caught.value), StreamNotFound)


async def test_an_error_in_a_client_stream_carries_one_error_info_and_when_to_retry(serve: Any) -> None:
    async with serve(Servicer()) as (_, stub):
        with pytest.raises(grpc.RpcError) as caught:
            await stub.StageChunks(iter([pb.StageChunksRequest()]))

    details = rpc_status.from_call(caught.value).details
    retry = error_details_pb2.RetryInfo()
    assert [detail.Is(error_details_pb2.ErrorInfo.DESCRIPTOR) for detail in details] == [True, False]
    assert details[1].Unpack(retry)
    assert retry.retry_delay.ToTimedelta().total_seconds() == 2.5


async def test_a_value_error_is_the_callers_mistake(serve: Any) -> None:
    async with serve(Servicer()) as (_, stub):
        with pytest.raises(grpc.RpcError) as caught:
            await stub.DeleteStream(pb.DeleteStreamRequest())

    assert isinstance(from_rpc_error(caught.value), InvalidRequest)


async def test_an_unexpected_error_is_internal_and_tells_nothing(serve: Any, caplog: pytest.LogCaptureFixture) -> None:
    async with serve(Servicer()) as (_, stub):
        with pytest.raises(grpc.RpcError) as caught:
            await stub.GetUsage(pb.GetUsageRequest())

    assert caught.value.code() == grpc.StatusCode.INTERNAL
    assert "swordfish" not in str(caught.value)
    assert [record.error for record in caplog.records] == ["KeyError"]


async def test_an_rpc_nobody_wrote_is_unimplemented(serve: Any) -> None:
    async with serve(Servicer()) as (_, stub):
        with pytest.raises(grpc.RpcError) as caught:
            await stub.ListApiKeys(pb.ListApiKeysRequest())

    assert caught.value.code() == grpc.StatusCode.UNIMPLEMENTED


async def test_a_cancelled_call_unwinds_its_handler(serve: Any) -> None:
    servicer = Servicer()
    async with serve(servicer) as (_, stub):
        call = stub.ReadChunks(pb.ReadChunksRequest())
        await call.read()
        call.cancel()

        await asyncio.wait_for(servicer.unwound.wait(), 5)


async def test_a_message_above_4_mib_is_refused(serve: Any) -> None:
    async with serve(Servicer()) as (_, stub):
        with pytest.raises(grpc.RpcError) as caught:
            await stub.DeleteStream(pb.DeleteStreamRequest(name="x" * (4 * 1024 * 1024 + 1)))

    assert caught.value.code() == grpc.StatusCode.RESOURCE_EXHAUSTED


async def test_a_port_in_use_cannot_be_bound_twice(serve: Any) -> None:
    async with serve(Servicer()) as (server, _):
        second = GrpcServer(address=server.address, add_servicers=lambda _: None, service_names=[])

        with pytest.raises(RuntimeError):
            await second.start()


async def test_drain_lets_a_running_call_finish_and_takes_no_new_one(serve: Any) -> None:
    servicer = Servicer()
    async with serve(servicer) as (server, stub), open_channel(server.address) as other_channel:
        running = asyncio.ensure_future(stub.CreateStream(pb.CreateStreamRequest()))
        await servicer.started.wait()
        draining = asyncio.create_task(server.drain(30))
        await _condition(lambda: _is_refused(other_channel))
        servicer.go_on.set()

        assert await running == pb.CreateStreamResponse()
        await draining


@pytest.mark.parametrize(("kind", "method"), [("unary_unary", "GetStream"), ("unary_stream", "ReadLog")])
async def test_a_request_that_is_no_message_is_refused(serve: Any, kind: str, method: str) -> None:
    async with serve(Servicer()) as (server, _), open_channel(server.address) as channel:
        call = getattr(channel, kind)(f"/eunoe.internal.v1.StateStoreService/{method}")(b"\xff\xff")

        with pytest.raises(grpc.RpcError) as caught:
            await (call.read() if kind == "unary_stream" else call)

    assert isinstance(from_rpc_error(caught.value), InvalidRequest)


async def test_a_stream_of_requests_ends_with_the_one_that_is_no_message(serve: Any) -> None:
    async with serve(Servicer()) as (server, _), open_channel(server.address) as channel:
        requests = iter([b"\xff\xff"])

        with pytest.raises(grpc.RpcError) as caught:
            await channel.stream_unary("/eunoe.internal.v1.StateStoreService/StageChunks")(requests)

    assert isinstance(from_rpc_error(caught.value), InvalidRequest)


async def test_drain_cancels_what_outlives_the_grace(serve: Any) -> None:
    servicer = Servicer()
    async with serve(servicer) as (server, stub):
        running = asyncio.ensure_future(stub.CreateStream(pb.CreateStreamRequest()))
        await servicer.started.wait()

        await server.drain(0.01)

        with pytest.raises(grpc.RpcError):
            await running


async def test_health_follows_set_serving(serve: Any) -> None:
    async with serve(Servicer()) as (server, _), open_channel(server.address) as channel:
        health = health_pb2_grpc.HealthStub(channel)
        name = health_pb2.HealthCheckRequest(service="eunoe.internal.v1.StateStoreService")
        before = (await health.Check(name)).status

        await server.set_serving(False)

        after = (await health.Check(health_pb2.HealthCheckRequest())).status
        assert (before, after) == (health_pb2.HealthCheckResponse.SERVING, health_pb2.HealthCheckResponse.NOT_SERVING)


async def test_a_process_announces_itself_and_ends_by_sigterm(tmp_path: Path) -> None:
    drained = asyncio.Event()

    async def on_drain() -> None:
        drained.set()

    ready_file = tmp_path / "ready.json"
    server = GrpcServer(address="127.0.0.1:0", add_servicers=lambda _: None, service_names=[])
    process = asyncio.create_task(run_process(server, ready_file=ready_file, on_drain=on_drain))
    await _condition(lambda: _exists(ready_file))
    ready = json.loads(ready_file.read_text())

    os.kill(os.getpid(), signal.SIGTERM)
    await asyncio.wait_for(process, 10)

    assert ready == {"address": server.address, "pid": os.getpid()}
    assert drained.is_set()
    assert not ready_file.exists()


async def _is_refused(channel: grpc.aio.Channel) -> bool:
    try:
        await state_store_pb2_grpc.StateStoreServiceStub(channel).GetUsage(pb.GetUsageRequest())
    except grpc.RpcError as error:
        return error.code() == grpc.StatusCode.UNAVAILABLE
    return False


async def _exists(path: Path) -> bool:
    return path.exists()


async def _condition(is_true: Any) -> None:
    async with asyncio.timeout(10):
        while not await is_true():
            await asyncio.sleep(0.01)
