"""Which worker owns a stream, and calling it there.

Ownership is the lease in the state store; what this file remembers is only a hint to it. A worker that is asked for a
stream of another's says so (NotOwner, with the owner's address). A worker that cannot be reached may be dead: then
another one is asked to take the stream, and told whom we suspect. That worker makes its own probe, so a gateway with a
broken network can take nothing from anybody.
"""

import hashlib
import logging
from collections import OrderedDict
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import aclosing
from typing import Protocol, TypeVar

import grpc

from eunoe.clients.model_worker import ModelWorkerClient, PlacementClient
from eunoe.clients.state_store import StateStoreClient
from eunoe.internal.v1 import state_store_pb2 as store_pb
from eunoe.internal.v1.state_store_pb2 import Lease
from eunoe.runtime.errors import DeadlineTooShort, NotOwner, Overloaded, Unavailable
from eunoe.runtime.grpc_channel import open_channel

logger = logging.getLogger(__name__)

MAX_REDIRECTS = 2

_MAX_LEASES = 100_000
# Far above the workers of one installation: the oldest are addresses of workers long gone.
_MAX_CHANNELS = 512
_MAX_ASKED_WORKERS = 4

Response = TypeVar("Response")
Response_co = TypeVar("Response_co", covariant=True)


class StreamingCall(Protocol[Response_co]):
    """One try at one worker: an asynchronous generator, which is closed when it is no longer wanted."""

    def __call__(self, worker: ModelWorkerClient, lease: Lease) -> AsyncGenerator[Response_co, None]: ...


