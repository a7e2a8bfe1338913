"""Limits of one gateway on each tenant: calls at once, and appended bytes a second."""

import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from eunoe.runtime.errors import Overloaded, QuotaExceeded


class TenantLimits:
    """Counts what each tenant does at this gateway.

    Args:
        max_concurrent_calls: Calls of one tenant at once.
        append_bytes_per_second: Rate at which a tenant's allowance of bytes refills, and its size.
        clock: Seconds that never go back.
    """

    def __init__(
        self,
        *,
        max_concurrent_calls: int,
        append_bytes_per_second: int,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._max_concurrent_calls = max_concurrent_calls
        self._bytes_per_second = append_bytes_per_second
        self._clock = clock
        self._num_calls: Counter[str] = Counter()
        # tenant -> (bytes left, when that was so); a full allowance needs no entry.
        self._allowances: dict[str, tuple[float, float]] = {}

    @contextmanager
    def call(self, tenant: str) -> Iterator[None]:
        """Counts a call while it runs.

        Raises:
            Overloaded: If the tenant has as many running as it may.
        """
        if self._num_calls[tenant] >= self._max_concurrent_calls:
            raise Overloaded(f"{self._max_concurrent_calls} calls of this tenant are running")
        self._num_calls[tenant] += 1
        try:
            yield
        finally:
            self._num_calls[tenant] -= 1
            if not self._num_calls[tenant]:
                del self._num_calls[tenant]
                self._drop_full_allowances()

    def take_append_bytes(self, tenant: str, num_bytes: int) -> None:
        """Takes bytes from the tenant's allowance, all or none.

        Raises:
            QuotaExceeded: If fewer are left, with the seconds until there are enough.
        """
        left = self._bytes_left(tenant)
        if left < num_bytes:
            raise QuotaExceeded(
                f"more than {self._bytes_per_second} bytes a second are appended",
                quota="append_bytes_per_second",
                retry_after_seconds=(num_bytes - left) / self._bytes_per_second,
            )
        self._allowances[tenant] = (left - num_bytes, self._clock())

    def _bytes_left(self, tenant: str) -> float:
        left, moment = self._allowances.get(tenant, (self._bytes_per_second, 0.0))
        return min(self._bytes_per_second, left + (self._clock() - moment) * self._bytes_per_second)

    def _drop_full_allowances(self) -> None:
        for tenant in [t for t in self._allowances if self._bytes_left(t) >= self._bytes_per_second]:
            del self._allowances[tenant]
