"""One stream that this worker holds the lease of: reads its log, has it folded, commits its checkpoints."""

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import numpy as np

from eunoe.api.v1 import long_context_pb2 as api
from eunoe.clients.state_store import StateStoreClient
from eunoe.decoder.decoder import Decoder
from eunoe.decoder.memory_state import MemorySettings, MemoryState
from eunoe.decoder.tokenizer import Tokenizer
from eunoe.eviction.fallback import policy_in_charge
from eunoe.eviction.policy import EvictionPolicy
from eunoe.eviction.policy_files import PolicyFiles
from eunoe.internal.v1 import state_store_pb2 as pb
from eunoe.model_worker import metrics
from eunoe.model_worker.checkpoints import Checkpoints
from eunoe.model_worker.config import WorkerConfig
from eunoe.model_worker.engine import Engine
from eunoe.model_worker.evictions import StreamEvictions, recorded_policy
from eunoe.model_worker.fold import EphemeralCopy, StreamFold
from eunoe.model_worker.memory import Admission, StateRoom
from eunoe.model_worker.sidecar import Sidecar
from eunoe.runtime.errors import (
    Conflict,
    CorruptState,
    DeadlineTooShort,
    EunoeError,
    FoldFailed,
    MissingChunk,
    NotOwner,
    StateLost,
    Unavailable,
)
from eunoe.runtime.failpoints import failpoint

logger = logging.getLogger(__name__)

# Read from the log at a time, while as much is being folded.
_READ_BYTES = 64 * 1024
_LONGEST_PAUSE_SECONDS = 5.0
# Between two signs of progress to a caller who waits.
PROGRESS_SECONDS = 1.0

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class WorkerParts:
    """What the streams of one worker share."""

    config: WorkerConfig
    store: StateStoreClient
    engine: Engine
    decoder: Decoder
    tokenizer: Tokenizer
    policy: EvictionPolicy
    """Evicts where no sidecar says otherwise."""
    policies: PolicyFiles
    sidecar: Sidecar | None
    checkpoints: Checkpoints
    admission: Admission


