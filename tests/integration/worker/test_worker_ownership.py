"""Streams change hands: by placement, death, drain, and lack of memory. The state is the same afterwards."""

import asyncio
import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from eunoe.clients.model_worker import ModelWorkerClient
from eunoe.decoder.tiny import write_tiny_byte_model
from eunoe.internal.v1 import state_store_pb2 as pb
from eunoe.runtime.errors import ModelMismatch, NotOwner, Overloaded, StreamNotFound, Unavailable
from eunoe.runtime.grpc_channel import open_channel

Text = Callable[..., bytes]


async def test_placing_twice_gives_the_same_lease(platform: Any) -> None:
    worker = await platform.worker()
    name = await platform.stream()
    leases = await asyncio.gather(*(worker.place(name) for _ in range(5)))
    assert all(lease == leases[0] for lease in leases)
    assert leases[0].worker == worker.incarnation
    assert leases[0].address == worker.address


async def test_placing_names_a_living_owner(platform: Any) -> None:
    one, other = await platform.worker(), await platform.worker()
    name = await platform.stream()
    lease = await one.place(name)
    assert await other.place(name) == lease
    # Also for a caller who wrongly believes the owner dead: this worker looks for itself.
    assert await other.place(name, lease) == lease


async def test_an_unknown_stream_cannot_be_placed(platform: Any) -> None:
    worker = await platform.worker()
    with pytest.raises(StreamNotFound):
        await worker.place(f"tenants/{platform.tenant}/streams/nothing")


async def test_a_stream_of_another_model_is_refused_and_given_back(platform: Any) -> None:
    worker = await platform.worker(model_name="another")
    name = await platform.stream()
    with pytest.raises(ModelMismatch):
        await worker.place(name)
    assert not (await platform.record(name)).HasField("lease")


async def test_a_call_under_an_old_epoch_is_told_the_owner(platform: Any) -> None:
    worker = await platform.worker()
    name = await platform.stream()
    lease = await worker.place(name)
    old = pb.Lease(worker=lease.worker, epoch=lease.epoch + 1, address=lease.address)
    with pytest.raises(NotOwner) as caught:
        await worker.held(name, old)
    assert (caught.value.worker, caught.value.epoch, caught.value.address) == (lease.worker, lease.epoch, lease.address)


async def test_a_call_for_another_incarnation_gets_no_address(platform: Any) -> None:
    worker = await platform.worker()
    name = await platform.stream()
    lease = await worker.place(name)
    with pytest.raises(NotOwner) as caught:
        await worker.held(name, pb.Lease(worker="former", epoch=lease.epoch, address=lease.address))
    assert caught.value.address == ""


async def test_a_call_at_the_wrong_worker_is_told_the_owner(platform: Any) -> None:
    one, other = await platform.worker(), await platform.worker()
    name = await platform.stream()
    lease = await one.place(name)
    async with open_channel(other.address) as channel:
        with pytest.raises(NotOwner) as caught:
            asked = pb.Lease(worker=other.incarnation, epoch=lease.epoch, address=other.address)
            await ModelWorkerClient(channel).advance(name, asked, 0)
    assert caught.value.address == one.address


async def test_advance_answers_at_once_and_the_log_is_folded(platform: Any, make_text: Text) -> None:
    worker = await platform.worker()
    name = await platform.stream()
    accepted = await platform.append(name, make_text(1000))
    lease = await worker.place(name)
    async with open_channel(worker.address) as channel:
        client = ModelWorkerClient(channel)
        await asyncio.gather(*(client.advance(name, lease, accepted) for _ in range(10)))

        async def is_folded() -> bool:
            return bool((await client.advance(name, lease, accepted)).folded_offset > accepted - 200)

        await platform.until(is_folded)


async def test_after_a_worker_died_another_one_reaches_the_same_digest(platform: Any, make_text: Text) -> None:
    data = make_text(6000)
    first = await platform.worker(checkpoint_segments=4)
    name = await platform.stream()
    await platform.append(name, data[:3000])
    stream = await first.held(name, await first.place(name))
    await stream.load()

    async def has_uncommitted_progress() -> bool:
        return bool((await platform.record(name)).HasField("manifest"))

    await platform.until(has_uncommitted_progress)
    await platform.append(name, data[3000:])
    stream.advance()
    await platform.kill(first)
    second = await platform.worker()
    lease = await second.place(name)
    assert (lease.worker, lease.epoch) == (second.incarnation, 2)
    record = await platform.flush(second, name)
    assert record.stream.state_digest == await platform.digest(second, data)


