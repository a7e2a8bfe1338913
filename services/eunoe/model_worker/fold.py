"""The fold of one stream's log into its memory state. Everything here runs on the engine thread.

The state is a pure function of the log and the recorded decisions, within one numerics_id: segments are cut only at
multiples of the segment length, only closed pre-tokens count, and a segment is one pass over exactly `segment_length`
rows of one stream. What fills no segment yet runs only on copies, which are never committed. Between two turns of the
engine the state always stands at a segment boundary, so a checkpoint may be encoded at any of them.
"""

import threading
import time
import uuid
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import xxhash

from eunoe.api.v1 import long_context_pb2 as api
from eunoe.decoder import state_codec
from eunoe.decoder.decoder import Decoder
from eunoe.decoder.log_tokenizer import LogTokenizer, RecordKind
from eunoe.decoder.memory_state import MAX_TOKENS, MemorySettings, MemoryState
from eunoe.decoder.tokenizer import Tokenizer
from eunoe.eviction.policy import EvictionPolicy
from eunoe.internal.v1 import state_store_pb2 as pb
from eunoe.model_worker import metrics
from eunoe.model_worker.engine import Job
from eunoe.runtime.errors import FailedPrecondition
from eunoe.runtime.failpoints import failpoint

# Bytes tokenized at a time: a few segments, so that a turn stays short and milestones pass often.
FEED_BYTES = 8 * 1024

# The state store takes 1,024.
_MAX_DECISIONS = 1000

RECORD_KINDS: dict[int, RecordKind] = {
    api.RECORD_KIND_UNSPECIFIED: "text",
    api.RECORD_KIND_TEXT: "text",
    api.RECORD_KIND_TOKEN_IDS: "token_ids",
}


@dataclass(slots=True, eq=False)
class EphemeralCopy:
    """A memory state to answer from, never committed.

    Attributes:
        state: At a segment boundary.
        tail: Tokens of the log after it, int64; fewer than a segment and an open pre-token.
        offset: Bytes of the log that state and tail stand for.
        state_bytes: Bytes of the memory state it was copied from.
        record: The stream as it was when `state` was its newest checkpoint; None where that was not asked for.
    """

    state: MemoryState
    tail: np.ndarray
    offset: int
    state_bytes: int
    record: pb.StreamRecord | None = None


@dataclass(frozen=True, slots=True, eq=False)
class Snapshot:
    """A memory state ready to be committed: the manifest lacks nothing but its version.

    Attributes:
        read: Where the reading of the log ends that the state was folded from; None if nothing was read.
    """

    manifest: pb.Manifest
    chunks: list[tuple[str, bytes]]
    read: api.LogMark | None


@dataclass(frozen=True, slots=True, eq=False)
class _Milestone:
    offset: int
    action: Callable[[], None]


