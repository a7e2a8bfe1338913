"""Clients that read too slowly, not at all, or vanish in the middle of a call, beside one that wants quick answers.

The gateway may hold a few MiB for each of them and no more, the others must not notice, and when they are gone nothing
of them is left: every call has ended at the gateway, the worker and the state store, and its memory is given back.
"""

import asyncio
import contextlib
import statistics
import time
import urllib.request
from collections import Counter
from collections.abc import Coroutine
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Self

import google_crc32c
import grpc
import psutil
from fault_proxy import FaultProxy
from prometheus_client.parser import text_string_to_metric_families
from worker_processes import Site, until
from write_stall import CHUNK_BYTES, StateWriter

from eunoe.api.v1 import long_context_pb2 as api
from eunoe.api.v1 import long_context_pb2_grpc
from eunoe.embedded.processes import free_ports
from eunoe.runtime.grpc_channel import open_channel

Ending = Literal["cancel", "reset", "black hole"]

_MIB = 1 << 20
_SAMPLE_SECONDS = 0.05
_DRIP_BYTES_PER_SECOND = 1024
_MAX_TOKENS = 300
# Who vanishes without a word is noticed by keepalive: after 30 s of silence, and 10 s for the answer to a ping.
_LONGEST_SECONDS = {"cancel": 10.0, "reset": 10.0, "black hole": 60.0}
# A client that promises to take in everything at once, and then does not.
_GREEDY = (("grpc.http2.lookahead_bytes", 16 * _MIB), ("grpc.http2.bdp_probe", 0))
# A client that promises to take in next to nothing.
_MODEST = (("grpc.http2.lookahead_bytes", 1 << 16), ("grpc.http2.bdp_probe", 0))
_REFUSED = bytes(1 << 14)
_ALONE = (("grpc.use_local_subchannel_pool", 1), ("grpc.max_receive_message_length", 4 * _MIB))

