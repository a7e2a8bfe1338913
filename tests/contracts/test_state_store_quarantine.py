"""A checkpoint whose stored chunks are damaged is passed over, over every database driver."""

from collections.abc import Sequence
from typing import Any

import pytest

from eunoe.runtime.errors import CorruptState, InvalidRequest, OffsetUnavailable
from eunoe.state_store import keys
from eunoe.state_store.effects import Total
from eunoe.state_store.metadata import Manifest, StreamMetadata
from eunoe.state_store.storage import PutValue
from eunoe.state_store.stream_rules import Fork


async def fork(caller: Any) -> StreamMetadata:
    child: StreamMetadata = await caller.store.streams.fork(caller.name(), Fork(name=caller.name("child")))
    return child


async def committed(caller: Any, num: int = 4) -> list[Manifest]:
    """A stream of `num` checkpoints, ten bytes apart."""
    await caller.create()
    await caller.append(*[b"0123456789"] * num)
    fence = await caller.acquire()
    return [await caller.commit(fence, 10 * i) for i in range(1, num + 1)]


async def damage(caller: Any, *manifests: Manifest) -> None:
    for manifest in manifests:
        key = keys.chunk(caller.tenant, manifest.chunks[0].chunk_id)
        await caller.store.environment.storage.apply([PutValue(key, b"damaged", 0)])
        with pytest.raises(CorruptState):
            await caller.chunks(manifest)


async def test_a_damaged_checkpoint_gives_way_to_the_one_before_it(caller: Any) -> None:
    _, _, third, fourth = await committed(caller)
    before = await caller.get()

    await damage(caller, fourth)

    metadata = await caller.get()
    assert metadata.newest.version == third.version
    assert (metadata.applied_offset, metadata.checkpoint_offsets) == (30, (20, 30))
    assert (metadata.version, metadata.checkpoint_chain) == (before.version, before.checkpoint_chain)
    assert metadata.log_start_offset == before.log_start_offset


async def test_the_next_commit_follows_the_damaged_one_and_may_lie_below_it(caller: Any) -> None:
    manifests = await committed(caller)
    fence = (await caller.get()).lease.fence
    await damage(caller, *manifests[2:])

    again = await caller.commit(fence, 25)

    metadata = await caller.get()
    assert again.version == metadata.newest.version == 5
    assert (metadata.applied_offset, metadata.checkpoint_offsets) == (25, (25,))
    assert metadata.log_start_offset <= 25
    assert await caller.read(25) == (b"0123456789" * 4)[25:]


async def test_a_commit_below_the_newest_sound_checkpoint_is_refused(caller: Any) -> None:
    manifests = await committed(caller)
    fence = (await caller.get()).lease.fence
    await damage(caller, manifests[3])

    with pytest.raises(InvalidRequest):
        await caller.commit(fence, 29)


async def test_forks_start_from_sound_checkpoints_only(caller: Any) -> None:
    manifests = await committed(caller)
    await damage(caller, manifests[3])

    child = await fork(caller)

    assert child.newest.version == manifests[2].version
    assert await caller.read(30, "child") == b"0123456789"


async def test_without_a_sound_checkpoint_nothing_can_be_forked(caller: Any) -> None:
    manifests = await committed(caller)
    await damage(caller, *manifests[1:])

    assert (await caller.get()).newest is None
    with pytest.raises(OffsetUnavailable):
        await fork(caller)


async def test_a_checkpoint_that_only_a_fork_keeps_does_not_come_back(caller: Any) -> None:
    manifests = await committed(caller, 1)
    await fork(caller)
    await caller.append(b"0123456789" * 3)
    fence = (await caller.get()).lease.fence
    later = [await caller.commit(fence, offset) for offset in (20, 30, 40)]

    await damage(caller, *later)

    metadata = await caller.get()
    assert manifests[0].version in {c.version for c in metadata.checkpoints}
    assert metadata.newest is None


async def test_damage_on_the_way_is_no_damage_of_what_is_stored(caller: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    manifests = await committed(caller)
    storage = caller.store.environment.storage
    get, answers = storage.get, [[b"damaged"]]

    async def flawed(names: Sequence[str]) -> list[bytes | None]:
        return answers.pop() if answers else await get(names)

    monkeypatch.setattr(storage, "get", flawed)

    await caller.chunks(manifests[3])

    assert not answers
    assert (await caller.get()).newest.version == 4


async def test_the_damaged_checkpoint_is_freed_when_its_time_comes(caller: Any) -> None:
    manifests = await committed(caller)
    fence = (await caller.get()).lease.fence
    await damage(caller, manifests[3])
    for offset in (35, 40, 40):
        await caller.commit(fence, offset)

    metadata = await caller.get()
    assert [c.version for c in metadata.checkpoints] == [5, 6, 7]
    assert await caller.used(Total.CHECKPOINT_BYTES) == sum(c.chunk_bytes for c in metadata.checkpoints)
