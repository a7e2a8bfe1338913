"""A verification folds a stream anew: what is right is equal, what is missing is named, whatever goes on beside it."""

import asyncio
import dataclasses
from collections.abc import Awaitable, Callable
from typing import Any

import pytest
import redis.asyncio as redis
import torch

from eunoe.api.v1 import long_context_pb2 as api
from eunoe.clients.model_worker import ModelWorkerClient
from eunoe.clients.state_store import StateStoreClient
from eunoe.eviction import POLICIES, SinksRecent, Window
from eunoe.internal.v1 import state_store_pb2 as pb
from eunoe.runtime.errors import Conflict, ModelMismatch, Overloaded, StreamNotFound
from eunoe.runtime.grpc_channel import open_channel

Text = Callable[..., bytes]
ReadStream = Callable[..., Awaitable[str]]


@pytest.fixture
def all_keys(redis_server: Any, platform: Any) -> Callable[[], Awaitable[dict[bytes, bytes]]]:
    """Everything that the database has of the test's tenant and model."""

    async def dump() -> dict[bytes, bytes]:
        async with redis.Redis.from_url(redis_server.url) as client:
            patterns = f"eunoe:{{{platform.tenant}}}:*", f"eunoe:backlog:{platform.config.model_name}"
            return {key: await client.dump(key) for pattern in patterns async for key in client.scan_iter(pattern)}

    return dump


async def test_a_stream_is_verified_from_its_oldest_checkpoint_by_a_worker_that_takes_and_writes_nothing(
    platform: Any, a_read_stream: ReadStream, state_store: Any, all_keys: Any
) -> None:
    owner, bystander = await platform.worker(), await platform.worker()
    name = await a_read_stream(owner)
    retained = await platform.checkpoints(name)
    await state_store.store.settle()
    before = await all_keys()

    summary = await platform.verify(bystander, name)

    assert summary.verdict == api.VERDICT_VERIFIED
    assert (summary.from_offset, summary.to_offset) == (retained[0].applied_offset, retained[-1].applied_offset)
    assert summary.from_offset > 0
    assert summary.tokens_folded == retained[-1].tokens - retained[0].tokens > 0
    assert summary.num_checkpoints == 3
    assert summary.log_bytes_checked == (await platform.record(name)).stream.accepted_offset - summary.from_offset
    assert summary.numerics_id == bystander.parts.decoder.numerics_id
    await state_store.store.settle()
    assert await all_keys() == before
    assert (await platform.record(name)).lease.worker == owner.incarnation
    assert bystander.streams == {}
    assert bystander.ledger.reserved_bytes == 0


async def test_a_retained_log_is_verified_from_the_empty_memory(platform: Any, a_read_stream: ReadStream) -> None:
    worker = await platform.worker()
    name = await a_read_stream(worker, retain_log=True)
    record = await platform.record(name)

    summary = await platform.verify(worker, name)

    assert summary.verdict == api.VERDICT_VERIFIED
    assert (summary.from_offset, summary.tokens_folded) == (0, record.stream.tokens)
    assert summary.log_bytes_checked == record.stream.accepted_offset


@pytest.mark.parametrize("data", [b"", b"less than a segment"])
async def test_a_stream_without_a_checkpoint_is_verified_by_its_log_alone(platform: Any, data: bytes) -> None:
    worker = await platform.worker()
    name = await platform.stream()
    if data:
        await platform.append(name, data)

    summary = await platform.verify(worker, name)

    assert summary.verdict == api.VERDICT_VERIFIED
    assert (summary.num_checkpoints, summary.tokens_folded, summary.log_bytes_checked) == (0, 0, len(data))


async def test_remembered_answers_are_folded_anew_with_the_rest(platform: Any, make_text: Text) -> None:
    owner, bystander = await platform.worker(), await platform.worker()
    name = await platform.stream()
    for seed in range(3):
        await platform.append(name, make_text(300, seed))
        await platform.generate(owner, name, text="so", max_tokens=20, remember=True)
        await platform.flush(owner, name)

    summary = await platform.verify(bystander, name)

    assert summary.verdict == api.VERDICT_VERIFIED
    assert summary.tokens_folded > 0


@pytest.mark.parametrize("goes_on", [False, True])
async def test_forks_are_verified_from_the_checkpoint_that_they_share(
    platform: Any, a_read_stream: ReadStream, make_text: Text, goes_on: bool
) -> None:
    worker = await platform.worker()
    parent = await a_read_stream(worker)
    child = f"{parent}-child"
    await platform.store.fork_stream(pb.ForkStreamRequest(parent=parent, name=child))
    if goes_on:
        await platform.append(child, make_text(700, seed=9))
        await platform.flush(worker, child)

    summary = await platform.verify(worker, child)

    assert summary.verdict == api.VERDICT_VERIFIED
    assert summary.num_checkpoints == 1 + goes_on
    assert (summary.tokens_folded > 0) == goes_on
    assert (await platform.verify(worker, parent)).verdict == api.VERDICT_VERIFIED


