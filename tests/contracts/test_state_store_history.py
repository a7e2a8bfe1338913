"""What the state store says of a stream's past: both hash chains hold over what is retained, or where they do not."""

from dataclasses import replace
from typing import Any

import pytest

from eunoe.runtime.errors import CorruptState, OffsetUnavailable, StreamNotFound
from eunoe.state_store import keys
from eunoe.state_store.effects import Change
from eunoe.state_store.history import Checked, Difference, History, broken_commit, check_history
from eunoe.state_store.metadata import StreamMetadata
from eunoe.state_store.storage import Delete, PutValue
from eunoe.state_store.stream_rules import Fork
from eunoe.state_store.transactions import Transaction, member_as_entry, record_identity


async def history(caller: Any, stream_id: str = "a") -> History:
    """The end of a check whose progress only grows, up to all of the log."""
    *progress, end = [i async for i in check_history(caller.store.streams, caller.store.logs, caller.name(stream_id))]
    assert all(isinstance(item, Checked) for item in progress)
    done = [item.done_bytes for item in progress]
    assert done == sorted(done)
    assert isinstance(end, History)
    if end.difference is None:
        assert done[-1] == progress[-1].log_bytes == end.metadata.accepted_offset - end.metadata.log_start_offset
    return end


async def difference(caller: Any, stream_id: str = "a") -> Difference:
    found = (await history(caller, stream_id)).difference
    assert found is not None
    return found


async def alter_record(caller: Any, start: int, data: bytes) -> None:
    """Other bytes in a record, closed as the store would."""
    metadata, environment = await caller.get(), caller.store.environment
    rows = await environment.storage.members_by_score(keys.log_index(caller.tenant, metadata.uid), start, None, 1)
    identity = record_identity(metadata.uid, member_as_entry(*rows[0]))
    sealed = environment.keyring.seal(caller.tenant, metadata.wrapped_key).close(identity, data)
    await environment.storage.apply([PutValue(keys.log_record(caller.tenant, metadata.uid, start), sealed, 0)])


async def alter(caller: Any, **changes: Any) -> None:
    transaction = Transaction(caller.store.environment, caller.tenant)
    await transaction.commit(Change((replace(await transaction.stream(caller.name()), **changes),)))


async def a_stream(caller: Any, **settings: Any) -> StreamMetadata:
    """One with four checkpoints, at 3, 6, 9 and 12, of 15 bytes."""
    await caller.create(**settings)
    fence = await caller.acquire()
    for offset in (3, 6, 9, 12):
        await caller.append(b"%03d" % offset)
        await caller.commit(fence, offset)
    await caller.append(b"end")
    return await caller.get()


@pytest.mark.parametrize("retain_log", [False, True])
async def test_an_honest_past_has_no_difference(caller: Any, retain_log: bool) -> None:
    metadata = await a_stream(caller, retain_log=retain_log)

    found = await history(caller)

    assert found == History(metadata, None)
    assert [manifest.version for manifest in found.metadata.retained] == [2, 3, 4]


async def test_a_stream_of_nothing_has_no_difference(caller: Any) -> None:
    await caller.create()

    assert (await history(caller)).difference is None


@pytest.mark.parametrize("at_offset", [None, 9, 12])
async def test_forks_and_what_they_append_have_no_difference(caller: Any, at_offset: int | None) -> None:
    await a_stream(caller)
    await caller.store.streams.fork(caller.name(), Fork(name=caller.name("child"), at_offset=at_offset))
    before = await history(caller, "child")
    end = await caller.append(b"more", stream_id="child")
    await caller.commit(await caller.acquire(stream_id="child"), end, "child")
    await caller.store.streams.fork(caller.name("child"), Fork(name=caller.name("grandchild")))
    await caller.append(b"even more", stream_id="grandchild")
    await caller.store.streams.delete(caller.name())

    assert before.difference is None
    assert (await history(caller, "child")).difference is None
    assert (await history(caller, "grandchild")).difference is None


