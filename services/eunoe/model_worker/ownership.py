"""Who may fold a stream: taking and giving back leases, and this worker's sign of life."""

import asyncio
import logging
import time
from collections.abc import Callable

from eunoe.clients.state_store import StateStoreClient
from eunoe.internal.v1 import state_store_pb2 as pb
from eunoe.runtime.errors import Conflict, DeadlineTooShort, EunoeError, NotFound, NotOwner, Unavailable
from eunoe.runtime.failpoints import failpoint

logger = logging.getLogger(__name__)

_PROBE_SECONDS = 0.5


class Ownership:
    """Leases of one worker incarnation.

    A stream is taken only if nobody owns it, its owner missed two renewals (the state store knows), or the owner's port
    refuses or resets our own connection. A probe that times out proves nothing: the owner may be slow, or the network.

    Args:
        store: The state store.
        worker: This incarnation, as it appears in the directory.
    """

    def __init__(self, store: StateStoreClient, worker: pb.Worker) -> None:
        self._store = store
        self.worker = worker

    async def acquire(self, name: str, suspect: pb.Lease | None = None) -> pb.StreamRecord:
        """Take a stream; returns it with the new lease.

        Raises:
            NotOwner: If a living worker owns it, whom the error names.
            StreamNotFound: If there is no such stream.
        """
        by = pb.Lease(worker=self.worker.worker, address=self.worker.address)
        request = pb.AcquireStreamRequest(name=name, by=by)
        failpoint("worker.before-acquire")
        if suspect is not None and suspect.worker != by.worker and await _is_dead(suspect.address):
            request.suspect.CopyFrom(suspect)
        try:
            return (await self._store.acquire_stream(request)).record
        except NotOwner as owner:
            owners = pb.Lease(worker=owner.worker, epoch=owner.epoch, address=owner.address)
            if request.suspect == owners or not await _is_dead(owner.address):
                raise
            request.suspect.CopyFrom(owners)
        return (await self._store.acquire_stream(request)).record

    async def release(self, name: str, lease: pb.Lease) -> None:
        """Give a stream back; one that is not ours any more is none of our business."""
        failpoint("worker.before-release")
        try:
            await self._store.release_stream(pb.ReleaseStreamRequest(name=name, lease=lease))
        except (Conflict, NotFound):
            return
        except (Unavailable, DeadlineTooShort):
            # The lease ends by itself once this worker stops renewing.
            logger.warning("a lease could not be given back", extra={"stream": name})

    async def renew_forever(self, interval_seconds: float, is_able: Callable[[], bool]) -> None:
        """Say that this worker lives, as long as it is able to work; others may take its streams otherwise.

        Args:
            interval_seconds: From the start of a renewal to that of the next, and the longest that one may take: one
                that hangs is given up for the next, before the sign of life that it was to prolong ends.
            is_able: Asked before each renewal.
        """
        while True:
            start = time.monotonic()
            if is_able():
                try:
                    await self._store.renew_worker(pb.RenewWorkerRequest(worker=self.worker), interval_seconds)
                except EunoeError as error:
                    # Whatever the store answers, its next answer may be another: this worker still lives.
                    logger.warning("this worker's life was not renewed", extra={"error": str(error)})
            await asyncio.sleep(start + interval_seconds - time.monotonic())

    async def leave(self) -> None:
        """Take this worker out of the directory."""
        try:
            await self._store.remove_worker(pb.RemoveWorkerRequest(worker=self.worker.worker))
        except (Unavailable, DeadlineTooShort):
            logger.warning("this worker could not be taken out of the directory")


async def _is_dead(address: str) -> bool:
    """Whether nobody listens at host:port, by refusal or reset."""
    host, _, port = address.rpartition(":")
    if not port.isdigit():
        return False
    try:
        async with asyncio.timeout(_PROBE_SECONDS):
            _, writer = await asyncio.open_connection(host, int(port))
    except (ConnectionRefusedError, ConnectionResetError):
        return True
    except (TimeoutError, OSError):
        return False
    writer.close()
    return False
