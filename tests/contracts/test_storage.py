"""What every database driver of the state store promises."""

import asyncio
import time
import uuid

import pytest

from eunoe.state_store.storage import (
    AddTotal,
    BuryRecord,
    Conflict,
    Delete,
    ExpectRoom,
    ExpectStaged,
    ExpectVersion,
    IndexAdd,
    IndexRemove,
    NoRoom,
    NotStaged,
    Persist,
    PutRecord,
    PutValue,
    Shorten,
    Storage,
    Versioned,
)

ABSENT = Versioned("", b"")


@pytest.fixture
def key() -> str:
    """A key's beginning that no other test uses."""
    return f"{{{uuid.uuid4().hex}}}"


async def test_a_record_gets_the_token_of_its_swap_as_version(storage: Storage, key: str) -> None:
    refusal = await storage.compare_and_swap("t1", [ExpectVersion(key, "")], [PutRecord(key, b"one")])

    assert refusal is None
    assert await storage.read([key, key + "x"]) == [Versioned("t1", b"one"), ABSENT]


async def test_a_swap_with_an_old_version_writes_nothing(storage: Storage, key: str) -> None:
    await storage.compare_and_swap("t1", [ExpectVersion(key, "")], [PutRecord(key, b"one")])

    refusal = await storage.compare_and_swap(
        "t2",
        [ExpectVersion(key, "")],
        [PutRecord(key, b"two"), PutValue(key + "v", b"v", 0), AddTotal(key + "t", "n", 1)],
    )

    assert refusal == Conflict(key)
    assert await storage.read([key]) == [Versioned("t1", b"one")]
    assert await storage.get([key + "v"]) == [None]
    assert await storage.totals(key + "t") == {}


async def test_a_repeated_swap_is_recognised_and_counts_once(storage: Storage, key: str) -> None:
    swap = [ExpectVersion(key, "")], [PutRecord(key, b"one"), AddTotal(key + "t", "n", 5)]
    await storage.compare_and_swap("t1", *swap)

    assert await storage.compare_and_swap("t1", *swap) is None
    assert await storage.totals(key + "t") == {"n": 5}


async def test_a_repeated_swap_is_recognised_by_any_of_its_records(storage: Storage, key: str) -> None:
    first, second = key + "1", key + "2"
    swap = (
        [ExpectVersion(first, ""), ExpectVersion(second, "")],
        [PutRecord(first, b"one"), PutRecord(second, b"two"), AddTotal(key + "t", "n", 5)],
    )
    await storage.compare_and_swap("t1", *swap)
    await storage.compare_and_swap("t2", [ExpectVersion(first, "t1")], [PutRecord(first, b"later")])

    assert await storage.compare_and_swap("t1", *swap) is None
    assert await storage.totals(key + "t") == {"n": 5}
    assert await storage.read([first]) == [Versioned("t2", b"later")]


async def test_a_record_made_again_does_not_pass_for_the_old_one(storage: Storage, key: str) -> None:
    await storage.compare_and_swap("t1", [ExpectVersion(key, "")], [PutRecord(key, b"same")])
    await storage.compare_and_swap("t2", [ExpectVersion(key, "t1")], [Delete(key)])
    await storage.compare_and_swap("t3", [ExpectVersion(key, "")], [PutRecord(key, b"same")])

    assert await storage.compare_and_swap("t4", [ExpectVersion(key, "t1")], [Delete(key)]) == Conflict(key)


async def test_of_concurrent_swaps_of_one_version_exactly_one_wins(storage: Storage, key: str) -> None:
    refusals = await asyncio.gather(
        *(storage.compare_and_swap(f"t{i}", [ExpectVersion(key, "")], [PutRecord(key, b"%d" % i)]) for i in range(20))
    )

    assert refusals.count(None) == 1
    assert (await storage.read([key]))[0].version == f"t{refusals.index(None)}"


async def test_a_staged_value_vanishes_after_its_time(storage: Storage, key: str) -> None:
    await storage.stage([(key, b"chunk")], ttl_ms=30)

    deadline = time.monotonic() + 10
    while await storage.get([key]) != [None]:
        assert time.monotonic() < deadline
        await asyncio.sleep(0.005)


async def test_a_persisted_value_outlives_its_time_and_late_repeats_of_its_staging(storage: Storage, key: str) -> None:
    other = key + "other"
    await storage.stage([(key, b"chunk")], ttl_ms=200)
    refusal = await storage.compare_and_swap("t1", [ExpectStaged(key, 5)], [Persist(key)])
    await storage.stage([(key, b"other bytes"), (other, b"o")], ttl_ms=1)

    deadline = time.monotonic() + 10
    while await storage.get([other]) != [None]:
        assert time.monotonic() < deadline
        await asyncio.sleep(0.005)
    assert refusal is None
    assert await storage.get([key]) == [b"chunk"]


