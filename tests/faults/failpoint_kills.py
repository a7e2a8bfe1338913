"""A worker that dies at each of its failpoints in turn, and another one that goes on."""

import asyncio
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
from worker_processes import Site, Worker

from eunoe.clients.model_worker import ModelWorkerClient
from eunoe.gateway.placement import Placement
from eunoe.internal.v1 import state_store_pb2 as pb
from eunoe.runtime.errors import Unavailable
from eunoe.runtime.grpc_channel import open_channel

FAILPOINTS = (
    "worker.before-acquire",
    "worker.acquired",
    "worker.before-load",
    "worker.chunks-read",
    "worker.record-read",
    "worker.before-segment",
    "worker.segment-folded",
    "worker.before-snapshot",
    "worker.before-stage",
    "worker.chunks-staged",
    "worker.committed",
    "worker.before-remember",
    "worker.remembered",
    "worker.before-release",
)
"""Every failpoint of a model worker, in the order of a stream's life there."""

# What a stream passes more than once here.
_REPEATED = {
    "worker.record-read": 4,
    "worker.before-segment": 8,
    "worker.segment-folded": 8,
    "worker.before-snapshot": 2,
    "worker.before-stage": 2,
    "worker.chunks-staged": 2,
    "worker.committed": 2,
}
_FINISH_SECONDS = 60.0


@dataclass(frozen=True, slots=True)
class KillFigures:
    """What came of workers that died at a failpoint.

    Attributes:
        kills: How many did, by failpoint.
        num_equal: Streams whose log is what was acknowledged, once and in order, and whose memory is that of an
            undisturbed fold.
        num_remembered_once: Streams whose remembering call, asked again, got its first answer and left one record.
        wrong: Of the others, what is wrong.
    """

    kills: dict[str, int]
    num_equal: int
    num_remembered_once: int
    wrong: tuple[str, ...]
    seconds: float

    @property
    def num_kills(self) -> int:
        return sum(self.kills.values())


async def kills_at_failpoints(kills_each: int, seed: int, model_path: Path) -> KillFigures:
    """Kill workers at every failpoint, so often each, at a random one of its passes."""
    start = time.monotonic()
    randomness = random.Random(f"{seed} failpoints")
    decoder, tokenizer = load_model(model_path)
    kills: Counter[str] = Counter()
    num_equal = num_remembered_once = 0
    wrong = []
    async with Site(model_path) as site, placement_at(site.store) as placement:
        other = await site.serving_worker(checkpoint_segments=4)
        for i, failpoint in enumerate(FAILPOINTS * kills_each):
            at = f"{failpoint}=kill@{randomness.randint(1, _REPEATED.get(failpoint, 1))}"
            # It takes only what it is given: a sweep that passes a failpoint first would be another test.
            dying = await site.serving_worker(failpoints=at, checkpoint_segments=4, sweep_seconds=60.0)
            stream = _stream(site, placement, randomness, i)
            async with asyncio.timeout(_FINISH_SECONDS):
                await _live(stream, site, dying, other)
                is_remembered_once = await stream.is_remembered_once()
                record = await stream.finish()
            if dying.exit_status == -signal.SIGKILL:
                kills[failpoint] += 1
            else:
                wrong.append(f"{at}: the worker did not die there, its status is {dying.exit_status}")
            log = await read_log(site.store, stream.name)
            found = await memory_of(site.store, record)
            is_whole = stream.is_what_was_written(log, tokenizer)
            is_equal = found == undisturbed(decoder, tokenizer, log, record.stream.settings)
            num_equal += is_whole and is_equal
            num_remembered_once += is_remembered_once
            if not (is_whole and is_equal and is_remembered_once):
                wrong.append(f"{at}: whole={is_whole} equal={is_equal} remembered once={is_remembered_once}")
    return KillFigures(
        kills=dict(kills),
        num_equal=num_equal,
        num_remembered_once=num_remembered_once,
        wrong=tuple(wrong),
        seconds=time.monotonic() - start,
    )


def _stream(site: Site, placement: Placement, randomness: random.Random, number: int) -> DisturbedStream:
    return DisturbedStream(
        name=f"tenants/faults/streams/kill{number}",
        placement=placement,
        store=site.store,
        randomness=randomness,
        text=random_text(randomness, 1500),
    )


async def _live(stream: DisturbedStream, site: Site, dying: Worker, other: Worker) -> None:
    """A stream's life that passes every failpoint at `dying`: it dies at one of them, and `other` goes on."""
    await stream.create(site.model_name, Shape())
    async with open_channel(other.address) as channel:
        await ModelWorkerClient(channel).take_stream(stream.name)
    # Whole characters: nothing is remembered behind a cut one.
    text = stream.text.decode()
    pieces = [text[i : i + 140].encode() for i in range(0, len(text), 140)]
    for piece in pieces[:4]:
        await stream.append(piece)
    await stream.finish()
    await _give_to(stream, site, dying)
    for piece in pieces[4:8]:
        await stream.append(piece)
    await stream.finish()
    await stream.generate(remember=True)
    for piece in pieces[8:]:
        await stream.append(piece)
    await stream.finish()
    dying.send(signal.SIGTERM)
    await dying.ended()


async def _give_to(stream: DisturbedStream, site: Site, worker: Worker) -> None:
    """Take the stream from its owner, and have the worker find out that it is its own now."""
    listed = await site.store.list_workers(pb.ListWorkersRequest(model=site.model_name))
    (incarnation,) = [listed_one.worker for listed_one in listed.workers if listed_one.address == worker.address]
    by = pb.Lease(worker=incarnation, address=worker.address)
    suspect = (await stream.record()).lease
    await site.store.acquire_stream(pb.AcquireStreamRequest(name=stream.name, by=by, suspect=suspect))
    async with open_channel(worker.address) as channel:
        try:
            await ModelWorkerClient(channel).take_stream(stream.name)
        except Unavailable:
            # It died at taking.
            await worker.ended()
