"""Whatever is changed of a stream in the database, with or without its digests and chains: a verification finds it."""

import dataclasses
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any

import pytest
import xxhash

from eunoe.api.v1 import long_context_pb2 as api
from eunoe.decoder import state_codec
from eunoe.internal.v1 import state_store_pb2 as pb
from eunoe.model_worker.stream import memory_settings
from eunoe.state_store import keys
from eunoe.state_store.chains import checkpoint_chain
from eunoe.state_store.checkpoints import _chunk_identity
from eunoe.state_store.effects import Change
from eunoe.state_store.metadata import Manifest, StreamMetadata
from eunoe.state_store.storage import Delete, PutValue
from eunoe.state_store.transactions import Transaction, member_as_entry, record_identity

Text = Callable[..., bytes]
ReadStream = Callable[..., Awaitable[str]]


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


async def test_a_recorded_digest_that_is_another_breaks_the_chain_of_the_commits(
    platform: Any, a_read_stream: ReadStream, plant: Planter
) -> None:
    worker = await platform.worker()
    name = await a_read_stream(worker)
    retained = await platform.checkpoints(name)

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
    retained = await platform.checkpoints(name)

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
    retained = await platform.checkpoints(name)
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
    middle = (await platform.checkpoints(name))[1]

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
    retained = await platform.checkpoints(name)

    await plant.checkpoint(name, index, lambda manifest: dataclasses.replace(manifest, tokens=manifest.tokens + 160))

    difference = (await platform.verify(worker, name)).difference
    assert (difference.part, difference.offset) == (api.VERIFIED_PART_CHECKPOINT, retained[index].applied_offset)


async def test_a_log_that_ends_before_its_newest_checkpoint_is_different(
    platform: Any, a_read_stream: ReadStream, plant: Planter, make_text: Text
) -> None:
    worker = await platform.worker()
    name, longer = await a_read_stream(worker), await a_read_stream(worker)
    before = (await platform.checkpoints(name))[-1]
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


async def test_a_foreign_encoding_is_unverifiable_unless_its_bytes_are_not_as_committed(
    platform: Any, a_read_stream: ReadStream, plant: Planter
) -> None:
    worker = await platform.worker()
    name = await a_read_stream(worker)
    await plant.checkpoint(name, 1, lambda manifest: dataclasses.replace(manifest, encoding_version=99))

    summary = await platform.verify(worker, name)
    await plant.chunk((await platform.checkpoints(name))[1].chunks[0].chunk_id, b"x")
    broken = await platform.verify(worker, name)

    assert summary.verdict == api.VERDICT_UNVERIFIABLE
    (missing,) = summary.missing
    assert (missing.kind, missing.recorded) == (api.MISSING_KIND_ENCODING, "99")
    assert broken.verdict == api.VERDICT_DIFFERENT
