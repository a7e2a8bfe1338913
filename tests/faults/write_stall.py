"""What writing large states costs: other clients' patience, and time against writing the same bytes plainly.

python tests/faults/write_stall.py SOCKET      probes a Redis until its standard input closes; prints JSON
"""

import asyncio
import json
import os
import secrets
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import redis
import xxhash

from eunoe.api.v1 import long_context_pb2 as api
from eunoe.clients.state_store import StateStoreClient
from eunoe.internal.v1 import state_store_pb2 as pb

CHUNK_BYTES = 1 << 20
_PROBE_PAUSE_SECONDS = 0.001


@dataclass(frozen=True, slots=True, kw_only=True)
class StallFigures:
    """PINGs of another client while states are written, and syncs of 1 MiB on the same disk, in milliseconds."""

    num_pings: int
    ping_p50_ms: float
    ping_p999_ms: float
    ping_max_ms: float
    fsync_p50_ms: float
    fsync_max_ms: float
    state_mib: int
    write_seconds: float


@dataclass(frozen=True, slots=True, kw_only=True)
class CommitFigures:
    """Throughput of commits through the state store against pipelined SETs of the same bytes; medians."""

    commit_ratio: float
    commit_mib_per_second: float
    raw_mib_per_second: float
    num_repeats: int


class StateWriter:
    """Commits states of any size to one stream of a running state store.

    Args:
        store: A client of it.
        tenant: One that nobody else uses.

    Attributes:
        name: The stream's.
    """

    def __init__(self, store: StateStoreClient, tenant: str) -> None:
        self._store = store
        self.name = f"tenants/{tenant}/streams/{secrets.token_hex(8)}"
        self._lease = pb.Lease()
        self._version = 0

    async def open(self) -> None:
        """Make the stream and take it."""
        settings = api.StreamSettings(
            kv_budget_tokens=1024, segment_length=512, num_sink_tokens=4, positions=api.POSITION_MODE_COMPACT
        )
        await self._store.create_stream(pb.CreateStreamRequest(name=self.name, model="m", settings=settings))
        by = pb.Lease(worker="w", address="127.0.0.1:1")
        acquired = await self._store.acquire_stream(pb.AcquireStreamRequest(name=self.name, by=by))
        self._lease = acquired.record.lease

    async def commit(self, chunks: Sequence[bytes]) -> float:
        """Stage and commit; the seconds that it took."""
        named = [(secrets.token_hex(16), chunk) for chunk in chunks]
        refs = [pb.ChunkRef(chunk_id=i, length=len(c), digest=xxhash.xxh3_128_digest(c)) for i, c in named]
        self._version += 1
        manifest = pb.Manifest(encoding_version=1, version=self._version, tokens=self._version, chunks=refs)
        start = time.perf_counter()
        await self._store.stage_chunks(self.name, named)
        await self._store.commit_checkpoint(
            pb.CommitCheckpointRequest(name=self.name, lease=self._lease, manifest=manifest)
        )
        return time.perf_counter() - start

    async def close(self) -> None:
        """Delete it all."""
        await self._store.delete_stream(pb.DeleteStreamRequest(name=self.name))


async def ping_stall(
    store: StateStoreClient, tenant: str, socket: Path, *, state_mib: int, num_states: int = 1
) -> StallFigures:
    """Another client's PINGs, from a process of its own, while states are written.

    Args:
        store: Of a state store over the Redis at `socket`.
        tenant: One that nobody else uses.
        socket: A unix socket; beside it, on the same disk, syncs are timed first.
        state_mib: Size of a state.
        num_states: States to write, one after the other.
    """
    syncs = _timed_syncs(socket.parent / "sync-probe", 100)
    writer = StateWriter(store, tenant)
    await writer.open()
    chunks = [os.urandom(CHUNK_BYTES)] * state_mib
    async with _Probing(socket) as pings:
        seconds = statistics.median([await writer.commit(chunks) for _ in range(num_states)])
    await writer.close()
    times = sorted(pings)
    return StallFigures(
        num_pings=len(times),
        ping_p50_ms=_at(times, 0.5),
        ping_p999_ms=_at(times, 0.999),
        ping_max_ms=times[-1],
        fsync_p50_ms=_at(syncs, 0.5),
        fsync_max_ms=syncs[-1],
        state_mib=state_mib,
        write_seconds=seconds,
    )


