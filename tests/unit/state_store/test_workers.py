"""The directory of workers while one renews late."""

from collections.abc import Awaitable, Callable, Sequence

from eunoe.internal.v1 import state_store_pb2 as pb
from eunoe.state_store.memory_storage import MemoryStorage
from eunoe.state_store.workers import WorkerDirectory

WORKER = pb.Worker(worker="w", address="h:1")


class InterruptedStorage(MemoryStorage):
    """Lets something happen between the values that it has read and their reader."""

    def __init__(self, clock: Callable[[], float]) -> None:
        super().__init__(clock)
        self.interruption: Callable[[], Awaitable[None]] | None = None

    async def get(self, keys: Sequence[str]) -> list[bytes | None]:
        values = await super().get(keys)
        if (interruption := self.interruption) is not None:
            self.interruption = None
            await interruption()
        return values


class LateWorker:
    """A directory in which the only worker's sign of life has ended."""

    def __init__(self) -> None:
        self.now = 10_000.0
        self.storage = InterruptedStorage(lambda: self.now)
        self.directory = WorkerDirectory(self.storage, worker_seconds=10.0)

    async def let_lapse(self) -> None:
        await self.directory.renew(WORKER)
        self.now += 11

    async def renew(self) -> None:
        await self.directory.renew(WORKER)


async def test_a_worker_that_renews_while_the_directory_is_read_stays_in_it() -> None:
    late = LateWorker()
    await late.let_lapse()
    late.storage.interruption = late.renew

    while_it_renewed = await late.directory.living("")

    assert while_it_renewed == []
    assert await late.directory.living("") == [WORKER]


async def test_a_worker_that_renews_while_dead_ones_are_forgotten_stays_in_the_directory() -> None:
    late = LateWorker()
    await late.let_lapse()
    late.storage.interruption = late.renew

    await late.directory.forget_dead()

    assert await late.directory.living("") == [WORKER]


async def test_a_worker_that_lived_between_two_looks_is_not_forgotten() -> None:
    late = LateWorker()
    await late.let_lapse()
    await late.directory.forget_dead()
    await late.renew()
    await late.directory.forget_dead()
    late.now += 11
    late.storage.interruption = late.renew

    await late.directory.forget_dead()

    assert await late.directory.living("") == [WORKER]