async def test_a_worker_whose_lease_was_taken_gives_the_stream_up(platform: Any, make_text: Text) -> None:
    one, other = await platform.worker(), await platform.worker()
    name = await platform.stream()
    await platform.append(name, make_text(600))
    lease = await one.place(name)
    # As if `one` had been cut off from the state store for long.
    by = pb.Lease(worker=other.incarnation, address=other.address)
    await platform.store.acquire_stream(pb.AcquireStreamRequest(name=name, by=by, suspect=lease))
    stream = await one.held(name, lease)
    with pytest.raises(NotOwner):
        async for _ in stream.flush((await platform.record(name)).stream.accepted_offset):
            pass
    assert one.streams == {}
    assert one.ledger.reserved_bytes == 0
    with pytest.raises(NotOwner) as caught:
        await one.held(name, lease)
    assert caught.value.address == other.address


async def test_a_drained_worker_has_committed_and_given_back(platform: Any, make_text: Text) -> None:
    worker, data = await platform.worker(), make_text(3000)
    names = [await platform.stream() for _ in range(3)]
    for name in names:
        await platform.append(name, data)
        await platform.flush(worker, name)
        await platform.append(name, make_text(1000, 1))
        (await worker.held(name, await worker.place(name))).advance()
    platform.workers.remove(worker)
    before = await platform.store.list_workers(pb.ListWorkersRequest(model=platform.config.model_name))
    await worker.drain()
    after = await platform.store.list_workers(pb.ListWorkersRequest(model=platform.config.model_name))
    assert (len(before.workers), len(after.workers)) == (1, 0)
    for name in names:
        record = await platform.record(name)
        assert not record.HasField("lease")
        assert record.stream.tokens > 0
    other = await platform.worker()
    digest = (await platform.flush(other, names[0])).stream.state_digest
    assert digest == await platform.digest(other, data + make_text(1000, 1))


async def test_a_draining_worker_takes_no_streams(platform: Any) -> None:
    worker = await platform.worker()
    name = await platform.stream()
    platform.workers.remove(worker)
    await worker.drain()
    with pytest.raises(Unavailable):
        await worker.place(name)


async def test_the_sweep_folds_streams_whose_client_has_left(platform: Any, make_text: Text) -> None:
    name = await platform.stream()
    await platform.append(name, make_text(1500))
    await platform.worker(sweep_seconds=0.05, checkpoint_seconds=0.05)

    async def is_applied() -> bool:
        stream = (await platform.record(name)).stream
        return bool(stream.accepted_offset - stream.applied_offset < 200)

    await platform.until(is_applied)


async def test_the_sweep_takes_the_streams_of_a_dead_worker(platform: Any, make_text: Text) -> None:
    first = await platform.worker()
    name = await platform.stream()
    await first.place(name)
    await platform.kill(first)
    await platform.append(name, make_text(1500))
    second = await platform.worker(sweep_seconds=0.05)

    async def is_taken() -> bool:
        return bool((await platform.record(name)).lease.worker == second.incarnation)

    await platform.until(is_taken)


async def test_a_full_worker_drops_idle_streams_and_they_come_back_equal(platform: Any, make_text: Text) -> None:
    probe = await platform.worker()
    name = await platform.stream()
    await (await probe.held(name, await probe.place(name))).load()
    size = probe.ledger.reserved_bytes
    assert size > 0
    worker = await platform.worker(memory_limit_bytes=2 * size)
    texts = [make_text(2000, seed) for seed in range(5)]
    names = [await platform.stream() for _ in texts]
    for half in (slice(0, 1000), slice(1000, None)):
        for name, data in zip(names, texts, strict=True):
            await platform.append(name, data[half])
            await platform.flush(worker, name)
            assert worker.ledger.reserved_bytes <= 2 * size
    digests = [(await platform.record(name)).stream.state_digest for name in names]
    assert digests == [await platform.digest(probe, data) for data in texts]


async def test_a_worker_full_of_streams_in_use_says_so(platform: Any) -> None:
    probe = await platform.worker()
    name = await platform.stream()
    await (await probe.held(name, await probe.place(name))).load()
    worker = await platform.worker(memory_limit_bytes=probe.ledger.reserved_bytes)
    used, refused = await platform.stream(), await platform.stream()
    stream = await worker.held(used, await worker.place(used))
    await stream.load()
    with stream.in_use():
        other = await worker.held(refused, await worker.place(refused))
        with pytest.raises(Overloaded):
            await other.load()
    await other.load()
    assert used not in worker.streams