_KINDS = (
    "export, dripping",
    "export, not read",
    "export, deaf",
    "generate, dripping",
    "generate, not read",
    "append, not read",
)
"""A call, and what its client does after the first response. A deaf one does not even empty its socket."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SlowFigures:
    """What slow clients cost.

    Attributes:
        num_clients: Slow ones at once, by what they do.
        endings: Rounds, by how the clients went.
        export_mib: What each export has.
        growth_mib: Most memory that each process took beyond what it had before, in MiB.
        unread_mib: Most that one client could append without reading an acknowledgement, in MiB.
        quiet_ms: Median and longest time of another client's call without the slow ones, in ms.
        crowded_ms: The same beside them.
        num_crowded: Calls of that.
        given_back_seconds: Longest time from an ending until nothing was left, by ending.
        complaints: What the gateway's log says of failed calls.
    """

    num_clients: dict[str, int]
    endings: dict[str, int]
    export_mib: int
    growth_mib: dict[str, float]
    unread_mib: float
    quiet_ms: tuple[float, float]
    crowded_ms: tuple[float, float]
    num_crowded: int
    given_back_seconds: dict[str, float]
    complaints: tuple[str, ...]


async def slow_clients(
    model_path: Path, endings: list[Ending], *, num_each: int, seconds: float, export_mib: int
) -> SlowFigures:
    """Crowds of slow clients, one after the other, each of which stays a while and goes.

    Args:
        model_path: Of a tiny model.
        endings: One a crowd.
        num_each: Clients of each kind in a crowd.
        seconds: How long a crowd stays.
        export_mib: Size of what is exported.
    """
    ports = dict(zip(("gateway", "worker", "state_store"), free_ports(3), strict=True))
    async with Site(model_path, METRICS_PORT=str(ports["state_store"])) as site:
        await site.serving_worker(metrics_port=ports["worker"])
        # Room for one crowd and some: a crowd that were still counted would keep the next one out.
        limits = {"max_tenant_concurrent_calls": num_each * len(_KINDS) + num_each}
        gateway = await site.serving_gateway(metrics_port=ports["gateway"], **limits)
        writer = StateWriter(site.store, "default")
        await writer.open()
        await writer.commit([bytes([i]) * CHUNK_BYTES for i in range(export_mib)])
        started: Counter[tuple[str, str]] = Counter()
        watch = _Watch(ports, {"gateway": gateway.pid, "state_store": site.state_store_pid}, started)
        given_back: dict[str, float] = {}
        unread_mib = 0.0
        async with open_channel(gateway.address) as channel:
            other = _OtherClient(long_context_pb2_grpc.LongContextServiceStub(channel), started)
            await other.prepare(site.model_name, writer.name)
            await other.call_for(1.0)
            quiet_ms = other.times_ms()
            await watch.begin()
            for ending in endings:
                async with _Crowd(gateway.address, other.name, writer.name, started) as crowd:
                    await crowd.come(num_each)
                    await watch.while_running(other.call_for(seconds))
                    go = time.monotonic()
                    await crowd.go(ending)
                    left = f"something of the clients is left after their {ending}"
                    await until(watch.is_all_given_back, left, _LONGEST_SECONDS[ending])
                    given_back[ending] = max(given_back.get(ending, 0.0), time.monotonic() - go)
                    unread_mib = max(unread_mib, crowd.most_sent_mib)
        log = gateway.log_file.read_text()
    crowded_ms = other.times_ms()[len(quiet_ms) :]
    return SlowFigures(
        num_clients=dict.fromkeys(_KINDS, num_each),
        endings=dict(Counter(endings)),
        export_mib=export_mib,
        growth_mib=watch.growth_mib,
        unread_mib=unread_mib,
        quiet_ms=(statistics.median(quiet_ms), max(quiet_ms)),
        crowded_ms=(statistics.median(crowded_ms), max(crowded_ms)),
        num_crowded=len(crowded_ms),
        given_back_seconds=given_back,
        complaints=tuple(line for line in log.splitlines() if "rror" in line or "unexpected" in line.lower()),
    )


class _Crowd:
    """Clients that begin a call each, over connections of their own, and then behave badly.

    Attributes:
        most_sent_mib: What the gateway took from one client that reads no acknowledgement, before it read no more.
    """

    def __init__(self, address: str, name: str, exported: str, started: Counter[tuple[str, str]]) -> None:
        self._name = name
        self._exported = exported
        self._started = started
        # What a client does after its first response is done to its connection, too.
        self._proxies = {kind: FaultProxy(address, seed) for seed, kind in enumerate(_KINDS)}
        self._channels: list[grpc.aio.Channel] = []
        self._calls: list[Any] = []
        self._tasks: list[asyncio.Task[None]] = []
        self.most_sent_mib = 0.0

    async def __aenter__(self) -> Self:
        for proxy in self._proxies.values():
            await proxy.__aenter__()
        return self

    async def __aexit__(self, *_: object) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        for channel in self._channels:
            await channel.close()
        for proxy in self._proxies.values():
            await proxy.__aexit__()

    async def come(self, num_each: int) -> None:
        """Begin all calls; returns when each has its first response, and is slow from then on."""
        await asyncio.gather(*(self._begin(kind) for kind in _KINDS for _ in range(num_each)))
        for kind, proxy in self._proxies.items():
            if kind.endswith("dripping"):
                proxy.drip(_DRIP_BYTES_PER_SECOND)
            elif kind.endswith("deaf"):
                proxy.blackhole()

    async def go(self, ending: Ending) -> None:
        """Leave, all at once."""
        if ending == "cancel":
            for proxy in self._proxies.values():
                proxy.heal()
            for call in self._calls:
                call.cancel()
        for proxy in self._proxies.values():
            if ending == "reset":
                proxy.reset_all()
            elif ending == "black hole":
                proxy.blackhole()

    async def _begin(self, kind: str) -> None:
        method, _, manner = kind.partition(", ")
        window = _MODEST if method == "append" else _GREEDY
        channel = grpc.aio.insecure_channel(self._proxies[kind].address, options=(*window, *_ALONE))
        self._channels.append(channel)
        stub: Any = long_context_pb2_grpc.LongContextServiceStub(channel)
        if method == "export":
            call = stub.ExportStream(api.ExportStreamRequest(name=self._exported))
            counted = [("gateway", "ExportStream"), ("state_store", "ReadChunks")]
        elif method == "generate":
            call = stub.Generate(api.GenerateRequest(stream=self._name, text="so", max_tokens=_MAX_TOKENS))
            counted = [("gateway", "Generate"), ("worker", "Generate")]
        else:
            call = stub.Append()
            counted = [("gateway", "Append")]
            await call.write(api.AppendRequest(open=api.AppendOpen(stream=self._name)))
        self._started.update(counted)
        self._calls.append(call)
        await call.read()
        if method == "append":
            self._tasks.append(asyncio.create_task(self._append_forever(call)))
        elif manner == "dripping":
            self._tasks.append(asyncio.create_task(_read_forever(call)))

    async def _append_forever(self, call: Any) -> None:
        """Send records far above the accepted offset: each is read, checked and refused, and nobody reads that."""
        record = api.AppendRecord(offset=1 << 40, data=_REFUSED, crc32c=google_crc32c.value(_REFUSED))
        num_sent_bytes = 0
        with contextlib.suppress(grpc.RpcError, asyncio.InvalidStateError, grpc.aio.InternalError):
            while True:
                await call.write(api.AppendRequest(record=record))
                num_sent_bytes += len(_REFUSED)
                self.most_sent_mib = max(self.most_sent_mib, num_sent_bytes / _MIB)


async def _read_forever(call: Any) -> None:
    with contextlib.suppress(grpc.RpcError):
        while await call.read() is not grpc.aio.EOF:
            pass


class _OtherClient:
    """Looks, appends and asks, one call after the other, and takes the times."""

    def __init__(self, stub: Any, started: Counter[tuple[str, str]]) -> None:
        self._stub = stub
        self._started = started
        self._times_ms: list[float] = []
        self.name = ""

    async def prepare(self, model: str, exported: str) -> None:
        """Make a stream with a memory, and have everything done once that is going to be done."""
        self.name = (await self._stub.CreateStream(api.CreateStreamRequest(model=model))).stream.name
        await self._append(finishes=True)
        await self._generate()
        async for _ in self._stub.ExportStream(api.ExportStreamRequest(name=exported)):
            pass
        self._started.update([("gateway", "ExportStream"), ("state_store", "ReadChunks")])

    async def call_for(self, seconds: float) -> None:
        """Call until so many seconds are over."""
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            for call in (self._get, self._append, self._generate):
                start = time.monotonic()
                await call()
                self._times_ms.append((time.monotonic() - start) * 1000)

    def times_ms(self) -> list[float]:
        """Of all calls of `call_for` so far."""
        return list(self._times_ms)

    async def _get(self) -> None:
        await self._stub.GetStream(api.GetStreamRequest(name=self.name))

    async def _append(self, *, finishes: bool = False) -> None:
        self._started["gateway", "Append"] += 1
        call = self._stub.Append()
        await call.write(api.AppendRequest(open=api.AppendOpen(stream=self.name)))
        offset = (await call.read()).opened.stream.accepted_offset
        data = b"Who waits his turn is served in turn. "
        record = api.AppendRecord(offset=offset, data=data, crc32c=google_crc32c.value(data))
        await call.write(api.AppendRequest(record=record))
        if finishes:
            await call.write(api.AppendRequest(finish=api.AppendFinish()))
        await call.done_writing()
        while (response := await call.read()) is not grpc.aio.EOF:
            assert not response.verdict.status.code, response.verdict.status.message

    async def _generate(self) -> None:
        self._started.update([("gateway", "Generate"), ("worker", "Generate")])
        async for _ in self._stub.Generate(api.GenerateRequest(stream=self.name, text="so", max_tokens=1)):
            pass


class _Watch:
    """Looks at processes from outside: what they hold, and what of it is work in progress.

    Args:
        ports: Of their metrics, by name.
        pids: Of those whose memory counts.
        started: Calls that were begun, by process and method; what has not ended yet is work in progress.
    """

    def __init__(self, ports: dict[str, int], pids: dict[str, int], started: Counter[tuple[str, str]]) -> None:
        self._ports = ports
        self._processes = {name: psutil.Process(pid) for name, pid in pids.items()}
        self._started = started
        self._rss_before: dict[str, int] = {}
        self._resident_before = 0.0
        self.growth_mib = dict.fromkeys(pids, 0.0)

    async def begin(self) -> None:
        """What is there now is what was there before."""
        self._rss_before = {name: process.memory_info().rss for name, process in self._processes.items()}
        self._resident_before = _resident_bytes(await self._samples("worker"))

    async def while_running(self, work: Coroutine[Any, Any, None]) -> None:
        """Watch the memory while something runs."""
        task = asyncio.create_task(work)
        while not task.done():
            await asyncio.wait([task], timeout=_SAMPLE_SECONDS)
            for name, process in self._processes.items():
                growth_mib = (process.memory_info().rss - self._rss_before[name]) / _MIB
                self.growth_mib[name] = max(self.growth_mib[name], growth_mib)
        task.result()

    async def is_all_given_back(self) -> bool:
        """Whether every call has ended, and the worker holds what it held before."""
        samples = {name: await self._samples(name) for name in self._ports}
        ended = {(name, method): _num_ended(samples[name], method) for name, method in self._started}
        return ended == self._started and _resident_bytes(samples["worker"]) == self._resident_before

    async def _samples(self, name: str) -> list[Any]:
        def fetched() -> str:
            with urllib.request.urlopen(f"http://127.0.0.1:{self._ports[name]}/metrics", timeout=10) as response:
                text: str = response.read().decode()
                return text

        families = text_string_to_metric_families(await asyncio.to_thread(fetched))
        return [sample for family in families for sample in family.samples]


def _num_ended(samples: list[Any], method: str) -> int:
    counted = [s for s in samples if s.name == "eunoe_rpc_calls_total" and s.labels["method"].endswith(f"/{method}")]
    return int(sum(sample.value for sample in counted))


def _resident_bytes(samples: list[Any]) -> float:
    return float(next(sample.value for sample in samples if sample.name == "eunoe_worker_resident_bytes"))
