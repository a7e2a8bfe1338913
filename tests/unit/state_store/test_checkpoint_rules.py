from eunoe.decoder.log_tokenizer import MAX_PRE_TOKEN_BYTES
from eunoe.state_store.checkpoint_rules import MAX_READ_AHEAD_BYTES, commit
from eunoe.state_store.effects import RecordEntry
from eunoe.state_store.metadata import ChunkRef, Lease, Manifest, Settings, StreamMetadata
from eunoe.state_store.stream_rules import Fork, fork, garbage_ranges

LEASE = Lease("w", 1, "h:1")


def a_stream(accepted_offset: int) -> StreamMetadata:
    settings = Settings(64, 16, 4, 2, False)
    return StreamMetadata(
        name="tenants/t/streams/a",
        uid="a",
        model="m",
        settings=settings,
        create_time_ns=0,
        accepted_offset=accepted_offset,
        epoch=1,
        lease=LEASE,
    )


def committed(stream: StreamMetadata, applied_offset: int) -> StreamMetadata:
    version = stream.version + 1
    chunk = ChunkRef(f"c{version}", 1, "0" * 32)
    manifest = Manifest(1, version, applied_offset, 0, 16 * version, 1, "d", "md", (), (chunk,))
    return commit(stream, manifest, LEASE.fence).records[0]


def forked(stream: StreamMetadata, at_offset: int) -> StreamMetadata:
    entry = RecordEntry(at_offset - 1, at_offset, 1, 0, "")
    return fork(
        stream, {}, Fork(name="tenants/t/streams/b", at_offset=at_offset), at_entry=entry, uid="b", now_ns=0
    ).records[0]


def test_the_read_ahead_covers_whatever_closes_a_pre_token() -> None:
    assert MAX_READ_AHEAD_BYTES >= MAX_PRE_TOKEN_BYTES + 3


def test_a_fork_starts_from_the_newest_checkpoint_that_had_not_read_beyond_it() -> None:
    stream = a_stream(100_000)
    for applied_offset in (10_000, 20_000, 30_000):
        stream = committed(stream, applied_offset)

    starts = [forked(stream, at).applied_offset for at in (20_000, 24_098, 24_099, 34_098, 100_000)]

    assert starts == [10_000, 10_000, 20_000, 20_000, 30_000]


def test_a_checkpoint_is_usable_right_where_the_log_ended_when_it_was_committed() -> None:
    stream = a_stream(10_000)
    for _ in range(3):
        stream = committed(stream, 9_990)
    later = committed(stream, 9_995)

    assert forked(later, 10_000).applied_offset == 9_995


def test_records_between_what_forks_and_the_stream_need_are_garbage() -> None:
    stream = a_stream(100_000)
    for applied_offset in (10_000, 20_000, 30_000):
        stream = committed(stream, applied_offset)
    change = fork(
        stream,
        {},
        Fork(name="tenants/t/streams/b", at_offset=25_000),
        at_entry=RecordEntry(0, 25_000, 1, 0, ""),
        uid="b",
        now_ns=0,
    )
    parent = next(record for record in change.records if record.uid == "a")
    for applied_offset in (50_000, 60_000, 70_000):
        parent = committed(parent, applied_offset)

    assert garbage_ranges(parent) == ((0, 20_000), (25_000, 50_000))