class StreamFold:
    """One stream's memory state, its place in the log, and its decisions.

    The loop offers log records and sets milestones (both thread-safe); the engine runs `fold` as a job.

    Args:
        decoder: Folds.
        tokenizer: Of the same model.
        policy: Evicts, unless `choose_policy` says another. Its name is recorded in the decisions, as it is after the
            pass.
        state: At a segment boundary; of a new stream or decoded from a checkpoint.
        manifest: The checkpoint that `state` came from; an empty one for a new stream.
        max_uncommitted_segments: `fold` pauses at so many; the checkpoint must catch up first.
    """

    def __init__(
        self,
        decoder: Decoder,
        tokenizer: Tokenizer,
        policy: EvictionPolicy,
        state: MemoryState,
        manifest: pb.Manifest,
        max_uncommitted_segments: int,
    ) -> None:
        self._decoder = decoder
        self._tokenizer = tokenizer
        self.policy = policy
        self._state = state
        self._log = LogTokenizer(
            tokenizer, offset=manifest.applied_offset, num_applied_tokens=manifest.applied_pretoken_tokens
        )
        self._decisions = list(manifest.decisions)
        self._max_uncommitted_tokens = max_uncommitted_segments * state.settings.segment_length
        self._offered: deque[tuple[bytes, RecordKind]] = deque()
        self._milestones: list[_Milestone] = []
        self._lock = threading.Lock()
        # Where the loop goes on reading the log: what was offered ends here.
        self.read_offset: int = self._log.next_offset
        self.fed_offset: int = self._log.next_offset
        # ... and so does this mark, by which the store knows whether it still has the log that was read.
        self.read_mark: api.LogMark | None = None
        self.num_tokens: int = state.num_tokens
        self.num_committed_tokens: int = state.num_tokens
        self.folded_offset: int = manifest.applied_offset
        self.on_progress: Callable[[], None] = lambda: None
        # Gets the index of each segment before its pass.
        self.choose_policy: Callable[[int], EvictionPolicy] = lambda segment: self.policy

    @property
    def settings(self) -> MemorySettings:
        """What the stream fixed."""
        return self._state.settings

    @property
    def resident_bytes(self) -> int:
        """Bytes that the state, or a copy of it, holds in memory."""
        return self._state.resident_bytes

    @property
    def num_uncommitted_tokens(self) -> int:
        """Tokens folded since the newest committed checkpoint."""
        return self.num_tokens - self.num_committed_tokens

    @property
    def is_paused(self) -> bool:
        """Whether `fold` waits for a commit."""
        return self.num_uncommitted_tokens >= self._max_uncommitted_tokens

    @property
    def has_work(self) -> bool:
        """Whether `fold` would have something to do; read on the loop while no fold runs."""
        with self._lock:
            is_awaited = any(milestone.offset <= self.read_offset for milestone in self._milestones)
        return bool(self._offered) or is_awaited or self._log.num_closed >= self.settings.segment_length

    def offer(self, record: pb.ReadLogResponse) -> None:
        """Take the next piece of the log; it is tokenized when its turn comes."""
        assert record.offset == self.read_offset, f"piece at {record.offset}, expected at {self.read_offset}"
        kind = RECORD_KINDS[record.kind]
        for start in range(0, len(record.data), FEED_BYTES):
            self._offered.append((record.data[start : start + FEED_BYTES], kind))
        self.read_offset += len(record.data)
        self.read_mark = api.LogMark(offset=self.read_offset, chain=record.chain)

    def at_offset(self, offset: int, action: Callable[[], None]) -> None:
        """Have `action` called on the engine thread once all below `offset` is taken in and no full segment is left."""
        with self._lock:
            self._milestones.append(_Milestone(offset, action))

    def fold(self) -> Job[None]:
        """Fold all full segments of what was offered, a turn each, and act at milestones in between.

        Raises:
            FailedPrecondition: If the stream has no position left for a segment; the state is as it was.
        """
        length = self.settings.segment_length
        while True:
            while self._log.num_closed >= length:
                if self.is_paused:
                    return
                self._fold_segment()
                yield None
            self._pass_milestones()
            if not self._offered:
                return
            data, kind = self._offered.popleft()
            self._log.feed(data, kind)
            self.fed_offset = self._log.next_offset

    def digest(self) -> str:
        """Digest of the state as it stands, and of its place in the log."""
        return state_codec.state_digest(self._state, *self._log.cursor)

    def snapshot(self) -> Snapshot:
        """Encode the state as it stands."""
        failpoint("worker.before-snapshot")
        applied_offset, applied_pretoken_tokens = self._log.cursor
        chunks = [(uuid.uuid4().hex, chunk) for chunk in state_codec.encode(self._state)]
        manifest = pb.Manifest(
            encoding_version=state_codec.version(self._state),
            applied_offset=applied_offset,
            applied_pretoken_tokens=applied_pretoken_tokens,
            tokens=self._state.num_tokens,
            state_bytes=self._state.state_bytes,
            state_digest=self.digest(),
            model_digest=self._decoder.model_digest,
            decisions=self._decisions,
            chunks=[
                pb.ChunkRef(chunk_id=chunk_id, length=len(data), digest=xxhash.xxh3_128_digest(data))
                for chunk_id, data in chunks
            ],
        )
        return Snapshot(manifest, chunks, self.read_mark)

    def boundary_copy(self) -> EphemeralCopy:
        """A copy of the state as it stands, without what fills no segment yet."""
        no_tail = np.empty(0, dtype=np.int64)
        return EphemeralCopy(self._state.copy(), no_tail, self._log.cursor[0], self._state.state_bytes)

    def accepted_copy(self) -> EphemeralCopy:
        """A copy that stands for all that was tokenized, the open pre-token closed on the copy only."""
        tail = self._log.close_copy()
        return EphemeralCopy(self._state.copy(), tail, self._log.next_offset, self._state.state_bytes)

    def _fold_segment(self) -> None:
        start = time.monotonic()
        length = self.settings.segment_length
        failpoint("worker.before-segment")
        if self._state.num_tokens + length > MAX_TOKENS:
            raise FailedPrecondition(f"a stream ends at {MAX_TOKENS:,} tokens: go on in a new one")
        segment = self._state.num_tokens // length
        self.policy = self.choose_policy(segment)
        self._decoder.prefill(self._state, self._log.take(length), self.policy)
        self._record_decision(segment)
        failpoint("worker.segment-folded")
        self.num_tokens = self._state.num_tokens
        self.folded_offset = self._log.cursor[0]
        metrics.FOLDED_TOKENS.inc(length)
        metrics.SEGMENT_SECONDS.observe(time.monotonic() - start)
        self.on_progress()

    def _record_decision(self, segment: int) -> None:
        """Open a new run where this segment was folded under another decision than the one before it."""
        policy, numerics_id = self.policy.name, self._decoder.numerics_id
        last = self._decisions[-1] if self._decisions else None
        if last is None or (last.policy, last.numerics_id) != (policy, numerics_id):
            self._decisions.append(pb.DecisionRun(first_segment=segment, policy=policy, numerics_id=numerics_id))
            # Of a sidecar that comes and goes for weeks a manifest has no room to tell. Those of the segments between
            # the retained checkpoints are always among the newest.
            del self._decisions[:-_MAX_DECISIONS]

    def _pass_milestones(self) -> None:
        with self._lock:
            fed = self._log.next_offset
            passed = [milestone for milestone in self._milestones if milestone.offset <= fed]
            self._milestones = [milestone for milestone in self._milestones if milestone.offset > fed]
        for milestone in passed:
            milestone.action()


def run_of(segment: int, decisions: Sequence[pb.DecisionRun]) -> pb.DecisionRun | None:
    """The run that a segment is part of; None before the first."""
    return next((run for run in reversed(decisions) if run.first_segment <= segment), None)
