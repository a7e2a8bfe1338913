"""What the state store's callers see through its RPCs and their client, over a real Redis."""

import pytest
import xxhash

from eunoe.api.v1 import long_context_pb2 as api
from eunoe.internal.v1 import state_store_pb2 as pb
from eunoe.runtime.errors import (
    AlreadyExists,
    InvalidRequest,
    InvalidUtf8,
    NotOwner,
    OffsetGap,
    OffsetUnavailable,
    StreamNotFound,
    VersionConflict,
)

SETTINGS = api.StreamSettings(
    kv_budget_tokens=64, segment_length=16, num_sink_tokens=0, positions=api.POSITION_MODE_COMPACT
)


@pytest.fixture
async def name(state_store) -> str:
    """A stream that is there."""
    name = f"tenants/{state_store.tenant}/streams/a"
    await state_store.client.create_stream(pb.CreateStreamRequest(name=name, model="m", settings=SETTINGS))
    return name


async def append(state_store, name: str, offset: int, data: bytes, **fields) -> pb.AppendRecordResponse:
    return await state_store.client.append_record(
        pb.AppendRecordRequest(name=name, offset=offset, data=data, kind=api.RECORD_KIND_TEXT, **fields)
    )


async def acquire(state_store, name: str, worker: str = "w1") -> pb.Lease:
    request = pb.AcquireStreamRequest(name=name, by=pb.Lease(worker=worker, address=f"{worker}:1"))
    return (await state_store.client.acquire_stream(request)).record.lease


async def commit(state_store, name: str, lease: pb.Lease, version: int, applied_offset: int, *contents: bytes):
    chunks = [(f"{name}-{version}-{i}", data) for i, data in enumerate(contents)]
    await state_store.client.stage_chunks(name, chunks)
    manifest = pb.Manifest(
        version=version,
        applied_offset=applied_offset,
        applied_pretoken_tokens=3,
        tokens=16 * version,
        state_bytes=77,
        state_digest=f"digest{version}",
        model_digest="weights",
        decisions=[pb.DecisionRun(first_segment=0, policy="sinks-recent/1", numerics_id="cpu")],
        chunks=[
            pb.ChunkRef(chunk_id=chunk_id, length=len(data), digest=xxhash.xxh3_128_digest(data))
            for chunk_id, data in chunks
        ],
    )
    request = pb.CommitCheckpointRequest(name=name, lease=lease, manifest=manifest)
    return (await state_store.client.commit_checkpoint(request)).record


async def test_settings_and_times_come_back_as_they_went(state_store) -> None:
    name = f"tenants/{state_store.tenant}/streams/b"
    request = pb.CreateStreamRequest(name=name, model="m", settings=SETTINGS, request_id="r")
    request.expire_time.FromSeconds(4_000_000_000)
    made = (await state_store.client.create_stream(request)).record

    assert made.stream.settings == SETTINGS
    assert made.stream.settings.HasField("num_sink_tokens")
    assert made.stream.expire_time == request.expire_time
    assert not made.HasField("manifest")
    assert not made.HasField("lease")
    assert (await state_store.client.create_stream(request)).record == made
    assert (await state_store.client.get_stream(pb.GetStreamRequest(name=name))).record == made


async def test_a_document_goes_in_and_its_state_comes_back(state_store, name: str) -> None:
    first = await append(state_store, name, 0, b"hello ", source_id="file", source_offset=0)
    lease = await acquire(state_store, name)
    record = await commit(state_store, name, lease, 1, 4, b"x" * 2**20, b"rest")
    second = await append(state_store, name, 6, b"world")

    assert (first.accepted_offset, first.applied_offset, first.HasField("lease")) == (6, 0, False)
    assert (second.accepted_offset, second.applied_offset, second.lease) == (11, 4, lease)
    assert record.stream.policy == "sinks-recent/1"
    assert (record.stream.tokens, record.stream.state_digest, record.stream.checkpoint_version) == (16, "digest1", 1)
    pieces = [p async for p in state_store.client.read_log(pb.ReadLogRequest(name=name, offset=4))]
    assert [(p.offset, p.data) for p in pieces] == [(4, b"o "), (6, b"world")]
    request = pb.ReadChunksRequest(name=name, chunks=record.manifest.chunks)
    assert [c.data async for c in state_store.client.read_chunks(request)] == [b"x" * 2**20, b"rest"]
    answer = await state_store.client.get_stream(pb.GetStreamRequest(name=name, source_id="file"))
    assert answer.source_bytes_accepted == 6
    assert answer.record.manifest == record.manifest
    assert list(answer.record.checkpoint_offsets) == [0, 4]


