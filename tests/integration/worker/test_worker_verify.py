"""A verification folds a stream anew: what is right is equal, what was changed is found, what is missing is named."""

import asyncio
import dataclasses
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any

import pytest
import redis.asyncio as redis
import torch
import xxhash

from eunoe.api.v1 import long_context_pb2 as api
from eunoe.clients.model_worker import ModelWorkerClient
from eunoe.clients.state_store import StateStoreClient
from eunoe.decoder import state_codec
from eunoe.eviction import POLICIES, SinksRecent, Window
from eunoe.internal.v1 import state_store_pb2 as pb
from eunoe.model_worker.stream import memory_settings
from eunoe.runtime.errors import Conflict, ModelMismatch, Overloaded, StreamNotFound
from eunoe.runtime.grpc_channel import open_channel
from eunoe.state_store import keys
from eunoe.state_store.chains import checkpoint_chain
from eunoe.state_store.checkpoints import _chunk_identity
from eunoe.state_store.effects import Change
from eunoe.state_store.metadata import Manifest, StreamMetadata
from eunoe.state_store.storage import Delete, PutValue
from eunoe.state_store.transactions import Transaction, member_as_entry, record_identity

Text = Callable[..., bytes]


@dataclass
class Planter:
    """Changes what is stored of a stream, as nobody may but who has the database."""

    environment: Any
    tenant: str

    async def metadata(self, name: str, change: Callable[[StreamMetadata], StreamMetadata]) -> None:
        transaction = Transaction(self.environment, self.tenant)
        await transaction.commit(Change((change(await transaction.stream(name)),)))

    async def checkpoint(self, name: str, index: int, change: Callable[[Manifest], Manifest]) -> None:
        """Change a checkpoint, and make all the chains right again."""

        def changed(metadata: StreamMetadata) -> StreamMetadata:
            checkpoints = list(metadata.checkpoints)
            checkpoints[index] = change(checkpoints[index])
            chain = checkpoints[0].chain if checkpoints[0].version > 1 else ""
            for i, manifest in enumerate(checkpoints):
                if i or manifest.version == 1:
                    checkpoints[i] = dataclasses.replace(manifest, chain=checkpoint_chain(chain, manifest))
                chain = checkpoints[i].chain
            return dataclasses.replace(metadata, checkpoints=tuple(checkpoints))

        await self.metadata(name, changed)

    async def record(self, name: str, index: int, change: Callable[[bytes], bytes]) -> int:
        """Change a record of the log, with the right digest for what the index says of it; returns its start."""
        storage = self.environment.storage
        metadata = await Transaction(self.environment, self.tenant).stream(name)
        rows = await storage.members_by_score(keys.log_index(self.tenant, metadata.uid), 0, None, 100)
        entry = member_as_entry(*rows[index])
        key = keys.log_record(self.tenant, metadata.uid, entry.start)
        seal = self.environment.keyring.seal(self.tenant, metadata.wrapped_key)
        identity = record_identity(metadata.uid, entry)
        (sealed,) = await storage.get([key])
        await storage.apply([PutValue(key, seal.close(identity, change(seal.open(identity, sealed))), 0)])
        return entry.start

    async def chunk(self, chunk_id: str, data: bytes | None) -> None:
        """Put other bytes, with their right digest, where a chunk is; None removes it."""
        key = keys.chunk(self.tenant, chunk_id)
        seal = self.environment.keyring.seal(self.tenant, "")
        write = Delete(key) if data is None else PutValue(key, seal.close(_chunk_identity(chunk_id), data), 0)
        await self.environment.storage.apply([write])


@pytest.fixture
def plant(state_store: Any) -> Planter:
    return Planter(state_store.store.environment, state_store.tenant)


@pytest.fixture
def all_keys(redis_server: Any, platform: Any) -> Callable[[], Awaitable[dict[bytes, bytes]]]:
    """Everything that the database has of the test's tenant and model."""

    async def dump() -> dict[bytes, bytes]:
        async with redis.Redis.from_url(redis_server.url) as client:
            patterns = f"eunoe:{{{platform.tenant}}}:*", f"eunoe:backlog:{platform.config.model_name}"
            return {key: await client.dump(key) for pattern in patterns async for key in client.scan_iter(pattern)}

    return dump


