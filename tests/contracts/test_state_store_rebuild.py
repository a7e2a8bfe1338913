"""What the state store promises about forks that share the log alone, over every database driver."""

import asyncio
from dataclasses import replace
from typing import Any

import pytest

from eunoe.runtime.errors import AlreadyExists, InvalidRequest, OffsetUnavailable, VocabularyMismatch
from eunoe.state_store.effects import Total
from eunoe.state_store.log_rules import KIND_TOKEN_IDS
from eunoe.state_store.metadata import Settings, StreamMetadata
from eunoe.state_store.stream_rules import Create, Fork, Rebuild

SETTINGS = Settings(kv_budget_tokens=32, segment_length=8, num_sink_tokens=2, positions=1, retain_log=True)
REBUILD = Rebuild(model="other", settings=SETTINGS)


async def rebuild(caller: Any, parent: str = "a", child: str = "b", **changes: Any) -> StreamMetadata:
    by = replace(REBUILD, **{name: changes.pop(name) for name in list(changes) if name in Rebuild.__slots__})
    fork = Fork(name=caller.name(child), rebuild=by, **changes)
    return await caller.store.streams.fork(caller.name(parent), fork)  # type: ignore[no-any-return]


async def read_by_a_worker(caller: Any, num_commits: int, **settings: bool) -> None:
    """A stream "a" of so many records of 10 bytes, each followed by a commit."""
    await caller.create(**settings)
    fence = await caller.acquire()
    for i in range(num_commits):
        await caller.append(b"%10d" % i)
        await caller.commit(fence, 10 * i + 8)


async def test_a_rebuild_shares_the_whole_log_and_no_memory(caller: Any) -> None:
    await read_by_a_worker(caller, 5, retain_log=True)
    log_bytes = await caller.used(Total.LOG_BYTES)

    child = await rebuild(caller)

    assert (child.model, child.settings) == ("other", SETTINGS)
    assert (child.accepted_offset, child.applied_offset, child.version, child.epoch) == (50, 0, 0, 0)
    assert (child.checkpoints, child.lease) == ((), None)
    assert await caller.read(0, "b") == await caller.read(0)
    assert await caller.used(Total.LOG_BYTES) == log_bytes
    assert (await caller.store.backlog.largest("other", 1, 10_000)).count((child.name, 50)) == 1


async def test_a_rebuilt_stream_goes_its_own_way_whatever_becomes_of_its_parent(caller: Any) -> None:
    await read_by_a_worker(caller, 2, retain_log=True)
    await rebuild(caller)

    await caller.append(b"parent")
    await caller.append(b"child", stream_id="b")
    fence = await caller.acquire(stream_id="b")
    await caller.store.streams.delete(caller.name())
    first = replace(await caller.manifest(0, stream_id="b"), model_digest="other weights")
    await caller.store.commit(caller.name("b"), first, fence)

    assert await caller.read(0, "b") == b"%10d%10dchild" % (0, 1)
    assert (await caller.get("b")).version == 1


async def test_a_rebuilt_stream_that_moved_on_gives_back_what_it_shared(caller: Any) -> None:
    await read_by_a_worker(caller, 2)
    await rebuild(caller, settings=SETTINGS._replace(retain_log=False))
    await caller.store.streams.delete(caller.name())
    fence = await caller.acquire(stream_id="b")

    for _ in range(3):
        await caller.commit(fence, 20, "b")

    assert await caller.used(Total.LOG_BYTES) == 0


async def test_a_log_that_was_trimmed_cannot_be_rebuilt_from(caller: Any) -> None:
    await read_by_a_worker(caller, 4)

    with pytest.raises(OffsetUnavailable, match=r"starts at 18: .* retain_log=true") as error:
        await rebuild(caller)

    assert error.value.available == "the log from 18 to 40"


async def test_a_log_that_was_not_trimmed_yet_can_be_rebuilt_from(caller: Any) -> None:
    await read_by_a_worker(caller, 2)

    assert (await rebuild(caller)).accepted_offset == 20


async def test_an_import_lacks_the_beginning(caller: Any) -> None:
    manifest = caller.a_manifest(3, 5, await caller.stage(b"memory"))
    event = Create(name=caller.name(), model="m", settings=SETTINGS, manifest=manifest, log_start_offset=5)
    await caller.store.streams.create(event)

    with pytest.raises(OffsetUnavailable, match="starts at 5"):
        await rebuild(caller)


async def test_a_rebuilt_stream_can_be_rebuilt_and_forked_like_any_other(caller: Any) -> None:
    await read_by_a_worker(caller, 2, retain_log=True)
    await rebuild(caller)
    await caller.append(b"child", stream_id="b")

    again = await rebuild(caller, "b", "c", model="third")
    fork = await caller.store.streams.fork(caller.name("b"), Fork(name=caller.name("d")))

    assert (again.model, fork.model) == ("third", "other")
    for stream_id in "cd":
        assert await caller.read(0, stream_id) == await caller.read(0, "b")


async def test_a_rebuild_may_end_at_any_record(caller: Any) -> None:
    await read_by_a_worker(caller, 5, retain_log=True)

    child = await rebuild(caller, at_offset=20)

    assert (child.accepted_offset, await caller.read(0, "b")) == (20, b"%10d%10d" % (0, 1))
    for at_offset in (13, 51):
        with pytest.raises(OffsetUnavailable, match=str(at_offset)):
            await rebuild(caller, child="c", at_offset=at_offset)


async def test_a_repeated_rebuild_answers_the_same_child(caller: Any) -> None:
    await read_by_a_worker(caller, 1)
    first = await rebuild(caller, request_id="r")

    assert await rebuild(caller, request_id="r") == first
    with pytest.raises(AlreadyExists):
        await rebuild(caller)


async def test_token_ids_are_read_by_models_of_their_vocabulary_only(caller: Any) -> None:
    await caller.create()
    await caller.append(*[b"text"] * 3)
    await caller.append(b"\1\0\0\0", kind=KIND_TOKEN_IDS)

    with pytest.raises(VocabularyMismatch) as error:
        await rebuild(caller)

    assert error.value.offset == 12
    assert (await rebuild(caller, at_offset=12)).accepted_offset == 12
    assert (await rebuild(caller, child="c", shares_vocabulary=True)).accepted_offset == 16
    with pytest.raises(VocabularyMismatch):
        await rebuild(caller, "c", "d")


async def test_a_log_may_grow_while_it_is_looked_through(caller: Any) -> None:
    await caller.create()
    await caller.append(*[b"text"] * 20)

    child, _ = await asyncio.gather(rebuild(caller), caller.append(*[b"more"] * 20))

    assert await caller.read(0, "b") == (b"text" * 20 + b"more" * 20)[: child.accepted_offset]


async def test_settings_without_room_are_refused(caller: Any) -> None:
    await caller.create()

    with pytest.raises(InvalidRequest):
        await rebuild(caller, settings=SETTINGS._replace(kv_budget_tokens=0))