@pytest.mark.parametrize("length", [4, 6])
async def test_a_staged_value_of_another_length_is_refused(storage: Storage, key: str, length: int) -> None:
    await storage.stage([(key, b"chunk")], ttl_ms=60_000)

    assert await storage.compare_and_swap("t1", [ExpectStaged(key, length)], [Persist(key)]) == NotStaged(key)


async def test_a_value_that_is_absent_or_persisted_already_is_not_staged(storage: Storage, key: str) -> None:
    await storage.stage([(key, b"chunk")], ttl_ms=60_000)
    await storage.compare_and_swap("t1", [ExpectStaged(key, 5)], [Persist(key)])

    assert await storage.compare_and_swap("t2", [ExpectStaged(key, 5)], []) == NotStaged(key)
    assert await storage.compare_and_swap("t3", [ExpectStaged(key + "x", 5)], []) == NotStaged(key + "x")


async def test_a_total_stops_at_its_limit(storage: Storage, key: str) -> None:
    expectations, writes = [ExpectRoom(key, "n", 3, 7)], [AddTotal(key, "n", 3)]

    assert [await storage.compare_and_swap(f"t{i}", expectations, writes) for i in range(3)] == [
        None,
        None,
        NoRoom("n"),
    ]
    assert await storage.totals(key) == {"n": 6}


async def test_an_index_is_read_by_score_from_both_ends(storage: Storage, key: str) -> None:
    await storage.apply([IndexAdd(key, score, f"m{score}") for score in (10, 20, 30, 40)])
    await storage.apply([IndexRemove(key, "m30"), IndexAdd(key, 25, "m20")])

    assert await storage.members_by_score(key, 10, 40, 9) == [("m20", 25), ("m40", 40)]
    assert await storage.members_by_score(key, 0, None, 2) == [("m10", 10), ("m20", 25)]
    assert await storage.highest_members(key, 11, 9) == [("m40", 40), ("m20", 25)]


async def test_an_index_of_equal_scores_is_read_in_pages(storage: Storage, key: str) -> None:
    names = ["A", "a", "a.b", "a_b", "b"]
    await storage.apply([IndexAdd(key, 0, name) for name in reversed(names)])

    first = await storage.members_after(key, "", 2)

    assert first == sorted(names)[:2]
    assert await storage.members_after(key, first[-1], 9) == sorted(names)[2:]


async def test_a_deleted_value_is_gone(storage: Storage, key: str) -> None:
    await storage.apply([PutValue(key, b"value", 0), Delete(key)])

    assert await storage.get([key]) == [None]


async def test_a_shortened_life_ends_at_its_new_end_and_is_never_prolonged(storage: Storage, key: str) -> None:
    await storage.apply([PutValue(key, b"long", 3_600_000), PutValue(key + "brief", b"brief", 20)])
    await storage.apply([Shorten(key, 20), Shorten(key + "brief", 3_600_000), Shorten(key + "absent", 20)])

    deadline = time.monotonic() + 10
    while await storage.get([key, key + "brief", key + "absent"]) != [None] * 3:
        assert time.monotonic() < deadline
        await asyncio.sleep(0.005)


async def test_a_late_repeat_of_what_made_a_record_does_not_bring_it_back(storage: Storage, key: str) -> None:
    made = [ExpectVersion(key, "")], [PutRecord(key, b"one")]
    await storage.compare_and_swap("t1", *made)
    await storage.compare_and_swap("t2", [ExpectVersion(key, "t1")], [BuryRecord(key, 60_000)])

    assert await storage.compare_and_swap("t1", *made) == Conflict(key)
    assert await storage.read([key]) == [Versioned("t2", b"")]


async def test_a_record_made_over_the_mark_of_a_removed_one_stays(storage: Storage, key: str) -> None:
    other = key + "other"
    await storage.compare_and_swap("t1", [], [BuryRecord(key, 20), BuryRecord(other, 20)])
    await storage.compare_and_swap("t2", [ExpectVersion(key, "t1")], [PutRecord(key, b"new")])

    deadline = time.monotonic() + 10
    while (await storage.read([other]))[0].version:
        assert time.monotonic() < deadline
        await asyncio.sleep(0.005)
    assert await storage.read([key]) == [Versioned("t2", b"new")]
