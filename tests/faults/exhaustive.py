"""Breadth-first search through every state that the small model can reach.

A state has three parts that change apart from each other: what is stored, and each worker with its message.
Each distinct part is kept once and has a number; what may happen next depends on few parts and is asked of the rules
once for each combination of them. Thus a state is a handful of small numbers, and a step costs microseconds.
"""

import time
from array import array
from collections.abc import Callable, Hashable
from dataclasses import dataclass, replace
from typing import Any
from unittest import mock

from small_checks import check_nothing_goes, check_world
from small_model import Bounds, Message, Violation, World, client_steps, first_world, stream_steps, with_item
from small_workers import OLDER, PRESENT, with_worker_names, worker_steps

from eunoe.state_store import metadata as metadata_module
from eunoe.state_store.metadata import StreamMetadata

FULL = Bounds(childs_record=False, reads_ahead=False)
SMALL = replace(FULL, num_records=2, num_crashes=1)
_SWAPPED = dict(zip((*PRESENT, *OLDER), (*reversed(PRESENT), *reversed(OLDER)), strict=True))


@dataclass(frozen=True, kw_only=True)
class SearchFigures:
    """What a search found.

    Attributes:
        violation: What is broken first, "" if nothing is.
        trace: The shortest way to it.
        num_rule_calls: Combinations of parts for which the product's rules were asked.
    """

    is_closed: bool
    num_states: int
    num_transitions: int
    depth: int
    num_stores: int
    num_rule_calls: int
    seconds: float
    violation: str
    trace: tuple[str, ...]


class _Numbers:
    """Distinct values by number, each kept once."""

    def __init__(self) -> None:
        self._number_of: dict[Hashable, int] = {}
        self.values: list[Any] = []

    def number(self, value: Hashable) -> int:
        number = self._number_of.setdefault(value, len(self.values))
        if number == len(self.values):
            self.values.append(value)
        return number


_State = tuple[int, int, int]


