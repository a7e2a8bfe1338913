"""Copies of a stream's memory for one call: admitted by their bytes, brought up to date, given back."""

import asyncio
from collections.abc import AsyncIterator
from typing import Any, Generic, TypeVar

from eunoe.api.v1 import long_context_pb2 as api
from eunoe.model_worker.engine import Job
from eunoe.model_worker.fold import EphemeralCopy, StreamFold
from eunoe.model_worker.stream import OwnedStream, WorkerParts, is_done_in_a_second
from eunoe.runtime.errors import CarryOpen

T = TypeVar("T")


class Outbox(Generic[T]):
    """Carries what a job sends from the engine thread to the loop. Answers are bounded, so it is not."""

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._queue: asyncio.Queue[T | None] = asyncio.Queue()

    def put(self, item: T) -> None:
        """Send an item, from any thread."""
        self._loop.call_soon_threadsafe(self._queue.put_nowait, item)

    async def until_done(self, running: "asyncio.Future[Any]") -> AsyncIterator[T]:
        """The items until the job has ended, in whatever way."""
        running.add_done_callback(lambda _: self._queue.put_nowait(None))
        while (item := await self._queue.get()) is not None:
            yield item


class BorrowedCopy:
    """One call's copy of a stream's memory state. `close` gives everything back, wherever the call stands.

    Args:
        parts: Of the worker.
        stream: In use while the copy is borrowed.
    """

    def __init__(self, parts: WorkerParts, stream: OwnedStream) -> None:
        self._parts = parts
        self._stream = stream
        self._reserved_bytes = 0
        self._future: asyncio.Future[EphemeralCopy] | None = None
        self._running: asyncio.Future[Any] | None = None

    async def take(
        self, freshness: "api.Freshness", *, needs_whole_text: bool = False
    ) -> AsyncIterator[api.CatchingUp]:
        """Make the copy; yields about once a second while the stream catches up with its log.

        Args:
            freshness: What the copy must stand for.
            needs_whole_text: Refuse a log that ends inside a character.

        Raises:
            Overloaded: If the copy does not fit in memory.
            CarryOpen: See `needs_whole_text`.
            NotOwner: If the stream is not this worker's any more, or its memory not that of its log.
        """
        fold = await self._stream.load()
        await self._parts.admission.reserve(fold.resident_bytes)
        self._reserved_bytes = fold.resident_bytes
        # For both: a worker that was cut off for a while would answer from a checkpoint that others have passed.
        now = await self._stream.confirmed()
        if freshness == api.FRESHNESS_APPLIED:
            self._future = asyncio.ensure_future(self._stream.committed_copy())
            await self._future
            return
        if needs_whole_text and now.carry_bytes:
            raise CarryOpen("the log ends inside a character", carry_bytes=now.carry_bytes)
        self._future = await self._stream.reach(now.accepted_offset, StreamFold.accepted_copy)
        while not await is_done_in_a_second(self._future):
            yield api.CatchingUp(applied_offset=self._stream.folded_offset, accepted_offset=now.accepted_offset)

    def taken(self) -> EphemeralCopy:
        """The copy, which is the caller's from now on."""
        assert self._future is not None, "taken before it was made"
        copy, self._future = self._future.result(), None
        return copy

    def run(self, job: Job[T]) -> "asyncio.Future[T]":
        """Run the job that works on the copy; the copy's bytes are given back when the job has ended."""
        num_bytes, self._reserved_bytes = self._reserved_bytes, 0
        ledger = self._parts.admission.ledger
        running = self._parts.engine.submit(job, on_close=lambda: ledger.release(num_bytes))
        self._running = running
        return running

    def close(self) -> None:
        """Cancel what runs and give back what is held."""
        for future in (self._future, self._running):
            if future is not None:
                future.cancel()
        self._parts.admission.ledger.release(self._reserved_bytes)
        self._reserved_bytes = 0
