"""The committed state is a pure function of the log: whoever folds it, in whatever pieces, beside whatever else."""

import asyncio
import random
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from eunoe.api.v1 import long_context_pb2 as api
from eunoe.internal.v1 import state_store_pb2 as pb

Text = Callable[..., bytes]


@pytest.mark.parametrize("seed", range(3))
async def test_bytes_cut_anywhere_into_records_give_the_same_digest(platform: Any, make_text: Text, seed: int) -> None:
    worker, data = await platform.worker(), make_text(3000)
    name = await platform.stream()
    generator = random.Random(seed)
    start = 0
    while start < len(data):
        end = min(len(data), start + generator.choice([1, 2, 3, 17, 400]))
        await platform.append(name, data[start:end])
        start = end
        if generator.random() < 0.1:
            await platform.flush(worker, name)
    record = await platform.flush(worker, name)
    assert record.stream.state_digest == await platform.digest(worker, data)
    assert record.stream.tokens % 16 == 0
    assert record.stream.tokens > 300


async def test_a_stream_beside_15_others_has_the_digest_it_has_alone(platform: Any, make_text: Text) -> None:
    worker = await platform.worker()
    texts = [make_text(1500 + 100 * seed, seed) for seed in range(16)]
    names = [await platform.stream() for _ in texts]
    for name, data in zip(names, texts, strict=True):
        await platform.append(name, data)
    together = await asyncio.gather(*(platform.flush(worker, name) for name in names))
    alone = [await platform.digest(worker, data) for data in texts[:4]]
    assert [record.stream.state_digest for record in together[:4]] == alone
    assert len({record.stream.state_digest for record in together}) == 16


async def test_token_id_records_are_folded_as_they_stand(platform: Any) -> None:
    worker = await platform.worker()
    name = await platform.stream()
    ids = np.arange(2, 2 + 64, dtype="<u4")
    await platform.append(name, b"some text before")
    await platform.append(name, ids.tobytes(), api.RECORD_KIND_TOKEN_IDS)
    record = await platform.flush(worker, name)
    assert record.stream.tokens == 64
    assert record.manifest.applied_pretoken_tokens == 0


async def test_flush_finish_and_generate_never_cut_a_segment_short(platform: Any, make_text: Text) -> None:
    worker, data = await platform.worker(), make_text(2000)
    name = await platform.stream()
    for start in range(0, len(data), 150):
        await platform.append(name, data[start : start + 150])
        await platform.generate(worker, name, max_tokens=2, text="so")
        assert (await platform.flush(worker, name)).stream.tokens % 16 == 0
    assert (await platform.record(name)).stream.state_digest == await platform.digest(worker, data)


async def test_less_than_a_segment_commits_nothing(platform: Any) -> None:
    worker = await platform.worker()
    name = await platform.stream()
    await platform.append(name, b"short")
    record = await platform.flush(worker, name)
    assert not record.HasField("manifest")
    assert record.stream.applied_offset == 0


async def test_a_checkpoint_is_committed_every_so_many_segments(platform: Any, make_text: Text) -> None:
    worker = await platform.worker(checkpoint_segments=4)
    name = await platform.stream()
    await platform.append(name, make_text(4000))
    record = await platform.flush(worker, name)
    num_segments = record.stream.tokens // 16
    assert num_segments / 8 - 1 <= record.manifest.version <= num_segments / 4 + 1


async def test_a_checkpoint_is_committed_after_a_while(platform: Any, make_text: Text) -> None:
    worker = await platform.worker(checkpoint_seconds=0.05, sweep_seconds=0.05)
    name = await platform.stream()
    await platform.append(name, make_text(400))
    lease = await worker.place(name)
    stream = await worker.held(name, lease)
    await stream.load()

    async def is_committed() -> bool:
        return bool((await platform.record(name)).HasField("manifest"))

    await platform.until(is_committed)


async def test_decisions_are_recorded_as_runs(platform: Any, make_text: Text) -> None:
    worker = await platform.worker()
    name = await platform.stream()
    for _ in range(2):
        await platform.append(name, make_text(500))
        record = await platform.flush(worker, name)
    (run,) = record.manifest.decisions
    assert run.first_segment == 0
    assert run.policy == record.stream.policy == "sinks-recent/1"
    assert run.numerics_id


async def test_state_bytes_do_not_grow_with_the_stream(platform: Any, make_text: Text) -> None:
    worker = await platform.worker()
    name = await platform.stream()
    sizes = set()
    for seed in range(4):
        await platform.append(name, make_text(1500, seed))
        record = await platform.flush(worker, name)
        sizes.add((record.stream.state_bytes, sum(chunk.length for chunk in record.manifest.chunks)))
    assert len(sizes) == 1


async def test_a_large_backlog_does_not_starve_a_small_stream(platform: Any, make_text: Text) -> None:
    worker = await platform.worker(checkpoint_segments=1000)
    large, small = await platform.stream(), await platform.stream()
    await platform.append(large, make_text(16_000))
    await platform.append(small, make_text(200))
    large_stream = await worker.held(large, await worker.place(large))
    await large_stream.load()
    await platform.flush(worker, small)
    accepted = (await platform.record(large)).stream.accepted_offset
    assert large_stream.folded_offset < accepted / 2
    record = await platform.flush(worker, large)
    assert record.stream.tokens >= 200 * 16


async def test_folding_pauses_while_nothing_can_be_committed_and_loses_nothing(
    platform: Any, make_text: Text, monkeypatch: pytest.MonkeyPatch
) -> None:
    from eunoe.clients.state_store import StateStoreClient
    from eunoe.runtime.errors import Unavailable

    is_down = True
    commit = StateStoreClient.commit_checkpoint

    async def sometimes(self: StateStoreClient, request: pb.CommitCheckpointRequest) -> pb.CommitCheckpointResponse:
        if is_down:
            raise Unavailable("down")
        return await commit(self, request)

    monkeypatch.setattr(StateStoreClient, "commit_checkpoint", sometimes)
    worker, data = await platform.worker(checkpoint_segments=2), make_text(4000)
    name = await platform.stream()
    await platform.append(name, data)
    stream = await worker.held(name, await worker.place(name))
    fold = await stream.load()

    async def is_paused() -> bool:
        return bool(fold.is_paused)

    await platform.until(is_paused)
    assert fold.num_uncommitted_tokens == 4 * 16
    is_down = False
    record = await platform.flush(worker, name)
    assert record.stream.state_digest == await platform.digest(worker, data)
