import itertools

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from eunoe.runtime.errors import InvalidUtf8
from eunoe.state_store.text_carry import carry_after


def cut(data: bytes, places: list[int]) -> list[bytes]:
    bounds = [0, *sorted(place % (len(data) + 1) for place in places), len(data)]
    return [data[a:b] for a, b in itertools.pairwise(bounds) if a < b]


@given(st.text(), st.lists(st.integers(0, 1000)))
def test_text_cut_anywhere_is_valid_and_ends_without_a_carry(text: str, places: list[int]) -> None:
    carry = b""
    for piece in cut(text.encode(), places):
        carry = carry_after(carry, piece, 0)
        assert len(carry) <= 3

    assert carry == b""


@given(st.binary(min_size=1, max_size=12), st.lists(st.integers(0, 12)))
@example(b"\xed\xa0", [])
@example(b"\xed\xa0\x80", [1])
@example(b"\xe0\x80", [1])
@example(b"\xf4\x90\x80\x80", [1])
@example(b"a\xc3(", [1, 2])
def test_what_is_taken_is_what_python_takes_however_it_is_cut(data: bytes, places: list[int]) -> None:
    carry, offset, bad_offset = b"", 100, None
    for piece in cut(data, places):
        try:
            carry = carry_after(carry, piece, offset)
        except InvalidUtf8 as error:
            bad_offset = error.offset
            assert offset <= bad_offset < offset + len(piece)
            break
        offset += len(piece)

    decoded = data.decode("utf-8", errors="replace")
    if bad_offset is None:
        # Valid so far: some ending makes it a whole text.
        assert any(
            _is_utf8(data + end)
            for end in (b"", b"\x80", b"\x80\x80", b"\x80\x80\x80", b"\xa0\x80", b"\x90\x80\x80", b"\xa0", b"\x90\x80")
        )
    else:
        assert "�" in decoded


@pytest.mark.parametrize(
    ("carry", "data", "bad_offset"),
    [
        (b"", b"ab\xff", 12),
        (b"\xe2\x82", b"A", 10),
        (b"\xe2", b"\x82A", 11),
        (b"", b"\xc0\x80", 10),
        (b"\xed", b"\xa0", 10),
    ],
)
def test_the_error_names_the_first_byte_that_cannot_stand_there(carry: bytes, data: bytes, bad_offset: int) -> None:
    with pytest.raises(InvalidUtf8) as error:
        carry_after(carry, data, 10)
    assert error.value.offset == bad_offset


def _is_utf8(data: bytes) -> bool:
    try:
        data.decode()
    except UnicodeDecodeError:
        return False
    return True
