import random
from collections.abc import AsyncIterator

import pytest

from eunoe.gateway.export_format import MAGIC, PIECE_BYTES, FrameKind, FrameReader, frame, pieces
from eunoe.runtime.errors import BadExport

FRAMES = [
    (FrameKind.HEADER, b"the header"),
    (FrameKind.CHUNK, b"\x00" * 5000),
    (FrameKind.CHUNK, b"\x01"),
    (FrameKind.RECORD, "some text ä".encode()),
    (FrameKind.END, b""),
]


def a_file(frames: list[tuple[FrameKind, bytes]] | None = None) -> bytes:
    return MAGIC + b"".join(frame(kind, payload) for kind, payload in (FRAMES if frames is None else frames))


def read(data: bytes, *cuts: int) -> tuple[list[tuple[FrameKind, bytes]], bool]:
    reader = FrameReader()
    found = []
    for start, end in zip((0, *cuts), (*cuts, len(data)), strict=True):
        found += list(reader.feed(data[start:end]))
    return found, reader.is_complete


def test_frames_are_read_wherever_the_bytes_are_cut() -> None:
    data = a_file()
    seeded = random.Random(0)
    for _ in range(50):
        cuts = sorted(seeded.sample(range(1, len(data)), 7))

        assert read(data, *cuts) == (FRAMES, True)


def test_a_torn_file_is_not_complete() -> None:
    data = a_file()
    for end in [*range(60), *range(len(data) - 20, len(data))]:
        assert not read(data[:end])[1]


def test_no_flipped_bit_gets_through() -> None:
    data = a_file(FRAMES[:1] + FRAMES[2:])
    for place in range(len(data)):
        corrupt = bytearray(data)
        corrupt[place] ^= 0x10
        try:
            is_complete = read(bytes(corrupt))[1]
        except BadExport:
            continue
        # A length that grew waits for more bytes: torn.
        assert not is_complete


@pytest.mark.parametrize(
    "frames",
    [
        [FRAMES[1]],
        [FRAMES[0], FRAMES[0]],
        [FRAMES[0], FRAMES[3], FRAMES[1]],
        [FRAMES[0], FRAMES[4], FRAMES[3]],
    ],
)
def test_frames_out_of_order_are_refused(frames: list[tuple[FrameKind, bytes]]) -> None:
    with pytest.raises(BadExport):
        read(a_file(frames))


def test_bytes_behind_the_end_are_refused() -> None:
    with pytest.raises(BadExport):
        read(a_file() + b"x")


def test_another_file_is_refused_at_its_first_bytes() -> None:
    with pytest.raises(BadExport, match="no export"):
        read(b"PK\x03\x04")


def test_a_huge_frame_is_refused_before_its_bytes_come() -> None:
    head = frame(FrameKind.HEADER, b"")[:1] + (2**31).to_bytes(4, "little")

    with pytest.raises(BadExport):
        read(MAGIC + head)


async def test_pieces_are_the_file_and_none_is_above_1_mib() -> None:
    big = [(FrameKind.HEADER, b"h"), *[(FrameKind.CHUNK, bytes([i]) * PIECE_BYTES) for i in range(3)], FRAMES[4]]

    async def frames() -> AsyncIterator[bytes]:
        for kind, payload in big:
            yield frame(kind, payload)

    found = [piece async for piece in pieces(frames())]

    assert b"".join(found) == a_file(big)
    assert max(map(len, found)) <= PIECE_BYTES
