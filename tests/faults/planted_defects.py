"""Testing the tests: one promise-breaking change of the product at a time, and whether the fault runs notice it.

Each defect is planted by patching one function for as long as a context lasts. The finders are the runs themselves: the
exhaustive search, the simulation with and without loss, the lives of remembered answers, folds that are flushed.
"""

import random
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import Any
from unittest.mock import patch

from exhaustive import SMALL, search
from flushed_folds import flushed_folds
from remembering_lives import remembering_lives
from simulated_storage import SimulatedDatabase, SimulatedStorage
from simulation import simulate
from virtual_time import run_in_virtual_time

from eunoe.model_worker.fold import StreamFold
from eunoe.runtime.errors import EunoeError, LeaseLost, NotOwner, StateLost
from eunoe.state_store import checkpoint_rules, keys, lease_rules, log_rules, memory_storage, stream_rules
from eunoe.state_store.chains import LogMark
from eunoe.state_store.config import StateStoreConfig
from eunoe.state_store.log_rules import Append
from eunoe.state_store.metadata import ChunkRef, Lease, Manifest, Settings, StreamMetadata
from eunoe.state_store.sealing import DigestSeal
from eunoe.state_store.storage import Conflict, NotStaged
from eunoe.state_store.store import StateStore
from eunoe.state_store.stream_rules import Create
from eunoe.state_store.transactions import Environment

Finder = Callable[[], str]


@dataclass(frozen=True, slots=True)
class PlantedDefect:
    """A defect by name; `plant` puts it into the product while its context lasts.

    Attributes:
        layer: Whose promise it breaks, as in FINDERS.
    """

    name: str
    plant: Callable[[], AbstractContextManager[Any]]
    layer: str = "store"


@dataclass(frozen=True, slots=True)
class Caught:
    """Who found a defect first, what was broken, and how long it took; no finder means that nobody did."""

    defect: str
    finder: str
    violation: str
    seconds: float


def hunt(defect: PlantedDefect, finders: dict[str, Finder] | None = None) -> Caught:
    """Let the finders (default: those of the defect's layer) look until one sees a broken promise."""
    start = time.monotonic()
    with defect.plant():
        for name, find in (finders or FINDERS[defect.layer]).items():
            if violation := find():
                return Caught(defect.name, name, violation, time.monotonic() - start)
    return Caught(defect.name, "", "", time.monotonic() - start)


def by_search() -> str:
    """The exhaustive search of the smallest world."""
    return search(SMALL, max_seconds=60.0).violation


def by_search_that_reads_ahead() -> str:
    """The same of a world whose folds read on, as tokenizers do, but whose workers do not crash."""
    return search(replace(SMALL, reads_ahead=True, num_leases=1, num_crashes=0), max_seconds=60.0).violation


def by_simulation() -> str:
    """Lives with faults that lose nothing."""
    return _first(lambda: simulate(600, seed=1, stops_at_violation=True).violations)


def by_lossy_simulation() -> str:
    """Lives in which promotions forget."""
    return _first(lambda: simulate(600, seed=1, loses=True, stops_at_violation=True).violations)


def by_stale_fold() -> str:
    """A worker has read a record that a promotion then forgets; another record of its length comes instead."""

    async def live() -> str:
        database = SimulatedDatabase(random.Random(0), waits_for_replica=False)
        store = StateStore(Environment(storage=SimulatedStorage(database), config=StateStoreConfig()))
        name, settings = "tenants/t/streams/a", Settings(64, 16, 4, 2, False)
        await store.streams.create(Create(name=name, model="m", settings=settings))
        lease = (await store.streams.acquire(name, Lease("w", 0, "h:1"), None)).lease
        database.replicate()
        read, _ = await store.logs.append(name, Append(offset=0, data=b"lost"))
        database.promote()
        await store.logs.append(name, Append(offset=0, data=b"else"))
        await store.environment.storage.stage([(keys.chunk("t", "c"), DigestSeal().close("chunk c", b"lost"))], 60_000)
        manifest = Manifest(1, 1, 4, 0, 16, 4, "d", "md", (), (ChunkRef("c", 4, "0" * 32),))
        assert lease is not None
        try:
            mark = LogMark(4, read.log_chain)
            await store.checkpoints.commit(name, manifest, lease.fence, parent_chain="", read=mark)
        except StateLost:
            return ""
        return "a state that was folded from a lost record is committed"

    return run_in_virtual_time(live, seed=0)


def by_remembering() -> str:
    """Answers that are to be remembered, beside writers."""
    return _first(lambda: remembering_lives(200, seed=1))


def by_flushes() -> str:
    """Folds that are flushed and moved, against undisturbed ones."""
    try:
        return flushed_folds(10, seed=1)
    except (AssertionError, ValueError) as error:
        return f"{type(error).__name__}: {error}"


