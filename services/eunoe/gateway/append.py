"""The Append call: records in, verdicts out, and how far the memory is in between.

The log alone makes a record durable, so this call needs no worker until `flush` or `finish`: a worker's death is only
a pause in progress. Back-pressure is not reading: while accepted - applied exceeds the window nothing is read from the
call, and HTTP/2 flow control holds the client.
"""

import asyncio
import sys
import time
from array import array
from collections.abc import AsyncIterator, Callable, Coroutine
from typing import Any

import google_crc32c

from eunoe.api.v1 import long_context_pb2 as api
from eunoe.clients.state_store import StateStoreClient
from eunoe.gateway.follower import Follower
from eunoe.gateway.limits import TenantLimits
from eunoe.gateway.models import ModelDirectory
from eunoe.gateway.placement import Placement
from eunoe.internal.v1 import state_store_pb2 as store_pb
from eunoe.runtime.errors import (
    AlreadyExists,
    BadChecksum,
    BadTokenId,
    CarryAtFinish,
    CarryOpen,
    ContentMismatch,
    InvalidRequest,
    OffsetGap,
    Overloaded,
    QuotaExceeded,
    RecordTooLarge,
    Unavailable,
)

MAX_RECORD_BYTES = 1024 * 1024
MAX_SOURCE_ID_BYTES = 128
PROGRESS_SECONDS = 1.0

# Errors of one record, which do not end the call.
_IN_BAND = (InvalidRequest, OffsetGap, ContentMismatch, CarryOpen)
# How late a drain, a failed companion task or due progress may be noticed while the call waits.
_TICK_SECONDS = 0.25


