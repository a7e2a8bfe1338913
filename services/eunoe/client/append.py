"""Appending a source to a stream, through broken connections and beside other writers."""

import asyncio
import logging
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import google_crc32c
import grpc

from eunoe.api.v1 import long_context_pb2 as api
from eunoe.client.connection import UNARY_TIMEOUT_SECONDS, Backoff, Connection, error_of
from eunoe.client.source import Source
from eunoe.runtime.errors import (
    AlreadyExists,
    ContentMismatch,
    CorruptState,
    EunoeError,
    OffsetGap,
    StateLost,
    Unavailable,
    from_status,
)

logger = logging.getLogger(__name__)

MAX_RECORDS_IN_FLIGHT = 8

_Call = Any  # grpc.aio.StreamStreamCall of AppendRequest and AppendResponse


@dataclass(frozen=True, kw_only=True, slots=True)
class AppendProgress:
    """How far an append is.

    Attributes:
        source_bytes_accepted: Bytes of the source that are durable, those of former appends of it included.
        accepted_offset: Bytes of the stream's log that are durable.
        applied_offset: Bytes of the log that the committed memory has taken in.
        folded_offset: Bytes of the log that the worker's running memory has taken in; at least `applied_offset`.
        num_reconnects: How often the call was opened again.
        num_rollbacks: How often the server had lost bytes that it had acknowledged, which were sent again.
    """

    source_bytes_accepted: int
    accepted_offset: int
    applied_offset: int
    folded_offset: int
    num_reconnects: int
    num_rollbacks: int


@dataclass(slots=True)
class _Record:
    position: int
    """Where it starts in the source."""
    data: bytes
    offset: int | None = None
    """Where it was sent to, if what became of it is not known."""


class _OpenAgain(Exception):
    """Another writer came first: the call's offsets are off."""