async def test_an_import_has_no_difference_though_its_log_begins_anew(caller: Any) -> None:
    exported = (await a_stream(caller)).newest
    assert exported is not None
    chunks = await caller.stage(b"imported", stream_id="b")
    manifest = replace(exported, chunks=chunks, owner_uid="", read_to=0)
    await caller.create("b", manifest=manifest, log_start_offset=12)
    await caller.append(b"end", stream_id="b")
    await caller.commit(await caller.acquire(stream_id="b"), 15, "b")

    found = await history(caller, "b")

    assert found.difference is None
    assert [manifest.version for manifest in found.metadata.retained] == [4, 5]


async def test_an_altered_record_is_where_the_logs_chain_breaks(caller: Any) -> None:
    await a_stream(caller)

    await alter_record(caller, 9, b"xxx")

    found = await difference(caller)
    assert (found.of_log, found.offset) == (True, 9)
    assert len(found.recorded) == len(found.found) == 32


async def test_the_first_record_of_a_whole_log_is_checked_too(caller: Any) -> None:
    await a_stream(caller, retain_log=True)

    await alter_record(caller, 0, b"xxx")

    assert (await difference(caller)).offset == 0


async def test_a_record_that_is_gone_is_a_difference(caller: Any) -> None:
    metadata = await a_stream(caller)

    await caller.store.environment.storage.apply([Delete(keys.log_record(caller.tenant, metadata.uid, 12))])

    found = await difference(caller)
    assert (found.of_log, found.offset, found.found) == (True, 12, "")


async def test_an_end_of_the_log_with_another_chain_is_a_difference(caller: Any) -> None:
    metadata = await a_stream(caller)

    await alter(caller, log_chain="ab" * 16)

    assert await difference(caller) == Difference(
        True, 15, "ab" * 16, metadata.log_chain, "the log's chain is another from offset 15 on"
    )


@pytest.mark.parametrize("index", [0, 1, 2])
@pytest.mark.parametrize("change", [{"state_digest": "other"}, {"tokens": 1}, {"chain": "ab" * 16}])
async def test_an_altered_commit_is_where_the_chain_of_commits_breaks(
    caller: Any, index: int, change: dict[str, Any]
) -> None:
    metadata = await a_stream(caller)
    altered = list(metadata.checkpoints)
    altered[index] = replace(altered[index], **change)

    found = broken_commit(replace(metadata, checkpoints=tuple(altered)))

    # What the oldest says of itself rests on a commit that is gone; only its chain is known to the next one.
    if index == 0:
        assert found is None or (found.offset == altered[1].applied_offset and "chain" in change)
    else:
        assert found is not None
        assert (found.of_log, found.offset) == (False, altered[index].applied_offset)


async def test_the_first_commit_of_all_is_checked_by_itself(caller: Any) -> None:
    await caller.create()
    await caller.append(b"text")
    await caller.commit(await caller.acquire(), 4)
    metadata = await caller.get()

    altered = replace(metadata.checkpoints[0], state_digest="other")

    assert broken_commit(metadata) is None
    assert broken_commit(replace(metadata, checkpoints=(altered,))) is not None


async def test_a_log_that_is_trimmed_while_it_is_checked_is_no_difference(caller: Any) -> None:
    await a_stream(caller)
    checking = check_history(caller.store.streams, caller.store.logs, caller.name())
    await anext(checking)
    fence = await caller.acquire()
    for offset in (13, 14, 15):
        await caller.commit(fence, offset)

    with pytest.raises(OffsetUnavailable):
        _ = [item async for item in checking]


async def test_a_stream_that_is_made_anew_while_it_is_checked_is_not_found(caller: Any) -> None:
    await a_stream(caller)
    checking = check_history(caller.store.streams, caller.store.logs, caller.name())
    await anext(checking)
    await caller.store.streams.delete(caller.name())
    await caller.create(retain_log=True)
    await caller.append(b"0123456789")

    with pytest.raises((StreamNotFound, OffsetUnavailable, CorruptState)):
        _ = [item async for item in checking]