async def test_an_idle_stream_that_cannot_be_committed_fails_no_other(platform: Any, make_text: Text) -> None:
    probe = await platform.worker()
    probed, deleted, needed = [await platform.stream() for _ in range(3)]
    await (await probe.held(probed, await probe.place(probed))).load()
    worker = await platform.worker(memory_limit_bytes=probe.ledger.reserved_bytes, checkpoint_segments=1000)
    await platform.append(deleted, make_text(1500))
    idle = await worker.held(deleted, await worker.place(deleted))
    await (await idle.reach(1000, lambda fold: None))

    async def is_idle() -> bool:
        return idle.is_idle

    await platform.until(is_idle)
    await platform.store.delete_stream(pb.DeleteStreamRequest(name=deleted))

    await (await worker.held(needed, await worker.place(needed))).load()

    assert deleted not in worker.streams
    assert worker.ledger.reserved_bytes == worker.ledger.limit_bytes


async def test_a_deleted_stream_is_let_go(platform: Any, make_text: Text) -> None:
    worker = await platform.worker()
    name = await platform.stream()
    await platform.append(name, make_text(100))
    stream = await worker.held(name, await worker.place(name))
    await stream.load()
    await platform.store.delete_stream(pb.DeleteStreamRequest(name=name))
    stream.advance()

    async def is_gone() -> bool:
        return not worker.streams and worker.ledger.reserved_bytes == 0

    await platform.until(is_gone)


async def test_a_stream_made_anew_under_an_old_name_starts_from_nothing(platform: Any, make_text: Text) -> None:
    worker = await platform.worker()
    name = await platform.stream()
    await platform.append(name, make_text(1000))
    stream = await worker.held(name, await worker.place(name))
    await (await stream.reach(1000, lambda fold: fold.num_tokens))
    old = await platform.record(name)
    await platform.store.delete_stream(pb.DeleteStreamRequest(name=name))
    request = pb.CreateStreamRequest(name=name, model=old.stream.model, settings=old.stream.settings)
    await platform.store.create_stream(request)
    await platform.append(name, make_text(1500, 1))
    record = await platform.flush(worker, name)
    assert record.stream.state_digest == await platform.digest(worker, make_text(1500, 1))


async def test_a_stalled_worker_is_unhealthy(platform: Any) -> None:
    import threading

    worker = await platform.worker(stall_seconds=0.05)
    worker.check_health()
    gate = threading.Event()
    stuck = worker.parts.engine.call(lambda: gate.wait(10))

    async def is_unhealthy() -> bool:
        try:
            worker.check_health()
        except Unavailable:
            return True
        return False

    async def is_healthy() -> bool:
        return not await is_unhealthy()

    await platform.until(is_unhealthy)
    gate.set()
    await stuck
    # On a busy machine the engine's thread may not yet have heard that it has nothing to do.
    await platform.until(is_healthy)


async def test_the_directory_describes_the_model(platform: Any) -> None:
    worker = await platform.worker()
    (listed,) = (await platform.store.list_workers(pb.ListWorkersRequest(model=platform.config.model_name))).workers
    assert listed.worker == worker.incarnation
    assert listed.address == worker.address
    model = listed.model
    assert model.name == platform.config.model_name
    assert (model.num_layers, model.num_kv_heads, model.head_dim, model.max_positions) == (2, 2, 16, 512)
    assert model.default_settings.kv_budget_tokens == 512
    assert model.default_state_bytes == 512 * model.state_bytes_per_budget_token
    assert model.full_cache_bytes_per_token == 2 * 2 * 2 * 16 * 2


async def test_the_directory_has_the_models_own_defaults(platform: Any, tmp_path: Path) -> None:
    write_tiny_byte_model(tmp_path)
    await platform.worker(model_path=tmp_path)

    (listed,) = (await platform.store.list_workers(pb.ListWorkersRequest(model=platform.config.model_name))).workers

    settings = listed.model.default_settings
    assert (settings.kv_budget_tokens, settings.segment_length, settings.num_sink_tokens) == (16, 16, 0)
    assert settings.HasField("num_sink_tokens")
    # Its slots are float32, by its binding.
    assert listed.model.state_bytes_per_budget_token == 2 * 2 * (2 * 16 * 4 + 8)
    # Memory and normalizer of 2 layers and 2 heads of 16 come on top, whatever the budget.
    num_compressed_bytes = 2 * 2 * (16 * 16 + 16) * 4
    assert listed.model.default_state_bytes == 16 * listed.model.state_bytes_per_budget_token + num_compressed_bytes


def test_the_config_refuses_nonsense(platform: Any) -> None:
    with pytest.raises(ValueError, match="at least 1"):
        dataclasses.replace(platform.config, checkpoint_segments=0)
