"""Resources: making, reading, listing, forking and deleting streams; models and usage; who may see what."""

import secrets
import uuid
from pathlib import Path
from typing import Any

import grpc
import pytest

from eunoe.api.v1 import long_context_pb2 as api
from eunoe.clients.state_store import StateStoreClient
from eunoe.internal.v1 import state_store_pb2 as store_pb
from eunoe.runtime.errors import (
    AlreadyExists,
    DeadlineTooShort,
    InvalidRequest,
    ModelNotFound,
    OffsetUnavailable,
    Overloaded,
    StreamNotFound,
    Unauthenticated,
    VocabularyMismatch,
    from_rpc_error,
)

RPCS = list(api.DESCRIPTOR.services_by_name["LongContextService"].methods)
# A request of each RPC that names a stream, as far as it has a name.
NAMED_REQUESTS = {
    "GetStream": lambda name: api.GetStreamRequest(name=name),
    "DeleteStream": lambda name: api.DeleteStreamRequest(name=name),
    "Append": lambda name: api.AppendRequest(open=api.AppendOpen(stream=name)),
    "Generate": lambda name: api.GenerateRequest(stream=name),
    "Score": lambda name: api.ScoreRequest(stream=name, text="x"),
    "ForkStream": lambda name: api.ForkStreamRequest(name=name),
    "ExportStream": lambda name: api.ExportStreamRequest(name=name),
    "InspectMemory": lambda name: api.InspectMemoryRequest(name=name),
    "VerifyStream": lambda name: api.VerifyStreamRequest(name=name),
}
NAMELESS = {"CreateStream", "ListStreams", "ImportStream", "ListModels", "GetUsage"}


async def call(stub: Any, rpc: Any, request: Any, **options: Any) -> Any:
    """The last response of an RPC of any kind, to one request."""
    while True:
        try:
            return await call_once(stub, rpc, request, **options)
        except grpc.RpcError as error:
            # grpc.aio loses the status of a call that ends while it is written to; clients try again, too.
            if error.details() != "Internal error from Core":
                raise


async def call_once(stub: Any, rpc: Any, request: Any, **options: Any) -> Any:
    method = getattr(stub, rpc.name)
    requests = iter([request]) if rpc.client_streaming else request
    if not rpc.server_streaming:
        return await method(requests, **options)
    last = None
    async for response in method(requests, **options):
        last = response
    return last


def request_of(rpc: Any, name: str) -> Any:
    if rpc.name in NAMED_REQUESTS:
        return NAMED_REQUESTS[rpc.name](name)
    return getattr(api, rpc.input_type.name)()


async def error_of(awaitable: Any) -> Any:
    with pytest.raises(grpc.RpcError) as caught:
        await awaitable
    return from_rpc_error(caught.value)


def bearing(secret: str) -> dict[str, Any]:
    return {"metadata": (("authorization", f"Bearer {secret}"),)}


async def a_key(store: StateStoreClient, tenant: str) -> str:
    return (await store.create_api_key(store_pb.CreateApiKeyRequest(tenant=tenant))).secret


def a_tenant() -> str:
    return f"t-{uuid.uuid4().hex[:8]}"


def test_every_rpc_is_covered_by_the_walks_below() -> None:
    assert set(NAMED_REQUESTS) | NAMELESS == {rpc.name for rpc in RPCS}


@pytest.mark.parametrize("rpc", RPCS, ids=lambda rpc: rpc.name)
@pytest.mark.parametrize("credentials", [{}, bearing("eunoe-no-such-key")], ids=["no key", "bad key"])
async def test_every_rpc_demands_a_key(a_gateway: Any, rpc: Any, credentials: dict[str, Any]) -> None:
    async with a_gateway(requires_key=True) as (_, stub):
        request = request_of(rpc, "tenants/-/streams/x")

        assert isinstance(await error_of(call(stub, rpc, request, **credentials)), Unauthenticated)


@pytest.mark.parametrize("rpc", [rpc for rpc in RPCS if rpc.name in NAMED_REQUESTS], ids=lambda rpc: rpc.name)
async def test_another_tenants_stream_looks_like_none(
    a_gateway: Any, store: StateStoreClient, worker: Any, model: str, rpc: Any
) -> None:
    mine, theirs = a_tenant(), a_tenant()
    my_key, their_key = await a_key(store, mine), await a_key(store, theirs)
    async with a_gateway(requires_key=True) as (_, stub):
        created = await stub.CreateStream(
            api.CreateStreamRequest(stream_id="secret", model=model), **bearing(their_key)
        )
        foreign = await error_of(call(stub, rpc, request_of(rpc, created.stream.name), **bearing(my_key)))
        missing = await error_of(call(stub, rpc, request_of(rpc, f"tenants/{mine}/streams/secret"), **bearing(my_key)))

    assert isinstance(foreign, StreamNotFound)
    assert isinstance(missing, StreamNotFound)


