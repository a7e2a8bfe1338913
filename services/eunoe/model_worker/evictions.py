"""Who decides which slots of a stream stay: one policy, or what the eviction sidecar says, segment by segment."""

import logging
import time
from collections.abc import Callable, Mapping, Sequence

import numpy as np
import torch

from eunoe.eviction import EvictionPolicy, ScoringPolicy, Statistics, Window
from eunoe.eviction.catalogue import Choice
from eunoe.eviction.fallback import Fallback, decided_by, policy_in_charge
from eunoe.internal.v1 import eviction_sidecar_pb2 as pb
from eunoe.internal.v1.state_store_pb2 import DecisionRun
from eunoe.model_worker import metrics
from eunoe.model_worker.fold import run_of
from eunoe.model_worker.sidecar import NoScores, Sidecar

logger = logging.getLogger(__name__)


class StreamEvictions:
    """One stream's policies.

    Args:
        stream: Full resource name.
        policy: In charge until the sidecar says another; for good if there is none.
        sidecar: Of the worker.
        recorded: What segments are folded with that were folded before: a policy by the segment's index, or None.
        has_room: Whether a policy that the sidecar says fits in memory; until it does, the one before it stays.
    """

    def __init__(
        self,
        stream: str,
        policy: EvictionPolicy,
        sidecar: Sidecar | None,
        recorded: Callable[[int], EvictionPolicy | None] = lambda segment: None,
        has_room: Callable[[EvictionPolicy], bool] = lambda policy: True,
    ) -> None:
        self._stream = stream
        self._policy = policy
        self._sidecar = sidecar
        self._recorded = recorded
        self._has_room = has_room
        self._waiting = ""
        self._is_on_fallback = False

    def choose(self, segment: int) -> EvictionPolicy:
        """The policy of the segment of that index; on the engine thread. Its name is what decided, after the pass."""
        if (recorded := self._recorded(segment)) is not None:
            return recorded
        if self._sidecar is None:
            return self._policy
        start = time.monotonic()
        choice = self._admitted(self._sidecar.choose(self._stream, self._policy))
        self._policy = choice.policy
        spent_seconds = time.monotonic() - start
        return SegmentPolicy(self._sidecar, choice, self._stream, segment, spent_seconds, self._note)

    def of_copy(self) -> EvictionPolicy:
        """The policy of a copy that is never committed, and of which nothing is recorded."""
        return self._policy if self._sidecar is None else CopyPolicy(self._sidecar, self._policy)

    def _admitted(self, choice: Choice) -> Choice:
        if self._has_room(choice.policy):
            self._waiting = ""
            return choice
        metrics.UNANSWERED_CHOICES.labels("no-room").inc()
        if self._waiting != choice.policy.name:
            self._waiting = choice.policy.name
            extra = {"stream": self._stream, "policy": choice.policy.name}
            logger.warning("a policy waits for room for its statistics", extra=extra)
        return Choice(self._policy)

    def _note(self, decided: EvictionPolicy) -> None:
        """Log when the policy ceases to decide, and when it does again: once each, however many segments it lasts."""
        is_fallback = isinstance(decided, Fallback)
        if is_fallback == self._is_on_fallback:
            return
        self._is_on_fallback = is_fallback
        extra = {"stream": self._stream, "policy": decided.name}
        if is_fallback:
            logger.warning("a stream is decided without its policy", extra=extra)
        else:
            logger.info("a stream is decided by its policy again", extra=extra)


class CopyPolicy:
    """A policy that the sidecar scores for; sinks and recent where it does not.

    Args:
        sidecar: Of the worker.
        policy: In charge.
        spent_seconds: That the sidecar has taken already of the time that it has for the next scores.
    """

    def __init__(self, sidecar: Sidecar, policy: EvictionPolicy, spent_seconds: float = 0.0) -> None:
        self._sidecar = sidecar
        self._policy = policy
        self._decided = policy
        self._spent_seconds = spent_seconds

    @property
    def name(self) -> str:
        """Of what decided last."""
        return self._decided.name

    @property
    def statistics(self) -> Statistics | None:
        """See `EvictionPolicy`."""
        return self._policy.statistics

    def keep(self, window: Window, budget: int) -> torch.Tensor:
        """See `EvictionPolicy.keep`."""
        self._decided = self._policy
        if not isinstance(self._policy, ScoringPolicy):
            return self._policy.keep(window, budget)
        try:
            scores_LHS = self._sidecar.scores(self._policy, window, self._spent_seconds)
            return self._policy.keep_scored(scores_LHS, window, budget)
        except NoScores as error:
            self._decided = Fallback(error.reason, self._policy)
            metrics.FALLBACKS.labels(error.reason).inc()
            return self._decided.keep(window, budget)


class SegmentPolicy(CopyPolicy):
    """The policy of one segment of a stream: compared with its shadow, and recorded; `note` gets what decided."""

    def __init__(
        self,
        sidecar: Sidecar,
        choice: Choice,
        stream: str,
        segment: int,
        spent_seconds: float,
        note: Callable[[EvictionPolicy], None],
    ) -> None:
        super().__init__(sidecar, choice.policy, spent_seconds)
        self._note = note
        self._shadow = choice.shadow
        self._stream = stream
        self._segment = segment

    def keep(self, window: Window, budget: int) -> torch.Tensor:
        """See `EvictionPolicy.keep`."""
        kept_LHS = super().keep(window, budget)
        self._note(self._decided)
        if self._shadow is not None and not isinstance(self._decided, Fallback):
            self._sidecar.compare(self.name, kept_LHS, self._shadow, window, budget)
        dropped_first, dropped_last = dropped_runs(window.positions_LHS, kept_LHS)
        eviction = pb.RecordEvictionRequest(
            stream=self._stream,
            segment=self._segment,
            policy=self.name,
            num_slots_before=window.num_slots,
            num_slots_after=kept_LHS.shape[2],
            dropped_first=dropped_first.tolist(),
            dropped_last=dropped_last.tolist(),
            time_ns=time.time_ns(),
        )
        self._sidecar.record(eviction)
        return kept_LHS


def recorded_policy(
    segment: int, decisions: Sequence[DecisionRun], num_segments: int, policies: Mapping[str, EvictionPolicy]
) -> EvictionPolicy | None:
    """What decided in one of the first `num_segments` segments; None if that is not recorded, or not here."""
    if segment >= num_segments:
        return None
    run = run_of(segment, decisions)
    if run is None or policy_in_charge(run.policy) not in policies:
        return None
    return decided_by(run.policy, policies)


def dropped_runs(positions_LHS: torch.Tensor, kept_LHS: torch.Tensor) -> tuple[np.ndarray, np.ndarray]:
    """First and last ones of the runs of positions that some head had, and that none has any more; ascending."""
    is_kept_LHS = torch.zeros(positions_LHS.shape, dtype=torch.bool).scatter_(2, kept_LHS, True)
    dropped = np.setdiff1d(positions_LHS[~is_kept_LHS].numpy(), positions_LHS[is_kept_LHS].numpy())
    # No position is the next of -2, or the one before it.
    return dropped[np.diff(dropped, prepend=-2) != 1], dropped[np.diff(dropped, append=-2) != 1]
