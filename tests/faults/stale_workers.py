"""Workers that are stopped past their lease: what they still try to commit after they wake is refused."""

import asyncio
import contextlib
import random
import signal
import time
import urllib.request
from dataclasses import dataclass
from pathlib import Path

from disturbed_stream import (
    DisturbedStream,
    Shape,
    load_model,
    memory_of,
    placement_at,
    random_text,
    read_log,
    undisturbed,
)
from worker_processes import Fault, Site, Worker, until

from eunoe.clients.model_worker import ModelWorkerClient
from eunoe.embedded.processes import free_ports
from eunoe.gateway.placement import Placement
from eunoe.internal.v1 import state_store_pb2 as pb
from eunoe.runtime.errors import EunoeError
from eunoe.runtime.grpc_channel import open_channel

_STREAMS_AT_ONCE = 20
# After the first segment; a pause is longer than that and than the lease, so commits are overdue when a worker wakes.
_CHECKPOINT_SECONDS = 1.2
_PAUSE_SECONDS = 1.6
_PATIENCE_SECONDS = 5.0
# Where a worker stops itself in the middle of a commit.
_STOPS_AT = ("worker.before-snapshot", "worker.before-stage", "worker.chunks-staged")


@dataclass(frozen=True, slots=True)
class StaleFigures:
    """What came of pauses.

    Attributes:
        num_pauses: One for each stream that a worker was stopped with past its lease, that another worker took
            meanwhile, and that the stopped one tried to commit when it woke. Commits that it did not try do not count.
        num_accepted: Of these commits, those that became a version of the stream.
        num_inside_commits: Pauses of workers that stopped between a snapshot and its commit.
        num_equal: Streams that ended with the memory of an undisturbed fold, of `num_streams`.
    """

    num_pauses: int
    num_accepted: int
    num_inside_commits: int
    num_streams: int
    num_equal: int
    seconds: float


async def stale_commits(num_pauses: int, seed: int, model_path: Path) -> StaleFigures:
    """Stop workers past their lease, with 20 streams each, until there were `num_pauses` tries to commit after it."""
    start = time.monotonic()
    randomness = random.Random(f"{seed} stale")
    decoder, tokenizer = load_model(model_path)
    tried = accepted = inside = num_streams = num_equal = 0
    async with Site(model_path) as site, placement_at(site.store) as placement:
        other = await _worker(site)
        num_rounds = 0
        # One that is accepted says it all; after it commits of the new owner fail, and nothing can be counted.
        while tried < num_pauses and not accepted:
            if num_rounds > 20 + num_pauses // 5:
                raise Fault(f"only {tried} commits were tried in {num_rounds} pauses of a worker")
            is_inside = num_rounds % 2 == 1
            at = (
                f"{randomness.choice(_STOPS_AT)}=stop@{randomness.randint(1, _STREAMS_AT_ONCE // 2)}"
                if is_inside
                else ""
            )
            stale = await _worker(site, failpoints=at)
            streams = [_stream(site, placement, randomness, f"{num_rounds}-{i}") for i in range(_STREAMS_AT_ONCE)]
            num_tried, num_accepted = await _round(site, stale, other, streams)
            tried += num_tried
            inside += num_tried * is_inside
            accepted += num_accepted
            for stream in streams:
                record = await stream.finish()
                found = await memory_of(site.store, record)
                log = await read_log(site.store, stream.name)
                num_streams += 1
                num_equal += found == undisturbed(decoder, tokenizer, log, record.stream.settings)
            stale.end()
            num_rounds += 1
    return StaleFigures(
        num_pauses=tried,
        num_accepted=accepted,
        num_inside_commits=inside,
        num_streams=num_streams,
        num_equal=num_equal,
        seconds=time.monotonic() - start,
    )


