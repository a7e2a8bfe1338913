"""A database in memory: what `Storage` promises, as plainly as it can be written."""

import time
from collections import defaultdict
from collections.abc import Callable, Sequence

from eunoe.state_store.storage import (
    AddTotal,
    BuryRecord,
    Conflict,
    Delete,
    Expectation,
    ExpectStaged,
    ExpectVersion,
    IndexAdd,
    IndexRemove,
    NoRoom,
    NotStaged,
    Persist,
    PutRecord,
    PutValue,
    Refusal,
    Shorten,
    Versioned,
    Write,
)


class MemoryStorage:
    """Keeps everything in dicts; `clock` (seconds) decides when values vanish."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._records: dict[str, tuple[Versioned, float | None]] = {}
        self._values: dict[str, tuple[bytes, float | None]] = {}
        self._indexes: defaultdict[str, dict[str, int]] = defaultdict(dict)
        self._totals: defaultdict[str, dict[str, int]] = defaultdict(dict)

    async def read(self, keys: Sequence[str]) -> list[Versioned]:
        return [self._record(key) for key in keys]

    async def compare_and_swap(
        self, token: str, expectations: Sequence[Expectation], writes: Sequence[Write]
    ) -> Refusal | None:
        versions = [self._record(e.key).version for e in expectations if isinstance(e, ExpectVersion)]
        if token in versions:
            return None
        for expectation in expectations:
            refusal = self._refusal(expectation)
            if refusal is not None:
                return refusal
        for write in writes:
            self._write(write, token)
        return None

    async def apply(self, writes: Sequence[Write]) -> None:
        for write in writes:
            self._write(write, "")

    async def stage(self, values: Sequence[tuple[str, bytes]], ttl_ms: int) -> None:
        ends = self._clock() + ttl_ms / 1000
        for key, data in values:
            present = self._value(key)
            if present is None:
                self._values[key] = (data, ends)
            elif present[1] is not None:
                self._values[key] = (present[0], ends)

    async def get(self, keys: Sequence[str]) -> list[bytes | None]:
        present = [self._value(key) for key in keys]
        return [None if value is None else value[0] for value in present]

    async def totals(self, key: str) -> dict[str, int]:
        return dict(self._totals[key])

    async def members_after(self, key: str, after: str, limit: int) -> list[str]:
        return sorted(member for member in self._indexes[key] if member > after)[:limit]

    async def members_by_score(self, key: str, above: int, up_to: int | None, limit: int) -> list[tuple[str, int]]:
        found = [
            (score, member)
            for member, score in self._indexes[key].items()
            if score > above and (up_to is None or score <= up_to)
        ]
        return [(member, score) for score, member in sorted(found)[:limit]]

    async def highest_members(self, key: str, at_least: int, limit: int) -> list[tuple[str, int]]:
        found = [(score, member) for member, score in self._indexes[key].items() if score >= at_least]
        return [(member, score) for score, member in sorted(found, reverse=True)[:limit]]

    async def erase_history(self) -> None:
        pass

    async def close(self) -> None:
        pass

    def keys(self) -> set[str]:
        """Every key at which something is."""
        present = {key for store in (self._indexes, self._totals) for key, values in store.items() if values}
        present |= {key for key in self._records if self._record(key).data}
        return present | {key for key in list(self._values) if self._value(key) is not None}

    def _record(self, key: str) -> Versioned:
        record, ends = self._records.get(key, (Versioned("", b""), None))
        return Versioned("", b"") if ends is not None and self._clock() >= ends else record

    def _value(self, key: str) -> tuple[bytes, float | None] | None:
        value = self._values.get(key)
        if value is not None and value[1] is not None and self._clock() >= value[1]:
            del self._values[key]
            return None
        return value

    def _refusal(self, expectation: Expectation) -> Refusal | None:
        if isinstance(expectation, ExpectVersion):
            found = self._record(expectation.key).version
            return None if found == expectation.version else Conflict(expectation.key)
        if isinstance(expectation, ExpectStaged):
            value = self._value(expectation.key)
            is_staged = value is not None and value[1] is not None and len(value[0]) == expectation.num_bytes
            return None if is_staged else NotStaged(expectation.key)
        total = self._totals[expectation.key].get(expectation.total, 0) + expectation.delta
        return None if total <= expectation.limit else NoRoom(expectation.total)

    def _write(self, write: Write, token: str) -> None:
        match write:
            case PutRecord(key, data):
                self._records[key] = (Versioned(token, data), None)
            case BuryRecord(key, ttl_ms):
                self._records[key] = (Versioned(token, b""), self._clock() + ttl_ms / 1000)
            case PutValue(key, data, ttl_ms):
                self._values[key] = (data, self._clock() + ttl_ms / 1000 if ttl_ms else None)
            case Persist(key):
                self._values[key] = (self._values[key][0], None)
            case Shorten(key, ttl_ms):
                if (value := self._value(key)) is not None:
                    ends = self._clock() + ttl_ms / 1000
                    self._values[key] = (value[0], ends if value[1] is None else min(value[1], ends))
            case Delete(key):
                self._records.pop(key, None)
                self._values.pop(key, None)
                self._indexes.pop(key, None)
            case IndexAdd(key, score, member):
                self._indexes[key][member] = score
            case IndexRemove(key, member):
                self._indexes[key].pop(member, None)
            case AddTotal(key, total, delta):
                self._totals[key][total] = self._totals[key].get(total, 0) + delta