async def test_each_run_is_folded_with_the_policy_that_it_was_recorded_with(
    platform: Any, make_text: Text, monkeypatch: pytest.MonkeyPatch
) -> None:
    class FirstOnes:
        name = "first-ones/1"
        statistics = None

        def keep(self, window: Window, budget: int) -> torch.Tensor:
            num_layers, num_heads, num_slots = window.positions_LHS.shape
            return torch.arange(min(budget, num_slots)).expand(num_layers, num_heads, -1)

    worker, name = await platform.worker(), await platform.stream(retain_log=True)
    for policy in (SinksRecent(), FirstOnes(), SinksRecent()):
        worker.parts = dataclasses.replace(worker.parts, policy=policy)
        await platform.append(name, make_text(600))
        await platform.flush(worker, name)
        await worker._let_go(worker.streams[name])
    runs = (await platform.record(name)).manifest.decisions
    assert [run.policy for run in runs] == ["sinks-recent/1", "first-ones/1", "sinks-recent/1"]

    unverifiable = await platform.verify(worker, name)
    monkeypatch.setitem(POLICIES, FirstOnes.name, FirstOnes())
    verified = await platform.verify(worker, name)

    assert unverifiable.verdict == api.VERDICT_UNVERIFIABLE
    (missing,) = unverifiable.missing
    assert (missing.kind, missing.recorded) == (api.MISSING_KIND_POLICY, "first-ones/1")
    assert SinksRecent().name in missing.available
    assert FirstOnes.name not in missing.available
    assert missing.first_segment == runs[1].first_segment
    assert verified.verdict == api.VERDICT_VERIFIED
    assert verified.tokens_folded == (await platform.record(name)).stream.tokens


async def test_other_numerics_are_unverifiable_and_nothing_is_folded(platform: Any, a_read_stream: ReadStream) -> None:
    owner, other = await platform.worker(), await platform.worker()
    name = await a_read_stream(owner)
    recorded = owner.parts.decoder.numerics_id
    other.parts.decoder.numerics_id = "engine-1/another-machine"

    summary = await platform.verify(other, name)

    assert summary.verdict == api.VERDICT_UNVERIFIABLE
    (missing,) = summary.missing
    assert (missing.kind, missing.recorded) == (api.MISSING_KIND_NUMERICS, recorded)
    assert (missing.available, missing.first_segment) == ("engine-1/another-machine", 0)
    assert summary.tokens_folded == 0


async def test_numerics_that_no_segment_to_fold_needs_are_not_missing(
    platform: Any, a_read_stream: ReadStream, make_text: Text
) -> None:
    worker = await platform.worker()
    here = worker.parts.decoder.numerics_id
    worker.parts.decoder.numerics_id = "where it was before"
    parent = await a_read_stream(worker)
    child = f"{parent}-child"
    await platform.store.fork_stream(pb.ForkStreamRequest(parent=parent, name=child))
    worker.parts.decoder.numerics_id = here
    await platform.append(child, make_text(700, seed=9))
    await platform.flush(worker, child)

    summary = await platform.verify(worker, child)

    assert summary.verdict == api.VERDICT_VERIFIED
    assert summary.tokens_folded > 0
    assert (await platform.verify(worker, parent)).verdict == api.VERDICT_UNVERIFIABLE


async def test_a_stream_that_goes_on_is_verified_from_what_is_oldest_then(
    platform: Any, a_read_stream: ReadStream, make_text: Text, monkeypatch: pytest.MonkeyPatch
) -> None:
    owner, bystander = await platform.worker(), await platform.worker()
    name = await a_read_stream(owner)
    num_overtaken = 1
    check_history = StateStoreClient.check_history

    async def overtaken(self: StateStoreClient, request: pb.CheckHistoryRequest) -> Any:
        nonlocal num_overtaken
        async for response in check_history(self, request):
            if response.HasField("history") and num_overtaken:
                num_overtaken -= 1
                for seed in range(3):
                    await platform.append(name, make_text(300, seed))
                    await platform.flush(owner, name)
            yield response

    monkeypatch.setattr(StateStoreClient, "check_history", overtaken)

    verified = await platform.verify(bystander, name)
    num_overtaken = 4
    with pytest.raises(Conflict):
        await platform.verify(bystander, name)

    assert verified.verdict == api.VERDICT_VERIFIED
    assert verified.num_restarts == 1
    assert bystander.ledger.reserved_bytes == 0


