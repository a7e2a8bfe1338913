"""Harm to an eviction sidecar, of all kinds, each time until its streams are decided by their policies again."""

import asyncio
import contextlib
import itertools
import random
import signal
import statistics
import time
from collections import Counter
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field

from garbling_sidecar import ORDERS, Order
from sidecar_beside import SidecarBeside
from timed_worker import Stopwatch
from worker_processes import Fault, until

_PATIENCE_SECONDS = 30.0
_ORDER_SECONDS = 5.0
# Of 200.
_FAULTS = {
    "kill": 28,
    "kill or stop in a call": 24,
    "short stop": 20,
    "long stop": 14,
    "socket removed": 10,
    "nonsense scores": 44,
    "nonsense choices": 14,
    "damaged payload": 18,
    "reset in a reply": 8,
    "replies lost": 4,
    "replies corrupted": 8,
    "slow": 4,
    "impostor": 4,
}


@dataclass(kw_only=True)
class StrikeFigures:
    """What was done to a sidecar, and for how long its streams felt it.

    Attributes:
        faults: By kind.
        num_hits: Faults that left some segment without scores, or made one wait for more than 50 ms.
        not_back: Faults after which a stream did not come back to its policy, by kind.
        back_seconds: From the end of each fault until all streams had come back.
        longest_seconds: That the sidecar kept a segment, by the kind of fault.
    """

    faults: Counter[str] = field(default_factory=Counter)
    num_hits: int = 0
    not_back: list[str] = field(default_factory=list)
    back_seconds: list[float] = field(default_factory=list)
    longest_seconds: dict[str, float] = field(default_factory=dict)

    @property
    def back_p50_seconds(self) -> float:
        return statistics.median(self.back_seconds)

    @property
    def back_max_seconds(self) -> float:
        return max(self.back_seconds)


def drawn_kinds(num_faults: int, chance: random.Random) -> list[str]:
    """Each kind once, then as often as it should be."""
    first = chance.sample([*_FAULTS], len(_FAULTS))
    others = [*(Counter(_FAULTS) - Counter(first)).elements()]
    return [*first, *itertools.islice(itertools.cycle(chance.sample(others, len(others))), num_faults)][:num_faults]


