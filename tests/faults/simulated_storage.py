"""A seeded database for the state store, with everything going wrong that can.

`SimulatedDatabase` is the server: a primary, its disk and a replica, each what `MemoryStorage` says that a database is.
`SimulatedStorage` is one process's connection to it, a driver of `Storage`. Time is the running loop's: on a
`VirtualTimeLoop` nothing waits and a seed decides everything, on a real loop it is real.

Every command goes through a journal. The disk holds a prefix of it (with `fsync="always"` never less than what was
acknowledged), the replica another one (all of it if the primary waits for replicas). A crash cuts the journal to what
the disk has, a promotion to what the replica has.
"""

import asyncio
import hashlib
import random
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

from eunoe.runtime.errors import Unavailable
from eunoe.state_store.memory_storage import MemoryStorage
from eunoe.state_store.storage import Expectation, Refusal, Versioned, Write

_WRITES = frozenset(("compare_and_swap", "apply", "stage"))
# A database closes a connection that stalls: no command arrives later than this, marks of removed records last longer.
_LATEST_SECONDS = 60.0
_SYNC_SECONDS = 1.0


class ProcessDied(BaseException):
    """The process that made the call is no more. No code under test may catch it."""


@dataclass(frozen=True, kw_only=True)
class FaultRates:
    """Chances per command, 0 to 1, and the longest delay on one way, in seconds."""

    lost_request: float = 0.0
    lost_reply: float = 0.0
    late_repeat: float = 0.0
    database_crash: float = 0.0
    promotion: float = 0.0
    clock_jump: float = 0.0
    delay_seconds: float = 0.0


class Command(NamedTuple):
    """What the database did, at `time` of its clock."""

    time: float
    method: str
    arguments: tuple[Any, ...]


class _Node:
    """A copy of the data that has done the first `position` commands of the journal."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._replayed_time: float | None = None
        self.database = MemoryStorage(self._now)
        self.position = 0

    def run(self, method: str, arguments: tuple[Any, ...]) -> Any:
        coroutine = getattr(self.database, method)(*arguments)
        try:
            coroutine.send(None)
        except StopIteration as done:
            return done.value
        raise AssertionError("a database in memory does not wait")

    def catch_up(self, journal: Sequence[Command], position: int) -> None:
        for time, method, arguments in journal[self.position : position]:
            self._replayed_time = time
            self.run(method, arguments)
        self._replayed_time = None
        self.position = max(position, self.position)

    def copy(self) -> "_Node":
        copy = _Node(self._clock)
        for name in ("_records", "_values"):
            getattr(copy.database, name).update(getattr(self.database, name))
        for name in ("_indexes", "_totals"):
            copies = {key: dict(values) for key, values in getattr(self.database, name).items()}
            getattr(copy.database, name).update(copies)
        copy.position = self.position
        return copy

    def _now(self) -> float:
        return self._clock() if self._replayed_time is None else self._replayed_time


class SimulatedDatabase:
    """The server.

    Args:
        chance: Decides everything.
        rates: Of faults; may be changed at any time.
        fsync: "always" has on disk what it acknowledges, "everysec" what it acknowledged a second ago.
        waits_for_replica: Whether what is acknowledged is at the replica.

    Attributes:
        journal: All that was done and not lost.
        num_faults: By kind.
        on_command: Called after each command with it and its result.
        on_loss: Called when commands were lost, after the journal was cut.
    """

    def __init__(
        self,
        chance: random.Random,
        rates: FaultRates = FaultRates(),
        *,
        fsync: Literal["always", "everysec"] = "always",
        waits_for_replica: bool = True,
    ) -> None:
        self._chance = chance
        self.rates = rates
        self._fsync = fsync
        self._waits_for_replica = waits_for_replica
        self._jumped_seconds = 0.0
        self._primary = _Node(self.clock)
        self._disk = self._primary.copy()
        self._replica = self._primary.copy()
        self._late: list[Command] = []
        self._num_restarts = 0
        self._trace = hashlib.blake2b(digest_size=16)
        self.journal: list[Command] = []
        self.num_faults: Counter[str] = Counter()
        self.on_command: Callable[[Command, Any], None] = lambda command, result: None
        self.on_loss: Callable[[], None] = lambda: None

    @property
    def trace_hash(self) -> str:
        """Of every command, fault and moment so far."""
        return self._trace.hexdigest()

    def record(self, key: str) -> bytes:
        """The record at a key, to look at without faults."""
        data: bytes = self._primary.run("read", ((key,),))[0].data
        return data

    def clock(self) -> float:
        """The server's clock in seconds."""
        return asyncio.get_running_loop().time() + self._jumped_seconds

    async def execute(self, method: str, arguments: tuple[Any, ...]) -> Any:
        """One command from somebody, with all that may happen to it on its ways."""
        await self._delay()
        self._let_things_happen()
        if self._happens("lost_request"):
            raise Unavailable("the request was lost")
        num_restarts = self._num_restarts
        result = self._do(Command(self.clock(), method, arguments))
        if method in _WRITES and self._happens("late_repeat"):
            self._late.append(self.journal[-1])
        is_lost = self._happens("lost_reply")
        await self._delay()
        if is_lost or num_restarts != self._num_restarts:
            raise Unavailable("the reply was lost")
        return result

    def crash(self) -> None:
        """Lose what is not on disk, and start again from there."""
        self._sync()
        self._disk.catch_up(self.journal, self._disk.position)
        self._restart(self._disk.copy())
        if self._replica.position > len(self.journal):
            self._replica = self._primary.copy()

    def promote(self) -> int:
        """Make the replica the primary; returns how many commands are lost."""
        num_lost = len(self.journal) - self._replica.position
        # The old primary is gone, and with it what was on the way to it.
        self._late.clear()
        self._restart(self._replica.copy())
        self._disk = self._primary.copy()
        return num_lost

    def replicate(self, position: int | None = None) -> None:
        """Let the replica catch up, with all or up to a place of the journal."""
        self._replica.catch_up(self.journal, len(self.journal) if position is None else position)

    def jump(self, seconds: float) -> None:
        """Move the server's clock. Whoever has a command on the way is cut off, as by the time that seems to pass."""
        self._jumped_seconds += seconds
        self._late.clear()

    def calm(self) -> None:
        """No faults from here on."""
        self.rates = FaultRates(delay_seconds=self.rates.delay_seconds)
        self._late.clear()

    def _let_things_happen(self) -> None:
        self._late = [late for late in self._late if self.clock() - late.time < _LATEST_SECONDS]
        if self._late and self._chance.random() < 0.3:
            late = self._late.pop(self._chance.randrange(len(self._late)))
            self._do(late._replace(time=self.clock()))
        if not self._waits_for_replica and self._chance.random() < 0.2:
            self.replicate(self._chance.randint(self._replica.position, len(self.journal)))
        if self._happens("database_crash"):
            self.crash()
        if self._happens("promotion"):
            self.promote()
        if self._happens("clock_jump"):
            self.jump(self._chance.choice((-30.0, 5.0, 700.0)))

    def _do(self, command: Command) -> Any:
        result = self._primary.run(command.method, command.arguments)
        self._note(f"{command.time:.9f}{command.method}{command.arguments}{result}")
        if command.method in _WRITES:
            self.journal.append(command)
            self._primary.position = len(self.journal)
            self._sync()
            if self._waits_for_replica:
                self.replicate()
            self.on_command(command, result)
        return result

    def _sync(self) -> None:
        position = len(self.journal)
        if self._fsync == "everysec":
            until = self.clock() - _SYNC_SECONDS
            while position > self._disk.position and self.journal[position - 1].time > until:
                position -= 1
        self._disk.catch_up(self.journal, position)

    def _restart(self, node: _Node) -> None:
        self._num_restarts += 1
        is_loss = node.position < len(self.journal)
        del self.journal[node.position :]
        self._primary = node
        if is_loss:
            self.on_loss()

    def _happens(self, kind: str) -> bool:
        rate = getattr(self.rates, kind)
        if not rate or self._chance.random() >= rate:
            return False
        self.num_faults[kind] += 1
        self._note(kind)
        return True

    def _note(self, what: str) -> None:
        self._trace.update(what.encode())

    async def _delay(self) -> None:
        if self.rates.delay_seconds:
            await asyncio.sleep(self._chance.uniform(0, self.rates.delay_seconds))


