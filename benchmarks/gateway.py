"""What the gateway costs: durable append MB/s, latency to the first token, and what it adds to a direct call.

    python benchmarks/gateway.py [--json] [--quick]

Redis (appendfsync always), the state store and the gateway are processes of their own, as in the product; the model
worker, with a tiny random model, lives in the process that measures. Appends go to a model that no worker serves, so
that nothing but the way into the log is measured; each stream stays below the window at which reading stops.
"""

import asyncio
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from typing import Any

import google_crc32c
from _report import Report, arguments

from eunoe.api.v1 import long_context_pb2 as api
from eunoe.api.v1 import long_context_pb2_grpc
from eunoe.clients.model_worker import ModelWorkerClient
from eunoe.clients.state_store import StateStoreClient
from eunoe.decoder.tiny import write_tiny_model
from eunoe.internal.v1 import state_store_pb2 as store_pb
from eunoe.model_worker.config import WorkerConfig
from eunoe.model_worker.worker import ModelWorker
from eunoe.runtime.grpc_channel import open_channel

RECORD_BYTES = 256 * 1024
STREAM_BYTES = 3 * 1024 * 1024
UNSERVED = "nobody-serves-this"
LINE = b"It was the best of times, it was the worst of times, it was the age of wisdom. "


@contextmanager
def process(module: str, ready_file: Path, **settings: str) -> Iterator[str]:
    """Run `python -m eunoe.MODULE` with EUNOE_MODULE_<SETTING>; gives its address."""
    prefix = f"EUNOE_{module.upper()}_"
    variables = {prefix + name.upper(): value for name, value in settings.items()}
    variables |= {prefix + "READY_FILE": str(ready_file), prefix + "LISTEN_ADDRESS": "127.0.0.1:0"}
    started = subprocess.Popen([sys.executable, "-m", f"eunoe.{module}"], env=os.environ | variables)
    try:
        while not ready_file.exists():
            if started.poll() is not None:
                raise RuntimeError(f"eunoe.{module} ended with status {started.returncode}")
            time.sleep(0.05)
        yield json.loads(ready_file.read_text())["address"]
    finally:
        started.terminate()
        started.wait()


@contextmanager
def redis(directory: Path) -> Iterator[str]:
    """Run a durable Redis; gives its URL."""
    socket = directory / "redis.sock"
    settings = f"--port 0 --unixsocket {socket} --dir {directory} --appendonly yes --appendfsync always --save".split()
    server = subprocess.Popen(
        ["redis-server", *settings, "", "--maxmemory-policy", "noeviction"], stdout=subprocess.DEVNULL
    )
    try:
        while not socket.exists():
            time.sleep(0.05)
        yield f"unix://{socket}"
    finally:
        server.terminate()
        server.wait()


@asynccontextmanager
async def platform(directory: Path) -> AsyncIterator[tuple[Any, ModelWorker, StateStoreClient]]:
    """Everything, for the length of the context: a stub of the gateway, the worker, a client of the state store."""
    write_tiny_model(directory / "model")
    with (
        redis(directory) as redis_url,
        process("state_store", directory / "store.json", redis_url=redis_url) as store_address,
        process(
            "gateway",
            directory / "gateway.json",
            state_store_address=store_address,
            requires_key="false",
            max_tenant_append_bytes_per_second=str(1 << 32),
        ) as gateway_address,
    ):
        config = WorkerConfig(
            model_name="tiny", model_path=directory / "model", state_store_address=store_address, drain_seconds=0.1
        )
        worker = ModelWorker(config)
        await worker.start()
        async with open_channel(gateway_address) as gateway, open_channel(store_address) as channel:
            yield long_context_pb2_grpc.LongContextServiceStub(gateway), worker, StateStoreClient(channel)
        await worker.drain()


