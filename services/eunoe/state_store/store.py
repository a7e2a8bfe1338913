"""The parts of one state store, put together over one database."""

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator

from eunoe.runtime.errors import Unavailable
from eunoe.state_store import keys
from eunoe.state_store.api_keys import ApiKeys
from eunoe.state_store.chains import LogMark
from eunoe.state_store.checkpoints import Checkpoints
from eunoe.state_store.effects import Total
from eunoe.state_store.erasure import Erasures
from eunoe.state_store.log import Logs
from eunoe.state_store.metadata import Manifest, StreamMetadata
from eunoe.state_store.streams import Streams
from eunoe.state_store.sweeper import Sweeper
from eunoe.state_store.transactions import Environment
from eunoe.state_store.workers import BacklogIndex, WorkerDirectory

logger = logging.getLogger(__name__)


class StateStore:
    """All of the state store but its RPCs.

    Args:
        environment: Database, limits, clock and randomness.
        pepper: As in ApiKeys.
    """

    def __init__(self, environment: Environment, *, pepper: bytes = b"") -> None:
        self.environment = environment
        self.logs = Logs(environment)
        self.checkpoints = Checkpoints(environment, self.logs)
        self.workers = WorkerDirectory(environment.storage, environment.config.worker_seconds)
        self.backlog = BacklogIndex(environment.storage)
        self.streams = Streams(environment, logs=self.logs, workers=self.workers, backlog=self.backlog)
        self.erasures = Erasures(environment, self.streams)
        self.api_keys = ApiKeys(environment, pepper)
        self.sweeper = Sweeper(environment.storage, self.streams, self.workers)
        self._background: set[asyncio.Task[None]] = set()

    async def commit(
        self,
        name: str,
        manifest: Manifest,
        fence: tuple[str, int],
        *,
        parent_chain: str | None = None,
        read: LogMark | None = None,
    ) -> StreamMetadata:
        """`Checkpoints.commit`; what it leaves unneeded is cleared away behind the answer."""
        metadata = await self.checkpoints.commit(name, manifest, fence, parent_chain=parent_chain, read=read)
        self.backlog.note(metadata)
        tenant, _ = keys.parse_name(name)
        task = asyncio.create_task(self.streams.collect_quietly(tenant, name, metadata.uid))
        self._background.add(task)
        task.add_done_callback(self._background.discard)
        return metadata

    async def usage(self, tenant: str) -> dict[Total, tuple[int, int]]:
        """(used, quota) of each total."""
        used = await self.environment.storage.totals(keys.totals(keys.check_tenant(tenant)))
        return {total: (used.get(total, 0), self.environment.quota(total)) for total in Total}

    async def settle(self) -> None:
        """Wait for everything that goes on behind answers."""
        while self._background:
            await asyncio.gather(*self._background)
        await self.backlog.flush()

    @contextlib.asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """Sweep and write hints while the context lasts."""
        pause_seconds = self.environment.config.sweep_seconds
        tasks = [asyncio.create_task(self.backlog.run()), asyncio.create_task(self.sweeper.run(pause_seconds))]
        for task in tasks:
            task.add_done_callback(_report_death)
        try:
            yield
        finally:
            # More than once: a Redis call that ends in the same moment can swallow a cancellation.
            while running := [task for task in tasks if not task.done()]:
                for task in running:
                    task.cancel()
                await asyncio.wait(running, timeout=0.1)
            # All that is left are hints and clearing up, which the next sweep of any state store does as well.
            with contextlib.suppress(Unavailable):
                await self.settle()


def _report_death(task: asyncio.Task[None]) -> None:
    """A loop that should run for ever must not end in silence."""
    if not task.cancelled() and task.exception() is not None:
        logger.critical("a background task died", exc_info=task.exception())
