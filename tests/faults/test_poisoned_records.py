"""A record whose bytes break the fold at every try: its stream suffers, and nothing else."""

import random
import time
import uuid
from collections import Counter
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from disturbed_stream import DisturbedStream, Shape, memory_of, placement_at, random_text, read_log, undisturbed
from worker_processes import until

from eunoe.api.v1 import long_context_pb2 as api
from eunoe.gateway.placement import Placement
from eunoe.internal.v1 import state_store_pb2 as pb
from eunoe.model_worker import failures, sweep
from eunoe.model_worker.config import WorkerConfig
from eunoe.model_worker.worker import ModelWorker
from eunoe.runtime.errors import FoldFailed

POISON = np.full(16, 300, dtype="<u4")
TEXT = random_text(random.Random(0), 800)


class Poisoned:
    """Two workers whose decoder breaks at the poison, as it would by a bug of its own.

    Attributes:
        tries: How often it broke, by worker.
        is_poisonous: Whether it breaks.
    """

    def __init__(self, config: WorkerConfig) -> None:
        self.config = config
        self.tries: Counter[str] = Counter()
        self.is_poisonous = True
        self.workers: list[ModelWorker] = []

    async def start_worker(self, monkeypatch: pytest.MonkeyPatch) -> ModelWorker:
        worker = ModelWorker(self.config, on_engine_death=lambda: None)
        await worker.start()
        decoder = worker.parts.decoder
        prefill = decoder.prefill

        def poisoned_prefill(state: Any, token_ids: npt.ArrayLike, *arguments: Any, **named: Any) -> Any:
            if self.is_poisonous and POISON[0] in np.asarray(token_ids):
                self.tries[worker.incarnation] += 1
                raise RuntimeError("poison")
            return prefill(state, token_ids, *arguments, **named)

        monkeypatch.setattr(decoder, "prefill", poisoned_prefill)
        self.workers.append(worker)
        return worker


@pytest.fixture
async def poisoned(state_store: Any, tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Poisoned]:
    monkeypatch.setattr(failures, "_FIRST_REST_SECONDS", 0.2)
    monkeypatch.setattr(sweep, "_REST_SECONDS", 0.02)
    config = WorkerConfig(
        model_name=f"tiny-{uuid.uuid4().hex[:8]}",
        model_path=tiny_model,
        state_store_address=state_store.address,
        num_threads=1,
        sweep_seconds=0.02,
        checkpoint_seconds=0.1,
        drain_seconds=0.1,
    )
    poisoned = Poisoned(config)
    for _ in range(2):
        await poisoned.start_worker(monkeypatch)
    yield poisoned
    for worker in poisoned.workers:
        await worker.stop()


@pytest.fixture
async def placement(state_store: Any) -> AsyncIterator[Placement]:
    async with placement_at(state_store.client) as placement:
        yield placement


async def a_stream(poisoned: Poisoned, state_store: Any, placement: Placement) -> DisturbedStream:
    """A healthy stream at the first worker."""
    stream = DisturbedStream(
        name=f"tenants/{state_store.tenant}/streams/{uuid.uuid4().hex}",
        placement=placement,
        store=state_store.client,
        randomness=random.Random(0),
        text=TEXT,
    )
    await stream.create(poisoned.config.model_name, Shape())
    await poisoned.workers[0].place(stream.name)
    await stream.append(TEXT)
    return stream


async def poison(stream: DisturbedStream) -> None:
    offset = (await stream.record()).stream.accepted_offset
    request = pb.AppendRecordRequest(
        name=stream.name, offset=offset, data=POISON.tobytes(), kind=api.RECORD_KIND_TOKEN_IDS
    )
    await stream.store.append_record(request)


async def test_a_poisoned_stream_fails_with_a_name_and_the_others_go_on(
    poisoned: Poisoned, state_store: Any, placement: Placement
) -> None:
    sick = await a_stream(poisoned, state_store, placement)
    healthy = await a_stream(poisoned, state_store, placement)
    await poison(sick)

    with pytest.raises(FoldFailed):
        await sick.finish()
    await healthy.append(TEXT)
    record = await healthy.finish()

    assert record.stream.accepted_offset - record.stream.applied_offset < 200
    assert record.lease.worker == poisoned.workers[0].incarnation


async def test_a_poisoned_stream_is_tried_at_longer_and_longer_intervals_by_one_worker(
    poisoned: Poisoned, state_store: Any, placement: Placement
) -> None:
    first, second = (worker.incarnation for worker in poisoned.workers)
    sick = await a_stream(poisoned, state_store, placement)
    start = time.monotonic()
    await poison(sick)

    async def is_tried_four_times() -> bool:
        return poisoned.tries[first] >= 4

    await until(is_tried_four_times, "it was not tried again", 20.0)

    assert time.monotonic() - start >= 0.2 + 0.4 + 0.8
    assert poisoned.tries[second] == 0
    assert (await sick.record()).lease.worker == first


async def test_a_stream_that_was_poisoned_goes_on_where_it_stood(
    poisoned: Poisoned, state_store: Any, placement: Placement
) -> None:
    sick = await a_stream(poisoned, state_store, placement)
    await poison(sick)
    with pytest.raises(FoldFailed):
        await sick.finish()
    poisoned.is_poisonous = False

    async def is_folded() -> bool:
        record = await sick.record()
        return bool(record.stream.applied_offset > len(TEXT))

    await until(is_folded, "it was given up", 30.0)
    record = await sick.record()
    parts = poisoned.workers[1].parts
    log = await read_log(sick.store, sick.name)

    assert await memory_of(sick.store, record) == undisturbed(
        parts.decoder, parts.tokenizer, log, record.stream.settings
    )
