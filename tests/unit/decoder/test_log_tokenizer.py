"""Tokens of a log depend on its bytes alone: not on their cuts, not on restarts."""

import gzip
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from eunoe.decoder import log_tokenizer
from eunoe.decoder.byte_tokenizer import ByteTokenizer
from eunoe.decoder.log_tokenizer import ID_BYTES, MAX_PRE_TOKEN_BYTES, LogTokenizer, RecordKind
from eunoe.decoder.pre_tokenizer import pre_tokenizer_definition
from eunoe.decoder.tokenizer import BytePairTokenizer, Tokenizer, load_tokenizer, write_tiny_tokenizer

BOOK = Path(__file__).parents[3] / "examples" / "kjv.txt.gz"

Log = list[tuple[RecordKind, bytes]]

# What the splits tell apart, often; and everything else, seldom. U+0004 has no token (see `tokenizer`).
PIECES = st.one_of(
    st.sampled_from(
        ["'", "'l", "'r", "'re", "'LL", " ", "  ", "\n", "\r\n", " \n ", "1", "23", "a", " b", "!", "\x04"]
    ),
    st.sampled_from(["\u00e9", "e\u0301", "\u00a0", "\u2028", "\x1c", "\u0663", "\u6f22", "\U0001f600", "\u017f"]),
    st.characters(codec="utf-8"),
)
TEXTS = st.lists(PIECES, max_size=12).map("".join)
LOGS = st.lists(
    st.one_of(
        TEXTS.map(lambda text: ("text", text.encode())),
        st.lists(st.integers(0, 255), max_size=3).map(lambda ids: ("token_ids", np.array(ids, "<u4").tobytes())),
    ),
    max_size=5,
)


def a_byte_pair_tokenizer(directory: Path, split: str) -> Tokenizer:
    """A tiny tokenizer whose vocabulary lacks a byte, as SmolLM2's lacks some."""
    write_tiny_tokenizer(directory)
    content = json.loads((directory / "tokenizer.json").read_bytes())
    content["pre_tokenizer"] = pre_tokenizer_definition(split)
    del content["model"]["vocab"]["\u0104"]
    return BytePairTokenizer(content, {})