async def commit_throughput(
    store: StateStoreClient, tenant: str, socket: Path, *, state_mib: int, num_repeats: int
) -> CommitFigures:
    """Commits of a state against pipelined SETs of the same chunks, in turns.

    Args:
        store: Of a state store over the Redis at `socket`.
        tenant: One that nobody else uses.
        socket: A unix socket.
        state_mib: Size of a state.
        num_repeats: Turns that count; one before them does not.
    """
    writer = StateWriter(store, tenant)
    await writer.open()
    commits, raws = [], []
    with redis.Redis(unix_socket_path=str(socket)) as client:
        for _ in range(num_repeats + 1):
            chunks = [os.urandom(CHUNK_BYTES) for _ in range(state_mib)]
            commits.append(await writer.commit(chunks))
            raws.append(await asyncio.to_thread(_raw_seconds, client, chunks))
    await writer.close()
    commit_seconds, raw_seconds = statistics.median(commits[1:]), statistics.median(raws[1:])
    return CommitFigures(
        commit_ratio=raw_seconds / commit_seconds,
        commit_mib_per_second=state_mib / commit_seconds,
        raw_mib_per_second=state_mib / raw_seconds,
        num_repeats=num_repeats,
    )


def _raw_seconds(client: redis.Redis, chunks: Sequence[bytes]) -> float:
    start = time.perf_counter()
    pipeline = client.pipeline(transaction=False)
    for index, chunk in enumerate(chunks):
        pipeline.set(f"raw:{index}", chunk)
    pipeline.execute()
    seconds = time.perf_counter() - start
    client.unlink(*(f"raw:{index}" for index in range(len(chunks))))
    return seconds


class _Probing:
    """PINGs a Redis from another process while the block runs; gives the milliseconds of each, after the block."""

    def __init__(self, socket: Path) -> None:
        self._socket = socket
        self._times: list[float] = []

    async def __aenter__(self) -> list[float]:
        pipe = asyncio.subprocess.PIPE
        command = [sys.executable, __file__, str(self._socket)]
        self._process = await asyncio.create_subprocess_exec(*command, stdin=pipe, stdout=pipe, limit=1 << 26)
        assert self._process.stdout is not None
        assert await self._process.stdout.readline() == b"probing\n"
        return self._times

    async def __aexit__(self, *_: object) -> None:
        output, _ = await self._process.communicate(b"")
        self._times += json.loads(output)


def _timed_syncs(path: Path, num_syncs: int) -> list[float]:
    """Milliseconds of writing and syncing 1 MiB, sorted."""
    data, times = os.urandom(CHUNK_BYTES), []
    with path.open("wb") as file:
        for _ in range(num_syncs):
            start = time.perf_counter()
            file.write(data)
            file.flush()
            os.fdatasync(file.fileno())
            times.append((time.perf_counter() - start) * 1000)
    path.unlink()
    return sorted(times)


def _at(times: Sequence[float], share: float) -> float:
    return times[min(len(times) - 1, int(share * len(times)))]


def _probe(socket: str) -> None:
    os.set_blocking(sys.stdin.fileno(), False)
    times = []
    with redis.Redis(unix_socket_path=socket) as client:
        client.ping()
        print("probing", flush=True)
        while sys.stdin.buffer.read(1) is None:
            start = time.perf_counter()
            client.ping()
            times.append((time.perf_counter() - start) * 1000)
            time.sleep(_PROBE_PAUSE_SECONDS)
    print(json.dumps(times))


if __name__ == "__main__":
    _probe(sys.argv[1])
