"""Scores on one thread, in the order of the calls."""

import asyncio
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import torch

from eunoe.eviction import EvictionPolicy, ScoringPolicy
from eunoe.eviction.policy import score, scoring_numerics
from eunoe.eviction.policy_files import PolicyFiles
from eunoe.eviction.tensor_payload import from_message, scores_digest, to_message
from eunoe.eviction_sidecar import metrics
from eunoe.internal.v1 import eviction_sidecar_pb2 as pb
from eunoe.runtime.errors import InvalidRequest, Overloaded, PolicyNotFound
from eunoe.runtime.payload_files import PayloadWriter

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class _Shape:
    num_slots: int
    num_sink_tokens: int


class Scoring:
    """Scores and compares.

    Args:
        files: Where policies come from.
        payload_dir: Where large tensors come from and go to.
    """

    def __init__(self, files: PolicyFiles, payload_dir: Path | None) -> None:
        self._files = files
        self._payload_dir = payload_dir
        self._thread = ThreadPoolExecutor(1, "scoring", initializer=torch.set_num_threads, initargs=(1,))
        self._num_calls = 0

    async def score(self, request: pb.ScoreSlotsRequest) -> pb.ScoreSlotsResponse:
        """Scores of all layers and heads.

        Raises:
            PolicyNotFound: If the policy is not there.
            ValueError: If the features are not what was meant.
            Overloaded: If there is no room for the scores' file.
        """
        return await self._in_turn(lambda: self._score(request))

    async def compare(self, request: pb.ComparePoliciesRequest) -> pb.ComparePoliciesResponse:
        """How far the shadow policy would have kept the same; empty if somebody waits for scores."""
        if self._num_calls:
            metrics.SKIPPED_COMPARISONS.inc()
            return pb.ComparePoliciesResponse()
        return await self._in_turn(lambda: self._compare(request))

    def close(self) -> None:
        """End the thread; what waits is not done any more."""
        self._thread.shutdown(cancel_futures=True)

    async def _in_turn(self, function: Callable[[], T]) -> T:
        self._num_calls += 1
        try:
            return await asyncio.get_running_loop().run_in_executor(self._thread, function)
        finally:
            self._num_calls -= 1

    def _score(self, request: pb.ScoreSlotsRequest) -> pb.ScoreSlotsResponse:
        policy = self._policy(request.policy)
        feature_LHSI = self._features(request.features)
        start = time.monotonic()
        scores_LHS = _scored(policy, feature_LHSI)
        metrics.SCORING_SECONDS.labels(policy.name).observe(time.monotonic() - start)
        writer = None
        if request.features.HasField("file") and self._payload_dir is not None:
            # A worker waits for one answer at a time, so it needs one file.
            writer = PayloadWriter(self._payload_dir, f"{request.features.file.name}-scores")
        digest = scores_digest(policy.name, feature_LHSI, scores_LHS)
        try:
            scores = to_message(scores_LHS, writer)
        except OSError as error:
            raise Overloaded(f"scores cannot be written: {error}", retry_after_seconds=1.0) from None
        return pb.ScoreSlotsResponse(scores=scores, numerics=scoring_numerics(), digest=digest)

    def _compare(self, request: pb.ComparePoliciesRequest) -> pb.ComparePoliciesResponse:
        shadow = self._policy(request.shadow_policy)
        feature_LHSI = self._features(request.shadow_features)
        kept_LHS = from_message(request.kept, self._payload_dir).long()
        num_slots = feature_LHSI.shape[2]
        if kept_LHS.shape[:2] != feature_LHSI.shape[:2] or kept_LHS.min() < 0 or kept_LHS.max() >= num_slots:
            raise InvalidRequest(f"slots {tuple(kept_LHS.shape)} are not of features {tuple(feature_LHSI.shape)}")
        shape = _Shape(num_slots, request.num_sink_tokens)
        shadow_LHS = shadow.keep_scored(_scored(shadow, feature_LHSI), shape, request.budget)
        is_kept_LHS = torch.zeros(feature_LHSI.shape[:3], dtype=torch.bool).scatter_(2, kept_LHS, True)
        num_kept, num_agreed = kept_LHS.numel(), int(is_kept_LHS.gather(2, shadow_LHS).sum())
        metrics.COMPARED_SLOTS.labels(request.policy, shadow.name).inc(num_kept)
        metrics.AGREED_SLOTS.labels(request.policy, shadow.name).inc(num_agreed)
        return pb.ComparePoliciesResponse(num_kept=num_kept, num_agreed=num_agreed)

    def _policy(self, name: str) -> ScoringPolicy:
        policy: EvictionPolicy | None = self._files.by_name.get(name)
        if policy is None:
            raise PolicyNotFound(f"there is no policy {name!r} here")
        if not isinstance(policy, ScoringPolicy):
            raise InvalidRequest(f"{name} has no scores")
        return policy

    def _features(self, message: pb.Tensor) -> torch.Tensor:
        feature_LHSI = from_message(message, self._payload_dir)
        if feature_LHSI.dim() != 4:
            raise InvalidRequest(f"features {tuple(feature_LHSI.shape)} have no layer, head, slot and feature")
        return feature_LHSI


def _scored(policy: ScoringPolicy, feature_LHSI: torch.Tensor) -> torch.Tensor:
    try:
        scores_LHS = score(policy, feature_LHSI.float())
    except (RuntimeError, IndexError) as error:
        # torch's word for shapes that do not fit to each other.
        raise InvalidRequest(f"{policy.name} scores no features {tuple(feature_LHSI.shape)}") from error
    return scores_LHS
