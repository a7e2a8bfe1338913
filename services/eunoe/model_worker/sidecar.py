"""The worker's side of the eviction sidecar: what is asked of it, and what is done when it does not answer.

Everything here runs on the engine thread and blocks it, for a segment no longer than the deadline: no answer, a late
one or nonsense is a fallback, and the segment goes on. After a late answer the sidecar is left alone for ten deadlines,
so that one that hangs costs a tenth of the time at most.
"""

import logging
import time
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from eunoe.clients.eviction_sidecar import EvictionSidecarClient
from eunoe.eviction import EvictionPolicy, ScoringPolicy
from eunoe.eviction.catalogue import Choice, is_observed
from eunoe.eviction.policy import Window, score, scoring_numerics
from eunoe.eviction.policy_files import PolicyFiles
from eunoe.eviction.tensor_payload import from_message, scores_digest, to_message
from eunoe.internal.v1 import eviction_sidecar_pb2 as pb
from eunoe.model_worker import metrics
from eunoe.runtime.errors import DeadlineTooShort, EunoeError, Overloaded, PolicyNotFound, Unavailable
from eunoe.runtime.payload_files import PayloadWriter

logger = logging.getLogger(__name__)

_REST_DEADLINES = 10
# What is logged only once.
_MAX_TOLD_OF = 100
_REASONS: Mapping[type[EunoeError], str] = {
    DeadlineTooShort: "late",
    Unavailable: "unavailable",
    PolicyNotFound: "unknown-policy",
    Overloaded: "no-room",
}


@dataclass(eq=False)
class NoScores(Exception):
    """There are no scores, for a reason of one word."""

    reason: str


