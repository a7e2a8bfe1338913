"""UTF-8 over a log whose records may cut a character: 0 to 3 bytes are carried from one record to the next."""

import codecs

from eunoe.runtime.errors import InvalidUtf8


def carry_after(carry: bytes, data: bytes, offset: int) -> bytes:
    """The bytes at the end of `carry + data` that begin a character which `data` cuts.

    Valid is what Python's decoder takes: no overlong forms, no surrogates, nothing above U+10FFFF.

    Args:
        carry: Bytes before `data` that begin a cut character, 0 to 3.
        data: A text record.
        offset: Where `data` starts in the stream.

    Raises:
        InvalidUtf8: With the place of the first byte that cannot stand there.
    """
    text = carry + data
    try:
        _, num_decoded = codecs.utf_8_decode(text, "strict", False)
        rest = text[num_decoded:]
        # The decoder waits for a third byte before it refuses half a surrogate; no byte could ever follow.
        if rest[:1] == b"\xed" and rest[1:] >= b"\xa0":
            raise UnicodeDecodeError("utf-8", text, num_decoded, num_decoded + 1, "surrogate")
    except UnicodeDecodeError as error:
        # A sequence that began in the carry was fine so far: what breaks it is the byte after its valid part.
        place = error.start if error.start >= len(carry) else error.end
        bad_offset = offset - len(carry) + place
        raise InvalidUtf8(f"the byte at offset {bad_offset} is not UTF-8", offset=bad_offset) from None
    return rest
