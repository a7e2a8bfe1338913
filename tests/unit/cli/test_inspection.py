"""What `eunoe inspect` shows of a memory."""

import pytest

from eunoe.cli.inspection import Token, legend, lines, shaded
from eunoe.client import HeadMemory, LogTokens


def a_head(**text_at: str) -> HeadMemory:
    """Keeps these texts, by position."""
    positions = [int(key[1:]) for key in text_at]
    return HeadMemory(positions=positions, token_ids=positions, texts=text_at.values())


def tokens_of(text: str, num_keeping: list[int], num_heads: int = 4, start: int = 0) -> list[Token]:
    """A token a word."""
    words = [f" {word}".encode() for word in text.split()]
    return [
        Token(start + rank, word, count, num_heads)
        for rank, (word, count) in enumerate(zip(words, num_keeping, strict=True))
    ]


def test_each_token_of_the_log_has_the_number_of_heads_that_keep_it() -> None:
    heads = [a_head(p0="Ge", p6=" created"), a_head(p0="Ge", p5=" God", p6=" created")]
    log = LogTokens(token_ids=[4, 5, 6], pieces=[b" beginning", b" God", b" created"])

    tokens = shaded(heads, log, num_tokens=7)

    assert [(token.position, token.data.decode(), token.num_keeping) for token in tokens] == [
        (0, "Ge", 2),
        (4, " beginning", 0),
        (5, " God", 1),
        (6, " created", 2),
    ]


@pytest.mark.parametrize(
    ("num_keeping", "word"),
    [(0, "none"), (1, "few"), (29, "few"), (30, "some"), (60, "most"), (89, "most"), (90, "all")],
)
def test_a_share_has_a_word(num_keeping: int, word: str) -> None:
    assert Token(0, b"x", num_keeping, 90).kept_by == word


def test_without_colours_marks_stand_around_what_not_all_heads_keep() -> None:
    tokens = tokens_of("Ge", [4]) + tokens_of("In the beginning God created", [0, 0, 1, 3, 4], start=9)

    shown = [line.plain for line in lines(tokens, has_colors=False)]

    assert shown == [
        "[0-0]  Ge",
        "... 8 tokens are gone ...",
        "[9-13] [- In the-]{few:  beginning}{most:  God} created",
    ]


def test_with_colours_the_text_stands_as_it_is() -> None:
    (line,) = lines(tokens_of("In the beginning God", [0, 0, 1, 4]), has_colors=True)

    assert line.plain == "[0-3]  In the beginning God"
    assert [str(span.style) for span in line.spans] == ["dim", "dim strike", "red", "bold bright_green"]


def test_a_character_of_several_tokens_is_whole_where_they_are_kept_alike() -> None:
    first, second, third = (bytes([byte]) for byte in "雨".encode())
    (alike,) = lines([Token(0, first, 1, 1), Token(1, second, 1, 1), Token(2, third, 1, 1)], has_colors=True)
    (unlike,) = lines([Token(0, first, 1, 1), Token(1, second, 0, 1), Token(2, third, 1, 1)], has_colors=True)

    assert alike.plain == "[0-2] 雨"
    assert "雨" not in unlike.plain


def test_a_text_does_not_steer_the_terminal() -> None:
    (line,) = lines([Token(0, b"a\x1b[2Jb\x07\x7f\nc", 1, 1)], has_colors=True)

    assert line.plain == "[0-0] a␛[2Jb␇␡\nc"


def test_the_legend_names_every_shade() -> None:
    assert legend(has_colors=False).plain == (
        "text all heads keep it, {most: text} two thirds or more, {some: text} a third or more, {few: text} fewer,"
        " [-text-] none"
    )
    assert legend(has_colors=True).plain == "all heads keep it, two thirds or more, a third or more, fewer, none"
