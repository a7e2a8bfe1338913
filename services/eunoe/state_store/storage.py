"""What the state store needs of a database: records with versions, one atomic compare-and-swap, and plain values.

The core never waits for a lock: it reads records, decides, and swaps them for new ones if nobody was faster. A
record's version is the token of the swap that wrote it, so that a swap repeated after a lost reply is recognised, and
a record deleted and made again never passes for the old one.

Drivers: `redis_storage` for production, `memory_storage` for tests and for reasoning. Both keep the same promises
(tests/contracts/test_storage.py).
"""

from collections.abc import Sequence
from typing import NamedTuple, Protocol


class Versioned(NamedTuple):
    """A record; no bytes mean that there is none. Version "" means that there is not even the mark of a removed one."""

    version: str
    data: bytes


class ExpectVersion(NamedTuple):
    """The record at `key` still has this version; "" means that nothing is there."""

    key: str
    version: str


class ExpectStaged(NamedTuple):
    """A staged value of this length, which no swap has made last yet, is at `key`."""

    key: str
    num_bytes: int


class ExpectRoom(NamedTuple):
    """A total plus `delta` is at most `limit`."""

    key: str
    total: str
    delta: int
    limit: int


class PutRecord(NamedTuple):
    """Write a record; its version becomes the swap's token."""

    key: str
    data: bytes


class BuryRecord(NamedTuple):
    """Remove a record, and leave a mark for `ttl_ms`: its version is the swap's token.

    The mark stops a swap that made the record, comes a second time, late, and expects that there is none.
    """

    key: str
    ttl_ms: int


class PutValue(NamedTuple):
    """Write a plain value that lasts `ttl_ms`, or for ever if that is 0."""

    key: str
    data: bytes
    ttl_ms: int


class Persist(NamedTuple):
    """Make a staged value last."""

    key: str


class Shorten(NamedTuple):
    """Let a value that is there live for at most `ttl_ms` from now. Not in a swap."""

    key: str
    ttl_ms: int


class Delete(NamedTuple):
    """Remove a record, value or whole index without a trace."""

    key: str


class IndexAdd(NamedTuple):
    """Put a member into an index, or change its score."""

    key: str
    score: int
    member: str


class IndexRemove(NamedTuple):
    """Take a member out of an index."""

    key: str
    member: str


class AddTotal(NamedTuple):
    """Add to a total, which starts at 0."""

    key: str
    total: str
    delta: int


Expectation = ExpectVersion | ExpectStaged | ExpectRoom
Write = PutRecord | BuryRecord | PutValue | Persist | Shorten | Delete | IndexAdd | IndexRemove | AddTotal


class Conflict(NamedTuple):
    """A record at `key` has another version: read again, decide again."""

    key: str


class NotStaged(NamedTuple):
    """No staged value of the expected length is at `key`."""

    key: str


class NoRoom(NamedTuple):
    """A total would exceed its limit."""

    total: str


Refusal = Conflict | NotStaged | NoRoom


class Storage(Protocol):
    """A database.

    Raises:
        Unavailable: From any method, if the database cannot be reached. A write may then have happened or not; all
            can be repeated.
    """

    async def read(self, keys: Sequence[str]) -> list[Versioned]:
        """Records as of one moment, in the order of the keys."""

    async def compare_and_swap(
        self, token: str, expectations: Sequence[Expectation], writes: Sequence[Write]
    ) -> Refusal | None:
        """Apply all writes if all expectations hold, else none; durable when it returns None.

        A swap whose token is the version of an expected record has been applied before: None, and nothing changes.
        All keys belong to one tenant.
        """

    async def apply(self, writes: Sequence[Write]) -> None:
        """Apply writes one after the other, not atomically: for hints and for writes that stand alone."""

    async def stage(self, values: Sequence[tuple[str, bytes]], ttl_ms: int) -> None:
        """Write values that vanish after `ttl_ms`. A value that is there already stays as it is and, unless it was
        made to last, lives on for `ttl_ms` from now.
        """

    async def get(self, keys: Sequence[str]) -> list[bytes | None]:
        """Plain values, in the order of the keys."""

    async def totals(self, key: str) -> dict[str, int]:
        """The totals at a key."""

    async def members_after(self, key: str, after: str, limit: int) -> list[str]:
        """Members of an index whose scores are all equal, in the order of their bytes, behind `after`."""

    async def members_by_score(self, key: str, above: int, up_to: int | None, limit: int) -> list[tuple[str, int]]:
        """Members with their scores in (above, up_to], lowest first; None is without end."""

    async def highest_members(self, key: str, at_least: int, limit: int) -> list[tuple[str, int]]:
        """Members with their scores, highest first."""

    async def erase_history(self) -> None:
        """Return when the database's disk holds nothing of what was removed or replaced before the call.

        Raises:
            Unavailable: Also if the database cannot write its files anew.
        """

    async def close(self) -> None:
        """Let go of connections."""