async def test_a_stream_is_made_with_the_models_defaults(stub: Any, worker: Any, model: str) -> None:
    stream = (await stub.CreateStream(api.CreateStreamRequest(model=model))).stream

    assert stream.model == model
    assert (stream.settings.kv_budget_tokens, stream.settings.segment_length) == (512, 512)
    assert (await stub.GetStream(api.GetStreamRequest(name=stream.name))).stream == stream


async def test_a_repeated_create_is_the_same_stream_and_another_one_is_refused(
    stub: Any, worker: Any, model: str
) -> None:
    stream_id = uuid.uuid4().hex
    request = api.CreateStreamRequest(stream_id=stream_id, model=model, request_id="r1")
    first = await stub.CreateStream(request)

    assert await stub.CreateStream(request) == first
    other = api.CreateStreamRequest(stream_id=stream_id, model=model, request_id="r2")
    assert isinstance(await error_of(stub.CreateStream(other)), AlreadyExists)


async def test_an_unknown_model_is_not_found(stub: Any, worker: Any) -> None:
    error = await error_of(stub.CreateStream(api.CreateStreamRequest(model="gpt-9")))

    assert isinstance(error, ModelNotFound)


async def test_settings_out_of_range_are_invalid(stub: Any, worker: Any, model: str) -> None:
    request = api.CreateStreamRequest(model=model, settings=api.StreamSettings(kv_budget_tokens=10_000))

    assert isinstance(await error_of(stub.CreateStream(request)), InvalidRequest)


async def test_streams_are_listed_in_pages_by_name(
    a_gateway: Any, store: StateStoreClient, worker: Any, model: str
) -> None:
    key = bearing(await a_key(store, a_tenant()))
    async with a_gateway(requires_key=True) as (_, stub):
        for stream_id in ("c", "a", "d", "b", "e"):
            await stub.CreateStream(api.CreateStreamRequest(stream_id=stream_id, model=model), **key)
        pages, token = [], ""
        while True:
            page = await stub.ListStreams(api.ListStreamsRequest(page_size=2, page_token=token), **key)
            pages.append("".join(stream.name[-1] for stream in page.streams))
            token = page.next_page_token
            if not token:
                break

    assert pages == ["ab", "cd", "e"]


@pytest.mark.parametrize("request_", [api.ListStreamsRequest(page_size=-1), api.ListStreamsRequest(page_token="/")])
async def test_a_bad_page_is_invalid(stub: Any, request_: api.ListStreamsRequest) -> None:
    assert isinstance(await error_of(stub.ListStreams(request_)), InvalidRequest)


async def test_a_deleted_stream_is_gone(stub: Any, stream: str) -> None:
    await stub.DeleteStream(api.DeleteStreamRequest(name=stream))

    assert isinstance(await error_of(stub.GetStream(api.GetStreamRequest(name=stream))), StreamNotFound)


