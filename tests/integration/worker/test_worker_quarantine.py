"""Damaged checkpoints: the worker that finds one folds the log again from an older one, to the same memory."""

from collections.abc import Awaitable, Callable
from typing import Any

import numpy as np
import pytest
import redis.asyncio as redis

from eunoe.api.v1 import long_context_pb2 as api
from eunoe.internal.v1 import state_store_pb2 as pb
from eunoe.runtime.errors import CorruptState, NotOwner
from eunoe.state_store import keys

Text = Callable[..., bytes]
Damage = Callable[[pb.Manifest], Awaitable[None]]


@pytest.fixture
def damage(redis_server: Any, platform: Any) -> Damage:
    """Flips a bit in the last chunk of a checkpoint."""

    async def flip(manifest: pb.Manifest) -> None:
        key = keys.chunk(platform.tenant, manifest.chunks[-1].chunk_id)
        async with redis.Redis.from_url(redis_server.url) as client:
            value = await client.get(key)
            await client.set(key, value[:-1] + bytes([value[-1] ^ 1]))

    return flip


async def checkpoints(platform: Any, worker: Any, data: bytes, num: int = 4, **settings: Any) -> list[pb.StreamRecord]:
    """A stream that took `data` in equal parts, as it was after each."""
    name = await platform.stream(**settings)
    size = -(-len(data) // num)
    records = []
    for start in range(0, len(data), size):
        await platform.append(name, data[start : start + size])
        records.append(await platform.flush(worker, name))
    return records


@pytest.mark.parametrize("num_damaged", [1, 2])
async def test_another_worker_folds_to_the_same_memory_from_an_older_checkpoint(
    platform: Any, make_text: Text, damage: Damage, num_damaged: int
) -> None:
    worker, data, more = await platform.worker(), make_text(2400), make_text(500, seed=1)
    records = await checkpoints(platform, worker, data)
    name, newest = records[-1].stream.name, records[-1].stream
    for record in records[-num_damaged:]:
        await damage(record.manifest)
    await platform.kill(worker)
    other = await platform.worker()

    refolded = (await platform.flush(other, name)).stream

    assert (refolded.state_digest, refolded.applied_offset) == (newest.state_digest, newest.applied_offset)
    assert refolded.checkpoint_version > newest.checkpoint_version
    await platform.append(name, more)
    assert (await platform.flush(other, name)).stream.state_digest == await platform.digest(other, data + more)


async def test_what_is_folded_again_is_folded_under_the_recorded_decisions(
    platform: Any, make_text: Text, damage: Damage
) -> None:
    worker, data, more = await platform.worker(policy="heavy-hitter/1"), make_text(2400), make_text(500, seed=1)
    records = await checkpoints(platform, worker, data)
    name, newest = records[-1].stream.name, records[-1].stream
    await damage(records[-1].manifest)
    await platform.kill(worker)
    other = await platform.worker(policy="snapkv/1")

    refolded = await platform.flush(other, name)
    await platform.append(name, more)
    after = await platform.flush(other, name)

    assert refolded.stream.state_digest == newest.state_digest
    assert refolded.manifest.decisions == records[-1].manifest.decisions
    assert [run.policy for run in after.manifest.decisions] == ["heavy-hitter/1", "snapkv/1"]
    assert after.manifest.decisions[1].first_segment == newest.tokens // 16


async def test_without_a_sound_checkpoint_the_stream_says_so(platform: Any, make_text: Text, damage: Damage) -> None:
    worker = await platform.worker()
    records = await checkpoints(platform, worker, make_text(2400))
    for record in records[-3:]:
        await damage(record.manifest)
    await platform.kill(worker)

    with pytest.raises(CorruptState):
        await platform.flush(await platform.worker(), records[-1].stream.name)


async def test_a_log_retained_from_the_beginning_mends_everything(
    platform: Any, make_text: Text, damage: Damage
) -> None:
    worker, data = await platform.worker(), make_text(2400)
    records = await checkpoints(platform, worker, data, retain_log=True)
    for record in records[-3:]:
        await damage(record.manifest)
    await platform.kill(worker)
    other = await platform.worker()

    refolded = await platform.flush(other, records[-1].stream.name)

    assert refolded.stream.state_digest == records[-1].stream.state_digest
    assert refolded.stream.applied_offset == records[-1].stream.applied_offset


async def test_the_owner_goes_on_over_a_damaged_checkpoint(platform: Any, make_text: Text, damage: Damage) -> None:
    worker, data, more = await platform.worker(), make_text(2400), make_text(500, seed=1)
    records = await checkpoints(platform, worker, data)
    name = records[-1].stream.name
    await damage(records[-1].manifest)
    with pytest.raises(CorruptState):
        async for _ in platform.store.read_chunks(pb.ReadChunksRequest(name=name, chunks=records[-1].manifest.chunks)):
            pass
    assert (await platform.record(name)).manifest == records[-2].manifest

    await platform.append(name, more)
    record = await platform.flush(worker, name)

    assert record.stream.state_digest == await platform.digest(worker, data + more)
    assert record.manifest.version == records[-1].manifest.version + 1


async def test_a_healed_stream_verifies_once_the_damaged_checkpoint_is_retired(
    platform: Any, make_text: Text, damage: Damage
) -> None:
    worker = await platform.worker()
    records = await checkpoints(platform, worker, make_text(2400))
    name = records[-1].stream.name
    await damage(records[-1].manifest)
    await platform.kill(worker)
    other = await platform.worker()
    await platform.flush(other, name)
    assert (await platform.verify(other, name)).difference.part == api.VERIFIED_PART_CHECKPOINT

    for seed in range(3):
        await platform.append(name, make_text(400, seed))
        await platform.flush(other, name)

    assert (await platform.verify(other, name)).verdict == api.VERDICT_VERIFIED


async def test_a_checkpoint_that_was_retired_before_it_was_loaded_belongs_to_another_owner(
    platform: Any, make_text: Text
) -> None:
    worker, name = await platform.worker(), await platform.stream()
    # Whole segments leave no backlog behind: what a worker looks for as it starts is none of this stream's business,
    # so that nobody takes it, or loads it, before this test does.
    await platform.append(name, np.arange(2, 2 + 256, dtype="<u4").tobytes(), api.RECORD_KIND_TOKEN_IDS)
    await platform.flush(worker, name)
    slow, quick = await platform.worker(), await platform.worker()
    await platform.kill(worker)
    lease = await slow.place(name)
    late = await slow.held(name, lease)
    by = pb.Lease(worker=quick.incarnation, address=quick.address)
    await platform.store.acquire_stream(pb.AcquireStreamRequest(name=name, by=by, suspect=lease))
    for seed in range(4):
        await platform.append(name, make_text(400, seed))
        await platform.flush(quick, name)

    with pytest.raises(NotOwner):
        await late.load()
