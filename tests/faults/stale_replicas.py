"""A replica that lags is made the primary: acknowledged records are gone, and whoever saw them must be told.

The state store reaches whichever Redis is the primary through a proxy. Everything above Redis runs on: state store,
gateway, and the public client that appends a file.
"""

import asyncio
import io
import random
import threading
import time
from contextlib import AsyncExitStack
from dataclasses import dataclass
from pathlib import Path

from fault_proxy import FaultProxy
from store_processes import RedisProcess, StateStoreProcess, storage_at, until

from eunoe.api.v1 import long_context_pb2 as api
from eunoe.client import AppendProgress, AsyncClient
from eunoe.clients.state_store import StateStoreClient
from eunoe.embedded.processes import free_ports
from eunoe.gateway.config import GatewayConfig
from eunoe.gateway.gateway import Gateway
from eunoe.internal.v1 import state_store_pb2 as pb
from eunoe.runtime.grpc_channel import open_channel
from eunoe.state_store import keys
from eunoe.state_store.metadata_codec import decode

_RECORD_BYTES = 4096
_NUM_RECORDS = 30
_ACCEPT_SECONDS = 20.0


@dataclass(frozen=True, slots=True, kw_only=True)
class PromotionFigures:
    """Promotions that forgot acknowledged bytes; of those, the ones that the client was told of, and that it mended."""

    num_promotions: int
    num_detected: int
    num_healed: int
    lost_bytes: int
    seconds: float


