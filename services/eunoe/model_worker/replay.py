"""What a verification folds: the recorded checkpoints, the decisions between them, and the fold that must be equal."""

from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from itertools import pairwise

from eunoe.api.v1 import long_context_pb2 as api
from eunoe.decoder import state_codec
from eunoe.decoder.decoder import Decoder
from eunoe.eviction.fallback import decided_by, policy_in_charge
from eunoe.eviction.policy import EvictionPolicy
from eunoe.internal.v1 import state_store_pb2 as pb
from eunoe.model_worker.engine import Job
from eunoe.model_worker.fold import StreamFold, run_of


class Recorded:
    """What is recorded of a stream from a memory state on.

    Attributes:
        num_segments: From `start` to the newest checkpoint.

    Args:
        start: The manifest of the state that a fold goes on from; an empty one is the empty memory.
        checkpoints: The retained ones, oldest first; at least one.
        segment_length: Of the stream.
        policies: Those that are here, by name.
    """

    def __init__(
        self,
        start: pb.Manifest,
        checkpoints: Sequence[pb.Manifest],
        segment_length: int,
        policies: Mapping[str, EvictionPolicy],
    ) -> None:
        self.num_segments = (checkpoints[-1].tokens - start.tokens) // segment_length
        self._start = start
        self._checkpoints = checkpoints
        self._segment_length = segment_length
        self._policies = policies
        self._runs = _runs_between(
            start.tokens // segment_length, checkpoints[-1].tokens // segment_length, checkpoints[-1].decisions
        )

    def missing(self, decoder: Decoder) -> list[api.Missing]:
        """What is not here of that which loading the checkpoints and folding between them takes."""
        missing: dict[tuple[int, str], api.Missing] = {}

        def need(kind: api.MissingKind, recorded: str, available: Sequence[str], first_segment: int = 0) -> None:
            if recorded not in available:
                missing.setdefault(
                    (kind, recorded),
                    api.Missing(
                        kind=kind, recorded=recorded, available=", ".join(available), first_segment=first_segment
                    ),
                )

        for manifest in self._checkpoints:
            need(api.MISSING_KIND_ENCODING, str(manifest.encoding_version), [*map(str, state_codec.VERSIONS)])
            need(api.MISSING_KIND_MODEL, manifest.model_digest, [decoder.model_digest])
        for run in self._runs:
            need(api.MISSING_KIND_NUMERICS, run.numerics_id, [decoder.numerics_id], run.first_segment)
            need(api.MISSING_KIND_POLICY, policy_in_charge(run.policy), sorted(self._policies), run.first_segment)
        return list(missing.values())

    def policy_at(self, segment: int) -> EvictionPolicy:
        """The policy that the segment of that index was folded with; a fallback where it was one."""
        run = run_of(segment, self._runs)
        assert run is not None, "the first run begins with the first segment"
        return decided_by(run.policy, self._policies)

    def difference(self, fold: StreamFold) -> api.Difference | None:
        """Where the fold's state is not that of a checkpoint made at this very place."""
        for manifest in self._awaited():
            if manifest.tokens == fold.num_tokens and (found := fold.digest()) != manifest.state_digest:
                message = f"the memory folded anew is another at offset {manifest.applied_offset}"
                return _of_memory(manifest, message, found)
        return None

    def unreached(self, fold: StreamFold) -> api.Difference | None:
        """The first checkpoint that the fold, which has ended, did not come to."""
        for manifest in self._awaited():
            if manifest.tokens > fold.num_tokens or manifest.tokens % self._segment_length:
                return _of_memory(manifest, f"no segment of the log ends after {manifest.tokens} tokens")
        return None

    def num_folded(self, fold: StreamFold) -> int:
        """Tokens that the fold has taken in."""
        return fold.num_tokens - self._start.tokens

    def _awaited(self) -> list[pb.Manifest]:
        return [manifest for manifest in self._checkpoints if manifest.tokens > self._start.tokens]


def replay(fold: StreamFold, recorded: Recorded, on_tokens: Callable[[int], None]) -> Job[api.Difference | None]:
    """Fold what was offered, each segment with its recorded policy; returns the first difference, at which it ends."""
    fold.choose_policy = recorded.policy_at
    with closing(fold.fold()) as turns:
        while not fold.is_paused:
            try:
                next(turns)
            except StopIteration:
                break
            except ValueError as error:
                # A log that has its chain, and yet is not the one that the state is of.
                message = f"the log does not fit to the memory: {error}"
                return api.Difference(part=api.VERIFIED_PART_MEMORY, offset=fold.folded_offset, message=message)
            on_tokens(recorded.num_folded(fold))
            difference = recorded.difference(fold)
            if difference is not None:
                return difference
            yield None
    return None


def _runs_between(first: int, end: int, decisions: Sequence[pb.DecisionRun]) -> list[pb.DecisionRun]:
    """The runs with a segment in [first, end); one that says nothing for segments whose run was dropped."""
    bounds = [*decisions, pb.DecisionRun(first_segment=end)]
    runs = [run for run, after in pairwise(bounds) if run.first_segment < end and after.first_segment > first]
    if first < end and not (runs and runs[0].first_segment <= first):
        runs.insert(0, pb.DecisionRun(first_segment=first))
    return runs


def _of_memory(manifest: pb.Manifest, message: str, found: str = "") -> api.Difference:
    return api.Difference(
        part=api.VERIFIED_PART_MEMORY,
        offset=manifest.applied_offset,
        recorded=manifest.state_digest,
        found=found,
        message=message,
    )