class Placement:
    """Calls the owners of streams.

    Args:
        store: Keeps the leases and the worker directory.
        serve: Ray Serve's proxy, for streams that have no owner yet; None uses the worker directory alone.
        open_worker_channel: Opens a channel to a worker's address.
    """

    def __init__(
        self,
        store: StateStoreClient,
        serve: PlacementClient | None = None,
        open_worker_channel: Callable[[str], grpc.aio.Channel] = open_channel,
    ) -> None:
        self._store = store
        self._serve = serve
        self._open_worker_channel = open_worker_channel
        self._leases: OrderedDict[str, Lease] = OrderedDict()
        self._channels: OrderedDict[str, grpc.aio.Channel] = OrderedDict()

    async def close(self) -> None:
        """Close the channels to all workers."""
        for channel in self._channels.values():
            await channel.close()
        self._channels.clear()

    async def stream_from_owner(
        self,
        name: str,
        call: StreamingCall[Response],
        is_progress: Callable[[Response], bool] = lambda _: False,
    ) -> AsyncGenerator[Response, None]:
        """What the stream's owner answers.

        A try that fails for want of the owner is repeated at the next one, as long as it answered nothing but progress.

        Args:
            name: The stream's full name.
            call: Makes one try.
            is_progress: Whether a response means nothing if the call is made again.

        Raises:
            Unavailable: If no worker can be found that owns the stream now.
        """
        num_redirects = 0
        is_replaced = False
        has_answered = False
        lease = await self._find(name)
        while True:
            try:
                async with aclosing(call(await self._worker(lease.address), lease)) as responses:
                    async for response in responses:
                        has_answered = has_answered or not is_progress(response)
                        yield response
                    return
            except NotOwner as error:
                self._leases.pop(name, None)
                num_redirects += 1
                if has_answered or num_redirects > MAX_REDIRECTS:
                    raise Unavailable("the stream is changing its worker") from error
                lease = await self._redirected(name, lease, error)
            except DeadlineTooShort:
                # Perhaps the owner hangs: the next call asks the store who it is by then.
                self._leases.pop(name, None)
                raise
            except Unavailable:
                self._leases.pop(name, None)
                if has_answered or is_replaced:
                    raise
                is_replaced = True
                lease = await self._replaced(name, suspect=lease)

    async def ask_owner(self, name: str, call: Callable[[ModelWorkerClient, Lease], Awaitable[Response]]) -> Response:
        """The one answer of the stream's owner; as `stream_from_owner`."""

        async def once(worker: ModelWorkerClient, lease: Lease) -> AsyncGenerator[Response, None]:
            yield await call(worker, lease)

        async with aclosing(self.stream_from_owner(name, once)) as responses:
            async for response in responses:
                return response
        raise AssertionError("one answer comes or an error")

    async def bystanders(self, name: str) -> list[ModelWorkerClient]:
        """Some workers of the stream's model, for what takes no lease: the stream's owner comes last.

        Raises:
            StreamNotFound.
        """
        record = (await self._store.get_stream(store_pb.GetStreamRequest(name=name))).record
        workers = list((await self._store.list_workers(store_pb.ListWorkersRequest(model=record.stream.model))).workers)
        workers.sort(key=lambda worker: (worker.worker == record.lease.worker, _rank(name, worker)))
        return [await self._worker(worker.address) for worker in workers[:_MAX_ASKED_WORKERS]]

    def forget(self, name: str) -> None:
        """Drop what is remembered of a deleted stream."""
        self._leases.pop(name, None)

    async def _find(self, name: str) -> Lease:
        lease = self._leases.get(name)
        if lease is not None:
            self._leases.move_to_end(name)
            return lease
        record = (await self._store.get_stream(store_pb.GetStreamRequest(name=name))).record
        if record.lease.worker:
            return self._remembered(name, record.lease)
        return await self._placed(name, record.stream.model)

    async def _placed(self, name: str, model: str) -> Lease:
        if self._serve is not None:
            try:
                return self._remembered(name, await self._serve.place_stream(name, model))
            except NotOwner as error:
                if error.address:
                    return self._remembered(name, _named(error))
            except (Unavailable, Overloaded) as error:
                logger.warning("Serve placed no stream, asking the worker directory", extra={"reason": error.reason()})
        return await self._taken(name, model, suspect=None)

    async def _redirected(self, name: str, tried: Lease, error: NotOwner) -> Lease:
        if error.address:
            return self._remembered(name, _named(error))
        # The owner let go of its memory, and may load it again; or another incarnation listens at that address.
        return await self._replaced(name, suspect=tried, is_reachable=True)

    async def _replaced(self, name: str, suspect: Lease, *, is_reachable: bool = False) -> Lease:
        """The lease after `suspect`: the one that the store has by now, or that of a worker which takes the stream."""
        record = (await self._store.get_stream(store_pb.GetStreamRequest(name=name))).record
        if record.lease.worker and (record.lease.worker, record.lease.epoch) != (suspect.worker, suspect.epoch):
            return self._remembered(name, record.lease)
        return await self._taken(name, record.stream.model, suspect, asks_suspect=is_reachable)

    async def _taken(self, name: str, model: str, suspect: Lease | None, *, asks_suspect: bool = False) -> Lease:
        """The lease of the first worker of the directory that says who owns the stream; a suspect is asked first."""
        owner = suspect.worker if suspect is not None else ""
        workers = (await self._store.list_workers(store_pb.ListWorkersRequest(model=model))).workers
        candidates = [worker for worker in workers if asks_suspect or worker.worker != owner]
        # The same order for a stream at every gateway: two that ask at once ask the same worker.
        candidates.sort(key=lambda worker: (worker.worker != owner, _rank(name, worker)))
        failure: Unavailable | Overloaded | DeadlineTooShort | None = None
        for worker in candidates[:_MAX_ASKED_WORKERS]:
            try:
                client = await self._worker(worker.address)
                return self._remembered(name, await client.take_stream(name, suspect))
            except NotOwner as error:
                if error.address:
                    return self._remembered(name, _named(error))
            except (Unavailable, Overloaded, DeadlineTooShort) as error:
                failure = error
        if isinstance(failure, Overloaded):
            raise failure
        raise Unavailable(f"no worker of model {model!r} can take the stream now") from failure

    def _remembered(self, name: str, lease: Lease) -> Lease:
        self._leases[name] = lease
        self._leases.move_to_end(name)
        if len(self._leases) > _MAX_LEASES:
            self._leases.popitem(last=False)
        return lease

    async def _worker(self, address: str) -> ModelWorkerClient:
        if address not in self._channels:
            self._channels[address] = self._open_worker_channel(address)
            if len(self._channels) > _MAX_CHANNELS:
                _, oldest = self._channels.popitem(last=False)
                await oldest.close()
        self._channels.move_to_end(address)
        return ModelWorkerClient(self._channels[address])


def _rank(name: str, worker: store_pb.Worker) -> bytes:
    return hashlib.sha256(f"{name} {worker.worker}".encode()).digest()


def _named(error: NotOwner) -> Lease:
    return Lease(worker=error.worker, epoch=error.epoch, address=error.address)