class SimulatedStorage:
    """One process's connection to a simulated database.

    Args:
        database: The server.
        dies_at: The process dies in its call of this number (1 is the first); None is never.
        dies_before: Whether it dies before the database has done that call, or after.
    """

    def __init__(self, database: SimulatedDatabase, *, dies_at: int | None = None, dies_before: bool = True) -> None:
        self._database = database
        self._dies_at = dies_at
        self._dies_before = dies_before
        self.num_calls = 0
        self.is_dead = False

    def kill(self) -> None:
        """End the process: whatever it waits for, no call of it returns any more."""
        self.is_dead = True

    async def read(self, keys: Sequence[str]) -> list[Versioned]:
        return await self._call("read", tuple(keys))

    async def compare_and_swap(
        self, token: str, expectations: Sequence[Expectation], writes: Sequence[Write]
    ) -> Refusal | None:
        return await self._call("compare_and_swap", token, tuple(expectations), tuple(writes))

    async def apply(self, writes: Sequence[Write]) -> None:
        await self._call("apply", tuple(writes))

    async def stage(self, values: Sequence[tuple[str, bytes]], ttl_ms: int) -> None:
        await self._call("stage", tuple(values), ttl_ms)

    async def get(self, keys: Sequence[str]) -> list[bytes | None]:
        return await self._call("get", tuple(keys))

    async def totals(self, key: str) -> dict[str, int]:
        return await self._call("totals", key)

    async def members_after(self, key: str, after: str, limit: int) -> list[str]:
        return await self._call("members_after", key, after, limit)

    async def members_by_score(self, key: str, above: int, up_to: int | None, limit: int) -> list[tuple[str, int]]:
        return await self._call("members_by_score", key, above, up_to, limit)

    async def highest_members(self, key: str, at_least: int, limit: int) -> list[tuple[str, int]]:
        return await self._call("highest_members", key, at_least, limit)

    async def erase_history(self) -> None:
        pass

    async def close(self) -> None:
        pass

    async def _call(self, method: str, *arguments: Any) -> Any:
        self.num_calls += 1
        is_last = self.num_calls == self._dies_at
        self.is_dead |= is_last and self._dies_before
        self._check_alive()
        try:
            result = await self._database.execute(method, arguments)
        except Unavailable:
            self.is_dead |= is_last
            self._check_alive()
            raise
        self.is_dead |= is_last
        self._check_alive()
        return result

    def _check_alive(self) -> None:
        if self.is_dead:
            raise ProcessDied