async def test_a_log_that_is_trimmed_while_it_is_folded_restarts_the_verification(
    platform: Any, a_read_stream: ReadStream, make_text: Text, monkeypatch: pytest.MonkeyPatch
) -> None:
    owner, bystander = await platform.worker(), await platform.worker()
    name = await a_read_stream(owner)
    is_overtaken = False
    read_log = StateStoreClient.read_log

    async def overtaken(self: StateStoreClient, request: pb.ReadLogRequest) -> Any:
        nonlocal is_overtaken
        if self is bystander.parts.store and not is_overtaken:
            is_overtaken = True
            for seed in range(3):
                await platform.append(name, make_text(300, seed))
                await platform.flush(owner, name)
        async for piece in read_log(self, request):
            yield piece

    monkeypatch.setattr(StateStoreClient, "read_log", overtaken)

    summary = await platform.verify(bystander, name)

    assert (summary.verdict, summary.num_restarts) == (api.VERDICT_VERIFIED, 1)


async def test_a_stream_is_verified_again_and_again_while_it_is_written(
    platform: Any, a_read_stream: ReadStream, make_text: Text
) -> None:
    owner, bystander = await platform.worker(checkpoint_segments=4), await platform.worker()
    name = await a_read_stream(owner)
    is_over = asyncio.Event()

    async def write() -> None:
        seed = 0
        while not is_over.is_set():
            seed += 1
            await platform.append(name, make_text(200, seed))
            await platform.flush(owner, name)

    writing = asyncio.create_task(write())
    verdicts = set()
    for _ in range(5):
        try:
            verdicts.add((await platform.verify(bystander, name)).verdict)
        except Conflict:
            continue
    is_over.set()
    await writing

    assert verdicts <= {api.VERDICT_VERIFIED}
    assert (await platform.verify(bystander, name)).verdict == api.VERDICT_VERIFIED


async def test_a_worker_verifies_one_stream_at_a_time_and_lets_go_of_one_that_nobody_waits_for(
    platform: Any, a_read_stream: ReadStream, monkeypatch: pytest.MonkeyPatch
) -> None:
    worker = await platform.worker()
    name = await a_read_stream(worker)
    has_begun, may_go_on = asyncio.Event(), asyncio.Event()
    read_log = StateStoreClient.read_log

    async def waiting(self: StateStoreClient, request: pb.ReadLogRequest) -> Any:
        has_begun.set()
        await may_go_on.wait()
        async for piece in read_log(self, request):
            yield piece

    reserved_before = worker.ledger.reserved_bytes
    with monkeypatch.context() as patched:
        patched.setattr(StateStoreClient, "read_log", waiting)
        first = asyncio.create_task(platform.verify(worker, name))
        await has_begun.wait()
        with pytest.raises(Overloaded):
            await platform.verify(worker, name)
        assert worker.ledger.reserved_bytes > reserved_before
        first.cancel()

        async def is_given_back() -> bool:
            return bool(worker.ledger.reserved_bytes == reserved_before)

        await platform.until(is_given_back)

    async def is_free() -> bool:
        try:
            return bool((await platform.verify(worker, name)).verdict == api.VERDICT_VERIFIED)
        except Overloaded:
            return False

    await platform.until(is_free)


async def test_a_long_verification_does_not_starve_a_stream_that_is_served(platform: Any, make_text: Text) -> None:
    worker = await platform.worker(checkpoint_segments=1000)
    large, small = await platform.stream(retain_log=True), await platform.stream()
    await platform.append(large, make_text(30_000))
    await platform.flush(worker, large)
    await platform.append(small, make_text(300))

    verifying = asyncio.create_task(platform.verify(worker, large))

    async def is_folding() -> bool:
        return not worker.parts.engine.is_idle

    await platform.until(is_folding)
    await platform.flush(worker, small)
    assert not verifying.done()
    assert (await verifying).verdict == api.VERDICT_VERIFIED


async def test_progress_comes_before_the_verdict(
    platform: Any, a_read_stream: ReadStream, monkeypatch: pytest.MonkeyPatch
) -> None:
    worker = await platform.worker()
    name = await a_read_stream(worker)
    monkeypatch.setattr("eunoe.model_worker.stream.PROGRESS_SECONDS", 0.001)

    async with open_channel(worker.address) as channel:
        call = ModelWorkerClient(channel).verify_stream(api.VerifyStreamRequest(name=name))
        *progress, last = [response async for response in call]

    assert {response.WhichOneof("response") for response in progress} == {"progress"}
    tokens = [response.progress.tokens_folded for response in progress]
    assert tokens == sorted(tokens)
    assert last.summary.verdict == api.VERDICT_VERIFIED


async def test_a_stream_of_another_model_or_of_nobody_is_refused(platform: Any) -> None:
    worker = await platform.worker()
    other = await platform.worker(model_name=f"{platform.config.model_name}-other")
    name = await platform.stream()

    with pytest.raises(ModelMismatch):
        await platform.verify(other, name)
    with pytest.raises(StreamNotFound):
        await platform.verify(worker, f"{name}-none")
