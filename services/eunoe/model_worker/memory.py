"""Admission by exact bytes: what resident memory states and copies take, and how much there may be."""

import threading
from collections.abc import Awaitable, Callable
from contextlib import suppress

from eunoe.decoder.decoder import Decoder
from eunoe.decoder.memory_state import MemorySettings
from eunoe.eviction import EvictionPolicy
from eunoe.model_worker import metrics
from eunoe.model_worker.engine import Engine
from eunoe.runtime.errors import Overloaded


class MemoryLedger:
    """Counts reserved bytes against a limit. Safe to use from any thread.

    Args:
        limit_bytes: Most bytes that may be reserved at once.
    """

    def __init__(self, limit_bytes: int) -> None:
        self.limit_bytes = limit_bytes
        self._reserved_bytes = 0
        self._lock = threading.Lock()

    @property
    def reserved_bytes(self) -> int:
        """Bytes reserved now."""
        return self._reserved_bytes

    def try_reserve(self, num_bytes: int) -> bool:
        """Take `num_bytes` if they fit."""
        with self._lock:
            if self._reserved_bytes + num_bytes > self.limit_bytes:
                return False
            self._reserved_bytes += num_bytes
            metrics.RESIDENT_BYTES.set(self._reserved_bytes)
            return True

    def release(self, num_bytes: int) -> None:
        """Give back what `try_reserve` took."""
        with self._lock:
            self._reserved_bytes -= num_bytes
            assert self._reserved_bytes >= 0
            metrics.RESIDENT_BYTES.set(self._reserved_bytes)


class Admission:
    """Makes room in a ledger by letting idle streams go.

    Args:
        ledger: What is counted.
        drop_idle: Lets the least recently used idle stream go; False if there is none.
    """

    def __init__(self, ledger: MemoryLedger, drop_idle: Callable[[], Awaitable[bool]]) -> None:
        self.ledger = ledger
        self._drop_idle = drop_idle

    async def reserve(self, num_bytes: int) -> None:
        """Take `num_bytes`; the caller gives them back to the ledger.

        Raises:
            Overloaded: If they do not fit beside the streams in use.
        """
        while not self.ledger.try_reserve(num_bytes):
            if num_bytes > self.ledger.limit_bytes or not await self._drop_idle():
                raise Overloaded(
                    f"{num_bytes} bytes of memory state do not fit: {self.ledger.reserved_bytes} of "
                    f"{self.ledger.limit_bytes} are in use",
                    retry_after_seconds=2.0,
                )


class StateRoom:
    """The memory that is reserved for one stream's memory state, and what policies it suffices for.

    Args:
        engine, admission, decoder: Of the worker.
        settings: Of the stream.
    """

    def __init__(self, engine: Engine, admission: Admission, decoder: Decoder, settings: MemorySettings) -> None:
        self._engine = engine
        self._admission = admission
        self._decoder = decoder
        self._settings = settings
        self._reserved_bytes = 0
        self._slot_bytes = -1

    async def reserve(self, policy: EvictionPolicy) -> None:
        """Have room for a policy and for all that remember no more of a slot.

        Raises:
            Overloaded: If there is none; what was reserved before stays.
        """
        if self.suffices(policy):
            return
        num_bytes = await self._engine.call(lambda: self._decoder.new_state(self._settings, policy).resident_bytes)
        await self._admission.reserve(num_bytes - self._reserved_bytes)
        self._reserved_bytes, self._slot_bytes = num_bytes, _slot_bytes(policy)

    async def grow(self, policy: EvictionPolicy) -> None:
        """Have room for a policy too if there is any left."""
        with suppress(Overloaded):
            await self.reserve(policy)

    def suffices(self, policy: EvictionPolicy) -> bool:
        """Whether there is room for a policy; on any thread."""
        return _slot_bytes(policy) <= self._slot_bytes

    def release(self) -> None:
        """Give all of it back."""
        self._admission.ledger.release(self._reserved_bytes)
        self._reserved_bytes, self._slot_bytes = 0, -1


def _slot_bytes(policy: EvictionPolicy) -> int:
    return policy.statistics.num_bytes if policy.statistics is not None else 0