FINDERS: dict[str, dict[str, Finder]] = {
    "store": {
        "exhaustive search": by_search,
        "exhaustive search that reads ahead": by_search_that_reads_ahead,
        "simulation": by_simulation,
        "lossy simulation": by_lossy_simulation,
        "stale fold": by_stale_fold,
    },
    "worker": {
        "remembering": by_remembering,
        "flushes": by_flushes,
    },
}


def _first(violations: Callable[[], list[str]]) -> str:
    try:
        return next(iter(violations()), "")
    except (EunoeError, AssertionError) as error:
        # What no client of the simulation expects has come out of the store.
        return f"{type(error).__name__}: {error}"


def _without(module: Any, function: str) -> Callable[[], AbstractContextManager[Any]]:
    """The check is never made."""
    return lambda: patch.object(module, function, lambda *_, **__: None)


@contextmanager
def _no_fence_check() -> Iterator[None]:
    with patch.object(checkpoint_rules, "check_fence", lambda *_: None):
        yield


@contextmanager
def _any_later_epoch() -> Iterator[None]:
    def check(metadata: StreamMetadata, fence: tuple[str, int]) -> None:
        if metadata.lease is None or fence[1] < metadata.epoch - 1:
            raise LeaseLost("too old")

    with patch.object(checkpoint_rules, "check_fence", check):
        yield


@contextmanager
def _epochs_stand_still() -> Iterator[None]:
    def acquire(metadata: StreamMetadata, by: Any, *, suspect: Any, owner_is_alive: bool) -> StreamMetadata:
        lease = metadata.lease
        if lease is not None and lease.worker != by.worker and owner_is_alive and suspect != lease.fence:
            raise NotOwner("owned", worker=lease.worker, epoch=lease.epoch, address=lease.address)
        return replace(metadata, epoch=1, lease=by._replace(worker="anybody", epoch=1))

    def check(metadata: StreamMetadata, fence: tuple[str, int]) -> None:
        if metadata.lease is None or fence[1] != metadata.lease.epoch:
            raise LeaseLost("too old")

    with patch.object(lease_rules, "acquire", acquire), patch.object(checkpoint_rules, "check_fence", check):
        yield


def _appends(change: Callable[[StreamMetadata, Any], Any]) -> Callable[[], AbstractContextManager[Any]]:
    """`append` sees a changed event."""
    original = log_rules.append

    def append(metadata: StreamMetadata, event: Any, **facts: Any) -> Any:
        return original(metadata, change(metadata, event), **facts)

    return lambda: patch.object(log_rules, "append", append)


def _moved_to_end(metadata: StreamMetadata, event: Any) -> Any:
    return replace(event, offset=metadata.accepted_offset, after_chain="")


def _gap_is_closed(metadata: StreamMetadata, event: Any) -> Any:
    return replace(event, offset=min(event.offset, metadata.accepted_offset), after_chain="")


@contextmanager
def _version_not_checked() -> Iterator[None]:
    original = checkpoint_rules.commit

    def commit(metadata: StreamMetadata, manifest: Any, fence: Any, *, parent_chain: str | None = None) -> Any:
        if manifest.version != metadata.version + 1:
            manifest = replace(manifest, version=metadata.version + 1)
        return original(metadata, manifest, fence)

    with patch.object(checkpoint_rules, "commit", commit):
        yield


@contextmanager
def _offset_may_go_back() -> Iterator[None]:
    original = checkpoint_rules.commit

    def commit(metadata: StreamMetadata, manifest: Any, fence: Any, **facts: Any) -> Any:
        newest = metadata.newest
        if newest is None or manifest.applied_offset >= newest.applied_offset:
            return original(metadata, manifest, fence, **facts)
        lower = replace(newest, applied_offset=0, tokens=0)
        seen = replace(metadata, checkpoints=(*metadata.checkpoints[:-1], lower))
        return original(seen, manifest, fence, **facts)

    with patch.object(checkpoint_rules, "commit", commit):
        yield


@contextmanager
def _fork_does_not_hold() -> Iterator[None]:
    with patch.object(stream_rules, "_with_holders", lambda owner, reference, delta: owner):
        yield


@contextmanager
def _fork_reads_ahead() -> Iterator[None]:
    with patch.object(stream_rules, "_base_of_fork", lambda parent, at, at_entry: parent.newest):
        yield


@contextmanager
def _delete_frees_what_is_shared() -> Iterator[None]:
    original = stream_rules.delete
    with patch.object(stream_rules, "delete", lambda metadata: original(replace(metadata, holds=()))):
        yield


@contextmanager
def _trims_to_the_newest() -> Iterator[None]:
    def ranges(metadata: StreamMetadata) -> tuple[tuple[int, int], ...]:
        return ((metadata.own_start_offset, metadata.accepted_offset),)

    with patch.object(stream_rules, "garbage_ranges", ranges):
        yield


@contextmanager
def _repeated_swap_runs_again() -> Iterator[None]:
    original = memory_storage.MemoryStorage.compare_and_swap

    async def swap(self: Any, token: str, expectations: Any, writes: Any) -> Any:
        # As a database that forgot to compare versions.
        kept = [e for e in expectations if type(e).__name__ != "ExpectVersion"]
        return await original(self, f"{token}'", kept, writes)

    with patch.object(memory_storage.MemoryStorage, "compare_and_swap", swap):
        yield


