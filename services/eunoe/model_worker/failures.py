"""Streams that failed in their fold: each is left alone for a while, longer with every failure in a row.

A record whose bytes bring out a bug does so at every try. Without a rest the worker would load the stream's memory and
fail again at every sweep and at every hint, for ever, and all its other streams would pay for it.
"""

import time
from collections import OrderedDict
from dataclasses import dataclass

from eunoe.runtime.errors import EunoeError, FoldFailed, from_status

_FIRST_REST_SECONDS = 2.0
_LONGEST_REST_SECONDS = 120.0
_MAX_STREAMS = 10_000


@dataclass(frozen=True, slots=True)
class _Failure:
    create_time_ns: int
    error: BaseException
    num_in_a_row: int
    ends: float


class FailedStreams:
    """What failed lately at this worker, the newest 10,000.

    `create_time_ns` tells a stream from another one of its name.
    """

    def __init__(self) -> None:
        self._failures: OrderedDict[str, _Failure] = OrderedDict()

    def note(self, name: str, create_time_ns: int, error: BaseException) -> None:
        """A stream failed."""
        former = self._failures.pop(name, None)
        num_in_a_row = 1
        if former is not None and former.create_time_ns == create_time_ns:
            num_in_a_row += former.num_in_a_row
        rest_seconds = min(_FIRST_REST_SECONDS * 2.0 ** min(num_in_a_row - 1, 20), _LONGEST_REST_SECONDS)
        self._failures[name] = _Failure(create_time_ns, error, num_in_a_row, time.monotonic() + rest_seconds)
        if len(self._failures) > _MAX_STREAMS:
            self._failures.popitem(last=False)

    def forget(self, name: str) -> None:
        """A stream left for another reason."""
        self._failures.pop(name, None)

    def check(self, name: str, create_time_ns: int) -> None:
        """Refuse a stream that rests.

        Raises:
            EunoeError: What it failed of; FoldFailed says how long it still rests.
        """
        failure = self._failures.get(name)
        if failure is None or failure.create_time_ns != create_time_ns:
            return
        seconds_left = failure.ends - time.monotonic()
        if seconds_left <= 0:
            return
        error = failure.error
        if isinstance(error, EunoeError) and not isinstance(error, FoldFailed):
            raise from_status(error.to_status())
        raise FoldFailed(
            f"the log of {name} broke its fold, {failure.num_in_a_row} times in a row", retry_after_seconds=seconds_left
        )