class _MeteredWorker:
    """A worker whose commits are counted."""

    def __init__(self, worker: Worker, metrics_port: int) -> None:
        self.process = worker
        self._url = f"http://127.0.0.1:{metrics_port}/metrics"

    async def num_commits(self, outcome: str) -> int:
        """How many commits had this outcome so far: `committed`, or `lease_lost`."""
        text = await asyncio.to_thread(self._read)
        prefix = f'eunoe_worker_commits_total{{outcome="{outcome}"}} '
        return next((int(float(line.removeprefix(prefix))) for line in text.splitlines() if line.startswith(prefix)), 0)

    def end(self) -> None:
        self.process.end()

    def _read(self) -> str:
        with urllib.request.urlopen(self._url, timeout=_PATIENCE_SECONDS) as response:
            text: str = response.read().decode()
            return text


async def _worker(site: Site, failpoints: str = "") -> _MeteredWorker:
    (port,) = free_ports(1)
    worker = await site.serving_worker(
        failpoints=failpoints,
        metrics_port=port,
        checkpoint_segments=1000,
        checkpoint_seconds=_CHECKPOINT_SECONDS,
    )
    return _MeteredWorker(worker, port)


def _stream(site: Site, placement: Placement, randomness: random.Random, stem: str) -> DisturbedStream:
    return DisturbedStream(
        name=f"tenants/faults/streams/stale{stem}",
        placement=placement,
        store=site.store,
        randomness=randomness,
        text=random_text(randomness, randomness.randint(400, 900)),
    )


async def _round(
    site: Site, stale: _MeteredWorker, other: _MeteredWorker, streams: list[DisturbedStream]
) -> tuple[int, int]:
    """One pause of `stale`; how many commits it tried after it, and how many of them were accepted."""
    await asyncio.gather(*(_begun(site, stream, stale.process) for stream in streams))
    if not stale.process.failpoints:
        stale.process.send(signal.SIGSTOP)
    await until(stale.process.is_stopped, "the worker did not stop")
    await asyncio.sleep(_PAUSE_SECONDS)
    await asyncio.gather(*(_taken(stream.name, other.process) for stream in streams))
    committed_before, taken = -1, list[pb.StreamRecord]()
    while committed_before != (committed_now := await other.num_commits("committed")):
        committed_before = committed_now
        taken = [await stream.record() for stream in streams]

    stale.process.send(signal.SIGCONT)
    # All streams that it had something uncommitted of when it stopped: those that nobody had committed by then.
    num_due = await _num_refused(stale, sum(record.manifest.version == 0 for record in taken))
    for stream in streams:
        await stream.finish()
    after = [await stream.record() for stream in streams]
    num_new = sum(r.manifest.version for r in after) - sum(r.manifest.version for r in taken)
    num_by_other = await other.num_commits("committed") - committed_before
    return num_due, num_new - num_by_other


async def _begun(site: Site, stream: DisturbedStream, worker: Worker) -> None:
    """The stream, with segments at the worker that no checkpoint has."""
    await stream.create(site.model_name, Shape())
    async with open_channel(worker.address) as channel:
        client = ModelWorkerClient(channel)
        lease = await client.take_stream(stream.name)
        await stream.append(stream.text)
        if worker.failpoints:
            return

        async def is_folded() -> bool:
            return (await client.advance(stream.name, lease, len(stream.text))).folded_offset > 0

        await until(is_folded, "the worker folds nothing")


async def _taken(name: str, worker: Worker) -> None:
    """Have the worker take the stream."""
    async with open_channel(worker.address) as channel:

        async def is_its() -> bool:
            try:
                return (await ModelWorkerClient(channel).take_stream(name)).address == worker.address
            except EunoeError:
                return False

        await until(is_its, "the other worker does not get the stream")


async def _num_refused(worker: _MeteredWorker, num_due: int) -> int:
    """How many commits were refused for the lease, once so many were."""

    async def are_refused() -> bool:
        return await worker.num_commits("lease_lost") >= num_due

    # Those that were accepted are found by the versions, and those that were never tried do not count.
    with contextlib.suppress(Fault):
        await until(are_refused, "", _PATIENCE_SECONDS)
    return await worker.num_commits("lease_lost")
