"""The export file's bytes, as they were when its version was released."""

from collections.abc import AsyncIterator, Callable, Iterable
from typing import Any

import pytest
import xxhash

from eunoe.api.v1 import long_context_pb2 as api
from eunoe.gateway.export import export_stream, import_stream
from eunoe.gateway.export_format import VERSION, FrameReader
from eunoe.internal.v1 import state_store_pb2 as pb
from eunoe.runtime.errors import BadExport

SETTINGS = api.StreamSettings(
    kv_budget_tokens=64,
    segment_length=16,
    num_sink_tokens=4,
    positions=api.POSITION_MODE_ORIGINAL,
    retain_log=True,
)
CHUNKS = [pb.ReadChunksResponse(chunk_id="c0", data=b"memory "), pb.ReadChunksResponse(chunk_id="c1", data=b"state")]
LOG = [
    pb.ReadLogResponse(offset=50, data="größe".encode(), kind=api.RECORD_KIND_TEXT, chain=b"1" * 16),
    pb.ReadLogResponse(offset=57, data=b"\1\0\0\0", kind=api.RECORD_KIND_TOKEN_IDS, chain=b"2" * 16),
]
RECORD = pb.StreamRecord(
    stream=api.Stream(
        name="tenants/t/streams/book",
        model="m",
        settings=SETTINGS,
        accepted_offset=61,
        applied_offset=50,
        tokens=32,
        state_bytes=12,
        state_digest="of the state",
        policy="sinks-recent/1",
        log_start_offset=0,
        checkpoint_version=2,
        log_chain=b"2" * 16,
        checkpoint_chain=b"3" * 16,
    ),
    manifest=pb.Manifest(
        encoding_version=1,
        version=2,
        applied_offset=50,
        applied_pretoken_tokens=1,
        tokens=32,
        state_bytes=12,
        state_digest="of the state",
        model_digest="of m",
        decisions=[pb.DecisionRun(first_segment=0, policy="sinks-recent/1", numerics_id="cpu")],
        chunks=[
            pb.ChunkRef(chunk_id=chunk.chunk_id, length=len(chunk.data), digest=xxhash.xxh3_128_digest(chunk.data))
            for chunk in CHUNKS
        ],
        chain=b"3" * 16,
    ),
    checkpoint_offsets=[0, 50],
)
RECORD.stream.create_time.FromNanoseconds(1_700_000_000_000_000_000)


class FakeStore:
    """A state store with one stream to export, that remembers what an import sends it."""

    def __init__(self) -> None:
        self.staged: list[bytes] = []
        self.imports: list[pb.ImportStreamRequest] = []
        self.appended: list[pb.AppendRecordRequest] = []

    async def get_stream(self, request: pb.GetStreamRequest) -> pb.GetStreamResponse:
        return pb.GetStreamResponse(record=RECORD)

    async def read_chunks(self, request: pb.ReadChunksRequest) -> AsyncIterator[pb.ReadChunksResponse]:
        for chunk in CHUNKS:
            yield chunk

    async def read_log(self, request: pb.ReadLogRequest) -> AsyncIterator[pb.ReadLogResponse]:
        for record in LOG:
            yield record

    async def stage_chunks(self, name: str, chunks: Iterable[tuple[str, bytes]]) -> None:
        self.staged += [data for _, data in chunks]

    async def import_stream(self, request: pb.ImportStreamRequest) -> None:
        self.imports.append(request)

    async def append_record(self, request: pb.AppendRecordRequest) -> None:
        self.appended.append(request)


class FakeModels:
    """One model."""

    async def find(self, name: str) -> api.Model:
        return api.Model(name=name, model_digest=f"of {name}", max_positions=512)


async def test_version_1_reads_and_is_written_as_ever(golden: Callable[[str, bytes], bytes]) -> None:
    source: Any = FakeStore()
    written = b"".join([piece async for piece in export_stream(source, RECORD.stream.name)])
    data = golden("export_1.bin", written)

    target: Any = FakeStore()
    models: Any = FakeModels()
    await import_stream(target, models, "tenants/t/streams/copy", "r", _as_stream(data))

    assert VERSION == 1
    assert target.staged == [b"memory ", b"state"]
    assert [(r.offset, r.data, r.kind) for r in target.appended] == [(r.offset, r.data, r.kind) for r in LOG]
    (made,) = target.imports
    assert (made.name, made.model, made.log_start_offset) == ("tenants/t/streams/copy", "m", 50)
    assert made.settings == SETTINGS
    for chunk, found in zip(RECORD.manifest.chunks, made.manifest.chunks, strict=True):
        assert (found.length, found.digest) == (chunk.length, chunk.digest)
        found.chunk_id = chunk.chunk_id
    assert made.manifest == RECORD.manifest


@pytest.mark.parametrize("cut", [3, 14, 15])
def test_another_version_is_named_and_so_is_this_one(cut: int) -> None:
    later = b"eunoe-export 21\n" + bytes(100)
    reader = FrameReader()

    with pytest.raises(BadExport, match="has version 21, and version 1 is read here"):
        for piece in (later[:cut], later[cut:]):
            assert list(reader.feed(piece)) == []


async def _as_stream(data: bytes) -> AsyncIterator[bytes]:
    yield data
