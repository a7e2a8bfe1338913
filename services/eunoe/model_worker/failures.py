"""Streams that failed in their fold: each is left alone for a while, longer with every failure in a row.

A record whose bytes bring out a bug does so at every try. Without a rest the worker would load the stream's memory and
fail again at every sweep and every hint, for ever, at the cost of all its other streams.
"""

import time
from collections import OrderedDict
from dataclasses import dataclass

from eunoe.runtime.errors import FoldFailed

_FIRST_REST_SECONDS = 2.0
_LONGEST_REST_SECONDS = 300.0
_MAX_STREAMS = 10_000


@dataclass(frozen=True, slots=True)
class _Failure:
    stream_id: object
    num_in_a_row: int
    rest_seconds: float
    ends: float


class FailedStreams:
    """What failed lately at this worker, the newest 10,000."""

    def __init__(self) -> None:
        self._failures: OrderedDict[str, _Failure] = OrderedDict()

    def note(self, name: str, stream_id: object) -> None:
        """A stream failed. `stream_id` tells it from another one that had its name before."""
        former = self._failures.pop(name, None)
        num_in_a_row = 1
        if former is not None and former.stream_id == stream_id:
            num_in_a_row += former.num_in_a_row
        rest_seconds = min(_FIRST_REST_SECONDS * 2.0 ** min(num_in_a_row - 1, 20), _LONGEST_REST_SECONDS)
        self._failures[name] = _Failure(stream_id, num_in_a_row, rest_seconds, time.monotonic() + rest_seconds)
        if len(self._failures) > _MAX_STREAMS:
            self._failures.popitem(last=False)

    def forget(self, name: str) -> None:
        """A stream works again."""
        self._failures.pop(name, None)

    def check(self, name: str, stream_id: object) -> None:
        """Refuse a stream that still rests.

        Raises:
            FoldFailed.
        """
        failure = self._failures.get(name)
        if failure is None or failure.stream_id != stream_id:
            return
        seconds_left = failure.ends - time.monotonic()
        if seconds_left > 0:
            raise FoldFailed(
                f"{name} failed {failure.num_in_a_row} times in a row while its log was read",
                retry_after_seconds=seconds_left,
            )
