"""Actors of one kind on Ray, which come and go: a call is made again where one is lost."""

import time
from collections import Counter
from collections.abc import Callable, Hashable, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, field
from typing import Any, Self

import ray
from ray.exceptions import OutOfMemoryError, RayActorError, RayTaskError

from eunoe.runtime.errors import Unavailable

_MAX_LOSSES = 3
_LOOK_INTERVAL_SECONDS = 5.0


@dataclass(frozen=True, slots=True)
class Call:
    """One call of an actor's method.

    Attributes:
        arguments: Of the method; what is shared arrives as itself.
        key: Whoever had a call with this key before is preferred: it may have something prepared.
    """

    arguments: tuple[Any, ...]
    key: Hashable = None


@dataclass(eq=False, slots=True)
class _Worker:
    actor: Any
    is_ready: bool = False
    call: int | None = None
    keys: set[Hashable] = field(default_factory=set)


class WorkerPool:
    """Runs calls on actors. A result must depend on the call's arguments alone.

    Args:
        actor_class: Made on each worker with `arguments`.
        arguments: Sent to each node once.
        num_workers: None: as many as the cluster has CPUs for, looked at again every few seconds.
        num_cpus: Of a worker.

    Attributes:
        num_lost: Workers that died so far.
    """

    def __init__(
        self, actor_class: type, arguments: tuple[Any, ...], *, num_workers: int | None = None, num_cpus: int = 1
    ) -> None:
        self._remote = ray.remote(num_cpus=num_cpus, max_restarts=0)(actor_class)
        self._arguments = [ray.put(argument) for argument in arguments]
        self._num_workers = num_workers
        self._num_cpus = num_cpus
        self._workers: list[_Worker] = []
        self._in_flight: dict[Any, _Worker] = {}
        self._num_failed_starts = 0
        self._next_look = 0.0
        self.num_lost = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End the actors."""
        for worker in self._workers:
            ray.kill(worker.actor)
        self._workers.clear()
        self._in_flight.clear()

    def share(self, value: Any) -> Any:
        """What stands for a value as an argument of many calls, so that it is sent to each node once."""
        return ray.put(value)

    def map(self, method: str, calls: Sequence[Call], on_done: Callable[[], None] = lambda: None) -> list[Any]:
        """What the method returns for each call, in the order of the calls. After an error the pool is closed.

        Args:
            method: Of the actors.
            calls: Any number.
            on_done: Called after each.

        Raises:
            Unavailable: If no worker starts, or the same call loses three of them.
            Exception: What the method raised.
        """
        try:
            return self._map(method, calls, on_done)
        except BaseException:
            self.close()
            raise

    def _map(self, method: str, calls: Sequence[Call], on_done: Callable[[], None]) -> list[Any]:
        results: list[Any] = [None] * len(calls)
        waiting = list(range(len(calls)))
        losses: Counter[int] = Counter()
        num_done = 0
        while num_done < len(calls):
            self._grow()
            for worker in self._workers:
                if waiting and worker.is_ready and worker.call is None:
                    taken = {key for each in self._workers for key in each.keys}
                    worker.call = choose_call(waiting, calls, worker.keys, taken)
                    waiting.remove(worker.call)
                    worker.keys.add(calls[worker.call].key)
                    reference = getattr(worker.actor, method).remote(*calls[worker.call].arguments)
                    self._in_flight[reference] = worker
            ready, _ = ray.wait(list(self._in_flight), timeout=_LOOK_INTERVAL_SECONDS)
            for reference in ready:
                worker = self._in_flight.pop(reference)
                index = worker.call
                try:
                    value = ray.get(reference)
                except (RayActorError, OutOfMemoryError) as error:
                    self._lose(worker, error)
                    if index is not None:
                        waiting.insert(0, index)
                        losses[index] += 1
                        if losses[index] == _MAX_LOSSES:
                            raise Unavailable(f"{_MAX_LOSSES} workers died of the same call: {error}") from None
                    continue
                except RayTaskError as error:
                    raise error.cause from error
                if index is None:
                    worker.is_ready, self._num_failed_starts = True, 0
                    continue
                worker.call = None
                results[index] = value
                num_done += 1
                on_done()
        return results

    def _grow(self) -> None:
        """Start workers that are missing."""
        if time.monotonic() < self._next_look:
            return
        self._next_look = time.monotonic() + _LOOK_INTERVAL_SECONDS
        wanted = self._num_workers
        if wanted is None:
            nodes = [node["Resources"].get("CPU", 0) for node in ray.nodes() if node["Alive"]]
            wanted = max(1, sum(int(num_cpus // self._num_cpus) for num_cpus in nodes))
        while len(self._workers) < wanted:
            worker = _Worker(self._remote.remote(*self._arguments))
            self._workers.append(worker)
            self._in_flight[worker.actor.__ray_ready__.remote()] = worker

    def _lose(self, worker: _Worker, error: Exception) -> None:
        self._workers.remove(worker)
        # It may be alive behind a broken network.
        ray.kill(worker.actor)
        self.num_lost += 1
        self._next_look = 0.0
        if not worker.is_ready:
            self._num_failed_starts += 1
            if self._num_failed_starts == _MAX_LOSSES:
                raise Unavailable(f"no worker starts: {error}") from None


def choose_call(
    waiting: Sequence[int], calls: Sequence[Call], own: AbstractSet[Hashable], taken: AbstractSet[Hashable]
) -> int:
    """Which of the waiting calls a worker gets: one with a key of its own, else with a key of nobody's, else the first.

    Args:
        waiting: Indices of calls, one or more.
        calls: All calls.
        own: Keys that the worker has had.
        taken: Keys that any worker has had.
    """
    for is_wanted in (own.__contains__, lambda key: key not in taken):
        found = next((index for index in waiting if is_wanted(calls[index].key)), None)
        if found is not None:
            return found
    return waiting[0]