class OwnedStream:
    """A leased stream. Its memory state is loaded at the first need and stays until `close`.

    Args:
        record: The stream as it was acquired.
        parts: Shared with the worker's other streams.
        on_gone: Called once when the stream is not served here any more, with why.
    """

    def __init__(
        self, record: pb.StreamRecord, parts: WorkerParts, on_gone: Callable[["OwnedStream", BaseException], None]
    ) -> None:
        self.name = record.stream.name
        self.lease = record.lease
        self.settings = memory_settings(record.stream.settings)
        self.last_used = time.monotonic()
        self._record = record
        self._parts = parts
        self._on_gone = on_gone
        self._fold: StreamFold | None = None
        self._evictions = StreamEvictions(self.name, parts.policy, parts.sidecar)
        self._room = StateRoom(parts.engine, parts.admission, parts.decoder, self.settings)
        self._num_users = 0
        self._failure: BaseException | None = None
        self._load_lock = asyncio.Lock()
        self._commit_lock = asyncio.Lock()
        self._background_load: asyncio.Task[None] | None = None
        self._background_commit: asyncio.Task[None] | None = None
        # When the oldest segment was folded that no checkpoint has; None if there is none.
        self._uncommitted_since: float | None = None
        self._pump_task: asyncio.Task[None] | None = None
        self._is_pump_waiting = False
        self._wake = asyncio.Event()
        self._pending: set[asyncio.Future[Any]] = set()
        self._loop = asyncio.get_running_loop()

    @property
    def folded_offset(self) -> int:
        """Bytes of the log folded into the running state."""
        return self.applied_offset if self._fold is None else self._fold.folded_offset

    @property
    def applied_offset(self) -> int:
        """Bytes of the log below the newest committed checkpoint."""
        return self._record.manifest.applied_offset

    @property
    def is_idle(self) -> bool:
        """Whether nobody uses it and all of its log is folded, as far as this worker knows."""
        is_working = self._fold is not None and not (self._is_pump_waiting and not self._wake.is_set())
        return not (self._num_users or is_working or self._load_lock.locked() or self._commit_lock.locked())

    @property
    def is_loaded(self) -> bool:
        """Whether its memory state is here."""
        return self._fold is not None

    @property
    def copy_policy(self) -> EvictionPolicy:
        """What evicts from a copy of its memory state."""
        return self._evictions.of_copy()

    @property
    def create_time_ns(self) -> int:
        """When the stream was made: tells it from another of its name."""
        return self._record.stream.create_time.ToNanoseconds()

    def is_of(self, record: pb.StreamRecord) -> bool:
        """Whether `record` is this very stream under this very lease: a deleted one's name may come back."""
        is_same_stream = record.stream.create_time == self._record.stream.create_time
        return is_same_stream and record.lease == self.lease

    @contextmanager
    def in_use(self) -> Iterator[None]:
        """Keeps the stream from being dropped as idle."""
        self._num_users += 1
        try:
            yield
        finally:
            self._num_users -= 1
            self.last_used = time.monotonic()

    async def load(self) -> StreamFold:
        """Bring the memory state here, if it is not, and start to fold.

        Raises:
            Overloaded: If it does not fit in memory.
            CorruptState: If no retained checkpoint can be read, and the log does not go back to its beginning.
            ModelMismatch: If it belongs to other weights.
        """
        async with self._load_lock:
            if self._failure is not None:
                raise self._failure
            if self._fold is not None:
                return self._fold
            parts = self._parts
            with self.in_use():
                await self._room.reserve(self._largest_policy)
                try:
                    self._record, state = await self._load_state()
                    # The one in charge may have come since.
                    await asyncio.to_thread(parts.policies.refresh)
                    fold = await parts.engine.call(lambda: self._new_fold(state))
                    if self._failure is not None:
                        raise self._failure
                except BaseException:
                    self._room.release()
                    raise
            fold.on_progress = lambda: _notify(self._loop, self._on_progress)
            self._fold = fold
            self._pump_task = asyncio.create_task(self._pump_forever(fold), name=f"pump {self.name}")
            return fold

    def advance(self) -> None:
        """The log may have grown: read on."""
        self._wake.set()
        if self._fold is None and self._background_load is None:
            self._background_load = asyncio.create_task(self._load_in_background())

    async def confirmed(self) -> api.Stream:
        """The stream as the state store has it now; its memory here is of that past.

        Raises:
            NotOwner: If another worker took the stream, it was deleted and made anew, or the store was rolled back. The
                stream has failed here then.
        """
        known, mark = self._record.stream, None if self._fold is None else self._fold.read_mark
        try:
            request = pb.GetStreamRequest(name=self.name, seen=mark)
            record = (await self._parts.store.get_stream(request)).record
        except StateLost as error:
            raise self._lost(error) from error
        if not self.is_of(record):
            raise self._lost("another worker took it")
        # A newer commit than is known here is this worker's own, whose answer is still on its way.
        found = record.stream
        is_older = found.checkpoint_version < known.checkpoint_version
        is_same = found.checkpoint_version == known.checkpoint_version
        if is_older or (is_same and found.checkpoint_chain != known.checkpoint_chain):
            raise self._lost("its checkpoints were rolled back")
        return found

    async def reach(self, offset: int, make: Callable[[StreamFold], T]) -> "asyncio.Future[T]":
        """A future of what `make` returns on the engine thread once all full segments below `offset` are folded."""
        fold = await self.load()
        future: asyncio.Future[T] = self._loop.create_future()
        self._pending.add(future)
        future.add_done_callback(self._pending.discard)

        def act() -> None:
            if not future.done():
                value = make(fold)
                _notify(self._loop, lambda: None if future.done() else future.set_result(value))

        fold.at_offset(offset, act)
        self.advance()
        return future

    async def flush(self, offset: int) -> AsyncIterator[bool]:
        """Fold all full segments below `offset` and commit there; False about once a second, True when done."""
        with self.in_use():
            task = asyncio.create_task(self._flush(offset))
            try:
                while not await is_done_in_a_second(task):
                    yield False
                task.result()
            finally:
                task.cancel()
            yield True

    async def committed_copy(self) -> EphemeralCopy:
        """A copy of the memory state of the newest committed checkpoint; the caller has reserved its bytes.

        It has its `record`: by the time that the copy is there, a newer checkpoint may have been committed.
        """
        fold = await self.load()

        def copied() -> EphemeralCopy | None:
            # The record last: a commit sets it before it counts tokens as committed.
            return replace(fold.boundary_copy(), record=self._record) if fold.num_uncommitted_tokens == 0 else None

        copy = await self._parts.engine.call(copied)
        if copy is None:
            record, state = await self._load_state()
            no_tail = np.empty(0, dtype=np.int64)
            copy = EphemeralCopy(state, no_tail, record.manifest.applied_offset, state.state_bytes, record)
        return copy

    async def commit(self, num_tokens: int | None = None) -> None:
        """Commit a checkpoint of at least the first `num_tokens` tokens; default: of what is folded.

        Waits for the state store as long as it takes.

        Raises:
            NotOwner: If the stream is another worker's now; it has failed here then.
        """
        fold = self._fold
        if fold is None:
            return
        goal = fold.num_tokens if num_tokens is None else num_tokens
        async with self._commit_lock:
            pause_seconds = 0.2
            while fold.num_committed_tokens < goal:
                if self._failure is not None:
                    raise self._failure
                try:
                    await self._commit_once(fold)
                except (Unavailable, DeadlineTooShort):
                    metrics.COMMITS.labels("unavailable").inc()
                    logger.warning("a checkpoint waits for the state store", extra={"stream": self.name})
                    await asyncio.sleep(pause_seconds)
                    pause_seconds = min(2 * pause_seconds, _LONGEST_PAUSE_SECONDS)

    def commit_if_due(self) -> None:
        """Start a commit if enough segments or seconds have passed that no checkpoint has."""
        fold, config = self._fold, self._parts.config
        if fold is None or self._uncommitted_since is None or self._background_commit is not None:
            return
        num_due = config.checkpoint_segments * self.settings.segment_length
        is_late = time.monotonic() - self._uncommitted_since >= config.checkpoint_seconds
        if (fold.num_uncommitted_tokens >= num_due or is_late) and not self._commit_lock.locked():
            self._background_commit = asyncio.create_task(self._commit_in_background())

    async def close(self, *, commits: bool) -> None:
        """Stop folding, commit what is folded if asked to, and free the memory state."""
        await self._stop_pump()
        try:
            if commits and self._failure is None:
                await self.commit()
        finally:
            self.fail(NotOwner(f"{self.name} was let go"))

    def fail(self, error: BaseException) -> None:
        """Give the stream up: nothing of it is served or committed here any more."""
        if self._failure is not None:
            return
        self._failure = error
        for task in (self._pump_task, self._background_load, self._background_commit):
            if task is not None and task is not asyncio.current_task():
                task.cancel()
        for future in list(self._pending):
            if not future.done():
                future.set_exception(error)
        self._fold = None
        self._room.release()
        self._on_gone(self, error)

    def _lost(self, reason: object) -> NotOwner:
        """Give the stream up, and the error that says so."""
        error = NotOwner(f"{self.name} is not held here any more: {reason}")
        self.fail(error)
        return error

    @property
    def _largest_policy(self) -> EvictionPolicy:
        return self._parts.policy if self._parts.sidecar is None else self._parts.policies.largest

    async def _load_state(self) -> tuple[pb.StreamRecord, MemoryState]:
        """The memory state of the newest checkpoint that can be read, and the stream when that was its newest.

        A damaged one is passed over: from the one before it the log is folded again, to the same state.
        """
        parts, record = self._parts, self._record
        while record.HasField("manifest"):
            manifest = record.manifest
            try:
                return record, await parts.checkpoints.load(self.name, manifest, self.settings)
            except (CorruptState, MissingChunk) as error:
                record = (await parts.store.get_stream(pb.GetStreamRequest(name=self.name))).record
                if not self.is_of(record):
                    # Whoever took it may have retired the checkpoint by now.
                    raise self._lost("another worker took it") from error
                if record.manifest == manifest:
                    raise
                if isinstance(error, CorruptState):
                    metrics.QUARANTINES.inc()
        if record.stream.log_start_offset:
            raise CorruptState(f"{self.name} has no sound checkpoint, and its log does not go back to the beginning")
        return record, await parts.engine.call(lambda: parts.decoder.new_state(self.settings, parts.policy))

    def _new_fold(self, state: MemoryState) -> StreamFold:
        parts, record, manifest = self._parts, self._record, self._record.manifest
        policy = parts.policy
        if parts.sidecar is not None and manifest.decisions:
            policy = parts.policies.by_name.get(policy_in_charge(manifest.decisions[-1].policy), policy)
        num_recorded = record.recorded_tokens // self.settings.segment_length
        self._evictions = StreamEvictions(
            self.name,
            policy,
            parts.sidecar,
            lambda segment: recorded_policy(segment, record.recorded_decisions, num_recorded, parts.policies.by_name),
            self._room.suffices,
        )
        fold = StreamFold(
            parts.decoder,
            parts.tokenizer,
            policy,
            state,
            manifest,
            max_uncommitted_segments=2 * parts.config.checkpoint_segments,
        )
        fold.choose_policy = self._evictions.choose
        return fold

    async def _flush(self, offset: int) -> None:
        await self.confirmed()
        reached = await self.reach(offset, lambda fold: fold.num_tokens)
        await self.commit(await reached)

    async def _pump_forever(self, fold: StreamFold) -> None:
        """Feed the fold until the stream is closed or fails."""
        while True:
            try:
                await self._pump(fold)
            except (Unavailable, DeadlineTooShort):
                logger.warning("the log waits for the state store", extra={"stream": self.name})
                await asyncio.sleep(1.0)
            except asyncio.CancelledError:
                raise
            except BaseException as error:
                # Whatever one stream's bytes break must not take the other streams with it.
                if not isinstance(error, EunoeError):
                    logger.exception("a stream failed", extra={"stream": self.name})
                    error = FoldFailed(f"the log of {self.name} broke its fold")
                self.fail(error)
                return

    async def _pump(self, fold: StreamFold) -> None:
        while True:
            self._wake.clear()
            has_read = await self._read_log(fold)
            if fold.has_work:
                # There may be a larger one since the load.
                await self._room.grow(self._largest_policy)
                folding = self._parts.engine.submit(fold.fold())
                try:
                    await self._read_log(fold)
                    await folding
                finally:
                    # Closed between two turns, that is, at a segment boundary.
                    folding.cancel()
                if fold.is_paused:
                    await self.commit()
            elif not has_read:
                self._is_pump_waiting = True
                try:
                    await self._wake.wait()
                finally:
                    self._is_pump_waiting = False

    async def _read_log(self, fold: StreamFold) -> bool:
        """Offer the next records to the fold, unless enough are waiting; whether there were any."""
        if fold.read_offset - fold.fed_offset >= _READ_BYTES:
            return False
        request = pb.ReadLogRequest(name=self.name, offset=fold.read_offset, max_bytes=_READ_BYTES)
        has_read = False
        async for record in self._parts.store.read_log(request):
            failpoint("worker.record-read")
            fold.offer(record)
            has_read = True
        return has_read

    async def _commit_once(self, fold: StreamFold) -> None:
        start = time.monotonic()
        snapshot = await self._parts.engine.call(fold.snapshot)
        try:
            self._record = await self._parts.checkpoints.commit(self.name, self.lease, snapshot, self._record.stream)
        except (Conflict, StateLost) as error:
            # Another worker's now, or computed from a past that the store has lost: the next owner loads what is there.
            metrics.COMMITS.labels("lease_lost" if isinstance(error, Conflict) else "rolled_back").inc()
            raise self._lost(error) from error
        except EunoeError as error:
            if not isinstance(error, Unavailable | DeadlineTooShort):
                self.fail(error)
            raise
        failpoint("worker.committed")
        fold.num_committed_tokens = snapshot.manifest.tokens
        self._uncommitted_since = start if fold.num_uncommitted_tokens else None
        metrics.COMMITS.labels("committed").inc()
        metrics.COMMIT_SECONDS.observe(time.monotonic() - start)

    async def _load_in_background(self) -> None:
        try:
            await self.load()
        except EunoeError as error:
            # The sweep tries again.
            logger.warning("a stream was not loaded", extra={"stream": self.name, "error": str(error)})
        finally:
            self._background_load = None

    async def _commit_in_background(self) -> None:
        try:
            await self.commit()
        except EunoeError as error:
            logger.warning("a checkpoint failed", extra={"stream": self.name, "error": str(error)})
        finally:
            self._background_commit = None

    def _on_progress(self) -> None:
        if self._uncommitted_since is None:
            self._uncommitted_since = time.monotonic()
        self.commit_if_due()

    async def _stop_pump(self) -> None:
        if self._pump_task is not None:
            self._pump_task.cancel()
            await asyncio.wait([self._pump_task])


def memory_settings(settings: api.StreamSettings) -> MemorySettings:
    """A stream's settings, complete as the state store keeps them, as the decoder knows them."""
    is_original = settings.positions == api.POSITION_MODE_ORIGINAL
    return MemorySettings(
        kv_budget_tokens=settings.kv_budget_tokens,
        segment_length=settings.segment_length,
        num_sink_tokens=settings.num_sink_tokens,
        positions="original" if is_original else "compact",
    )


async def is_done_in_a_second(future: "asyncio.Future[T]") -> bool:
    """Wait for a future no longer than callers wait for a sign of progress."""
    done, _ = await asyncio.wait([future], timeout=PROGRESS_SECONDS)
    return bool(done)


def _notify(loop: asyncio.AbstractEventLoop, action: Callable[[], None]) -> None:
    loop.call_soon_threadsafe(action)
