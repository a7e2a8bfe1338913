"""A model worker's process with a stopwatch: how long its eviction sidecar kept each segment, and what decided."""

import itertools
import json
import os
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from garbling_sidecar import INLINE_BYTES

from eunoe.eviction import EvictionPolicy, ScoringPolicy, Window, tensor_payload
from eunoe.eviction.catalogue import Choice
from eunoe.internal.v1 import eviction_sidecar_pb2 as pb
from eunoe.model_worker import __main__ as model_worker
from eunoe.model_worker import worker
from eunoe.model_worker.sidecar import Sidecar


@dataclass(frozen=True, slots=True)
class TimedEviction:
    """One eviction of a stream.

    Attributes:
        moment: When it was decided, of the machine's monotonic clock.
        choice_seconds: The choice took before its segment; `scores_seconds` the scores after it.
        policy: What decided.
    """

    moment: float
    stream: str
    segment: int
    policy: str
    choice_seconds: float
    scores_seconds: float

    @property
    def seconds(self) -> float:
        """For which the sidecar kept the segment."""
        return self.choice_seconds + self.scores_seconds


class TimedSidecar(Sidecar):
    """Writes a `TimedEviction` a line."""

    def __init__(self, *arguments: Any, **keywords: Any) -> None:
        super().__init__(*arguments, **keywords)
        self._file = evictions_file(Path(os.environ["EUNOE_WORKER_READY_FILE"])).open("a", buffering=1)
        self._choice_seconds = self._scores_seconds = 0.0

    def choose(self, stream: str, present: EvictionPolicy) -> Choice:
        start = time.monotonic()
        self._scores_seconds = 0.0
        try:
            return super().choose(stream, present)
        finally:
            self._choice_seconds = time.monotonic() - start

    def scores(self, policy: ScoringPolicy, window: Window, spent_seconds: float = 0.0) -> torch.Tensor:
        start = time.monotonic()
        try:
            return super().scores(policy, window, spent_seconds)
        finally:
            self._scores_seconds = time.monotonic() - start

    def record(self, eviction: pb.RecordEvictionRequest) -> None:
        super().record(eviction)
        line = TimedEviction(
            moment=time.monotonic(),
            stream=eviction.stream,
            segment=eviction.segment,
            policy=eviction.policy,
            choice_seconds=self._choice_seconds,
            scores_seconds=self._scores_seconds,
        )
        self._file.write(json.dumps(asdict(line)) + "\n")


def main() -> int:
    """Run the worker's process; its exit status."""
    tensor_payload.INLINE_BYTES = INLINE_BYTES
    worker.Sidecar = TimedSidecar  # type: ignore[misc]
    return model_worker.main()


def evictions_file(ready_file: Path) -> Path:
    """Where the worker of that ready file writes."""
    return ready_file.with_suffix(".evictions")


class Stopwatch:
    """Reads what a worker writes.

    Attributes:
        evictions: All that were read, in their order.
    """

    def __init__(self, ready_file: Path) -> None:
        self._path = evictions_file(ready_file)
        self._num_read = 0
        self.evictions: list[TimedEviction] = []

    def read(self) -> list[TimedEviction]:
        """All evictions so far."""
        if self._path.exists():
            with self._path.open() as file:
                file.seek(self._num_read)
                text = file.read()
            whole = text[: text.rfind("\n") + 1]
            self._num_read += len(whole)
            self.evictions.extend(TimedEviction(**json.loads(line)) for line in whole.splitlines())
        return self.evictions

    def since(self, moment: float) -> list[TimedEviction]:
        """Those that were decided after a moment, the newest first."""
        return [*itertools.takewhile(lambda each: each.moment > moment, reversed(self.read()))]