class Search:
    """One search; the rules are those that the product has when it runs."""

    def __init__(self, bounds: Bounds) -> None:
        self._bounds = bounds
        self._empty = first_world(bounds)
        self._stores, self._workers = _Numbers(), _Numbers()
        self._memory: dict[tuple[Any, ...], Any] = {}

    def run(self, max_seconds: float = 600.0) -> SearchFigures:
        """Search until nothing new is found, a promise is broken, or the time is over."""
        with mock.patch.object(metadata_module, "NUM_RETAINED_CHECKPOINTS", self._bounds.num_retained):
            return self._run(max_seconds)

    def _run(self, max_seconds: float) -> SearchFigures:
        start = time.perf_counter()
        first = self._split(self._empty)
        seen: dict[_State, int] = {first: 0}
        states, parents, labels, names = [first], array("I", [0]), array("I", [0]), _Numbers()
        num_transitions, depth, last_of_depth, index, violation = 0, 0, 0, 0, ""
        trace: list[str] = []
        while index < len(states) and not violation:
            if index > last_of_depth:
                depth, last_of_depth = depth + 1, len(states) - 1
            if index % 4096 == 0 and time.perf_counter() - start > max_seconds:
                break
            try:
                for label, after in self._successors(states[index]):
                    num_transitions += 1
                    if after not in seen:
                        seen[after] = len(states)
                        parents.append(index)
                        labels.append(names.number(label))
                        states.append(after)
                        trace = [label]
                        self._once(self._check_store, after[0])
                        trace = []
            except (Violation, AssertionError) as error:
                violation = str(error) or "an assertion of the product failed"
                while index:
                    trace.insert(0, names.values[labels[index]])
                    index = parents[index]
                break
            index += 1
        return SearchFigures(
            is_closed=index == len(states) and not violation,
            num_states=len(states),
            num_transitions=num_transitions,
            depth=depth,
            num_stores=len(self._stores.values),
            num_rule_calls=len(self._memory),
            seconds=time.perf_counter() - start,
            violation=violation,
            trace=tuple(trace),
        )

    def _successors(self, state: _State) -> list[tuple[str, _State]]:
        store, first, second = state
        found = [(label, (s, first, second)) for label, s in self._once(self._store_steps, store)]
        slots = [self._workers.values[number][1] for number in (first, second)]
        for worker, own in enumerate((first, second)):
            for label, s, w in self._once(self._worker_steps, store, own, worker, _chunk_ids(slots[1 - worker])):
                found.append((label, (s, w, second) if worker == 0 else (s, first, w)))
        return [(label, self._once(self._canonical, *after)) for label, after in found if after != state]

    def _once(self, ask: Callable[..., Any], *parts: Any) -> Any:
        key = (ask.__name__, *parts)
        if key not in self._memory:
            self._memory[key] = ask(*parts)
        return self._memory[key]

    def _check_store(self, store: int) -> None:
        check_world(self._world(store), self._bounds)

    def _store_steps(self, store: int) -> list[tuple[str, int]]:
        world = self._world(store)
        steps = [*stream_steps(world), *client_steps(world, self._bounds)]
        for label, after in steps:
            if not label.startswith(("delete", "collect")):
                check_nothing_goes(world, after)
        return [(label, self._split(after)[0]) for label, after in steps]

    def _worker_steps(
        self, store: int, own: int, worker: int, other_chunks: tuple[str, ...]
    ) -> list[tuple[str, int, int]]:
        # The other worker's message matters only by the chunk ids that are in use.
        world = self._world(store, own, worker)
        found = []
        for label, after in worker_steps(world, worker, self._bounds, other_chunks):
            check_nothing_goes(world, after)
            parts = self._split(after)
            found.append((label, parts[0], parts[1 + worker]))
        return found

    def _world(self, store: int, own: int = 0, worker: int = 0) -> World:
        hold, message = self._workers.values[own]
        return World(
            *self._stores.values[store],
            with_item((None, None), worker, hold),
            with_item((None, None), worker, message),
        )

    def _split(self, world: World) -> _State:
        first, second = (self._workers.number(parts) for parts in zip(world.holds, world.slots, strict=True))
        return self._stores.number(world[:4]), first, second

    def _canonical(self, store: int, first: int, second: int) -> _State:
        """The state that stands for all that differ only in epochs' numbers and in which worker is which."""
        store, first, second = self._with_ranked_epochs(store, first, second)
        swapped = (
            self._once(self._swapped_store, store),
            self._once(self._swapped_worker, second),
            self._once(self._swapped_worker, first),
        )
        return min((store, first, second), swapped)

    def _with_ranked_epochs(self, store: int, first: int, second: int) -> _State:
        streams = self._stores.values[store][0]
        parts = [part for number in (first, second) for part in self._workers.values[number] if part is not None]
        ranks = []
        for stream in (0, 1):
            epochs = {0 if streams[stream] is None else streams[stream].epoch}
            epochs |= {part.epoch for part in parts if part.stream == stream}
            ranks.append({epoch: rank for rank, epoch in enumerate(sorted(epochs - {0}), start=1)} | {0: 0})
        if all(epoch == rank for mapping in ranks for epoch, rank in mapping.items()):
            return store, first, second
        renamed = tuple(None if s is None else _with_epoch(s, ranks[i]) for i, s in enumerate(streams))
        workers = (
            self._workers.number(
                tuple(
                    part and part._replace(epoch=ranks[part.stream][part.epoch])
                    for part in self._workers.values[number]
                )
            )
            for number in (first, second)
        )
        return self._stores.number((renamed, *self._stores.values[store][1:])), *workers

    def _swapped_store(self, store: int) -> int:
        streams, *others = self._stores.values[store]
        renamed = tuple(None if s is None else with_worker_names(s, _SWAPPED) for s in streams)
        return self._stores.number((renamed, *others))

    def _swapped_worker(self, worker: int) -> int:
        hold, message = self._workers.values[worker]
        return self._workers.number((hold, message and message._replace(worker=_SWAPPED[message.worker])))


def search(bounds: Bounds = FULL, max_seconds: float = 600.0) -> SearchFigures:
    """Every state within the bounds."""
    return Search(bounds).run(max_seconds)


def _chunk_ids(message: Message | None) -> tuple[str, ...]:
    manifest = None if message is None else message.manifest
    return () if manifest is None else tuple(chunk.chunk_id for chunk in manifest.chunks)


def _with_epoch(metadata: StreamMetadata, ranks: dict[int, int]) -> StreamMetadata:
    lease = metadata.lease and metadata.lease._replace(epoch=ranks[metadata.lease.epoch])
    return replace(metadata, epoch=ranks[metadata.epoch], lease=lease)