@pytest.fixture(scope="module", params=["smollm", "llama-bpe"])
def byte_pair_tokenizer(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return a_byte_pair_tokenizer(tmp_path_factory.mktemp("tiny"), request.param)


@pytest.fixture(scope="module", params=["smollm", "llama-bpe", "bytes"])
def tokenizer(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    if request.param == "bytes":
        return ByteTokenizer()
    return a_byte_pair_tokenizer(tmp_path_factory.mktemp("tiny"), request.param)


@contextmanager
def short_pre_tokens() -> Iterator[None]:
    """Pre-tokens are closed by force after 16 bytes, so that short logs have some."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(log_tokenizer, "MAX_PRE_TOKEN_BYTES", 16)
        yield


def feed(tokens: LogTokenizer, log: Log, start: int = 0, step: int | None = None) -> LogTokenizer:
    """Feed the log from an offset on, whole or cut into pieces of `step` bytes."""
    for kind, data in log:
        data, start = data[start:], max(0, start - len(data))
        for place in range(0, len(data), step or len(data) or 1):
            tokens.feed(data[place : place + (step or len(data))], kind)
    return tokens


def cursors_and_ids(tokens: LogTokenizer) -> list[tuple[tuple[int, int], int]]:
    """Take all closed tokens one by one: each with the cursor after it."""
    return [(tokens.cursor, token_id) for token_id in iter_tokens(tokens)]


def iter_tokens(tokens: LogTokenizer) -> Iterator[int]:
    while tokens.num_closed:
        yield int(tokens.take(1)[0])


def text_tokens(tokenizer: Tokenizer, text: str) -> LogTokenizer:
    return feed(LogTokenizer(tokenizer), [("text", text.encode())])


@settings(deadline=None, derandomize=True, max_examples=500)
@given(text=TEXTS, more=TEXTS)
def test_closed_tokens_begin_the_tokens_of_every_longer_text(tokenizer: Tokenizer, text: str, more: str) -> None:
    tokens = text_tokens(tokenizer, text)

    closed = tokens.take(tokens.num_closed).tolist()

    assert closed == tokenizer.encode(text + more)[: len(closed)]


@settings(deadline=None, derandomize=True, max_examples=200)
@given(text=TEXTS)
def test_the_closed_copy_has_the_tokens_of_the_whole_text(tokenizer: Tokenizer, text: str) -> None:
    assert text_tokens(tokenizer, text).close_copy().tolist() == tokenizer.encode(text)


@short_pre_tokens()
@settings(deadline=None, derandomize=True, max_examples=300)
@given(log=LOGS, step=st.integers(1, 7))
def test_tokens_and_cursors_do_not_depend_on_the_cuts(tokenizer: Tokenizer, log: Log, step: int) -> None:
    whole, cut = feed(LogTokenizer(tokenizer), log), feed(LogTokenizer(tokenizer), log, step=step)

    assert cut.next_offset == whole.next_offset == sum(len(data) for _, data in log)
    assert cut.num_closed == whole.num_closed
    assert cut.close_copy().tolist() == whole.close_copy().tolist()
    assert cursors_and_ids(cut) == cursors_and_ids(whole)


@short_pre_tokens()
@settings(deadline=None, derandomize=True, max_examples=300)
@given(log=LOGS, step=st.integers(1, 7), data=st.data())
def test_tokenizing_goes_on_at_any_cursor(tokenizer: Tokenizer, log: Log, step: int, data: st.DataObject) -> None:
    before = feed(LogTokenizer(tokenizer), log)
    before.take(data.draw(st.integers(0, before.num_closed)))
    offset, num_applied_tokens = before.cursor

    after = feed(
        LogTokenizer(tokenizer, offset=offset, num_applied_tokens=num_applied_tokens), log, start=offset, step=step
    )

    assert after.cursor == before.cursor
    assert after.num_closed == before.num_closed
    assert after.close_copy().tolist() == before.close_copy().tolist()
    assert cursors_and_ids(after) == cursors_and_ids(before)


@pytest.mark.parametrize(
    ("text", "num_closed_bytes"),
    [
        ("a b", 1),
        ("a  ", 1),
        ("a \n", 1),
        ("a  b", 2),
        ("don't", 5),
        ("don'", 3),
        ("a\n\n\nb", 4),
    ],
)
def test_what_can_still_change_is_open(byte_pair_tokenizer: Tokenizer, text: str, num_closed_bytes: int) -> None:
    tokens = text_tokens(byte_pair_tokenizer, text)

    assert b"".join(map(byte_pair_tokenizer.token_bytes, iter_tokens(tokens))) == text.encode()[:num_closed_bytes]


@pytest.mark.parametrize("character", ["a", "\u00e9", "\u6f22", " ", "\n", "!"])
def test_a_long_pre_token_is_closed_at_the_first_character_after_4_kib(
    byte_pair_tokenizer: Tokenizer, character: str
) -> None:
    width = len(character.encode())
    num_closed_characters = 2 * -(-MAX_PRE_TOKEN_BYTES // width)

    tokens = text_tokens(byte_pair_tokenizer, character * (num_closed_characters + 1))

    taken = tokens.take(tokens.num_closed)
    assert b"".join(map(byte_pair_tokenizer.token_bytes, taken.tolist())).decode() == character * num_closed_characters
    assert tokens.cursor == (num_closed_characters * width, 0)


def test_a_forced_end_does_not_depend_on_what_follows_at_once(tokenizer: Tokenizer) -> None:
    # The last of the spaces would go to the word, were it in sight.
    spaces, word = b" " * MAX_PRE_TOKEN_BYTES, b"a "

    at_once = feed(LogTokenizer(tokenizer), [("text", spaces + word)])
    one_by_one = feed(LogTokenizer(tokenizer), [("text", spaces), ("text", word)])

    assert cursors_and_ids(at_once) == cursors_and_ids(one_by_one)


def test_token_ids_are_a_barrier(tokenizer: Tokenizer) -> None:
    ids = np.array([200, 1], "<u4").tobytes()

    tokens = feed(LogTokenizer(tokenizer), [("text", b"the"), ("token_ids", ids), ("text", b"re")])

    assert tokens.close_copy().tolist() == [*tokenizer.encode("the"), 200, 1, *tokenizer.encode("re")]
    tokens.take(len(tokenizer.encode("the")) + 1)
    assert tokens.cursor == (len("the") + ID_BYTES, 0)


def test_the_closed_copy_leaves_out_a_cut_character(tokenizer: Tokenizer) -> None:
    tokens = feed(LogTokenizer(tokenizer), [("text", b"a \xf0\x9f\x98")])

    assert tokens.close_copy().tolist() == tokenizer.encode("a ")
    assert tokens.next_offset == 5


def test_the_closed_copy_takes_nothing(tokenizer: Tokenizer) -> None:
    tokens = text_tokens(tokenizer, "the river of the")
    num_closed = tokens.num_closed

    tokens.close_copy()

    assert (tokens.num_closed, tokens.cursor) == (num_closed, (0, 0))


def test_a_copy_goes_its_own_way(tokenizer: Tokenizer) -> None:
    tokens = text_tokens(tokenizer, "the river of")
    other = tokens.copy()

    other.feed(b" all", "text")
    other.take(2)

    assert tokens.cursor == (0, 0)
    assert tokens.close_copy().tolist() == tokenizer.encode("the river of")


@pytest.mark.parametrize(
    ("log", "message"),
    [
        ([("text", b"a\xff")], "utf-8"),
        ([("text", b"a\xc3"), ("text", b"a")], "utf-8"),
        ([("text", b"a\xc3"), ("token_ids", b"\1\0\0\0")], "1 bytes of a text"),
        ([("token_ids", b"\1\0"), ("text", b"a")], "2 bytes of a token_ids"),
        ([("token_ids", b"\0\2\0\0")], "id 512 is not below"),
    ],
)
def test_bytes_that_do_not_fit_are_refused_and_change_nothing(tokenizer: Tokenizer, log: Log, message: str) -> None:
    *good, bad = log
    tokens = feed(LogTokenizer(tokenizer), good)

    with pytest.raises(ValueError, match=message):
        feed(tokens, [bad])

    assert tokens.next_offset == sum(len(data) for _, data in good)


def test_more_tokens_than_are_closed_are_refused(byte_pair_tokenizer: Tokenizer) -> None:
    with pytest.raises(ValueError, match="2 tokens wanted, 1 closed"):
        text_tokens(byte_pair_tokenizer, "a b").take(2)


def test_a_cursor_of_another_log_is_refused(tokenizer: Tokenizer) -> None:
    tokens = LogTokenizer(tokenizer, offset=0, num_applied_tokens=2)

    with pytest.raises(ValueError, match="no pre-token of more than 2 tokens"):
        tokens.feed(b"a b c d e", "text")


def test_every_byte_is_a_token_at_once_but_those_of_a_cut_character() -> None:
    tokens = feed(LogTokenizer(ByteTokenizer()), [("text", "aé".encode()), ("text", b"\xf0\x9f")])

    assert tokens.take(tokens.num_closed).tolist() == list("aé".encode())
    assert (tokens.cursor, tokens.next_offset) == ((3, 0), 5)
    tokens.feed(b"\x98\x80", "text")
    assert tokens.take(2).tolist() == [0xF0, 0x9F]
    assert tokens.cursor == (3, 2)


@pytest.mark.model
def test_the_whole_book_has_the_tokens_of_one_encoding_however_it_is_cut(smollm2_directory: Path) -> None:
    tokenizer = load_tokenizer(smollm2_directory)
    book = gzip.decompress(BOOK.read_bytes())

    tokens = LogTokenizer(tokenizer)
    taken = []
    for start in range(0, len(book), 65_521):
        tokens.feed(book[start : start + 65_521], "text")
        taken.append(tokens.take(tokens.num_closed))

    token_ids = np.concatenate([*taken, tokens.close_copy()])
    assert len(token_ids) == 1_207_908
    assert np.array_equal(token_ids, tokenizer.encode(book.decode()))
