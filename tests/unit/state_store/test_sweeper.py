"""What a sweep puts right beside streams."""

from eunoe.internal.v1 import state_store_pb2 as pb
from eunoe.state_store import keys
from eunoe.state_store.config import StateStoreConfig
from eunoe.state_store.memory_storage import MemoryStorage
from eunoe.state_store.store import StateStore
from eunoe.state_store.transactions import Environment


async def test_a_worker_that_stopped_renewing_before_the_clock_was_set_back_is_dead_soon_after_a_sweep() -> None:
    now = 10_000.0
    config = StateStoreConfig(worker_seconds=10.0)
    store = StateStore(Environment(storage=MemoryStorage(clock=lambda: now), config=config))
    await store.workers.renew(pb.Worker(worker="w", address="h:1"))

    now -= 3_600
    await store.sweeper.sweep()

    assert await store.workers.is_alive("w")
    now += 10
    assert not await store.workers.is_alive("w")


async def test_a_worker_that_two_sweeps_find_dead_is_taken_out_of_the_directory() -> None:
    now = 10_000.0
    storage = MemoryStorage(clock=lambda: now)
    store = StateStore(Environment(storage=storage, config=StateStoreConfig(worker_seconds=10.0)))
    for name in ("dead", "living"):
        await store.workers.renew(pb.Worker(worker=name, address="h:1"))
    now += 11

    await store.sweeper.sweep()
    listed_after_one = await storage.members_after(keys.WORKERS, "", 10)
    await store.workers.renew(pb.Worker(worker="living", address="h:1"))
    await store.sweeper.sweep()

    assert listed_after_one == ["dead", "living"]
    assert await storage.members_after(keys.WORKERS, "", 10) == ["living"]
