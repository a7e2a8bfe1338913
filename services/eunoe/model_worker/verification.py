"""VerifyStream: whether a stream's memory is what its log and its recorded decisions make of it.

The worker takes no lease and writes nothing. It folds on the engine beside the streams that it serves, as one more of
them, and one verification at a time: so verifying costs the others no more than one more stream would.
"""

import asyncio
import logging
from collections.abc import AsyncIterator

from google.protobuf import timestamp_pb2

from eunoe.api.v1 import long_context_pb2 as api
from eunoe.decoder import state_codec
from eunoe.decoder.memory_state import MemorySettings, MemoryState
from eunoe.internal.v1 import state_store_pb2 as pb
from eunoe.model_worker.fold import StreamFold
from eunoe.model_worker.replay import Recorded, replay
from eunoe.model_worker.stream import WorkerParts, is_done_in_a_second, memory_settings
from eunoe.runtime.errors import (
    Conflict,
    CorruptState,
    MissingChunk,
    ModelMismatch,
    OffsetUnavailable,
    Overloaded,
    StreamNotFound,
)

logger = logging.getLogger(__name__)

_MAX_RESTARTS = 3
# More than lies between the retained checkpoints of a stream whose log is trimmed: once it is read, it may be trimmed.
_READ_AHEAD_BYTES = 4 << 20
_RETRY_SECONDS = 5.0


class Verification:
    """Verifies streams of one worker's model, one at a time."""

    def __init__(self, parts: WorkerParts) -> None:
        self._parts = parts
        self._is_running = False

    async def verify(self, name: str) -> AsyncIterator[api.VerifyStreamResponse]:
        """Progress about once a second, then the summary.

        Raises:
            Overloaded: If another verification runs, or the memory state has no room.
            StreamNotFound, ModelMismatch.
            Conflict: If the stream went on faster than it could be read, again and again.
        """
        if self._is_running:
            raise Overloaded("another verification runs at this worker", retry_after_seconds=_RETRY_SECONDS)
        progress = api.VerifyProgress()
        self._is_running = True
        task = asyncio.create_task(self._verified(name, progress))
        task.add_done_callback(self._note_end)
        try:
            while not await is_done_in_a_second(task):
                yield api.VerifyStreamResponse(progress=progress)
            yield api.VerifyStreamResponse(summary=task.result())
        finally:
            task.cancel()

    def _note_end(self, task: "asyncio.Task[api.VerifySummary]") -> None:
        self._is_running = False
        if not task.cancelled():
            task.exception()  # Somebody who cancelled the call does not ask for it.

    async def _verified(self, name: str, progress: api.VerifyProgress) -> api.VerifySummary:
        while True:
            try:
                return await _Attempt(self._parts, name, progress).run()
            except (OffsetUnavailable, MissingChunk) as error:
                # The oldest checkpoint was retired, or the log behind it trimmed: begin with what is oldest now.
                if progress.num_restarts == _MAX_RESTARTS:
                    raise Conflict(f"{name} goes on faster than it can be verified here: {error}") from error
                logger.info("a verification begins anew", extra={"stream": name, "reason": str(error)})
                progress.CopyFrom(api.VerifyProgress(num_restarts=progress.num_restarts + 1))


class _DifferentError(Exception):
    """Ends an attempt with what was proven."""

    def __init__(self, difference: api.Difference) -> None:
        super().__init__(difference.message)
        self.difference = difference


