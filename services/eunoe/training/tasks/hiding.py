"""Sentences hidden among consecutive lines of a haystack, as exactly so many tokens."""

import random

import numpy as np
import numpy.typing as npt

from eunoe.decoder.tokenizer import Tokenizer
from eunoe.training.tasks.case import TokenIds
from eunoe.training.tasks.haystack import HaystackName, Split, lines

PREAMBLE = (
    "There is an important info hidden inside a lot of irrelevant text. Find it and memorize it. "
    "I will quiz you about the important information there.\n"
)
# More than any page has: the book's have 3.6, code's 3.5.
_MOST_CHARACTERS_PER_TOKEN = 7
_SEAM_TOKENS = 4


def hide(
    needles: list[str],
    *,
    depth: float,
    haystack: HaystackName,
    split: Split,
    num_tokens: int,
    generator: random.Random,
    tokenizer: Tokenizer,
) -> tuple[TokenIds, list[tuple[int, int]]]:
    """A context of `num_tokens`, and (start, stop) of each needle's tokens in it.

    Args:
        needles: Lines. The first is hidden at `depth`, the others anywhere.
        depth: Share of the haystack before it, from 0 to below 1.
        haystack: Where the lines are from, a place that the generator draws.
        split: Which part of it.
        num_tokens: Tokens of the context, preamble and needles included.
        generator: Its draws decide all the rest.
        tokenizer: Of the model that will read it.

    Raises:
        ValueError: If the needles alone are longer.
    """
    room = num_tokens - len(tokenizer.encode(PREAMBLE + "".join(needles)))
    if room < _SEAM_TOKENS * (len(needles) + 2):
        raise ValueError(f"{num_tokens} tokens have no room for {len(needles)} needles")
    body = _consecutive_lines(lines(haystack, split), generator, num_characters=room * _MOST_CHARACTERS_PER_TOKEN)
    first_bytes = np.cumsum([0, *(len(line.encode()) for line in body)])[:-1]
    starts = np.searchsorted(_token_ends(tokenizer, tokenizer.encode("".join(body))), first_bytes)
    # Seams may have other tokens: the end is cut off, and a needle must not be there.
    limit = room - _SEAM_TOKENS * (len(needles) + 1)
    depths = [depth, *(generator.random() for _ in needles[1:])]
    places = [int(np.searchsorted(starts, each * limit, side="right")) - 1 for each in depths]
    order = sorted(range(len(needles)), key=places.__getitem__)
    # From the last on, so that places before it stay what they are.
    for index in reversed(order):
        body.insert(places[index], needles[index])

    token_ids = tokenizer.encode(PREAMBLE + "".join(body))
    token_ends = _token_ends(tokenizer, token_ids)
    line_ends = np.cumsum([len(PREAMBLE.encode()), *(len(line.encode()) for line in body)])
    spans = [(0, 0)] * len(needles)
    for num_before, index in enumerate(order):
        line = places[index] + num_before
        start, stop = np.searchsorted(token_ends, [line_ends[line] + 1, line_ends[line + 1]])
        spans[index] = (int(start), int(stop) + 1)
    assert len(token_ids) >= num_tokens >= max(stop for _, stop in spans)
    return np.asarray(token_ids[:num_tokens], dtype=np.int64), spans


def _consecutive_lines(found: tuple[str, ...], generator: random.Random, num_characters: int) -> list[str]:
    """From a line that is drawn on, around the end if need be."""
    index = generator.randrange(len(found))
    body: list[str] = []
    while num_characters > 0:
        body.append(found[index % len(found)])
        num_characters -= len(body[-1])
        index += 1
    return body


def _token_ends(tokenizer: Tokenizer, token_ids: list[int]) -> npt.NDArray[np.int64]:
    """Bytes up to the end of each token."""
    return np.cumsum([len(tokenizer.token_bytes(token_id)) for token_id in token_ids])