async def append(stub: Any, name: str, data: bytes, record_bytes: int) -> list[float]:
    """Append all of it, records in flight; returns each verdict's moment."""
    call = stub.Append()
    await call.write(api.AppendRequest(open=api.AppendOpen(stream=name)))
    await call.read()

    async def send() -> None:
        for start in range(0, len(data), record_bytes):
            piece = data[start : start + record_bytes]
            record = api.AppendRecord(offset=start, data=piece, crc32c=google_crc32c.value(piece))
            await call.write(api.AppendRequest(record=record))

    sending = asyncio.create_task(send())
    moments = []
    while len(moments) < -(-len(data) // record_bytes):
        response = await call.read()
        if response.HasField("verdict"):
            assert response.verdict.status.code == 0, response.verdict.status.message
            moments.append(time.perf_counter())
    await sending
    call.cancel()
    return moments


async def unserved_streams(store: StateStoreClient, count: int) -> list[str]:
    """Streams of a model that no worker serves."""
    names = [f"tenants/default/streams/bench-{time.time_ns()}-{i}" for i in range(count)]
    settings = api.StreamSettings(kv_budget_tokens=64, segment_length=16, positions=api.POSITION_MODE_COMPACT)
    for name in names:
        await store.create_stream(store_pb.CreateStreamRequest(name=name, model=UNSERVED, settings=settings))
    return names


async def append_rate(stub: Any, store: StateStoreClient, num_clients: int) -> float:
    """MB/s of all clients together, each on a stream of its own."""
    data = (LINE * (STREAM_BYTES // len(LINE) + 1))[:STREAM_BYTES]
    names = await unserved_streams(store, num_clients)
    start = time.perf_counter()
    await asyncio.gather(*(append(stub, name, data, RECORD_BYTES) for name in names))
    return num_clients * STREAM_BYTES / (time.perf_counter() - start) / 1e6


async def small_record_seconds(stub: Any, store: StateStoreClient, count: int) -> float:
    """Median seconds from a record of 1 KiB to its verdict, one at a time."""
    (name,) = await unserved_streams(store, 1)
    call = stub.Append()
    await call.write(api.AppendRequest(open=api.AppendOpen(stream=name)))
    await call.read()
    piece = (LINE * 13)[:1024]
    times = []
    for i in range(count):
        start = time.perf_counter()
        record = api.AppendRecord(offset=i * len(piece), data=piece, crc32c=google_crc32c.value(piece))
        await call.write(api.AppendRequest(record=record))
        while not (await call.read()).HasField("verdict"):
            pass
        times.append(time.perf_counter() - start)
    call.cancel()
    return statistics.median(times)


async def first_token_seconds(call: AsyncIterator[api.GenerateResponse]) -> float:
    start = time.perf_counter()
    async for response in call:
        if response.HasField("tokens"):
            return time.perf_counter() - start
    raise RuntimeError("the answer had no token")


async def first_tokens(stub: Any, worker: ModelWorker, count: int) -> tuple[float, float]:
    """Median seconds to the first token through the gateway, and from the worker itself, taken in turns."""
    name = (await stub.CreateStream(api.CreateStreamRequest(model="tiny"))).stream.name
    await append(stub, name, LINE * 100, RECORD_BYTES)
    request = api.GenerateRequest(stream=name, text="The", max_tokens=1)
    through, direct = [], []
    async with open_channel(worker.address) as channel:
        client = ModelWorkerClient(channel)
        for i in range(count + 5):
            seconds = await first_token_seconds(stub.Generate(request))
            direct_seconds = await first_token_seconds(client.generate(request, await worker.place(name)))
            if i >= 5:
                through.append(seconds)
                direct.append(direct_seconds)
    return statistics.median(through), statistics.median(direct)


async def measure(report: Report, is_quick: bool) -> None:
    """Take and report all figures."""
    with tempfile.TemporaryDirectory(prefix="eunoe-bench-") as directory:
        async with platform(Path(directory)) as (stub, worker, store):
            repeats = 3 if is_quick else 9
            await append_rate(stub, store, 1)
            for num_clients in (1, 4):
                rates = [await append_rate(stub, store, num_clients) for _ in range(repeats)]
                report.add(f"append_mb_per_second_{num_clients}", statistics.median(rates), "MB/s, durable")
            seconds = await small_record_seconds(stub, store, 100 if is_quick else 500)
            report.add("append_1kib_ms", seconds * 1e3, "ms from record to verdict")
            through, direct = await first_tokens(stub, worker, 30 if is_quick else 200)
            report.add("first_token_ms", through * 1e3, "ms through the gateway")
            report.add("first_token_direct_ms", direct * 1e3, "ms from the worker itself")
            report.add("added_latency_ms", (through - direct) * 1e3, "ms added by the gateway")


def main() -> None:
    """Measure and print."""
    options = arguments(__doc__.splitlines()[0] if __doc__ else "").parse_args()
    report = Report("gateway", as_json=options.json)
    asyncio.run(measure(report, options.quick))
    report.finish()


if __name__ == "__main__":
    main()