@pytest.fixture
def a_read_stream(platform: Any, make_text: Text) -> Callable[..., Awaitable[str]]:
    """Makes a stream of five records and as many checkpoints; gives its name."""

    async def made(worker: Any, **settings: Any) -> str:
        name: str = await platform.stream(**settings)
        for seed in range(5):
            await platform.append(name, make_text(500, seed))
            await platform.flush(worker, name)
        return name

    return made


ReadStream = Callable[..., Awaitable[str]]


async def checkpoints(platform: Any, name: str) -> list[pb.Manifest]:
    """The retained ones."""
    *_, last = [r async for r in platform.store.check_history(pb.CheckHistoryRequest(name=name))]
    return list(last.history.checkpoints)


async def test_a_stream_is_verified_from_its_oldest_checkpoint_by_a_worker_that_takes_and_writes_nothing(
    platform: Any, a_read_stream: ReadStream, state_store: Any, all_keys: Any
) -> None:
    owner, bystander = await platform.worker(), await platform.worker()
    name = await a_read_stream(owner)
    retained = await checkpoints(platform, name)
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
    assert (missing.available, missing.first_segment) == ("sinks-recent/1", runs[1].first_segment)
    assert verified.verdict == api.VERDICT_VERIFIED
    assert verified.tokens_folded == (await platform.record(name)).stream.tokens


async def test_a_recorded_digest_that_is_another_breaks_the_chain_of_the_commits(
    platform: Any, a_read_stream: ReadStream, plant: Planter
) -> None:
    worker = await platform.worker()
    name = await a_read_stream(worker)
    retained = await checkpoints(platform, name)

    def changed(metadata: StreamMetadata) -> StreamMetadata:
        *others, newest = metadata.checkpoints
        return dataclasses.replace(metadata, checkpoints=(*others, dataclasses.replace(newest, state_digest="ab" * 16)))

    await plant.metadata(name, changed)

    summary = await platform.verify(worker, name)

    assert summary.verdict == api.VERDICT_DIFFERENT
    assert summary.difference.part == api.VERIFIED_PART_COMMITS
    assert summary.difference.offset == retained[-1].applied_offset
    assert summary.difference.recorded == retained[-1].chain.hex() != summary.difference.found
    assert summary.tokens_folded == 0


@pytest.mark.parametrize("index", [0, 1, 2])
async def test_a_recorded_digest_with_its_chains_is_not_that_of_the_stored_memory(
    platform: Any, a_read_stream: ReadStream, plant: Planter, index: int
) -> None:
    worker = await platform.worker()
    name = await a_read_stream(worker)
    retained = await checkpoints(platform, name)

    await plant.checkpoint(name, index, lambda manifest: dataclasses.replace(manifest, state_digest="ab" * 16))

    difference = (await platform.verify(worker, name)).difference
    assert difference.part == api.VERIFIED_PART_CHECKPOINT
    assert (difference.offset, difference.recorded) == (retained[index].applied_offset, "ab" * 16)
    assert retained[index].state_digest in difference.message


@pytest.mark.parametrize("index", [0, 1, 2])
async def test_a_stored_memory_with_its_digests_and_chains_is_not_the_one_that_the_log_makes(
    platform: Any, a_read_stream: ReadStream, plant: Planter, index: int
) -> None:
    worker = await platform.worker()
    name = await a_read_stream(worker)
    retained = await checkpoints(platform, name)
    manifest = retained[index]
    settings = memory_settings((await platform.record(name)).stream.settings)
    state = await worker.parts.checkpoints.load(name, manifest, settings)
    state.values_LHSD[0, 0, 0] += 1
    (data,) = state_codec.encode(state)
    digest = state_codec.state_digest(state, manifest.applied_offset, manifest.applied_pretoken_tokens)
    await plant.chunk(manifest.chunks[0].chunk_id, data)
    await plant.checkpoint(
        name,
        index,
        lambda m: dataclasses.replace(
            m, state_digest=digest, chunks=(m.chunks[0]._replace(digest=xxhash.xxh3_128_hexdigest(data)),)
        ),
    )

    summary = await platform.verify(worker, name)

    # A false beginning shows where the fold from it comes to the next checkpoint.
    proven = retained[max(index, 1)]
    assert summary.verdict == api.VERDICT_DIFFERENT
    assert (summary.difference.part, summary.difference.offset) == (api.VERIFIED_PART_MEMORY, proven.applied_offset)
    if index:
        assert (summary.difference.recorded, summary.difference.found) == (digest, manifest.state_digest)
    else:
        assert summary.difference.recorded == proven.state_digest != summary.difference.found


