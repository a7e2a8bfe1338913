import asyncio
import urllib.request
from typing import Any

import grpc
import pytest
from prometheus_client import REGISTRY

from eunoe.internal.v1 import state_store_pb2 as pb
from eunoe.internal.v1 import state_store_pb2_grpc
from eunoe.runtime.errors import StreamNotFound
from eunoe.runtime.telemetry import serve_metrics

_METHOD = "/eunoe.internal.v1.StateStoreService/GetStream"


class Servicer(state_store_pb2_grpc.StateStoreServiceServicer):
    async def GetStream(self, request: pb.GetStreamRequest, context: Any) -> pb.GetStreamResponse:
        if not request.name:
            raise StreamNotFound("none")
        return pb.GetStreamResponse()


def num_calls(code: str) -> float:
    return REGISTRY.get_sample_value("eunoe_rpc_calls_total", {"method": _METHOD, "code": code}) or 0.0


async def test_calls_are_counted_by_their_final_status(serve: Any) -> None:
    before = (num_calls("OK"), num_calls("NOT_FOUND"))
    async with serve(Servicer()) as (_, stub):
        await stub.GetStream(pb.GetStreamRequest(name="x"))
        with pytest.raises(grpc.RpcError):
            await stub.GetStream(pb.GetStreamRequest())

    assert (num_calls("OK"), num_calls("NOT_FOUND")) == (before[0] + 1, before[1] + 1)


async def test_metrics_are_published_over_http() -> None:
    with serve_metrics(0) as port:
        body = await asyncio.to_thread(lambda: urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics").read())

    assert b"eunoe_rpc_duration_seconds" in body


def test_no_port_publishes_nothing() -> None:
    with serve_metrics(None) as port:
        assert port is None