class AppendCall:
    """One Append of one client.

    Args:
        tenant: Whose call it is.
        name: The stream's full name.
        source_id: Where the records come from; may be empty.
        seen: The newest mark of the log that the client has seen; None checks nothing.
        window_bytes: Largest accepted - applied at which the call is still read.
        is_draining: Whether this gateway wants its long calls to end.
    """

    def __init__(
        self,
        *,
        store: StateStoreClient,
        placement: Placement,
        models: ModelDirectory,
        limits: TenantLimits,
        tenant: str,
        name: str,
        source_id: str,
        seen: api.LogMark | None,
        window_bytes: int,
        is_draining: Callable[[], bool],
    ) -> None:
        if len(source_id.encode()) > MAX_SOURCE_ID_BYTES:
            raise InvalidRequest(f"a source_id has at most {MAX_SOURCE_ID_BYTES} bytes")
        self._store = store
        self._placement = placement
        self._models = models
        self._limits = limits
        self._tenant = tenant
        self._name = name
        self._source_id = source_id
        self._seen = seen
        self._window_bytes = window_bytes
        self._is_draining = is_draining
        self._model = ""
        self._follower = Follower(placement, name)
        self._tasks: set[asyncio.Task[Any]] = set()
        self._told = (0, 0, 0)
        self._told_at = time.monotonic()

    async def run(self, requests: AsyncIterator[api.AppendRequest]) -> AsyncIterator[api.AppendResponse]:
        """The responses to the requests after `open`.

        Raises:
            CarryAtFinish: If `finish` comes while a character is cut.
            StateLost: If the log is not the one any more that the client, or this call, has seen.
            EunoeError: What ends the call; records that got their verdict stay durable.
        """
        yield await self._opened()
        following = self._started(self._follower.run())
        try:
            while True:
                reading = self._started(_next(requests))
                async for progress in self._progress_until(reading, following):
                    yield progress
                request = reading.result()
                if request is None:
                    return
                kind = request.WhichOneof("request")
                if kind == "record":
                    yield await self._verdict(request.record)
                    roomy = self._started(self._follower.backlog_at_most(self._window_bytes))
                    async for progress in self._progress_until(roomy, following):
                        yield progress
                elif kind in ("flush", "finish"):
                    flushing = self._started(self._flush(is_last=kind == "finish"))
                    async for progress in self._progress_until(flushing, following):
                        yield progress
                    stream = flushing.result()
                    if kind == "finish":
                        yield api.AppendResponse(finished=api.AppendFinished(stream=stream))
                        return
                    yield api.AppendResponse(flushed=api.AppendFlushed(stream=stream))
                else:
                    raise InvalidRequest("after `open` come records, `flush` and `finish`")
        finally:
            for task in self._tasks:
                task.cancel()
            await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _opened(self) -> api.AppendResponse:
        request = store_pb.GetStreamRequest(name=self._name, source_id=self._source_id, seen=self._seen)
        answer = await self._store.get_stream(request)
        stream = answer.record.stream
        self._seen = api.LogMark(offset=stream.accepted_offset, chain=stream.log_chain)
        self._model = stream.model
        self._follower.note(accepted=stream.accepted_offset, applied=stream.applied_offset)
        return api.AppendResponse(
            opened=api.AppendOpened(
                stream=stream, source_bytes_accepted=answer.source_bytes_accepted, window_bytes=self._window_bytes
            )
        )

    async def _verdict(self, record: api.AppendRecord) -> api.AppendResponse:
        self._limits.take_append_bytes(self._tenant, len(record.data))
        verdict = api.AppendVerdict(offset=record.offset)
        try:
            await self._check(record)
            answer = await self._append(record)
            self._follower.note(accepted=answer.accepted_offset, applied=answer.applied_offset)
            self._seen = api.LogMark(offset=answer.accepted_offset, chain=answer.log_chain)
            verdict.accepted_offset = answer.accepted_offset
            verdict.log_chain = answer.log_chain
            if answer.already_exists:
                verdict.unchecked = answer.unchecked
                verdict.status.CopyFrom(AlreadyExists("these bytes are in the log already").to_status())
        except _IN_BAND as error:
            verdict.accepted_offset = self._follower.accepted
            if isinstance(error, OffsetGap | ContentMismatch):
                verdict.accepted_offset = error.expected_offset
            verdict.status.CopyFrom(error.to_status())
        verdict.applied_offset = self._follower.applied
        return api.AppendResponse(verdict=verdict)

    async def _check(self, record: api.AppendRecord) -> None:
        if not 1 <= len(record.data) <= MAX_RECORD_BYTES:
            raise RecordTooLarge(f"a record has 1 to {MAX_RECORD_BYTES} bytes", limit_bytes=MAX_RECORD_BYTES)
        if google_crc32c.value(record.data) != record.crc32c:
            raise BadChecksum("the record's bytes do not have its CRC-32C")
        if record.kind == api.RECORD_KIND_TOKEN_IDS:
            check_token_ids(record.data, (await self._models.find(self._model)).vocab_size)
        elif record.kind not in (api.RECORD_KIND_UNSPECIFIED, api.RECORD_KIND_TEXT):
            raise InvalidRequest(f"kind={record.kind} is no RecordKind")

    async def _append(self, record: api.AppendRecord) -> store_pb.AppendRecordResponse:
        request = store_pb.AppendRecordRequest(
            name=self._name,
            offset=record.offset,
            data=record.data,
            kind=record.kind or api.RECORD_KIND_TEXT,
            source_id=self._source_id,
            source_offset=record.source_offset if record.HasField("source_offset") else None,
            after_chain=self._seen.chain if self._seen is not None and self._seen.offset == record.offset else b"",
        )
        while True:
            try:
                return await self._store.append_record(request)
            except QuotaExceeded:
                raise
            except Overloaded as error:
                # Other clients filled the stream's window: wait for the worker as if it were this call's own.
                if self._is_draining():
                    raise
                await asyncio.sleep(min(error.retry_after_seconds, _TICK_SECONDS))

    async def _flush(self, *, is_last: bool) -> api.Stream:
        """The stream once every full segment of its log is committed; waits for a worker as long as the call lives."""
        stream = await self._read_stream()
        if is_last and stream.carry_bytes:
            raise CarryAtFinish(
                f"the text ends inside a character, after {stream.carry_bytes} of its bytes",
                carry_bytes=stream.carry_bytes,
            )
        await self._follower.flush(stream.accepted_offset)
        return await self._read_stream()

    async def _read_stream(self) -> api.Stream:
        request = store_pb.GetStreamRequest(name=self._name, seen=self._seen)
        stream = (await self._store.get_stream(request)).record.stream
        self._follower.note(accepted=stream.accepted_offset, applied=stream.applied_offset)
        return stream

    async def _progress_until(
        self, task: asyncio.Task[Any], following: asyncio.Task[None]
    ) -> AsyncIterator[api.AppendResponse]:
        while not task.done():
            await asyncio.wait({task, following}, timeout=_TICK_SECONDS, return_when=asyncio.FIRST_COMPLETED)
            if following.done():
                following.result()
            if self._is_draining() and not task.done():
                raise Unavailable("this gateway is going away: go on with a new call", retry_after_seconds=0.1)
            now = (self._follower.accepted, self._follower.applied, self._follower.folded)
            if now != self._told and time.monotonic() - self._told_at >= PROGRESS_SECONDS:
                self._told, self._told_at = now, time.monotonic()
                accepted, applied, folded = now
                yield api.AppendResponse(
                    progress=api.AppendProgress(accepted_offset=accepted, applied_offset=applied, folded_offset=folded)
                )
        self._tasks.discard(task)

    def _started(self, work: Coroutine[Any, Any, Any]) -> asyncio.Task[Any]:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        return task


def check_token_ids(data: bytes, vocab_size: int) -> None:
    """Check a token-id record's bytes: 4 a token, little-endian.

    Raises:
        BadTokenId: If they are no multiple of 4 or an id is at or above `vocab_size`.
    """
    if len(data) % 4:
        raise BadTokenId(f"{len(data)} bytes are no multiple of 4")
    token_ids = array("I", data)
    assert token_ids.itemsize == 4, "C's unsigned int has 4 bytes wherever this runs"
    if sys.byteorder == "big":
        token_ids.byteswap()
    if max(token_ids) >= vocab_size:
        raise BadTokenId(f"token id {max(token_ids)} is not below the vocabulary's size {vocab_size}")


async def _next(requests: AsyncIterator[api.AppendRequest]) -> api.AppendRequest | None:
    return await anext(requests, None)