@pytest.mark.parametrize("is_removed", [False, True])
async def test_chunks_that_are_not_as_committed_are_different(
    platform: Any, a_read_stream: ReadStream, plant: Planter, is_removed: bool
) -> None:
    worker = await platform.worker()
    name = await a_read_stream(worker)
    middle = (await checkpoints(platform, name))[1]

    await plant.chunk(middle.chunks[0].chunk_id, None if is_removed else b"x" * middle.chunks[0].length)

    difference = (await platform.verify(worker, name)).difference
    assert (difference.part, difference.offset) == (api.VERIFIED_PART_CHECKPOINT, middle.applied_offset)


async def test_a_record_with_a_digest_of_its_own_breaks_the_chain_of_the_log(
    platform: Any, a_read_stream: ReadStream, plant: Planter
) -> None:
    worker = await platform.worker()
    name = await a_read_stream(worker)

    start = await plant.record(name, -1, bytes.swapcase)

    summary = await platform.verify(worker, name)
    assert summary.verdict == api.VERDICT_DIFFERENT
    assert (summary.difference.part, summary.difference.offset) == (api.VERIFIED_PART_LOG, start)
    assert summary.difference.recorded != summary.difference.found


async def test_an_oldest_record_whose_chain_cannot_be_checked_is_found_by_the_fold(
    platform: Any, a_read_stream: ReadStream, plant: Planter
) -> None:
    worker = await platform.worker()
    name = await a_read_stream(worker)

    assert await plant.record(name, 0, lambda data: data[:-50] + bytes.swapcase(data[-50:])) > 0

    difference = (await platform.verify(worker, name)).difference
    assert difference.part == api.VERIFIED_PART_MEMORY


@pytest.mark.parametrize("index", [0, 1, 2])
async def test_a_checkpoint_of_more_tokens_than_its_memory_has_is_different(
    platform: Any, a_read_stream: ReadStream, plant: Planter, index: int
) -> None:
    worker = await platform.worker()
    name = await a_read_stream(worker)
    retained = await checkpoints(platform, name)

    await plant.checkpoint(name, index, lambda manifest: dataclasses.replace(manifest, tokens=manifest.tokens + 160))

    difference = (await platform.verify(worker, name)).difference
    assert (difference.part, difference.offset) == (api.VERIFIED_PART_CHECKPOINT, retained[index].applied_offset)


async def test_a_log_that_ends_before_its_newest_checkpoint_is_different(
    platform: Any, a_read_stream: ReadStream, plant: Planter, make_text: Text
) -> None:
    worker = await platform.worker()
    name, longer = await a_read_stream(worker), await a_read_stream(worker)
    before = (await checkpoints(platform, name))[-1]
    await platform.append(longer, make_text(400, seed=9))
    foreign = (await platform.flush(worker, longer)).manifest
    data = [
        chunk.data
        async for chunk in platform.store.read_chunks(pb.ReadChunksRequest(name=longer, chunks=foreign.chunks))
    ]
    await plant.chunk(before.chunks[0].chunk_id, *data)
    chunk = foreign.chunks[0]
    await plant.checkpoint(
        name,
        2,
        lambda manifest: dataclasses.replace(
            manifest,
            applied_offset=foreign.applied_offset,
            applied_pretoken_tokens=foreign.applied_pretoken_tokens,
            tokens=foreign.tokens,
            state_digest=foreign.state_digest,
            chunks=(manifest.chunks[0]._replace(length=chunk.length, digest=chunk.digest.hex()),),
        ),
    )

    difference = (await platform.verify(worker, name)).difference
    assert difference.part == api.VERIFIED_PART_MEMORY
    assert difference.message.startswith("no segment of the log ends after")


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


async def test_a_foreign_encoding_is_unverifiable_unless_its_bytes_are_not_as_committed(
    platform: Any, a_read_stream: ReadStream, plant: Planter
) -> None:
    worker = await platform.worker()
    name = await a_read_stream(worker)
    await plant.checkpoint(name, 1, lambda manifest: dataclasses.replace(manifest, encoding_version=99))

    summary = await platform.verify(worker, name)
    await plant.chunk((await checkpoints(platform, name))[1].chunks[0].chunk_id, b"x")
    broken = await platform.verify(worker, name)

    assert summary.verdict == api.VERDICT_UNVERIFIABLE
    (missing,) = summary.missing
    assert (missing.kind, missing.recorded) == (api.MISSING_KIND_ENCODING, "99")
    assert broken.verdict == api.VERDICT_DIFFERENT


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