async def test_errors_keep_their_class_and_attributes(state_store, name: str) -> None:
    client = state_store.client
    await append(state_store, name, 0, b"abc")
    lease = await acquire(state_store, name, f"w-{state_store.tenant}")
    await client.renew_worker(pb.RenewWorkerRequest(worker=pb.Worker(worker=lease.worker, address=lease.address)))

    with pytest.raises(OffsetGap) as gap:
        await append(state_store, name, 5, b"x")
    with pytest.raises(InvalidUtf8) as invalid:
        await append(state_store, name, 3, b"\xff")
    with pytest.raises(NotOwner) as owned:
        await acquire(state_store, name, "w2")
    with pytest.raises(VersionConflict) as conflict:
        await commit(state_store, name, lease, 2, 0, b"x")
    with pytest.raises(AlreadyExists):
        await client.create_stream(pb.CreateStreamRequest(name=name, model="m", settings=SETTINGS))
    with pytest.raises(OffsetUnavailable):
        await client.fork_stream(pb.ForkStreamRequest(parent=name, name=f"{name}2", at_offset=2))
    with pytest.raises(StreamNotFound):
        await client.get_stream(pb.GetStreamRequest(name=f"{name}2"))
    with pytest.raises(InvalidRequest):
        await client.list_streams(pb.ListStreamsRequest(tenant=state_store.tenant, page_size=0))

    assert (gap.value.expected_offset, invalid.value.offset, conflict.value.version) == (3, 3, 0)
    assert (owned.value.worker, owned.value.epoch, owned.value.address) == (lease.worker, 1, lease.address)


async def test_forks_pages_usage_and_deletion(state_store, name: str) -> None:
    client, tenant = state_store.client, state_store.tenant
    await append(state_store, name, 0, b"abc")
    await append(state_store, name, 3, b"def")
    child = (await client.fork_stream(pb.ForkStreamRequest(parent=name, name=f"{name}2", at_offset=3))).record

    page = await client.list_streams(pb.ListStreamsRequest(tenant=tenant, page_size=1))
    rest = await client.list_streams(pb.ListStreamsRequest(tenant=tenant, page_size=5, after="a"))
    await client.delete_stream(pb.DeleteStreamRequest(name=name))
    usage = (await client.get_usage(pb.GetUsageRequest(tenant=tenant))).usage

    assert child.stream.accepted_offset == 3
    assert ([s.name for s in page.streams], page.has_more) == ([name], True)
    assert ([s.name for s in rest.streams], rest.has_more) == ([f"{name}2"], False)
    assert (usage.num_streams, usage.log_bytes, usage.checkpoint_bytes) == (1, 3, 0)
    assert (usage.max_streams, usage.max_log_bytes > 0, usage.max_checkpoint_bytes > 0) == (1000, True, True)


async def test_api_keys_through_the_wire(state_store) -> None:
    client = state_store.client
    made = await client.create_api_key(pb.CreateApiKeyRequest(tenant=state_store.tenant, label="laptop"))

    whose = await client.authenticate(pb.AuthenticateRequest(secret=made.secret))
    listed = await client.list_api_keys(pb.ListApiKeysRequest(tenant=state_store.tenant))
    await client.revoke_api_key(pb.RevokeApiKeyRequest(key_id=made.key.key_id))

    assert whose.tenant == state_store.tenant
    assert list(listed.keys) == [made.key]


async def test_a_hint_reaches_the_backlog_and_a_worker_the_directory(state_store) -> None:
    client, model = state_store.client, f"model-{state_store.tenant}"
    name = f"tenants/{state_store.tenant}/streams/b"
    await client.create_stream(pb.CreateStreamRequest(name=name, model=model, settings=SETTINGS))
    await append(state_store, name, 0, b"abc")
    worker = pb.Worker(worker=f"w-{model}", address="h:1", model=api.Model(name=model, vocab_size=9))
    await client.renew_worker(pb.RenewWorkerRequest(worker=worker))

    backlog = await client.list_backlog(pb.ListBacklogRequest(model=model, min_bytes=3))
    workers = await client.list_workers(pb.ListWorkersRequest(model=model))

    assert list(backlog.entries) == [pb.BacklogEntry(name=name, backlog_bytes=3)]
    assert list(workers.workers) == [worker]


async def test_a_staging_that_the_store_ends_early_says_why(state_store) -> None:
    chunks = [("", b"no id"), *((f"chunk-{number}", bytes(1 << 20)) for number in range(16))]

    for _ in range(10):
        with pytest.raises(InvalidRequest, match="needs an id"):
            await state_store.client.stage_chunks(f"tenants/{state_store.tenant}/streams/a", chunks)
