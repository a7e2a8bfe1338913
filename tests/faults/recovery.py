"""How long a stream stands still when the worker that reads it is killed.

The whole platform as `eunoe up` starts it, a long text on its way through the public API, and kill -9 of the owner's
process. The time ends when another worker has computed the first segment, be it one that the dead one had computed too.
"""

import asyncio
import gzip
import os
import signal
import statistics
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import psutil

from eunoe.client import AsyncClient
from eunoe.clients.model_worker import ModelWorkerClient
from eunoe.clients.state_store import StateStoreClient
from eunoe.embedded.platform import Platform
from eunoe.internal.v1 import state_store_pb2 as pb
from eunoe.runtime.errors import EunoeError
from eunoe.runtime.grpc_channel import open_channel

BOOK = Path(__file__).parents[2] / "examples" / "kjv.txt.gz"

# What the times below are precise to, and some milliseconds for a call.
_POLL_SECONDS = 0.01
_LONGEST_SECONDS = 120.0


@dataclass(frozen=True, slots=True)
class Recovery:
    """One kill: seconds until another worker had the lease, and until it had computed a segment."""

    takeover_seconds: float
    first_segment_seconds: float


@dataclass(frozen=True, slots=True)
class RecoveryFigures:
    """Seconds from kill -9 of the owner to the first segment of the next one."""

    recoveries: tuple[Recovery, ...]

    @property
    def p50_seconds(self) -> float:
        return statistics.median(self._seconds)

    @property
    def p99_seconds(self) -> float:
        """The nearest rank; of fewer than 100 kills that is the slowest."""
        return self._seconds[-(-99 * len(self._seconds) // 100) - 1]

    @property
    def max_seconds(self) -> float:
        return self._seconds[-1]

    @property
    def _seconds(self) -> list[float]:
        return sorted(recovery.first_segment_seconds for recovery in self.recoveries)


async def recovery(
    num_kills: int, model_path: Path, *, num_workers: int = 2, threads: int = 1, text: bytes | None = None
) -> RecoveryFigures:
    """Kill the owner of a stream that is being read, again and again; before each kill all workers are warm.

    Args:
        num_kills: How often.
        model_path: The model's directory.
        num_workers: 1 measures what a restart takes.
        threads: Of each worker.
        text: What the stream reads, over and over; default is the book among the examples.
    """
    text = gzip.decompress(BOOK.read_bytes()) if text is None else text
    # Not in the event loop: it starts processes and waits for them.
    with tempfile.TemporaryDirectory(prefix="eunoe-recovery-") as home:
        platform = Platform(home=Path(home), model=model_path, workers=num_workers, threads=threads)
        await asyncio.to_thread(platform.start)
        try:
            async with (
                AsyncClient(platform.address, retry_seconds=_LONGEST_SECONDS) as client,
                open_channel(platform.state_store_address) as channel,
            ):
                name = (await client.create_stream("long")).name
                reading = asyncio.create_task(_read(client, name, text))
                try:
                    watch = _Watch(StateStoreClient(channel), platform.model, name.replace("/-/", "/default/"))
                    measured = [await watch.kill_when_warm(num_workers) for _ in range(num_kills)]
                finally:
                    reading.cancel()
                    await asyncio.wait([reading])
                if not reading.cancelled() and (error := reading.exception()) is not None:
                    raise error
        finally:
            await asyncio.to_thread(platform.stop)
    return RecoveryFigures(tuple(measured))


async def _read(client: AsyncClient, name: str, text: bytes) -> None:
    while True:
        await client.append(name, text)


class _Watch:
    """Looks at one stream's owner."""

    def __init__(self, store: StateStoreClient, model: str, name: str) -> None:
        self._store = store
        self._model = model
        self._name = name

    async def kill_when_warm(self, num_workers: int) -> Recovery:
        """Wait until all workers are there and the owner has computed something since its last checkpoint; kill it."""
        owner = await self._until_computing(await self._until_warm(num_workers))
        pid = _pid_listening_at(owner.address)
        start = time.monotonic()
        os.kill(pid, signal.SIGKILL)
        record = await self._until_taken(owner)
        takeover_seconds = time.monotonic() - start
        await self._until_folded(record)
        return Recovery(takeover_seconds, time.monotonic() - start)

    async def _until_warm(self, num_workers: int) -> set[str]:
        """The incarnations of at least so many workers whose processes live."""
        give_up_at = time.monotonic() + _LONGEST_SECONDS
        while time.monotonic() < give_up_at:
            listed = (await self._store.list_workers(pb.ListWorkersRequest(model=self._model))).workers
            living = {worker.worker for worker in listed if _has_listener(worker.address)}
            if len(living) >= num_workers:
                return living
            await asyncio.sleep(0.1)
        raise TimeoutError(f"{num_workers} workers were not there after {_LONGEST_SECONDS:.0f} s")

    async def _until_computing(self, living: set[str]) -> pb.Lease:
        give_up_at = time.monotonic() + _LONGEST_SECONDS
        while time.monotonic() < give_up_at:
            record = await self._record()
            if record.lease.worker in living and await self._folded(record.lease) > record.manifest.applied_offset:
                return record.lease
            await asyncio.sleep(_POLL_SECONDS)
        raise TimeoutError("nobody reads the stream")

    async def _until_taken(self, dead: pb.Lease) -> pb.StreamRecord:
        give_up_at = time.monotonic() + _LONGEST_SECONDS
        while time.monotonic() < give_up_at:
            record = await self._record()
            if record.lease.worker and record.lease.worker != dead.worker:
                return record
            await asyncio.sleep(_POLL_SECONDS)
        raise TimeoutError("nobody took the stream")

    async def _until_folded(self, record: pb.StreamRecord) -> None:
        """Wait until the new owner has computed a segment beyond the checkpoint that it took over."""
        give_up_at = time.monotonic() + _LONGEST_SECONDS
        while time.monotonic() < give_up_at:
            if await self._folded(record.lease) > record.manifest.applied_offset:
                return
            await asyncio.sleep(_POLL_SECONDS)
        raise TimeoutError("the stream was taken, and not read on")

    async def _record(self) -> pb.StreamRecord:
        return (await self._store.get_stream(pb.GetStreamRequest(name=self._name))).record

    async def _folded(self, lease: pb.Lease) -> int:
        """How far the worker is; 0 if it does not say. The hint that this is comes after the gateway's own."""
        async with open_channel(lease.address) as channel:
            try:
                return (await ModelWorkerClient(channel).advance(self._name, lease, 0)).folded_offset
            except EunoeError:
                return 0


def _pid_listening_at(address: str) -> int:
    port = int(address.rpartition(":")[2])
    for connection in psutil.net_connections(kind="tcp"):
        if connection.status == psutil.CONN_LISTEN and connection.laddr.port == port and connection.pid:
            return int(connection.pid)
    raise LookupError(f"nobody listens at {address}")


def _has_listener(address: str) -> bool:
    try:
        _pid_listening_at(address)
    except LookupError:
        return False
    return True
