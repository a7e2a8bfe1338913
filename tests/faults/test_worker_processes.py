"""A model worker as a plain process: how it ends, and what its health says before."""

import asyncio
import os
import random
import signal
import sys
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from disturbed_stream import DisturbedStream, Shape, placement_at, random_text
from grpc_health.v1 import health_pb2, health_pb2_grpc
from worker_processes import Site, Worker, until

from eunoe.api.v1 import long_context_pb2 as api
from eunoe.clients.model_worker import ModelWorkerClient
from eunoe.gateway import follower
from eunoe.internal.v1 import state_store_pb2 as pb
from eunoe.runtime.errors import NotOwner
from eunoe.runtime.grpc_channel import open_channel


@pytest.fixture
async def site(tiny_model: Path) -> AsyncIterator[Site]:
    async with Site(tiny_model) as site:
        yield site


def stream_of(site: Site, placement: object, stream_id: str = "a") -> DisturbedStream:
    randomness = random.Random(stream_id)
    return DisturbedStream(
        name=f"tenants/faults/streams/{stream_id}",
        placement=placement,  # type: ignore[arg-type]
        store=site.store,
        randomness=randomness,
        text=random_text(randomness, 800),
    )


async def begin(site: Site, worker: Worker, stream: DisturbedStream) -> None:
    """The stream at the worker, its log not folded yet."""
    await stream.create(site.model_name, Shape())
    await stream.append(stream.text)
    async with open_channel(worker.address) as channel:
        client = ModelWorkerClient(channel)
        lease = await client.take_stream(stream.name)
        await client.advance(stream.name, lease, len(stream.text))


async def health_of(worker: Worker) -> int:
    async with open_channel(worker.address) as channel:
        request = health_pb2.HealthCheckRequest()
        return (await health_pb2_grpc.HealthStub(channel).Check(request, timeout=5)).status


async def test_a_worker_runs_by_hand_from_its_variables(site: Site, tmp_path: Path) -> None:
    services = str(Path(__file__).parents[2] / "services")
    kernels = str(Path(__file__).parents[2] / "kernels")
    ready_file = tmp_path / "ready.json"
    variables = {
        "EUNOE_WORKER_MODEL_NAME": site.model_name,
        "EUNOE_WORKER_MODEL_PATH": str(site.model_path),
        "EUNOE_WORKER_STATE_STORE_ADDRESS": site.store_address,
        "EUNOE_WORKER_READY_FILE": str(ready_file),
        "PYTHONPATH": f"{services}:{kernels}",
    }
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "eunoe.model_worker", env={**os.environ, **variables}
    )

    async def is_ready() -> bool:
        return ready_file.exists() or process.returncode is not None

    await until(is_ready, "no ready file")
    listed = await site.store.list_workers(pb.ListWorkersRequest(model=site.model_name))
    process.send_signal(signal.SIGTERM)
    status = await asyncio.wait_for(process.wait(), 20)
    left = await site.store.list_workers(pb.ListWorkersRequest(model=site.model_name))

    assert status == 0
    assert (len(listed.workers), len(left.workers)) == (1, 0)
    assert not ready_file.exists()


async def test_a_worker_without_a_model_says_so_and_ends(site: Site, tmp_path: Path) -> None:
    worker = site.start_worker(model_path=tmp_path)

    assert await worker.ended() == 1
    assert "the model worker does not serve" in worker.log_file.read_text()


async def test_a_terminated_worker_has_committed_everything(site: Site) -> None:
    worker = await site.serving_worker(checkpoint_segments=1000)
    async with placement_at(site.store) as placement:
        stream = stream_of(site, placement)
        await begin(site, worker, stream)

        async def is_folded() -> bool:
            async with open_channel(worker.address) as channel:
                lease = (await stream.record()).lease
                return (await ModelWorkerClient(channel).advance(stream.name, lease, 0)).folded_offset > 700

        await until(is_folded, "nothing is folded")
        worker.send(signal.SIGTERM)
        status = await worker.ended()
        record = await stream.record()

    assert status == 0
    assert not record.HasField("lease")
    assert record.stream.applied_offset > 700


async def test_a_worker_whose_engine_thread_dies_ends_with_an_error(site: Site) -> None:
    worker = await site.serving_worker(failpoints="worker.before-segment=end@3")
    async with placement_at(site.store) as placement:
        await begin(site, worker, stream_of(site, placement))

    assert await worker.ended() == 70


async def test_a_worker_whose_engine_hangs_is_not_healthy_and_ends(site: Site) -> None:
    worker = await site.serving_worker(failpoints="worker.before-segment=hang@3", stall_seconds=0.5)
    before = await health_of(worker)
    async with placement_at(site.store) as placement:
        await begin(site, worker, stream_of(site, placement))

        async def says_so() -> bool:
            return await health_of(worker) == health_pb2.HealthCheckResponse.NOT_SERVING

        await until(says_so, "it calls itself healthy", 10.0)
        status = await worker.ended()

    assert before == health_pb2.HealthCheckResponse.SERVING
    assert status == 70


async def test_a_flush_at_a_worker_that_hangs_goes_on_at_another_one(
    site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(follower, "_SILENCE_SECONDS", 0.3)
    hanging = await site.serving_worker()
    async with placement_at(site.store) as placement:
        stream = stream_of(site, placement)
        await begin(site, hanging, stream)
        await stream.finish()
        hanging.send(signal.SIGSTOP)
        await until(hanging.is_stopped, "it runs on")
        other = await site.serving_worker(sweep_seconds=60.0)
        await stream.append(b" and so on" * 50)
        async with asyncio.timeout(15):
            record = await stream.finish()

    assert record.lease.address == other.address
    assert record.stream.accepted_offset - record.stream.applied_offset < 200


async def test_an_answer_from_the_committed_memory_comes_from_its_owner(site: Site) -> None:
    """A worker that slept past its lease does not know it; a gateway may still ask it."""
    former = await site.serving_worker()
    other = await site.serving_worker()
    async with placement_at(site.store) as placement:
        stream = stream_of(site, placement)
        await begin(site, former, stream)
        await stream.finish()
        lease = (await stream.record()).lease
        owner, robber = (former, other) if lease.address == former.address else (other, former)
        listed = (await site.store.list_workers(pb.ListWorkersRequest(model=site.model_name))).workers
        by = next(
            pb.Lease(worker=each.worker, address=each.address) for each in listed if each.address == robber.address
        )
        await site.store.acquire_stream(pb.AcquireStreamRequest(name=stream.name, by=by, suspect=lease))
        request = api.GenerateRequest(stream=stream.name, text="so", max_tokens=1, freshness=api.FRESHNESS_APPLIED)
        async with open_channel(owner.address) as channel:
            with pytest.raises(NotOwner):
                async for _ in ModelWorkerClient(channel).generate(request, lease):
                    pass
