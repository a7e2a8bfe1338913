"""A worker's sign of life, over a state store that does not answer as it should."""

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

import grpc
import pytest

from eunoe.clients.state_store import StateStoreClient
from eunoe.internal.v1 import state_store_pb2 as pb
from eunoe.internal.v1 import state_store_pb2_grpc
from eunoe.model_worker.ownership import Ownership
from eunoe.runtime.grpc_channel import open_channel

WORKER = pb.Worker(worker="w", address="127.0.0.1:1")
# Far below the client's own deadline of ten seconds.
LIMIT_SECONDS = 8.0


async def hang(context: Any) -> None:
    await asyncio.Event().wait()


async def fail(context: Any) -> None:
    await context.abort(grpc.StatusCode.INTERNAL, "a bug")


class TroubledStore(state_store_pb2_grpc.StateStoreServiceServicer):
    """Renews a worker's life, after all of its troubles.

    Attributes:
        has_renewed: A life was renewed.
    """

    def __init__(self, *troubles: Callable[[Any], Awaitable[None]]) -> None:
        self._troubles = [*troubles]
        self.has_renewed = asyncio.Event()

    async def RenewWorker(self, request: pb.RenewWorkerRequest, context: Any) -> pb.RenewWorkerResponse:
        if self._troubles:
            await self._troubles.pop()(context)
        assert request.worker == WORKER
        self.has_renewed.set()
        return pb.RenewWorkerResponse()


@pytest.mark.parametrize("trouble", [hang, fail])
async def test_a_renewal_that_hangs_or_fails_is_followed_by_the_next_in_its_time(
    serve: Any, trouble: Callable[[Any], Awaitable[None]]
) -> None:
    store = TroubledStore(trouble)
    async with serve(store) as (server, _), open_channel(server.address) as channel:
        renewing = asyncio.create_task(Ownership(StateStoreClient(channel), WORKER).renew_forever(1.0, lambda: True))

        async with asyncio.timeout(LIMIT_SECONDS):
            await store.has_renewed.wait()

        assert not renewing.done()
        renewing.cancel()


async def test_a_worker_that_is_not_able_gives_no_sign_of_life(serve: Any) -> None:
    store = TroubledStore()
    has_asked_twice = asyncio.Event()
    num_asked = 0

    def is_able() -> bool:
        nonlocal num_asked
        num_asked += 1
        if num_asked == 2:
            has_asked_twice.set()
        return False

    async with serve(store) as (server, _), open_channel(server.address) as channel:
        renewing = asyncio.create_task(Ownership(StateStoreClient(channel), WORKER).renew_forever(0.01, is_able))

        async with asyncio.timeout(LIMIT_SECONDS):
            await has_asked_twice.wait()

        assert not store.has_renewed.is_set()
        renewing.cancel()
