"""A stream leaves one installation as a file and enters another: same offsets, same memory, or a clear refusal."""

from collections.abc import AsyncIterator
from typing import Any

import grpc
import pytest

from eunoe.api.v1 import long_context_pb2 as api
from eunoe.gateway.export_format import MAGIC, FrameKind, FrameReader, frame
from eunoe.internal.v1 import state_store_pb2 as store_pb
from eunoe.runtime.errors import (
    AlreadyExists,
    BadExport,
    InvalidRequest,
    ModelMismatch,
    ModelNotFound,
    from_rpc_error,
)

TEXT = "Τὸ δὲ ζητεῖν ἄρα καὶ τὸ μανθάνειν ἀνάμνησις ὅλον ἐστίν.".encode()


async def exported(stub: Any, name: str) -> bytes:
    return b"".join([piece.data async for piece in stub.ExportStream(api.ExportStreamRequest(name=name))])


async def imported(stub: Any, data: bytes, piece_bytes: int = 100_000, **first: str) -> api.Stream:
    async def requests() -> AsyncIterator[api.ImportStreamRequest]:
        yield api.ImportStreamRequest(data=data[:piece_bytes], **first)
        for start in range(piece_bytes, len(data), piece_bytes):
            yield api.ImportStreamRequest(data=data[start : start + piece_bytes])

    return (await stub.ImportStream(requests())).stream  # type: ignore[no-any-return]


async def error_of(awaitable: Any) -> Any:
    with pytest.raises(grpc.RpcError) as caught:
        await awaitable
    return from_rpc_error(caught.value)


@pytest.fixture
async def export(stub: Any, stream: str, append_to: Any) -> bytes:
    """The export of a stream with a checkpoint and a log behind it."""
    client = await append_to(stub, stream)
    await client.record(TEXT)
    await client.flush()
    await client.record(TEXT[:10])
    return await exported(stub, stream)


@pytest.mark.parametrize("piece_bytes", [7, 100_000])
async def test_an_imported_stream_has_the_same_offsets_and_memory(
    stub: Any, stream: str, export: bytes, piece_bytes: int
) -> None:
    original = (await stub.GetStream(api.GetStreamRequest(name=stream))).stream

    copy = await imported(stub, export, piece_bytes)

    assert copy.name != original.name
    for field in ("model", "settings", "accepted_offset", "applied_offset", "state_digest", "tokens", "carry_bytes"):
        assert getattr(copy, field) == getattr(original, field), field


async def test_an_imported_stream_goes_on_like_the_original(
    stub: Any, stream: str, export: bytes, append_to: Any
) -> None:
    copy = await imported(stub, export)
    digests = []
    for name in (stream, copy.name):
        client = await append_to(stub, name)
        await client.record(TEXT[10:])
        digests.append((await client.finish()).state_digest)

    assert digests[0] == digests[1]


async def test_a_stream_without_a_checkpoint_travels_by_its_log(stub: Any, stream: str, append_to: Any) -> None:
    client = await append_to(stub, stream)
    await client.record(b"short")

    copy = await imported(stub, await exported(stub, stream))

    assert (copy.accepted_offset, copy.applied_offset) == (5, 0)


async def test_a_repeated_import_is_the_same_stream(stub: Any, export: bytes) -> None:
    first = await imported(stub, export, stream_id="copy-of-it", request_id="r1")

    assert await imported(stub, export, stream_id="copy-of-it", request_id="r1") == first
    assert isinstance(await error_of(imported(stub, export, stream_id="copy-of-it", request_id="r2")), AlreadyExists)


async def test_a_torn_export_makes_nothing(stub: Any, export: bytes) -> None:
    for end in (0, 5, len(MAGIC), len(export) // 2, len(export) - 1):
        error = await error_of(imported(stub, export[:end], stream_id="torn"))
        assert isinstance(error, BadExport)

    with pytest.raises(grpc.RpcError):
        await stub.GetStream(api.GetStreamRequest(name="tenants/-/streams/torn"))


async def test_a_corrupt_export_is_refused(stub: Any, export: bytes) -> None:
    corrupt = bytearray(export)
    corrupt[len(export) // 2] ^= 1

    assert isinstance(await error_of(imported(stub, bytes(corrupt))), BadExport)


def changed(export: bytes, kind: FrameKind, change: Any) -> bytes:
    """The export with the first frame of that kind changed, its checksum made right."""
    frames = list(FrameReader().feed(export))
    index = [found for found, _ in frames].index(kind)
    frames[index] = (kind, change(frames[index][1]))
    return MAGIC + b"".join(frame(*one) for one in frames)


async def test_a_forged_chunk_is_refused(stub: Any, export: bytes) -> None:
    def other_bytes(payload: bytes) -> bytes:
        chunk = store_pb.ReadChunksResponse.FromString(payload)
        chunk.data = bytes(len(chunk.data))
        return chunk.SerializeToString()

    forged = changed(export, FrameKind.CHUNK, other_bytes)

    assert isinstance(await error_of(imported(stub, forged)), BadExport)


async def test_a_log_with_a_gap_is_refused(stub: Any, export: bytes) -> None:
    def later(payload: bytes) -> bytes:
        record = store_pb.ReadLogResponse.FromString(payload)
        record.offset += 1
        return record.SerializeToString()

    assert isinstance(await error_of(imported(stub, changed(export, FrameKind.RECORD, later))), BadExport)


async def test_a_frame_that_is_no_message_is_refused(stub: Any, export: bytes) -> None:
    forged = changed(export, FrameKind.HEADER, lambda _: b"\xff\xff\xff")

    assert isinstance(await error_of(imported(stub, forged)), BadExport)


async def test_a_memory_of_other_weights_is_refused(stub: Any, export: bytes) -> None:
    def of_other_weights(payload: bytes) -> bytes:
        record = store_pb.StreamRecord.FromString(payload)
        record.manifest.model_digest = "other"
        return record.SerializeToString()

    error = await error_of(imported(stub, changed(export, FrameKind.HEADER, of_other_weights)))

    assert isinstance(error, ModelMismatch)
    assert error.found == "other"


async def test_a_model_that_is_not_served_here_is_not_found(stub: Any, export: bytes) -> None:
    def of_other_model(payload: bytes) -> bytes:
        record = store_pb.StreamRecord.FromString(payload)
        record.stream.model = "gpt-9"
        return record.SerializeToString()

    error = await error_of(imported(stub, changed(export, FrameKind.HEADER, of_other_model)))

    assert isinstance(error, ModelNotFound)


async def test_an_import_names_its_stream_once(stub: Any, export: bytes) -> None:
    requests = [api.ImportStreamRequest(data=export[:50]), api.ImportStreamRequest(data=export[50:], stream_id="x")]

    assert isinstance(await error_of(stub.ImportStream(iter(requests))), InvalidRequest)


async def test_a_piece_of_an_import_has_at_most_1_mib(stub: Any, export: bytes) -> None:
    error = await error_of(imported(stub, export + bytes(1 << 20), 1 << 21))

    assert isinstance(error, InvalidRequest)
    assert "1048576" in error.message