async def test_an_erased_stream_is_in_no_file_and_no_log(
    stub: Any, stream: str, append_to: Any, redis_server: Any, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(0)
    canary = secrets.token_hex(24).encode()
    appending = await append_to(stub, stream)
    await appending.record(canary)
    await appending.finish()

    def num_hits() -> int:
        directory = Path(redis_server.url.removeprefix("unix://")).parent
        return sum(path.read_bytes().count(canary) for path in directory.rglob("*") if path.is_file())

    num_before = num_hits()
    request = api.DeleteStreamRequest(name=stream, erase=True, request_id=secrets.token_hex(8))
    receipt = (await stub.DeleteStream(request)).receipt
    again = (await stub.DeleteStream(request)).receipt

    assert num_before > 0
    assert num_hits() == 0
    assert canary.decode() not in caplog.text
    assert (receipt.name, receipt.is_shared, receipt.num_values_removed) == (stream, False, 2)
    assert again == receipt


async def test_a_fork_shares_the_past_and_goes_its_own_way(stub: Any, stream: str, append_to: Any) -> None:
    parent = await append_to(stub, stream)
    await parent.record(b"x" * 40)
    await parent.flush()

    child = (await stub.ForkStream(api.ForkStreamRequest(name=stream))).stream
    await parent.record(b"y" * 40)
    grown = await parent.finish()

    assert (child.accepted_offset, grown.accepted_offset) == (40, 80)
    branch = await append_to(stub, child.name)
    await branch.record(b"y" * 40)
    assert (await branch.finish()).state_digest == grown.state_digest


async def test_another_model_reads_the_log_anew(stub: Any, a_worker: Any, model: str, append_to: Any) -> None:
    await a_worker()
    await a_worker(f"{model}-other", max_positions=48)
    settings = api.StreamSettings(segment_length=16, kv_budget_tokens=64, num_sink_tokens=2, retain_log=True)
    name = (await stub.CreateStream(api.CreateStreamRequest(model=model, settings=settings))).stream.name
    parent = await append_to(stub, name)
    for letter in b"abcde":
        await parent.record(bytes([letter]) * 40)
        await parent.flush()
    read = await parent.finish()

    request = api.ForkStreamRequest(name=name, model=f"{model}-other", request_id="r")
    child = (await stub.ForkStream(request)).stream
    rebuilt = await (await append_to(stub, child.name)).finish()

    assert (child.model, child.accepted_offset, child.applied_offset) == (f"{model}-other", 200, 0)
    assert (child.state_digest, child.checkpoint_version, child.log_start_offset) == ("", 0, 0)
    # As the parent's, but for what the model has no room for.
    settings.kv_budget_tokens, settings.positions = 48, api.POSITION_MODE_COMPACT
    assert child.settings == settings
    # A fake's memory is the same whatever its model.
    assert (rebuilt.applied_offset, rebuilt.state_digest) == (read.applied_offset, read.state_digest)
    assert isinstance(await error_of(stub.ForkStream(api.ForkStreamRequest(name=name, model="gpt-9"))), ModelNotFound)


async def test_a_log_that_is_not_whole_is_not_read_anew(stub: Any, stream: str, model: str, append_to: Any) -> None:
    parent = await append_to(stub, stream)
    for _ in range(4):
        await parent.record(b"x" * 16)
        await parent.flush()

    error = await error_of(stub.ForkStream(api.ForkStreamRequest(name=stream, model=model)))

    assert isinstance(error, OffsetUnavailable)
    assert "retain_log=true" in error.message
    assert error.available == "the log from 32 to 64"


async def test_token_ids_are_read_anew_within_one_vocabulary_only(
    stub: Any, a_worker: Any, a_stream: Any, model: str, append_to: Any
) -> None:
    for name, vocab_size in ((model, 512), (f"{model}-same", 512), (f"{model}-larger", 1024)):
        await a_worker(name, vocab_size=vocab_size)
    stream = await a_stream(stub, model)
    parent = await append_to(stub, stream)
    await parent.record(b"text")
    await parent.record(b"\1\0\0\0", kind=api.RECORD_KIND_TOKEN_IDS)

    for same in (model, f"{model}-same"):
        child = (await stub.ForkStream(api.ForkStreamRequest(name=stream, model=same))).stream
        assert (child.model, child.accepted_offset) == (same, 8)
    error = await error_of(stub.ForkStream(api.ForkStreamRequest(name=stream, model=f"{model}-larger")))

    assert isinstance(error, VocabularyMismatch)
    assert error.offset == 4


async def test_models_are_listed_with_their_defaults(stub: Any, a_worker: Any, model: str) -> None:
    await a_worker()
    await a_worker()

    models = (await stub.ListModels(api.ListModelsRequest())).models

    found = next(m for m in models if m.name == model)
    assert found.num_workers == 2
    assert found.default_settings.kv_budget_tokens == 512


async def test_usage_counts_streams_and_log_bytes(
    a_gateway: Any, store: StateStoreClient, worker: Any, model: str
) -> None:
    tenant = a_tenant()
    key = bearing(await a_key(store, tenant))
    async with a_gateway(requires_key=True) as (_, stub):
        await stub.CreateStream(api.CreateStreamRequest(model=model), **key)
        usage = await stub.GetUsage(api.GetUsageRequest(), **key)

    assert (usage.tenant, usage.num_streams, usage.log_bytes) == (tenant, 1, 0)


async def test_a_tenants_calls_above_its_limit_are_refused(a_gateway: Any, worker: Any, model: str) -> None:
    async with a_gateway(max_tenant_concurrent_calls=1) as (_, stub):
        name = (await stub.CreateStream(api.CreateStreamRequest(model=model))).stream.name
        running = stub.Append()
        await running.write(api.AppendRequest(open=api.AppendOpen(stream=name)))
        await running.read()

        error = await error_of(stub.ListModels(api.ListModelsRequest()))

        running.cancel()
    assert isinstance(error, Overloaded)
    assert error.retry_after_seconds > 0


async def test_a_deadline_that_is_too_short_is_refused_at_once(a_gateway: Any) -> None:
    async with a_gateway(min_deadline_seconds=60.0) as (_, stub):
        error = await error_of(stub.ListModels(api.ListModelsRequest(), timeout=30))

    assert isinstance(error, DeadlineTooShort)