@contextmanager
def _refuses(kind: type) -> Iterator[None]:
    original = memory_storage.MemoryStorage._refusal

    def refusal(self: Any, expectation: Any) -> Any:
        found = original(self, expectation)
        return None if isinstance(found, kind) else found

    with patch.object(memory_storage.MemoryStorage, "_refusal", refusal):
        yield


@contextmanager
def _chunks_need_not_be_there() -> Iterator[None]:
    original = memory_storage.MemoryStorage._write

    def write(self: Any, operation: Any, token: str) -> None:
        # As Redis: to make a key last that is not there does nothing.
        if type(operation).__name__ != "Persist" or operation.key in self._values:
            original(self, operation, token)

    with _refuses(NotStaged), patch.object(memory_storage.MemoryStorage, "_write", write):
        yield


@contextmanager
def _chunks_are_not_persisted() -> Iterator[None]:
    original = memory_storage.MemoryStorage._write

    def write(self: Any, operation: Any, token: str) -> None:
        if type(operation).__name__ != "Persist":
            original(self, operation, token)

    with patch.object(memory_storage.MemoryStorage, "_write", write):
        yield


@contextmanager
def _acknowledges_before_the_sync() -> Iterator[None]:
    original = SimulatedDatabase.__init__

    def init(self: Any, *arguments: Any, **settings: Any) -> None:
        original(self, *arguments, **{**settings, "fsync": "everysec"})

    with patch.object(SimulatedDatabase, "__init__", init):
        yield


@contextmanager
def _acknowledges_before_the_replica() -> Iterator[None]:
    original = SimulatedDatabase.__init__

    def init(self: Any, *arguments: Any, **settings: Any) -> None:
        original(self, *arguments, **{**settings, "waits_for_replica": False})

    with patch.object(SimulatedDatabase, "__init__", init):
        yield


@contextmanager
def _nobody_looks_at_chains() -> Iterator[None]:
    with ExitStack() as stack:
        stack.enter_context(patch.object(log_rules, "check_seen", lambda *_: None))
        blind = lambda metadata, event: replace(event, after_chain="")  # noqa: E731
        stack.enter_context(_appends(blind)())
        original = checkpoint_rules.commit
        stack.enter_context(
            patch.object(checkpoint_rules, "commit", lambda m, manifest, fence, **_: original(m, manifest, fence))
        )
        yield


def _remembered_at_the_end(metadata: StreamMetadata, event: Any) -> Any:
    return _moved_to_end(metadata, event) if event.request_id else event


@contextmanager
def _flush_cuts_a_segment() -> Iterator[None]:
    original = StreamFold._pass_milestones

    def pass_milestones(self: Any) -> None:
        if any(milestone.offset <= self._log.next_offset for milestone in self._milestones):
            # What was asked for shall be in the memory: all of it, at once.
            self._decoder.prefill(self._state, self._log.take(self._log.num_closed), self.policy)
        original(self)

    with patch.object(StreamFold, "_pass_milestones", pass_milestones):
        yield


DEFECTS: tuple[PlantedDefect, ...] = (
    PlantedDefect("a commit's lease is not checked", _no_fence_check),
    PlantedDefect("a commit's epoch may be the one before", _any_later_epoch),
    PlantedDefect("epochs stand still and workers have one name", _epochs_stand_still),
    PlantedDefect("a record that is there already is taken again", _appends(_moved_to_end)),
    PlantedDefect("a record behind a gap is taken", _appends(_gap_is_closed)),
    PlantedDefect("a commit's version is not checked", _version_not_checked),
    PlantedDefect("a commit may go back in the log", _offset_may_go_back),
    PlantedDefect("a fork does not count as a holder", _fork_does_not_hold),
    PlantedDefect("a fork starts from a state that has read too far", _fork_reads_ahead),
    PlantedDefect("deleting a stream frees what its forks share", _delete_frees_what_is_shared),
    PlantedDefect("the log is trimmed without regard to checkpoints", _trims_to_the_newest),
    PlantedDefect("a swap does not compare versions", _repeated_swap_runs_again),
    PlantedDefect("a swap ignores conflicts", lambda: _refuses(Conflict)),
    PlantedDefect("a commit's chunks need not be there", _chunks_need_not_be_there),
    PlantedDefect("a commit's chunks keep their time to live", _chunks_are_not_persisted),
    PlantedDefect("writes are acknowledged before they are on disk", _acknowledges_before_the_sync),
    PlantedDefect("writes are acknowledged before the replica has them", _acknowledges_before_the_replica),
    PlantedDefect("nobody presents what he has seen", _nobody_looks_at_chains),
    PlantedDefect("an answer is remembered without compare-and-set", _appends(_remembered_at_the_end), "worker"),
    PlantedDefect("a segment is cut at a flush", _flush_cuts_a_segment, "worker"),
)
