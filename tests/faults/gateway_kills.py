"""kill -9 of the gateway in the middle of appends: the client goes on at the next one, and the log is the source.

Some sources have a name and several records in flight, some have none; some can go back, some cannot. No worker serves
the streams, so that their logs stay whole and can be compared.
"""

import asyncio
import random
import statistics
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from worker_processes import Site

from eunoe.api.v1 import long_context_pb2 as api
from eunoe.client import AppendProgress, AsyncClient
from eunoe.embedded.processes import free_ports
from eunoe.internal.v1 import state_store_pb2 as pb

_UNSERVED = Path("nobody-serves-this")
_NUM_WRITERS = 3
# Below the window at which a gateway stops reading.
_SOURCE_BYTES = (200_000, 1_500_000)
_LONGEST_PAUSE_SECONDS = 0.3
_PATIENCE_SECONDS = 120.0


@dataclass(kw_only=True)
class GatewayFigures:
    """What was killed, and what it did to what was appended meanwhile.

    Attributes:
        num_kills: All of them while every writer was appending.
        num_streams: Logs that were compared, `wrong` ones among them.
        num_bytes: Of their sources.
        num_unknown: Appends that a kill left with durable bytes which nobody had told them of.
        num_reconnects: Calls that were opened again.
        lost_bytes: How much shorter logs were than their sources.
        surplus_bytes: How much longer.
        wrong: Streams whose log is not their source.
        pauses: Seconds from each kill to the next acknowledged record.
        kinds: Sources by kind.
    """

    num_kills: int = 0
    num_streams: int = 0
    num_bytes: int = 0
    num_unknown: int = 0
    num_reconnects: int = 0
    lost_bytes: int = 0
    surplus_bytes: int = 0
    wrong: list[str] = field(default_factory=list)
    pauses: list[float] = field(default_factory=list)
    kinds: Counter[str] = field(default_factory=Counter)
    seconds: float = 0.0

    @property
    def pause_p50_seconds(self) -> float:
        return statistics.median(self.pauses)


async def gateway_kills(num_kills: int, seed: int) -> GatewayFigures:
    """Kill the gateway again and again, each time after it has acknowledged something.

    Args:
        num_kills: How often.
        seed: Of sources and moments.
    """
    start, figures = time.monotonic(), GatewayFigures()
    async with Site(_UNSERVED) as site:
        address = f"127.0.0.1:{free_ports(1)[0]}"
        gateway = await site.serving_gateway(listen_address=address)
        async with AsyncClient(address, retry_seconds=_PATIENCE_SECONDS) as client:
            writers = [_Writer(site, client, figures, f"{seed}-{number}") for number in range(_NUM_WRITERS)]
            writing = [asyncio.create_task(writer.run()) for writer in writers]
            chance = random.Random(seed)
            for _ in range(num_kills):
                await _all_acknowledged(writers, writing)
                await asyncio.sleep(chance.uniform(0.0, _LONGEST_PAUSE_SECONDS))
                gateway.end()
                figures.num_kills += 1
                killed = time.monotonic()
                figures.num_unknown += sum([await writer.has_unknown() for writer in writers])
                gateway = await site.serving_gateway(listen_address=address)
                await _all_acknowledged(writers[:1], writing)
                figures.pauses.append(time.monotonic() - killed)
            for writer in writers:
                writer.is_last = True
            await asyncio.gather(*writing)
    figures.seconds = time.monotonic() - start
    return figures


async def _all_acknowledged(writers: list["_Writer"], writing: list[asyncio.Task[None]]) -> None:
    """Wait until each writer has had a record acknowledged from now on."""
    waits = [asyncio.create_task(writer.next_acknowledged()) for writer in writers]
    await asyncio.wait([asyncio.gather(*waits), *writing], return_when=asyncio.FIRST_COMPLETED)
    for task in writing:
        if task.done():
            task.result()


class _Writer:
    """Appends one random source after the other, each to a stream of its own, and compares the log with it."""

    def __init__(self, site: Site, client: AsyncClient, figures: GatewayFigures, seed: str) -> None:
        self._store = site.store
        self._client = client
        self._figures = figures
        self._chance = random.Random(seed)
        self._seed = seed
        self._acknowledged = asyncio.Event()
        self._num_acknowledged = 0
        self._num_reconnects = 0
        self._name = ""
        self.is_last = False

    async def next_acknowledged(self) -> None:
        """Wait for the next acknowledgement."""
        self._acknowledged.clear()
        await self._acknowledged.wait()

    async def has_unknown(self) -> bool:
        """Whether the log has more than was acknowledged."""
        if not self._name:
            return False
        stream = (await self._store.get_stream(pb.GetStreamRequest(name=self._name))).record.stream
        return stream.accepted_offset > self._num_acknowledged

    async def run(self) -> None:
        """Append until `is_last` is set, and to the end of what is being appended then."""
        number = 0
        while not self.is_last:
            number += 1
            await self._append(f"w{self._seed}-{number}")

    async def _append(self, stream_id: str) -> None:
        name = f"tenants/default/streams/{stream_id}"
        settings = api.StreamSettings(kv_budget_tokens=64, segment_length=16, positions=api.POSITION_MODE_COMPACT)
        await self._store.create_stream(pb.CreateStreamRequest(name=name, model=_UNSERVED.name, settings=settings))
        data = self._chance.randbytes(self._chance.randint(*_SOURCE_BYTES) // 2).hex().encode()
        is_named, can_go_back = self._chance.random() < 0.6, self._chance.random() < 0.5
        kind = f"{'named' if is_named else 'unnamed'}, {'bytes' if can_go_back else 'pieces'}"
        self._name, self._num_acknowledged, self._num_reconnects = name, 0, 0
        await self._client.append(
            stream_id,
            data if can_go_back else _pieces(data, self._chance),
            source_id=stream_id if is_named else "",
            finish=False,
            on_progress=self._note,
        )
        self._name = ""
        pieces = [piece.data async for piece in self._store.read_log(pb.ReadLogRequest(name=name))]
        self._compare(stream_id, data, b"".join(pieces))
        self._figures.kinds[kind] += 1
        await self._client.delete_stream(stream_id)

    def _note(self, progress: AppendProgress) -> None:
        self._num_reconnects = progress.num_reconnects
        if progress.source_bytes_accepted > self._num_acknowledged:
            self._num_acknowledged = progress.source_bytes_accepted
            self._acknowledged.set()

    def _compare(self, stream_id: str, data: bytes, log: bytes) -> None:
        figures = self._figures
        figures.num_streams += 1
        figures.num_bytes += len(data)
        figures.num_reconnects += self._num_reconnects
        figures.lost_bytes += max(len(data) - len(log), 0)
        figures.surplus_bytes += max(len(log) - len(data), 0)
        if log != data:
            figures.wrong.append(stream_id)


def _pieces(data: bytes, chance: random.Random) -> Iterator[bytes]:
    """The data in records of all sizes, as from a pipe."""
    sizes = random.Random(chance.random())
    start = 0
    while start < len(data):
        size = sizes.randint(1, 40_000)
        yield data[start : start + size]
        start += size
