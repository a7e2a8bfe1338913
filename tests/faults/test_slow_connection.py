"""A channel of ours and a network or a server that takes its time."""

from typing import Any

from fault_proxy import FaultProxy

from eunoe.internal.v1 import state_store_pb2 as pb
from eunoe.internal.v1 import state_store_pb2_grpc
from eunoe.runtime.grpc_channel import open_channel


class Servicer(state_store_pb2_grpc.StateStoreServiceServicer):
    async def GetUsage(self, request: pb.GetUsageRequest, context: object) -> pb.GetUsageResponse:
        return pb.GetUsageResponse()


async def test_a_connection_may_take_longer_than_the_backoff(serve: Any) -> None:
    async with (
        serve(Servicer()) as (server, _),
        FaultProxy(server.address) as proxy,
        open_channel(proxy.address) as channel,
    ):
        proxy.delay_seconds = 0.5
        stub = state_store_pb2_grpc.StateStoreServiceStub(channel)

        assert await stub.GetUsage(pb.GetUsageRequest(), timeout=20) == pb.GetUsageResponse()
        assert proxy.num_connections == 1
