"""Memory of gateway and state store while calls are cancelled by the thousand, and while a client reads too slowly."""

import asyncio
import random
import time
from collections.abc import Callable, Coroutine
from dataclasses import dataclass
from typing import Any

import google_crc32c
import grpc
import psutil

from eunoe.api.v1 import long_context_pb2 as api
from eunoe.api.v1 import long_context_pb2_grpc
from eunoe.runtime.grpc_channel import open_channel

_NUM_AT_ONCE = 16
_MIB = 1 << 20
# A process that has nothing to do any more gives memory back, or takes a little, for so long.
_STEADY_SECONDS = 2.0


@dataclass(frozen=True, slots=True, kw_only=True)
class StormFigures:
    """Growth of each process in MiB for 1,000 cancelled calls, by least squares over all samples after the warm-up."""

    num_calls: int
    mib_per_1000: dict[str, float]
    rss_mib: dict[str, tuple[float, float]]
    cancelled_by_kind: dict[str, int]
    seconds: float


async def cancel_storm(address: str, pids: dict[str, int], model: str, *, num_calls: int, seed: int) -> StormFigures:
    """Make calls, and cancel each at a random moment.

    Args:
        address: Of a gateway that needs no key, with a worker of `model` behind it.
        pids: The processes to watch, by name.
        model: Of the streams.
        num_calls: Calls after a tenth as many that only warm the processes up.
        seed: Of the choices.
    """
    start, chance = time.monotonic(), random.Random(seed)
    processes = {name: psutil.Process(pid) for name, pid in pids.items()}
    async with open_channel(address) as channel:
        storm = _Storm(long_context_pb2_grpc.LongContextServiceStub(channel), chance)
        await storm.prepare(model)
        await storm.run(max(num_calls // 10, 100))
        samples: dict[str, list[float]] = {name: [] for name in processes}
        num_steps = 10
        for step in range(num_steps + 1):
            if step:
                await storm.run(num_calls // num_steps)
            await asyncio.sleep(_STEADY_SECONDS / (1 if step in (0, num_steps) else 4))
            for name, process in processes.items():
                samples[name].append(process.memory_info().rss / _MIB)
    return StormFigures(
        num_calls=num_calls,
        mib_per_1000={name: _slope(rss) / (num_calls / num_steps) * 1000 for name, rss in samples.items()},
        rss_mib={name: (rss[0], rss[-1]) for name, rss in samples.items()},
        cancelled_by_kind=storm.num_by_kind,
        seconds=time.monotonic() - start,
    )


class _Storm:
    def __init__(self, stub: Any, chance: random.Random) -> None:
        self._stub = stub
        self._chance = chance
        self._name = ""
        self.num_by_kind: dict[str, int] = {}

    async def prepare(self, model: str) -> None:
        """Make the stream that all calls are about; its export has some MiB."""
        request = api.CreateStreamRequest(model=model)
        self._name = (await self._stub.CreateStream(request)).stream.name
        call = self._stub.Append()
        await call.write(api.AppendRequest(open=api.AppendOpen(stream=self._name)))
        data = b"All that is cancelled is forgotten. " * 1000
        await call.write(api.AppendRequest(record=_record(0, data)))
        await call.write(api.AppendRequest(finish=api.AppendFinish()))
        async for _ in call:
            pass

    async def run(self, num_calls: int) -> None:
        """Make so many calls, and cancel them."""
        kinds: list[Callable[[], Coroutine[Any, Any, None]]] = [
            self._get, self._list, self._append, self._append_record, self._generate, self._export,
        ]  # fmt: skip
        slots = asyncio.Semaphore(_NUM_AT_ONCE)

        async def one(kind: Callable[[], Coroutine[Any, Any, None]]) -> None:
            name = kind.__name__.strip("_")
            self.num_by_kind[name] = self.num_by_kind.get(name, 0) + 1
            async with slots:
                try:
                    await kind()
                except (asyncio.CancelledError, grpc.RpcError):
                    return

        await asyncio.gather(*(one(self._chance.choice(kinds)) for _ in range(num_calls)))

    async def _get(self) -> None:
        await self._cancelled(self._stub.GetStream(api.GetStreamRequest(name=self._name)))

    async def _list(self) -> None:
        await self._cancelled(self._stub.ListStreams(api.ListStreamsRequest()))

    async def _append(self) -> None:
        call = self._stub.Append()
        await call.write(api.AppendRequest(open=api.AppendOpen(stream=self._name)))
        if self._chance.random() < 0.5:
            await call.read()
        await self._cancelled(call)

    async def _append_record(self) -> None:
        call = self._stub.Append()
        await call.write(api.AppendRequest(open=api.AppendOpen(stream=self._name)))
        await call.read()
        # Far above the accepted offset: it is read, checked and refused, and the log does not grow.
        await call.write(api.AppendRequest(record=_record(1 << 40, self._chance.randbytes(100_000))))
        await self._cancelled(call)

    async def _generate(self) -> None:
        call = self._stub.Generate(api.GenerateRequest(stream=self._name, text="so", max_tokens=20))
        await call.read()
        await self._cancelled(call)

    async def _export(self) -> None:
        call = self._stub.ExportStream(api.ExportStreamRequest(name=self._name))
        await call.read()
        await self._cancelled(call)

    async def _cancelled(self, call: Any) -> None:
        for _ in range(self._chance.choice((0, 0, 1, 5, 50))):
            await asyncio.sleep(0)
        call.cancel()


def _record(offset: int, data: bytes) -> api.AppendRecord:
    return api.AppendRecord(offset=offset, data=data, crc32c=google_crc32c.value(data))


def _slope(values: list[float]) -> float:
    mean_x, mean_y = (len(values) - 1) / 2, sum(values) / len(values)
    above = sum((x - mean_x) * (y - mean_y) for x, y in enumerate(values))
    return above / sum((x - mean_x) ** 2 for x in range(len(values)))