class Striker:
    """Does harm, undoes it, and waits until all is as before.

    Args:
        beside: The sidecar.
        stopwatch: Of its worker.
        figures: Where it is counted.
        chance: Of moments and garbage.
        deadline_seconds: Of the worker.

    Attributes:
        streams: Full names of those that are appended to.
    """

    def __init__(
        self,
        beside: SidecarBeside,
        stopwatch: Stopwatch,
        figures: StrikeFigures,
        chance: random.Random,
        deadline_seconds: float,
    ) -> None:
        self.streams: list[str] = []
        self._beside = beside
        self._stopwatch = stopwatch
        self._figures = figures
        self._chance = chance
        self._deadline_seconds = deadline_seconds
        self._num_orders = 0
        self._variants = {
            kind: itertools.cycle(chance.sample(variants, len(variants))) for kind, variants in ORDERS.items()
        }
        self._strikes: dict[str, Callable[[], Awaitable[object]]] = {
            "kill": self._kill,
            "kill or stop in a call": self._in_a_call,
            "short stop": lambda: self._stop(chance.uniform(0.1, 0.9) * deadline_seconds),
            "long stop": lambda: self._stop(chance.uniform(1.2, 3.0) * deadline_seconds),
            "socket removed": self._remove_socket,
            "nonsense scores": lambda: self._ordered("nonsense scores", "ScoreSlots"),
            "nonsense choices": lambda: self._ordered("nonsense choices", "ChoosePolicy"),
            "damaged payload": lambda: self._ordered("damaged payload", "ScoreSlots"),
            "reset in a reply": self._reset_in_a_reply,
            "replies lost": self._lose_replies,
            "replies corrupted": self._corrupt_replies,
            "slow": self._slow_down,
            "impostor": self._impostor,
        }

    async def strike_all(self, kinds: list[str]) -> None:
        """One fault after the other."""
        await until(lambda: self._has_come_back(0.0), "no policy decides, and nothing has been done")
        for kind in kinds:
            await asyncio.sleep(self._chance.uniform(0.0, 0.2))
            self._figures.faults[kind] += 1
            start = time.monotonic()
            self._beside.absence_seconds = self._chance.uniform(0.0, 1.0)
            what = await self._strikes[kind]()
            self._beside.proxy.heal()
            Order.withdraw(self._beside.ready_file)
            await self._are_back(f"{kind}: {what}" if what else kind)
            self._note(kind, start)

    async def _are_back(self, kind: str) -> None:
        start = time.monotonic()
        try:
            await until(lambda: self._has_come_back(start), "", _PATIENCE_SECONDS)
        except Fault:
            self._figures.not_back.append(kind)
        else:
            self._figures.back_seconds.append(time.monotonic() - start)

    async def _has_come_back(self, start: float) -> bool:
        """Whether all streams were decided by their policies since then."""
        evictions = self._stopwatch.since(start)
        return {each.stream for each in evictions if not each.policy.startswith("fallback:")}.issuperset(self.streams)

    def _note(self, kind: str, start: float) -> None:
        felt = self._stopwatch.since(start)
        longest = max((eviction.seconds for eviction in felt), default=0.0)
        is_hit = longest > 0.05 or any(eviction.policy.startswith("fallback:") for eviction in felt)
        self._figures.num_hits += is_hit
        self._figures.longest_seconds[kind] = max(self._figures.longest_seconds.get(kind, 0.0), longest)

    async def _kill(self) -> None:
        num_ends = self._beside.num_ends
        self._beside.process.send(signal.SIGKILL)
        await self._has_come_again(num_ends)

    async def _in_a_call(self) -> str:
        what, num_ends = next(self._variants["in a call"]), self._beside.num_ends
        if not await self._is_done(self._order("ScoreSlots", what, 1)):
            return f"{what}, but nobody called"
        if what.startswith("stop"):
            await asyncio.sleep(self._chance.uniform(0.2, 3.0) * self._deadline_seconds)
            self._beside.process.send(signal.SIGCONT)
        else:
            await self._has_come_again(num_ends)
        return what

    async def _stop(self, seconds: float) -> None:
        self._beside.process.send(signal.SIGSTOP)
        await asyncio.sleep(seconds)
        self._beside.process.send(signal.SIGCONT)

    async def _remove_socket(self) -> None:
        """Whoever is connected stays so; all who want to connect anew find nobody."""
        num_ends = self._beside.num_ends
        self._beside.socket.unlink()
        self._beside.proxy.reset_all()
        with contextlib.suppress(Fault):
            await self._has_come_again(num_ends)

    async def _ordered(self, kind: str, rpc: str) -> str:
        what = next(self._variants[kind])
        await self._is_done(self._order(rpc, what, self._chance.randint(1, 5)))
        return what

    async def _reset_in_a_reply(self) -> None:
        self._beside.proxy.reset_after(self._chance.randint(0, 3000))
        await asyncio.sleep(self._chance.uniform(0.1, 0.5))

    async def _lose_replies(self) -> None:
        self._beside.proxy.lose_replies()
        await asyncio.sleep(self._chance.uniform(0.5, 2.0) * self._deadline_seconds)

    async def _corrupt_replies(self) -> None:
        self._beside.proxy.corrupts_replies = True
        await asyncio.sleep(self._chance.uniform(0.2, 1.0))

    async def _slow_down(self) -> None:
        """Each answer takes about as long as it may."""
        self._beside.proxy.delay_seconds = 0.9 * self._deadline_seconds
        await asyncio.sleep(4 * self._deadline_seconds)

    async def _impostor(self) -> None:
        async with self._beside.impostor(self._chance):
            await asyncio.sleep(self._chance.uniform(0.2, 1.5))

    def _order(self, rpc: str, what: str, num_calls: int) -> Order:
        self._num_orders += 1
        order = Order(self._num_orders, rpc, what, num_calls)
        order.give(self._beside.ready_file)
        return order

    async def _is_done(self, order: Order) -> bool:
        """Wait until an order is done; after some answers the worker leaves the sidecar alone for ten deadlines."""

        async def is_done() -> bool:
            return order.num_done(self._beside.ready_file) >= order.num_calls

        with contextlib.suppress(Fault):
            await until(is_done, "", _ORDER_SECONDS + 10 * self._deadline_seconds)
        return await is_done()

    async def _has_come_again(self, num_ends: int) -> None:
        await until(lambda: self._beside.has_ended(num_ends), "the sidecar did not end", _ORDER_SECONDS)
        await until(self._beside.serves, "the sidecar does not serve")
