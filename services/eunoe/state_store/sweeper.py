"""The sweep: deletes what has expired, clears away what is left of it, repairs hints. Any number may run at once."""

import asyncio
import logging
import random

from eunoe.runtime.errors import EunoeError
from eunoe.state_store import keys
from eunoe.state_store.storage import Storage
from eunoe.state_store.streams import Streams
from eunoe.state_store.workers import WorkerDirectory, all_members

logger = logging.getLogger(__name__)


class Sweeper:
    """Goes over all streams of all tenants, now and then."""

    def __init__(self, storage: Storage, streams: Streams, workers: WorkerDirectory) -> None:
        self._storage = storage
        self._streams = streams
        self._workers = workers

    async def sweep(self) -> None:
        """Go over everything once; what fails is logged and left to the next sweep."""
        await self._workers.shorten_lives()
        await self._workers.forget_dead()
        for tenant in await all_members(self._storage, keys.TENANTS):
            for stream_id in await all_members(self._storage, keys.stream_ids(tenant)):
                await self._attempt(tenant, f"tenants/{tenant}/streams/{stream_id}", "")
            for uid in await all_members(self._storage, keys.deleted_uids(tenant)):
                await self._attempt(tenant, "", uid)

    async def run(self, pause_seconds: float) -> None:
        """Sweep for ever."""
        while True:
            # Several state stores should not all sweep at the same moment.
            await asyncio.sleep(pause_seconds * random.uniform(0.8, 1.2))
            try:
                await self.sweep()
            except EunoeError as error:
                logger.warning("a sweep was cut short", extra={"error": str(error)})

    async def _attempt(self, tenant: str, name: str, uid: str) -> None:
        try:
            if uid:
                await self._streams.sweep_deleted(tenant, uid)
            else:
                await self._streams.sweep_stream(tenant, name)
        except EunoeError as error:
            logger.warning("a stream was not swept", extra={"stream": name or uid, "error": str(error)})