class Sidecar:
    """One worker's sidecar.

    Args:
        client: Calls it.
        files: The policies that are here: features and statistics come from them.
        deadline_seconds: The client's.
        scores_in_process: Have policies score here; the sidecar chooses, compares and records all the same.
        payload_dir: Where large tensors are written, into files of names that begin with `stem`; None sends them in
            messages.
    """

    def __init__(
        self,
        client: EvictionSidecarClient,
        files: PolicyFiles,
        *,
        deadline_seconds: float,
        scores_in_process: bool,
        payload_dir: Path | None,
        stem: str,
    ) -> None:
        self._client = client
        self._files = files
        self._rest_seconds = _REST_DEADLINES * deadline_seconds
        self._rests_until = 0.0
        self._scores_in_process = scores_in_process
        self._features, self._shadow_features, self._shadow_kept = (
            PayloadWriter(payload_dir, f"{stem}-{part}") if payload_dir is not None else None
            for part in ("main", "shadow", "kept")
        )
        self._told_of: set[tuple[str, str]] = set()

    def choose(self, stream: str, present: EvictionPolicy) -> Choice:
        """What decides for a stream from now on: what the sidecar says, the present policy if it says nothing.

        A shadow that cannot be scored beside the policy is left out.
        """
        try:
            response = self._called(self._client.choose_policy, stream)
            policy = self._found(response.policy)
        except NoScores as error:
            metrics.UNANSWERED_CHOICES.labels(error.reason).inc()
            return Choice(present)
        return Choice(policy, self._shadow(response.shadow_policy, policy))

    def scores(self, policy: ScoringPolicy, window: Window, spent_seconds: float = 0.0) -> torch.Tensor:
        """The policy's scores of the window, float32 [L, H, S].

        Args:
            policy: Scores.
            window: A memory state at a segment boundary.
            spent_seconds: Of the deadline.

        Raises:
            NoScores: If there are none in time that can be used.
        """
        feature_LHSI = policy.features(window)
        if self._scores_in_process:
            scores_LHS = score(policy, feature_LHSI)
        else:
            scores_LHS = self._asked(policy, feature_LHSI, spent_seconds)
        is_fitting = scores_LHS.shape == feature_LHSI.shape[:3] and scores_LHS.dtype == torch.float32
        # Infinity is for sinks and the newest slots.
        if not is_fitting or not scores_LHS.isfinite().all():
            raise NoScores("bad-scores")
        return scores_LHS

    def compare(self, policy: str, kept_LHS: torch.Tensor, shadow: ScoringPolicy, window: Window, budget: int) -> None:
        """Have the sidecar count how far the shadow policy would have kept the same; waits for nothing."""
        if self._client.is_comparing or time.monotonic() < self._rests_until:
            return
        request = pb.ComparePoliciesRequest(
            policy=policy, shadow_policy=shadow.name, budget=budget, num_sink_tokens=window.num_sink_tokens
        )
        try:
            request.kept.CopyFrom(to_message(kept_LHS.int(), self._shadow_kept))
            request.shadow_features.CopyFrom(to_message(shadow.features(window), self._shadow_features))
        except OSError as error:
            self._note_lost_comparison(shadow.name, str(error))
            return
        self._client.compare_policies(request, on_lost=partial(self._note_lost_comparison, shadow.name))

    def record(self, eviction: pb.RecordEvictionRequest) -> None:
        """Have an eviction recorded; waits for nothing."""
        self._client.record_eviction(eviction, on_lost=metrics.UNRECORDED_EVICTIONS.inc)

    def flush(self, timeout_seconds: float) -> None:
        """Wait until all evictions are recorded, but no longer than that."""
        self._client.flush(timeout_seconds)

    def close(self) -> None:
        """End all calls."""
        self._client.close()
        for writer in (self._features, self._shadow_features, self._shadow_kept):
            if writer is not None:
                writer.close()

    def _asked(self, policy: ScoringPolicy, feature_LHSI: torch.Tensor, spent_seconds: float) -> torch.Tensor:
        start = time.monotonic()
        try:
            features = to_message(feature_LHSI, self._features)
        except OSError as error:
            logger.error("features cannot be written", extra={"problem": str(error)})
            raise NoScores("no-room") from error
        request = pb.ScoreSlotsRequest(policy=policy.name, features=features)
        spent_seconds += time.monotonic() - start
        response = self._called(self._client.score_slots, request, spent_seconds)
        metrics.SCORING_SECONDS.observe(time.monotonic() - start)
        if response.numerics != scoring_numerics():
            raise NoScores("other-numerics")
        try:
            directory = self._features.directory if self._features is not None else None
            scores_LHS = from_message(response.scores, directory)
        except ValueError as error:
            raise NoScores("bad-scores") from error
        if response.digest != scores_digest(policy.name, feature_LHSI, scores_LHS):
            raise NoScores("bad-scores")
        return scores_LHS

    def _called(self, call: Any, *arguments: Any) -> Any:
        if time.monotonic() < self._rests_until:
            raise NoScores("late")
        try:
            return call(*arguments)
        except EunoeError as error:
            if isinstance(error, DeadlineTooShort):
                self._rests_until = time.monotonic() + self._rest_seconds
            raise NoScores(_REASONS.get(type(error), "refused")) from error

    def _found(self, name: str) -> EvictionPolicy:
        policy = self._known(name)
        if policy is None:
            if self._is_news(name, ""):
                logger.error("the sidecar chose a policy that is not here", extra={"policy": name})
            raise NoScores("unknown-policy")
        return policy

    def _shadow(self, name: str, policy: EvictionPolicy) -> ScoringPolicy | None:
        """The shadow of that name; None if there is none that could be scored under the policy."""
        if not name:
            return None
        shadow = self._known(name)
        if shadow is None:
            problem = "it is not here"
        elif not isinstance(shadow, ScoringPolicy):
            problem = "it has no scores"
        elif not is_observed(shadow, policy):
            problem = "nobody observes what it scores"
        else:
            return shadow
        if self._is_news(name, policy.name):
            extra = {"shadow": name, "policy": policy.name, "problem": problem}
            logger.warning("the sidecar chose a shadow that is left out", extra=extra)
        return None

    def _note_lost_comparison(self, shadow: str, problem: str) -> None:
        """Any thread may."""
        metrics.LOST_COMPARISONS.inc()
        if self._is_news(shadow, problem):
            logger.warning("a shadow was not compared", extra={"shadow": shadow, "problem": problem})

    def _is_news(self, name: str, beside: str) -> bool:
        """Whether it is to be logged: what is wrong with a choice comes with the answer for each segment."""
        if (name, beside) in self._told_of:
            return False
        if len(self._told_of) >= _MAX_TOLD_OF:
            self._told_of.clear()
        self._told_of.add((name, beside))
        return True

    def _known(self, name: str) -> EvictionPolicy | None:
        policy = self._files.by_name.get(name)
        if policy is None and self._files.refresh():
            policy = self._files.by_name.get(name)
        return policy
