"""Streams on workers that are killed, stopped, drained and robbed: the memory is what it would have been without.

`byte_equality` is the claim of claims. `stale_commits` and `kills_at_failpoints` look at single steps of it.
"""

import asyncio
import contextlib
import random
import signal
import time
from collections import Counter
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
from failpoint_kills import FAILPOINTS, KillFigures, kills_at_failpoints
from stale_workers import StaleFigures, stale_commits
from worker_processes import LEASE_SECONDS, Site, Worker

from eunoe.clients.model_worker import ModelWorkerClient
from eunoe.gateway.placement import Placement
from eunoe.internal.v1 import state_store_pb2 as pb
from eunoe.runtime.errors import EunoeError
from eunoe.runtime.grpc_channel import open_channel

__all__ = [
    "EqualityFigures",
    "KillFigures",
    "StaleFigures",
    "byte_equality",
    "kills_at_failpoints",
    "stale_commits",
]

_STREAMS_AT_ONCE = 10
_FINISH_SECONDS = 90.0
# Of a step: so a run of about 25 steps has two faults of its own, and those of the streams beside it.
_FAULT_CHANCE = 0.09
_FAULTS = (("kill", 4), ("stop", 2), ("drain", 2), ("rob", 4), ("state store", 2), ("redis", 1))


@dataclass(frozen=True, slots=True)
class EqualityFigures:
    """What came of disturbed runs.

    Attributes:
        num_equal: Runs whose log is what was acknowledged, and whose digest, tokens, cursor, decisions and chunk bytes
            are those of one undisturbed fold of it.
        faults: What was done to the processes, by kind.
        counts: What the writers did.
        unequal: Of the other runs, what is wrong.
    """

    num_runs: int
    num_equal: int
    faults: dict[str, int]
    counts: dict[str, int]
    unequal: tuple[str, ...]
    seconds: float


async def byte_equality(num_runs: int, seed: int, model_path: Path, shape: Shape | None = None) -> EqualityFigures:
    """Disturb streams at random, ten side by side on two worker processes, and compare each with an undisturbed fold.

    Every process is real: workers, state store and Redis die by SIGKILL, at a random moment or at a random failpoint.
    """
    start = time.monotonic()
    shape = shape or Shape()
    decoder, tokenizer = load_model(model_path)
    faults: Counter[str] = Counter()
    counts: Counter[str] = Counter()
    unequal = []
    for first in range(0, num_runs, _STREAMS_AT_ONCE):
        runs = range(first, min(num_runs, first + _STREAMS_AT_ONCE))
        async with Site(model_path) as site, placement_at(site.store) as placement:
            async with Disturber(site, random.Random(f"{seed} faults {first}")) as disturber:
                results = await asyncio.gather(
                    *(_written(run, seed, site, placement, disturber, shape) for run in runs), return_exceptions=True
                )
                faults += disturber.counts
            for run, result in zip(runs, results, strict=True):
                if isinstance(result, BaseException):
                    unequal.append(f"run {run}: {result!r}")
                    continue
                stream, record = result
                counts += stream.counts
                log = await read_log(site.store, stream.name)
                found, expected = (
                    await memory_of(site.store, record),
                    undisturbed(decoder, tokenizer, log, record.stream.settings),
                )
                if not stream.is_what_was_written(log, tokenizer):
                    unequal.append(f"run {run}: the log is not what was written")
                elif found != expected:
                    differing = [
                        field for field in expected.__slots__ if getattr(found, field) != getattr(expected, field)
                    ]
                    unequal.append(f"run {run}: {', '.join(differing)} differ")
    return EqualityFigures(
        num_runs=num_runs,
        num_equal=num_runs - len(unequal),
        faults=dict(faults),
        counts=dict(counts),
        unequal=tuple(unequal),
        seconds=time.monotonic() - start,
    )


async def _written(
    run: int, seed: int, site: Site, placement: Placement, disturber: "Disturber", shape: Shape
) -> tuple[DisturbedStream, pb.StreamRecord]:
    randomness = random.Random(f"{seed} {run}")
    stream = DisturbedStream(
        name=f"tenants/faults/streams/run{run}",
        placement=placement,
        store=site.store,
        randomness=randomness,
        text=random_text(randomness, randomness.randint(*shape.num_bytes)),
    )
    await stream.create(site.model_name, shape)

    async def disturb() -> None:
        if randomness.random() < _FAULT_CHANCE:
            disturber.strike(stream.name, randomness)

    await stream.write(disturb)
    async with asyncio.timeout(_FINISH_SECONDS):
        return stream, await stream.finish()


