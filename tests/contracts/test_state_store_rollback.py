"""Who comes back with a mark that the store's history does not have is told so, whatever else happened since."""

from dataclasses import replace

import pytest

from eunoe.runtime.errors import LeaseLost, StateLost
from eunoe.state_store.chains import LogMark, checkpoint_chain, record_chain
from eunoe.state_store.log_rules import KIND_TEXT, Append
from eunoe.state_store.metadata import Lease
from eunoe.state_store.stream_rules import Fork

OTHER_CHAIN = "00" * 16


async def test_the_chain_grows_with_every_record_and_tells_histories_apart(caller) -> None:
    await caller.create("a")
    await caller.create("b")
    await caller.append(b"one", b"two", stream_id="a")
    await caller.append(b"onet", b"wo", stream_id="b")

    chains = [(await caller.get(stream_id)).log_chain for stream_id in ("a", "b")]

    first = record_chain("", 0, KIND_TEXT, b"one")
    assert chains[0] == record_chain(first, 3, KIND_TEXT, b"two")
    assert chains[0] != chains[1]


async def test_every_mark_of_the_log_is_known_and_no_other(caller) -> None:
    await caller.create()
    marks = []
    for data in (b"one", b"two", b"three"):
        end = await caller.append(data)
        marks.append(LogMark(end, (await caller.get()).log_chain))
    metadata = await caller.get()

    for mark in marks:
        await caller.store.logs.check_seen(metadata, mark)
    for mark in (*(mark._replace(chain=OTHER_CHAIN) for mark in marks), LogMark(4, marks[0].chain)):
        with pytest.raises(StateLost):
            await caller.store.logs.check_seen(metadata, mark)


async def test_a_mark_beyond_the_log_tells_where_the_log_ends_now(caller) -> None:
    await caller.create()
    await caller.append(b"one")

    with pytest.raises(StateLost) as caught:
        await caller.store.logs.check_seen(await caller.get(), LogMark(9, OTHER_CHAIN))

    assert caught.value.lost_from == 3


async def test_a_mark_whose_record_is_trimmed_is_not_checked(caller) -> None:
    await caller.create()
    await caller.append(b"one")
    fence = await caller.acquire()
    for _ in range(4):
        await caller.append(b"more")
        await caller.commit(fence, (await caller.get()).accepted_offset)
    metadata = await caller.get()
    assert metadata.log_start_offset > 3

    await caller.store.logs.check_seen(metadata, LogMark(3, OTHER_CHAIN))


async def test_a_mark_that_is_trimmed_while_it_is_checked_is_no_loss(caller) -> None:
    await caller.create()
    await caller.append(b"one")
    mark = LogMark(3, (await caller.get()).log_chain)
    await caller.append(b"two")
    before = await caller.get()
    fence = await caller.acquire()
    for _ in range(3):
        await caller.commit(fence, 6)

    await caller.store.logs.check_seen(before, mark)

    assert (await caller.get()).log_start_offset == 6


async def test_a_record_behind_another_past_is_not_taken(caller) -> None:
    await caller.create()
    await caller.append(b"one")

    with pytest.raises(StateLost):
        await caller.store.logs.append(caller.name(), Append(offset=3, data=b"two", after_chain=OTHER_CHAIN))

    assert await caller.read() == b"one"


async def test_a_state_that_was_folded_from_lost_records_is_not_committed(caller) -> None:
    await caller.create()
    await caller.append(b"one")
    fence = await caller.acquire()
    manifest = await caller.manifest(3)

    for read in (LogMark(3, OTHER_CHAIN), LogMark(6, OTHER_CHAIN)):
        with pytest.raises(StateLost):
            await caller.store.commit(caller.name(), manifest, fence, read=read)

    assert (await caller.get()).version == 0
    await caller.store.commit(caller.name(), manifest, fence, read=LogMark(3, (await caller.get()).log_chain))


async def test_a_state_beyond_the_end_of_a_log_that_was_rolled_back_is_lost_and_not_invalid(caller) -> None:
    await caller.create()
    await caller.append(b"one")
    fence = await caller.acquire()
    manifest = await caller.manifest(6)

    with pytest.raises(StateLost):
        await caller.store.commit(caller.name(), manifest, fence, read=LogMark(6, OTHER_CHAIN))


async def test_a_commit_behind_another_past_is_refused(caller) -> None:
    await caller.create()
    await caller.append(b"one")
    fence = await caller.acquire()
    first = await caller.commit(fence, 3)
    second = await caller.manifest(3)

    with pytest.raises(StateLost):
        await caller.store.commit(caller.name(), second, fence, parent_chain=OTHER_CHAIN)
    with pytest.raises(StateLost):
        await caller.store.commit(caller.name(), replace(second, version=3), fence, parent_chain=OTHER_CHAIN)
    await caller.store.commit(caller.name(), second, fence, parent_chain=checkpoint_chain("", first))

    newest = (await caller.get()).newest
    assert newest is not None
    assert newest.chain == checkpoint_chain(checkpoint_chain("", first), second)


async def test_repeating_a_commit_stays_harmless(caller) -> None:
    await caller.create()
    await caller.append(b"one")
    fence = await caller.acquire()
    manifest = await caller.manifest(3)
    mark = LogMark(3, (await caller.get()).log_chain)

    first = await caller.store.commit(caller.name(), manifest, fence, parent_chain="", read=mark)
    again = await caller.store.commit(caller.name(), manifest, fence, parent_chain="", read=mark)

    assert again.newest == first.newest


async def test_a_stranger_hears_of_its_lost_lease_first(caller) -> None:
    await caller.create()
    await caller.append(b"one")
    fence = await caller.acquire()
    manifest = await caller.manifest(3)
    await caller.acquire(Lease("w2", 0, "host:2"), suspect=fence)

    with pytest.raises(LeaseLost):
        await caller.store.commit(caller.name(), manifest, fence, parent_chain=OTHER_CHAIN)


@pytest.mark.parametrize("at_offset", [3, 6])
async def test_a_fork_goes_on_with_its_parents_chain(caller, at_offset: int) -> None:
    await caller.create()
    await caller.append(b"one")
    first = record_chain("", 0, KIND_TEXT, b"one")
    await caller.append(b"two")
    chain = first if at_offset == 3 else record_chain(first, 3, KIND_TEXT, b"two")

    child = await caller.store.streams.fork(caller.name(), Fork(name=caller.name("child"), at_offset=at_offset))
    await caller.append(b"own", stream_id="child")
    metadata = await caller.get("child")

    assert child.log_chain == chain
    assert metadata.log_chain == record_chain(chain, at_offset, KIND_TEXT, b"own")
    for mark in (LogMark(3, first), LogMark(at_offset, chain)):
        await caller.store.logs.check_seen(metadata, mark)
