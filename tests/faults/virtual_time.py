"""An event loop whose time stands still while anything can run and jumps to the next timer when nothing can.

What runs on it takes no real time to wait, and the order of everything depends on nothing but the program and its
seeds.
"""

import asyncio
import random
import selectors
from collections.abc import Callable, Coroutine
from typing import Any, TypeVar

T = TypeVar("T")


class StuckError(RuntimeError):
    """Everything waits for something that nobody will ever do."""


class _JumpingSelector(selectors.DefaultSelector):
    """Never waits: time is what passes instead."""

    jump: Callable[[float], None]

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        if timeout is None:
            raise StuckError("nothing is left to run and no timer is set")
        if timeout > 0:
            self.jump(timeout)
        return super().select(0)


class VirtualTimeLoop(asyncio.SelectorEventLoop):
    """Seconds of `time()` are virtual and start at 0."""

    def __init__(self) -> None:
        selector = _JumpingSelector()
        selector.jump = self._jump
        self._now_seconds = 0.0
        super().__init__(selector)

    def time(self) -> float:
        return self._now_seconds

    def _jump(self, seconds: float) -> None:
        self._now_seconds += seconds


def run_in_virtual_time(make: Callable[[], Coroutine[Any, Any, T]], seed: int) -> T:
    """The result of a coroutine run on a loop of its own, with the global random numbers seeded meanwhile.

    Blocks, and must not be called where a loop is running: there, `await asyncio.to_thread(run_in_virtual_time, ...)`.
    """
    state = random.getstate()
    random.seed(seed)
    loop = VirtualTimeLoop()
    # A process that died in the simulation leaves tasks behind that nobody asks for their errors.
    loop.set_exception_handler(lambda loop, context: None)
    try:
        return loop.run_until_complete(make())
    finally:
        tasks = asyncio.all_tasks(loop)
        for task in tasks:
            task.cancel()
        if tasks:
            loop.run_until_complete(asyncio.wait(tasks))
        loop.close()
        random.setstate(state)
