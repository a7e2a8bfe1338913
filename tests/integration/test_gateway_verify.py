"""Who verifies a stream: a worker that does not own it if there is one, and one that has what it takes."""

import json
from collections.abc import Awaitable, Callable
from typing import Any

import grpc
import pytest
import xxhash

from eunoe.api.v1 import long_context_pb2 as api
from eunoe.runtime.errors import Conflict, EunoeError, Overloaded, Unavailable, from_rpc_error
from eunoe.state_store import keys
from eunoe.state_store.storage import ExpectVersion, PutRecord

UNVERIFIABLE = api.VerifySummary(verdict=api.VERDICT_UNVERIFIABLE, missing=[api.Missing(recorded="elsewhere")])

StartWorker = Callable[..., Awaitable[Any]]


async def verified(stub: Any, name: str) -> api.VerifySummary:
    *progress, last = [r async for r in stub.VerifyStream(api.VerifyStreamRequest(name=name))]
    assert all(response.HasField("progress") for response in progress)
    summary: api.VerifySummary = last.summary
    return summary


async def error_of(stub: Any, name: str) -> EunoeError:
    with pytest.raises(grpc.RpcError) as caught:
        await verified(stub, name)
    return from_rpc_error(caught.value)


@pytest.fixture
async def owned(stub: Any, a_worker: StartWorker, model: str, a_stream: Any, append_to: Any) -> tuple[str, Any, Any]:
    """A stream's name, its owner, and another worker of its model."""
    workers = [await a_worker(), await a_worker()]
    name = await a_stream(stub, model)
    client = await append_to(stub, name)
    await client.record(b"x" * 40)
    await client.flush()
    owner, bystander = sorted(workers, key=lambda worker: name not in worker.memories)
    assert name in owner.memories
    assert name not in bystander.memories
    return name, owner, bystander


async def test_a_stream_is_verified_by_a_worker_that_does_not_own_it(stub: Any, owned: Any) -> None:
    name, owner, bystander = owned

    assert (await verified(stub, name)).verdict == api.VERDICT_VERIFIED
    assert (owner.num_calls["VerifyStream"], bystander.num_calls["VerifyStream"]) == (0, 1)


async def test_the_only_worker_verifies_its_own_streams(stub: Any, worker: Any, stream: str) -> None:
    assert (await verified(stub, stream)).verdict == api.VERDICT_VERIFIED
    assert worker.num_calls["TakeStream"] == 0


@pytest.mark.parametrize("error", [Overloaded("busy"), Unavailable("leaving")], ids=lambda error: error.reason())
async def test_the_next_worker_is_asked_where_one_has_no_room(stub: Any, owned: Any, error: EunoeError) -> None:
    name, owner, bystander = owned
    bystander.summary = error

    assert (await verified(stub, name)).verdict == api.VERDICT_VERIFIED
    assert owner.num_calls["VerifyStream"] == 1


async def test_a_worker_that_is_dead_is_passed_over(stub: Any, owned: Any) -> None:
    name, _, bystander = owned
    await bystander.kill()

    assert (await verified(stub, name)).verdict == api.VERDICT_VERIFIED


async def test_workers_that_are_all_busy_are_overloaded(stub: Any, owned: Any) -> None:
    name, *workers = owned
    for worker in workers:
        worker.summary = Overloaded("busy", retry_after_seconds=7.0)

    error = await error_of(stub, name)

    assert isinstance(error, Overloaded)
    assert error.retry_after_seconds == 7.0


async def test_no_worker_at_all_is_unavailable(stub: Any, worker: Any, stream: str) -> None:
    await worker.stop()

    assert isinstance(await error_of(stub, stream), Unavailable)


async def test_a_worker_that_has_what_it_takes_is_looked_for(stub: Any, owned: Any) -> None:
    name, owner, bystander = owned
    bystander.summary = UNVERIFIABLE

    verdict = await verified(stub, name)
    owner.summary = UNVERIFIABLE
    unverifiable = await verified(stub, name)

    assert verdict.verdict == api.VERDICT_VERIFIED
    assert unverifiable == UNVERIFIABLE


async def test_a_difference_is_a_verdict_and_nobody_else_is_asked(stub: Any, owned: Any) -> None:
    name, owner, bystander = owned
    bystander.summary = api.VerifySummary(verdict=api.VERDICT_DIFFERENT, difference=api.Difference(offset=5))

    assert await verified(stub, name) == bystander.summary
    assert owner.num_calls["VerifyStream"] == 0


async def test_a_stream_that_is_too_fast_is_a_conflict(stub: Any, owned: Any) -> None:
    name, _, bystander = owned
    bystander.summary = Conflict("too fast")

    assert isinstance(await error_of(stub, name), Conflict)


async def test_a_record_of_a_later_version_is_unverifiable(stub: Any, stream: str, state_store: Any) -> None:
    storage, key = state_store.store.environment.storage, keys.live_stream(stream)
    (record,) = await storage.read([key])
    content = json.dumps(json.loads(record.data[32:]) | {"format": 99}).encode()
    later = xxhash.xxh3_128_hexdigest(content).encode() + content
    await storage.compare_and_swap("t", [ExpectVersion(key, record.version)], [PutRecord(key, later)])

    summary = await verified(stub, stream)

    assert summary.verdict == api.VERDICT_UNVERIFIABLE
    (missing,) = summary.missing
    assert (missing.kind, missing.recorded) == (api.MISSING_KIND_RECORD_FORMAT, "99")
    assert missing.available == "2"
