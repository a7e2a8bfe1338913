from collections.abc import Mapping
from typing import Any

import pytest

from eunoe.internal.v1 import state_store_pb2 as pb
from eunoe.model_worker import sweep as sweep_module
from eunoe.model_worker.sweep import Sweep
from eunoe.runtime.errors import StreamNotFound


class FakeStore:
    """An index of backlogs."""

    def __init__(self, **backlogs: int) -> None:
        self.backlogs = backlogs

    async def list_backlog(self, request: pb.ListBacklogRequest) -> pb.ListBacklogResponse:
        rows = sorted(self.backlogs.items(), key=lambda row: -row[1])
        return pb.ListBacklogResponse(entries=[pb.BacklogEntry(name=name, backlog_bytes=size) for name, size in rows])


class FakeStream:
    """A stream that counts how often it was woken."""

    is_loaded = True
    is_idle = True

    def __init__(self, name: str) -> None:
        self.name = name
        self.num_woken = 0

    def advance(self) -> None:
        self.num_woken += 1

    def commit_if_due(self) -> None: ...


class FakeWorker:
    """Takes whatever `refused` does not name."""

    def __init__(self, store: FakeStore, refused: tuple[str, ...] = ()) -> None:
        self.streams: dict[str, Any] = {}
        self.asked: list[str] = []
        self.refused = refused
        streams: Mapping[str, Any] = self.streams
        self.sweep = Sweep(store, "tiny", streams, self.take)  # type: ignore[arg-type]

    async def take(self, name: str) -> bool:
        self.asked.append(name)
        if name == "gone":
            raise StreamNotFound("gone")
        if name in self.refused:
            return False
        self.streams[name] = FakeStream(name)
        return True


async def test_an_own_stream_with_a_backlog_is_woken() -> None:
    worker = FakeWorker(FakeStore(mine=100))
    stream = worker.streams["mine"] = FakeStream("mine")
    await worker.sweep.sweep()
    assert stream.num_woken == 1
    assert worker.asked == []


async def test_streams_of_nobody_are_taken_a_few_at_a_time_most_backlog_first() -> None:
    worker = FakeWorker(FakeStore(a=1, b=2, c=3, d=4, e=5, f=6))
    await worker.sweep.sweep()
    assert worker.asked == ["f", "e", "d", "c"]
    await worker.sweep.sweep()
    assert worker.asked == ["f", "e", "d", "c", "b", "a"]


async def test_a_stream_that_another_worker_owns_is_left_alone_for_a_while(monkeypatch: pytest.MonkeyPatch) -> None:
    worker = FakeWorker(FakeStore(other=5), refused=("other",))
    await worker.sweep.sweep()
    await worker.sweep.sweep()
    assert worker.asked == ["other"]
    monkeypatch.setattr(sweep_module, "_REST_SECONDS", 0.0)
    worker = FakeWorker(FakeStore(other=5), refused=("other",))
    await worker.sweep.sweep()
    await worker.sweep.sweep()
    assert worker.asked == ["other", "other"]


async def test_a_stream_that_cannot_be_taken_hides_no_other() -> None:
    worker = FakeWorker(FakeStore(gone=9, here=1))
    await worker.sweep.sweep()
    assert list(worker.streams) == ["here"]


async def test_a_stream_dropped_with_a_settled_backlog_is_not_taken_again_for_it() -> None:
    store = FakeStore(tail=7)
    worker = FakeWorker(store)
    for _ in range(2):
        await worker.sweep.sweep()
    del worker.streams["tail"]
    await worker.sweep.sweep()
    assert worker.asked == ["tail"]
    store.backlogs["tail"] = 900
    await worker.sweep.sweep()
    assert worker.asked == ["tail", "tail"]
