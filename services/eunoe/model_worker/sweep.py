"""The sweep: once a second, every stream with a backlog gets somebody who folds it, whoever appended to it and left."""

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Mapping

from eunoe.clients.state_store import StateStoreClient
from eunoe.internal.v1 import state_store_pb2 as pb
from eunoe.model_worker.stream import OwnedStream
from eunoe.runtime.errors import DeadlineTooShort, EunoeError, Unavailable

logger = logging.getLogger(__name__)

# At most so many streams of nobody are taken in one sweep: taking one loads its memory state.
_MAX_TAKEN = 4
# A stream that could not be taken is left alone for so long.
_REST_SECONDS = 5.0


class Sweep:
    """Looks for work in the state store's index of backlogs.

    Args:
        store: The state store.
        model: Whose streams to look for.
        streams: This worker's streams by name.
        take: Takes a stream if nobody living owns it; whether it is this worker's now.
    """

    def __init__(
        self,
        store: StateStoreClient,
        model: str,
        streams: Mapping[str, OwnedStream],
        take: Callable[[str], Awaitable[bool]],
    ) -> None:
        self._store = store
        self._model = model
        self._streams = streams
        self._take = take
        # When to try again to take a stream.
        self._resting: dict[str, float] = {}
        # The backlog that each stream was last woken for. Less than a segment stays behind at the end of every
        # document: a stream that idled over a backlog is not taken again for the same one.
        self._woken: dict[str, int] = {}
        self._settled: dict[str, int] = {}

    async def run_forever(self, interval_seconds: float) -> None:
        """Sweep, then wait, for ever."""
        while True:
            try:
                await self.sweep()
            except (Unavailable, DeadlineTooShort) as error:
                logger.warning("the state store was not reached to sweep", extra={"error": str(error)})
            await asyncio.sleep(interval_seconds)

    async def sweep(self) -> None:
        """Wake own streams with a backlog, take those of nobody, and start the commits that are due."""
        for own in list(self._streams.values()):
            own.commit_if_due()
        request = pb.ListBacklogRequest(model=self._model, min_bytes=1)
        entries = (await self._store.list_backlog(request)).entries
        names = {entry.name for entry in entries}
        for known in (self._resting, self._woken, self._settled):
            for name in known.keys() - names:
                del known[name]
        num_taken = 0
        for entry in entries:
            stream = self._streams.get(entry.name)
            if stream is None and num_taken < _MAX_TAKEN and not self._is_left_alone(entry):
                num_taken += await self._has_taken(entry.name)
                stream = self._streams.get(entry.name)
            if stream is not None:
                self._wake(stream, entry.backlog_bytes)

    def _is_left_alone(self, entry: pb.BacklogEntry) -> bool:
        is_resting = time.monotonic() < self._resting.get(entry.name, 0.0)
        return is_resting or self._settled.get(entry.name) == entry.backlog_bytes

    async def _has_taken(self, name: str) -> bool:
        try:
            if await self._take(name):
                return True
        except EunoeError as error:
            logger.warning("a stream was not taken", extra={"stream": name, "error": str(error)})
        self._resting[name] = time.monotonic() + _REST_SECONDS
        return False

    def _wake(self, stream: OwnedStream, backlog_bytes: int) -> None:
        if self._woken.get(stream.name) == backlog_bytes and stream.is_loaded and stream.is_idle:
            self._settled[stream.name] = backlog_bytes
            return
        self._woken[stream.name] = backlog_bytes
        stream.advance()