async def stale_promotions(num_promotions: int, seed: int, directory: Path) -> PromotionFigures:
    """Promote a stale replica in the middle of an append, again and again; each time another stream's.

    Args:
        num_promotions: Those that count: acknowledged bytes were gone.
        seed: Of sizes.
        directory: For two databases; its path has at most 80 bytes.
    """
    start, chance = time.monotonic(), random.Random(seed)
    num_detected = num_healed = lost_bytes = 0
    async with AsyncExitStack() as stack:
        pair = await stack.enter_async_context(_Pair(directory))
        store = StateStoreProcess(directory, f"redis://{pair.proxy.address}/0")
        stack.callback(store.kill)
        await store.start()
        # No worker serves these streams: only the log is looked at, and the append does not wait for a memory.
        gateway = Gateway(
            GatewayConfig(state_store_address=store.address, listen_address="127.0.0.1:0", requires_key=False)
        )
        await gateway.server.start()
        stack.push_async_callback(gateway.close)
        stack.push_async_callback(gateway.server.drain, 0)
        client = await stack.enter_async_context(AsyncClient(gateway.server.address))
        for number in range(num_promotions):
            source = _Source(chance.randbytes(_NUM_RECORDS * _RECORD_BYTES // 2).hex().encode())
            name = f"stream{number}"
            await _create(store.address, name)
            num_kept = chance.randint(1, _NUM_RECORDS - 8)
            appending = asyncio.create_task(
                client.append(name, source, source_id=name, finish=False, on_progress=source.note)
            )
            await source.is_accepted(num_kept)
            await pair.replica_has(name, num_kept * _RECORD_BYTES)
            pair.hold_back()
            await source.is_accepted(num_kept + chance.randint(1, 7))
            lost = source.num_accepted - await pair.promote(name)
            source.let_go()
            await appending
            assert lost > 0, "the replica was not stale"
            lost_bytes += lost
            num_detected += source.num_rollbacks == 1
            num_healed += await _log(store.address, name) == source.getvalue()
            await pair.heal()
    return PromotionFigures(
        num_promotions=num_promotions,
        num_detected=num_detected,
        num_healed=num_healed,
        lost_bytes=lost_bytes,
        seconds=time.monotonic() - start,
    )


class _Pair:
    """A primary and a replica of it; `proxy` leads to whichever is the primary."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._num_started = 0
        self._primary = self._redis()
        self._replica = self._redis()
        self.proxy = FaultProxy(f"127.0.0.1:{self._primary.port}")
        self._link = FaultProxy(f"127.0.0.1:{self._primary.port}")

    async def __aenter__(self) -> "_Pair":
        await self._primary.start()
        await self.proxy.__aenter__()
        await self._link.__aenter__()
        await self._follow()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.proxy.__aexit__()
        await self._link.__aexit__()
        self._primary.kill()
        self._replica.kill()

    def hold_back(self) -> None:
        """From here on the replica gets nothing any more."""
        self._link.blackhole()

    async def replica_has(self, stream_id: str, num_bytes: int) -> None:
        """Wait until the replica has so much of a stream."""

        async def condition() -> bool:
            return await _accepted(self._replica.url, stream_id) >= num_bytes

        await until(condition, "the replica does not follow")

    async def promote(self, stream_id: str) -> int:
        """Kill the primary and put the replica in its place; how many bytes of the stream that one has."""
        self._primary.kill()
        self._link.reset_all()
        async with storage_at(self._replica.url) as storage:
            await storage.client.replicaof("NO", "ONE")
        num_bytes = await _accepted(self._replica.url, stream_id)
        self._primary, self._replica = self._replica, self._redis()
        self.proxy.target = f"127.0.0.1:{self._primary.port}"
        self.proxy.reset_all()
        return num_bytes

    async def heal(self) -> None:
        """Give the new primary a replica of its own."""
        self._link.heal()
        self._link.target = f"127.0.0.1:{self._primary.port}"
        await self._follow()

    async def _follow(self) -> None:
        host, _, port = self._link.address.rpartition(":")
        await self._replica.start("--replicaof", host, port)

        async def is_up() -> bool:
            async with storage_at(self._replica.url) as storage:
                return (await storage.client.info("replication")).get("master_link_status") == "up"

        await until(is_up, "the replica does not connect")

    def _redis(self) -> RedisProcess:
        self._num_started += 1
        directory = self._directory / f"redis{self._num_started}"
        return RedisProcess(directory, "--repl-diskless-sync-delay", "0", port=free_ports(1)[0])


class _Source(io.BytesIO):
    """A file that gives a record at a time, and no more than it is asked to until it is let go.

    Attributes:
        num_accepted: Bytes that the client was told are durable.
        num_rollbacks: Losses that it was told of.
    """

    def __init__(self, data: bytes) -> None:
        super().__init__(data)
        self.num_accepted = 0
        self.num_rollbacks = 0
        self._num_allowed = 0
        self._has_changed = threading.Condition()

    def read(self, size: int | None = -1) -> bytes:
        with self._has_changed:
            self._has_changed.wait_for(lambda: self.tell() < self._num_allowed or self.tell() == len(self.getvalue()))
        return super().read(_RECORD_BYTES)

    def note(self, progress: AppendProgress) -> None:
        """What the client is told."""
        self.num_accepted = progress.source_bytes_accepted
        self.num_rollbacks = progress.num_rollbacks

    async def is_accepted(self, num_records: int) -> None:
        """Give so many records in all, and wait until they are durable."""
        self._allow(num_records * _RECORD_BYTES)

        async def condition() -> bool:
            return self.num_accepted >= num_records * _RECORD_BYTES

        await until(condition, "the records are not accepted", _ACCEPT_SECONDS)

    def let_go(self) -> None:
        """Give the rest."""
        self._allow(len(self.getvalue()))

    def _allow(self, num_bytes: int) -> None:
        with self._has_changed:
            self._num_allowed = num_bytes
            self._has_changed.notify_all()


async def _create(store_address: str, stream_id: str) -> None:
    settings = api.StreamSettings(
        kv_budget_tokens=64, segment_length=16, num_sink_tokens=4, positions=api.POSITION_MODE_COMPACT
    )
    async with open_channel(store_address) as channel:
        request = pb.CreateStreamRequest(name=_name(stream_id), model="m", settings=settings, request_id=stream_id)
        await StateStoreClient(channel).create_stream(request)


async def _log(store_address: str, stream_id: str) -> bytes:
    async with open_channel(store_address) as channel:
        request = pb.ReadLogRequest(name=_name(stream_id))
        return b"".join([piece.data async for piece in StateStoreClient(channel).read_log(request)])


async def _accepted(url: str, stream_id: str) -> int:
    """The accepted offset that a database knows."""
    async with storage_at(url) as storage:
        (record,) = await storage.read([keys.live_stream(_name(stream_id))])
    return decode(record.data).accepted_offset if record.data else 0


def _name(stream_id: str) -> str:
    return f"tenants/default/streams/{stream_id}"