class Disturber:
    """Keeps two workers running on a site, and does harm to them, to the state store and to Redis.

    Attributes:
        counts: Faults that took effect, by kind.
    """

    def __init__(self, site: Site, randomness: random.Random) -> None:
        self.counts: Counter[str] = Counter()
        self._site = site
        self._randomness = randomness
        self._workers: dict[int, Worker] = {}
        self._killed: set[Worker] = set()
        self._keepers: list[asyncio.Task[None]] = []
        self._strikes: set[asyncio.Task[None]] = set()
        self._store_lock = asyncio.Lock()

    async def __aenter__(self) -> "Disturber":
        self._keepers = [asyncio.create_task(self._keep(slot)) for slot in range(2)]
        return self

    async def __aexit__(self, *_: object) -> None:
        for keeper in self._keepers:
            keeper.cancel()
        await asyncio.gather(*self._keepers, return_exceptions=True)
        # A strike that failed is a fault of the harness, and must not look like none.
        results = await asyncio.gather(*self._strikes, return_exceptions=True)
        for result in (*results, *(k.exception() for k in self._keepers if not k.cancelled())):
            if isinstance(result, BaseException):
                raise result

    def strike(self, name: str, randomness: random.Random) -> None:
        """Begin some fault, from which the stream may suffer."""
        (kind,) = randomness.choices([kind for kind, _ in _FAULTS], [weight for _, weight in _FAULTS])
        task = asyncio.create_task(self._struck(kind, name, randomness.randrange(2), randomness.uniform(0.0, 0.06)))
        self._strikes.add(task)

    async def _struck(self, kind: str, name: str, slot: int, delay_seconds: float) -> None:
        await asyncio.sleep(delay_seconds)
        worker = self._workers.get(slot)
        if kind in ("state store", "redis"):
            async with self._store_lock:
                await (self._site.restart_redis() if kind == "redis" else self._site.restart_state_store())
        elif worker is None or not worker.address or worker.exit_status is not None:
            return
        elif kind == "kill":
            self._killed.add(worker)
            worker.send(signal.SIGKILL)
        elif kind == "drain":
            worker.send(signal.SIGTERM)
        elif kind == "stop":
            worker.send(signal.SIGSTOP)
            await asyncio.sleep(1.3 * LEASE_SECONDS)
            worker.send(signal.SIGCONT)
        elif kind == "rob":
            await self._rob(name)
        self.counts[kind] += 1

    async def _rob(self, name: str) -> None:
        """Give the stream to the worker that has it not, as if its owner had been found dead."""
        with contextlib.suppress(EunoeError, TimeoutError):
            record = (await self._site.store.get_stream(pb.GetStreamRequest(name=name))).record
            listed = await self._site.store.list_workers(pb.ListWorkersRequest(model=self._site.model_name))
            for worker in listed.workers:
                if worker.worker != record.lease.worker:
                    by = pb.Lease(worker=worker.worker, address=worker.address)
                    request = pb.AcquireStreamRequest(name=name, by=by, suspect=record.lease)
                    await self._site.store.acquire_stream(request)
                    async with open_channel(worker.address) as channel:
                        await asyncio.wait_for(ModelWorkerClient(channel).take_stream(name), 1.0)
                    return

    async def _keep(self, slot: int) -> None:
        """A worker, and after its end the next one; one of three bears a failpoint at which it will die."""
        while True:
            failpoint, at_pass = self._randomness.choice(FAILPOINTS), self._randomness.randint(1, 30)
            is_armed = self._randomness.random() < 0.35
            worker = self._workers[slot] = self._site.start_worker(
                failpoints=f"{failpoint}=kill@{at_pass}" if is_armed else "",
                checkpoint_segments=self._randomness.randint(1, 6),
                checkpoint_seconds=self._randomness.choice([0.05, 0.3, 2.0]),
            )
            if await worker.serves():
                await worker.ended()
            if worker.exit_status == -signal.SIGKILL and worker not in self._killed:
                self.counts["kill at a failpoint"] += 1
