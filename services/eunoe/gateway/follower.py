"""Follows the memory of one stream: hints its worker that the log has grown, and learns how far the fold is."""

import asyncio
import logging
from collections.abc import AsyncGenerator
from contextlib import aclosing, suppress

from eunoe.clients.model_worker import ModelWorkerClient
from eunoe.gateway.placement import Placement
from eunoe.internal.v1 import model_worker_pb2 as worker_pb
from eunoe.internal.v1.state_store_pb2 import Lease
from eunoe.runtime.errors import Conflict, DeadlineTooShort, EunoeError, NotFound, Overloaded, Unavailable

logger = logging.getLogger(__name__)

# Growth within this time is one hint.
_COALESCE_SECONDS = 0.05
_FIRST_PAUSE_SECONDS = 0.2
_LONGEST_PAUSE_SECONDS = 2.0
# A worker that flushes says so about once a second. One that says nothing for so long hangs: its port still accepts
# connections, and without this the call would wait 40 s for a keepalive to fail.
_SILENCE_SECONDS = 5.0


class Follower:
    """How far a stream is, by everything that one Append hears of it.

    Attributes:
        accepted: Durable bytes.
        applied: Bytes of the newest committed checkpoint.
        folded: Bytes of the worker's running state.
    """

    def __init__(self, placement: Placement, name: str) -> None:
        self._placement = placement
        self._name = name
        self.accepted = 0
        self.applied = 0
        self.folded = 0
        self._grown = asyncio.Event()
        self._applied_more = asyncio.Event()

    def note(self, *, accepted: int = 0, applied: int = 0, folded: int = 0) -> None:
        """Take in offsets that somebody told; they only grow."""
        if accepted > self.accepted:
            self.accepted = accepted
            self._grown.set()
        if applied > self.applied:
            self.applied = applied
            self._applied_more.set()
        self.folded = max(self.folded, folded, self.applied)

    async def backlog_at_most(self, num_bytes: int) -> None:
        """Wait until accepted - applied is no more than that."""
        while self.accepted - self.applied > num_bytes:
            self._applied_more.clear()
            await self._applied_more.wait()

    async def run(self) -> None:
        """Hint the owner whenever the log grows, and ask again at times while it has something left; never returns.

        Raises:
            NotFound: If the stream is deleted or expires.
        """
        pause_seconds = _FIRST_PAUSE_SECONDS
        while True:
            self._grown.clear()
            before = (self.accepted, self.folded)
            try:
                answer = await self._placement.ask_owner(self._name, self._advance)
                self.note(applied=answer.applied_offset, folded=answer.folded_offset)
                has_moved = before != (self.accepted, self.folded)
                pause_seconds = _FIRST_PAUSE_SECONDS if has_moved else _longer(pause_seconds)
                await asyncio.sleep(_COALESCE_SECONDS)
                await self._wait_for_growth(pause_seconds)
            except NotFound:
                raise
            except EunoeError as error:
                # Only a hint failed: the record is durable, and the backlog index will find a worker by itself.
                logger.debug("no worker took a hint", extra={"stream": self._name, "reason": error.reason()})
                pause_seconds = _longer(pause_seconds)
                await asyncio.sleep(pause_seconds)

    async def flush(self, offset: int) -> None:
        """Wait until every full segment below the offset is committed, whatever happens to workers meanwhile.

        Raises:
            NotFound: If the stream is deleted or expires.
            EunoeError: If the fold itself failed.
        """

        def commit(worker: ModelWorkerClient, lease: Lease) -> AsyncGenerator[worker_pb.FlushResponse, None]:
            return _while_answering(worker.flush(self._name, lease, offset))

        pause_seconds = _FIRST_PAUSE_SECONDS
        while True:
            try:
                async with aclosing(
                    self._placement.stream_from_owner(self._name, commit, is_progress=lambda _: True)
                ) as answers:
                    async for answer in answers:
                        self.note(applied=answer.applied_offset, folded=answer.folded_offset)
                        if answer.is_committed:
                            return
                        pause_seconds = _FIRST_PAUSE_SECONDS
            except (Unavailable, Conflict, Overloaded) as error:
                logger.info("a flush waits for a worker", extra={"stream": self._name, "reason": error.reason()})
            await asyncio.sleep(pause_seconds)
            pause_seconds = _longer(pause_seconds)

    async def _advance(self, worker: ModelWorkerClient, lease: Lease) -> worker_pb.AdvanceResponse:
        try:
            return await worker.advance(self._name, lease, self.accepted)
        except DeadlineTooShort as error:
            # It answers at once or hangs: then another worker is asked, which takes the stream if the lease has ended.
            raise Unavailable("the worker does not answer") from error

    async def _wait_for_growth(self, longest_seconds: float) -> None:
        with suppress(TimeoutError):
            async with asyncio.timeout(longest_seconds):
                await self._grown.wait()


async def _while_answering(
    answers: AsyncGenerator[worker_pb.FlushResponse, None],
) -> AsyncGenerator[worker_pb.FlushResponse, None]:
    async with aclosing(answers):
        while True:
            try:
                async with asyncio.timeout(_SILENCE_SECONDS):
                    answer = await anext(answers, None)
            except TimeoutError:
                raise Unavailable("the worker does not answer") from None
            if answer is None:
                return
            yield answer


def _longer(pause_seconds: float) -> float:
    return min(2 * pause_seconds, _LONGEST_PAUSE_SECONDS)