class Append:
    """One append of one source, over as many calls as it takes; only acknowledged bytes are dropped.

    A named source goes on by what the server has accepted of it, which is exact. An unnamed one has one record in
    flight, which is sent to the same offset again when its fate is unknown: the server compares the bytes.
    """

    def __init__(
        self,
        connection: Connection,
        stream: str,
        source: Source,
        *,
        source_id: str,
        kind: api.RecordKind,
        finishes: bool,
        on_progress: Callable[[AppendProgress], None] | None,
    ) -> None:
        self._connection = connection
        self._stream = stream
        self._source = source
        self._source_id = source_id
        self._kind = kind
        self._finishes = finishes
        self._on_progress = on_progress
        self._unacknowledged: deque[_Record] = deque()
        self._acknowledged = asyncio.Event()
        self._next_offset = 0
        self._accepted_offset = self._applied_offset = self._folded_offset = 0
        self._source_bytes_accepted = 0
        self._num_calls = 0
        # The newest place of the log that the server told, presented at every new call.
        self._seen: api.LogMark | None = None
        self._is_rolled_back = False
        self._num_rollbacks = 0

    async def run(self) -> api.Stream | None:
        """Send everything; returns the stream as it stood at the end, if it was to finish.

        Raises:
            StateLost: If the server has lost acknowledged bytes and the source cannot go back to them.
            ValueError: If the source is shorter than what the stream has accepted of it.
            EunoeError: Whatever the server says about the records.
        """
        backoff = self._connection.backoff()
        while True:
            try:
                return await self._call_once(backoff)
            except _OpenAgain:
                await backoff.wait(Unavailable("other writers came first again and again"))
            except grpc.RpcError as rpc_error:
                await self._recover(error_of(rpc_error), backoff)
            except EunoeError as error:
                await self._recover(error, backoff)

    async def _recover(self, error: EunoeError, backoff: Backoff) -> None:
        """Wait for the next call, or raise `error` if there is none that could help."""
        if not isinstance(error, StateLost) or isinstance(error, CorruptState) or self._seen is None:
            await backoff.wait(error)
            return
        if not (self._source_id and self._source.can_go_back):
            raise error
        logger.warning("the server lost acknowledged bytes: sending them again", extra={"problem": str(error)})
        self._seen, self._is_rolled_back = None, True
        self._num_rollbacks += 1
        await backoff.wait(Unavailable(error.message))

    async def _call_once(self, backoff: Backoff) -> api.Stream | None:
        call = self._connection.stub.Append(metadata=self._connection.metadata)
        self._num_calls += 1
        try:
            opening = api.AppendOpen(stream=self._stream, source_id=self._source_id, seen=self._seen)
            await call.write(api.AppendRequest(open=opening))
            async with asyncio.timeout(UNARY_TIMEOUT_SECONDS):
                response = await call.read()
            if response is grpc.aio.EOF:
                raise Unavailable("the server ended the append before it was opened")
            await self._go_on_from(response.opened)
            sending = asyncio.create_task(self._send(call))
            receiving = asyncio.create_task(self._receive(call, backoff))
            try:
                await asyncio.wait({sending, receiving}, return_when=asyncio.FIRST_EXCEPTION)
                for task in (sending, receiving):
                    if task.done() and (error := task.exception()) is not None:
                        raise error
                return receiving.result()
            finally:
                sending.cancel()
                receiving.cancel()
                await asyncio.gather(sending, receiving, return_exceptions=True)
        except TimeoutError:
            raise Unavailable("the server did not answer the opening of an append") from None
        finally:
            call.cancel()

    async def _go_on_from(self, opened: api.AppendOpened) -> None:
        """Drop what turns out to be accepted, and place what is left behind the log's end."""
        if self._source_id:
            accepted = opened.source_bytes_accepted
            # Less than was acknowledged without a rollback: eight other sources came between, and it is forgotten.
            if accepted >= self._source_bytes_accepted or self._is_rolled_back:
                while self._unacknowledged and self._unacknowledged[0].position < accepted:
                    self._unacknowledged.popleft()
                first_unsent = self._unacknowledged[0].position if self._unacknowledged else self._source.position
                if accepted != first_unsent:
                    self._unacknowledged.clear()
                    await self._source.move(accepted)
                self._source_bytes_accepted = accepted
                self._is_rolled_back = False
        self._next_offset = opened.stream.accepted_offset
        self._seen = api.LogMark(offset=opened.stream.accepted_offset, chain=opened.stream.log_chain)
        self._note(opened.stream.accepted_offset, opened.stream.applied_offset)

    async def _send(self, call: _Call) -> None:
        max_in_flight = MAX_RECORDS_IN_FLIGHT if self._source_id else 1
        try:
            for record in tuple(self._unacknowledged):
                await self._write(call, record)
            while True:
                await self._until_in_flight_below(max_in_flight)
                position = self._source.position
                data = await self._source.read()
                if not data:
                    break
                record = _Record(position, data)
                self._unacknowledged.append(record)
                await self._write(call, record)
            await self._until_in_flight_below(1)
            if self._finishes:
                await call.write(api.AppendRequest(finish=api.AppendFinish()))
            else:
                await call.done_writing()
        except (grpc.RpcError, asyncio.InvalidStateError):
            # The call has ended; the receiver reads why.
            return

    async def _write(self, call: _Call, record: _Record) -> None:
        if self._source_id or record.offset is None:
            record.offset = self._next_offset
        self._next_offset = record.offset + len(record.data)
        message = api.AppendRecord(
            offset=record.offset, data=record.data, crc32c=google_crc32c.value(record.data), kind=self._kind
        )
        if self._source_id:
            message.source_offset = record.position
        await call.write(api.AppendRequest(record=message))

    async def _until_in_flight_below(self, limit: int) -> None:
        while len(self._unacknowledged) >= limit:
            self._acknowledged.clear()
            await self._acknowledged.wait()

    async def _receive(self, call: _Call, backoff: Backoff) -> api.Stream | None:
        """Read to the call's end; returns the stream if the server sent it."""
        while (response := await call.read()) is not grpc.aio.EOF:
            match response.WhichOneof("response"):
                case "verdict":
                    self._take_verdict(response.verdict)
                    backoff.went_forward()
                case "progress":
                    progress = response.progress
                    self._note(progress.accepted_offset, progress.applied_offset, progress.folded_offset)
                case "finished":
                    stream: api.Stream = response.finished.stream
                    self._note(stream.accepted_offset, stream.applied_offset)
                    return stream
        if self._finishes:
            raise Unavailable("the server ended the append before it was finished")
        return None

    def _take_verdict(self, verdict: api.AppendVerdict) -> None:
        assert self._unacknowledged, "a verdict without a record"
        record = self._unacknowledged[0]
        if verdict.log_chain:
            self._seen = api.LogMark(offset=verdict.accepted_offset, chain=verdict.log_chain)
        if verdict.status.code:
            error = from_status(verdict.status)
            is_known_to_be_there = isinstance(error, AlreadyExists) and not self._source_id
            if isinstance(error, AlreadyExists | ContentMismatch | OffsetGap) and not is_known_to_be_there:
                record.offset = None
                raise _OpenAgain
            if not is_known_to_be_there:
                raise error
        self._unacknowledged.popleft()
        self._acknowledged.set()
        self._source_bytes_accepted = record.position + len(record.data)
        self._next_offset = max(self._next_offset, verdict.accepted_offset)
        self._note(verdict.accepted_offset, verdict.applied_offset)

    def _note(self, accepted_offset: int, applied_offset: int, folded_offset: int = 0) -> None:
        self._accepted_offset = accepted_offset
        self._applied_offset = applied_offset
        self._folded_offset = max(self._folded_offset, folded_offset, applied_offset)
        if self._on_progress is not None:
            self._on_progress(
                AppendProgress(
                    source_bytes_accepted=self._source_bytes_accepted,
                    accepted_offset=self._accepted_offset,
                    applied_offset=self._applied_offset,
                    folded_offset=self._folded_offset,
                    num_reconnects=self._num_calls - 1,
                    num_rollbacks=self._num_rollbacks,
                )
            )
