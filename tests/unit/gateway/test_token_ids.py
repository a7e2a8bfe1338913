import struct

import pytest

from eunoe.gateway.append import check_token_ids
from eunoe.runtime.errors import BadTokenId


def test_ids_below_the_vocabularys_size_are_good() -> None:
    check_token_ids(struct.pack("<3I", 0, 7, 511), vocab_size=512)


@pytest.mark.parametrize("data", [b"\x00", b"\x00" * 5, struct.pack("<2I", 1, 512), struct.pack("<I", 2**32 - 1)])
def test_other_bytes_are_no_token_ids(data: bytes) -> None:
    with pytest.raises(BadTokenId):
        check_token_ids(data, vocab_size=512)