class _Attempt:
    """One try, on the stream as it is when its history has been checked."""

    def __init__(self, parts: WorkerParts, name: str, progress: api.VerifyProgress) -> None:
        self._parts = parts
        self._name = name
        self._progress = progress
        self._create_time = timestamp_pb2.Timestamp()
        self._summary = api.VerifySummary(
            numerics_id=parts.decoder.numerics_id, num_restarts=progress.num_restarts, verdict=api.VERDICT_VERIFIED
        )

    async def run(self) -> api.VerifySummary:
        """The verdict: what is proven wrong comes before what is missing, and nothing is folded if anything is."""
        try:
            await self._check()
        except _DifferentError as error:
            self._summary.verdict = api.VERDICT_DIFFERENT
            self._summary.difference.CopyFrom(error.difference)
        return self._summary

    async def _check(self) -> None:
        parts, summary = self._parts, self._summary
        history = await self._history()
        stream, checkpoints = history.record.stream, history.checkpoints
        self._create_time = stream.create_time
        if stream.model != parts.config.model_name:
            raise ModelMismatch(
                f"{self._name} is bound to another model", expected=parts.config.model_name, found=stream.model
            )
        summary.num_checkpoints = len(checkpoints)
        summary.log_bytes_checked = self._progress.log_bytes_checked
        if history.HasField("difference"):
            raise _DifferentError(history.difference)
        if not checkpoints:
            return
        begins_empty = stream.log_start_offset == 0
        start = pb.Manifest() if begins_empty else checkpoints[0]
        summary.from_offset, summary.to_offset = start.applied_offset, checkpoints[-1].applied_offset
        settings = memory_settings(stream.settings)
        size = await parts.engine.call(lambda: parts.decoder.new_state(settings, parts.policies.largest).resident_bytes)
        await parts.admission.reserve(size)
        try:
            state = await self._load_all(list(checkpoints), settings)
            await asyncio.to_thread(parts.policies.refresh)
            recorded = Recorded(start, checkpoints, settings.segment_length, parts.policies.by_name)
            if missing := recorded.missing(parts.decoder):
                summary.verdict = api.VERDICT_UNVERIFIABLE
                summary.missing.extend(missing)
                return
            if begins_empty:
                state = None  # Room was reserved for one.
                state = await parts.engine.call(lambda: parts.decoder.new_state(settings))
            assert state is not None, "a checkpoint of an encoding and a model that are here"
            await self._fold(state, start, recorded)
        finally:
            parts.admission.ledger.release(size)

    async def _history(self) -> pb.History:
        async for response in self._parts.store.check_history(pb.CheckHistoryRequest(name=self._name)):
            if response.HasField("history"):
                return response.history
            self._progress.log_bytes_checked = response.log_bytes_checked
            self._progress.log_bytes = response.log_bytes
        raise AssertionError("the last response has the history")

    async def _load_all(self, checkpoints: list[pb.Manifest], settings: MemorySettings) -> MemoryState | None:
        """The oldest checkpoint's memory state. Each is read and compared with its digests, one in memory at a time."""
        state, difference = None, None
        for manifest in reversed(checkpoints):
            state = None
            try:
                state = await self._load(manifest, settings)
            except CorruptState as error:
                difference = api.Difference(
                    part=api.VERIFIED_PART_CHECKPOINT,
                    offset=manifest.applied_offset,
                    recorded=manifest.state_digest,
                    message=error.message,
                )
        if difference is not None:
            raise _DifferentError(difference)
        return state

    async def _load(self, manifest: pb.Manifest, settings: MemorySettings) -> MemoryState | None:
        """A checkpoint's memory state; None if this worker cannot read it, though its bytes are what was committed."""
        parts = self._parts
        is_known = manifest.encoding_version in state_codec.VERSIONS
        if is_known and manifest.model_digest == parts.decoder.model_digest:
            state = await parts.checkpoints.load(self._name, manifest, settings)
            if state.num_tokens != manifest.tokens:
                raise CorruptState(f"a checkpoint of {state.num_tokens} tokens is said to have {manifest.tokens}")
            return state
        async for _ in parts.store.read_chunks(pb.ReadChunksRequest(name=self._name, chunks=manifest.chunks)):
            pass
        return None

    async def _fold(self, state: MemoryState, start: pb.Manifest, recorded: Recorded) -> None:
        parts, progress = self._parts, self._progress
        progress.tokens = recorded.num_segments * state.settings.segment_length
        num_segments = recorded.num_segments
        fold = await parts.engine.call(
            # It pauses, and so ends, where the newest checkpoint was made.
            lambda: StreamFold(parts.decoder, parts.tokenizer, parts.policy, state, start, num_segments)
        )

        def note(num_tokens: int) -> None:
            progress.tokens_folded = self._summary.tokens_folded = num_tokens

        difference = None
        while difference is None and not fold.is_paused:
            has_read = await self._read_log(fold)
            if not (has_read or fold.has_work):
                break
            folding = parts.engine.submit(replay(fold, recorded, note))
            try:
                difference = await folding
            finally:
                folding.cancel()
        difference = difference or recorded.unreached(fold)
        if fold.read_mark is not None:
            await self._confirm(fold.read_mark)
        if difference is not None:
            raise _DifferentError(difference)

    async def _read_log(self, fold: StreamFold) -> bool:
        request = pb.ReadLogRequest(name=self._name, offset=fold.read_offset, max_bytes=_READ_AHEAD_BYTES)
        has_read = False
        try:
            async for record in self._parts.store.read_log(request):
                fold.offer(record)
                has_read = True
        except CorruptState as error:
            raise _DifferentError(
                api.Difference(part=api.VERIFIED_PART_LOG, offset=error.lost_from, message=error.message)
            ) from error
        return has_read

    async def _confirm(self, read: api.LogMark) -> None:
        """Make sure that what was read was the stream's log, and still is.

        Raises:
            StreamNotFound: If the stream was deleted, and perhaps made anew.
            StateLost: If the store was rolled back.
        """
        found = (await self._parts.store.get_stream(pb.GetStreamRequest(name=self._name, seen=read))).record.stream
        if found.create_time != self._create_time:
            raise StreamNotFound(f"{self._name} was deleted while it was verified")
