"""What a passkey is hidden in: the paper's filler, the same sentences shuffled, or a book."""

from typing import Literal

import numpy as np

from eunoe.training.tasks import haystack

FillerName = Literal["paper", "shuffled", "book"]

SENTENCES = (
    "The grass is green. ",
    "The sky is blue. ",
    "The sun is yellow. ",
    "Here we go. ",
    "There and back again. ",
)


def filler(name: FillerName, num_bytes: int, split: haystack.Split, generator: np.random.Generator) -> list[str]:
    """Consecutive sentences (or verses) of at most `num_bytes` bytes together, from a random place on.

    Raises:
        ValueError: If there is no such filler.
    """
    pieces: list[str] = []
    left = num_bytes
    if name == "book":
        lines = haystack.lines("book", split)
        place = int(generator.integers(len(lines)))
    elif name in ("paper", "shuffled"):
        place = int(generator.integers(len(SENTENCES)))
    else:
        raise ValueError(f"filler {name!r} is not one of paper, shuffled, book")
    while left > 0:
        if name == "book":
            piece = lines[place % len(lines)].replace("\n", " ")
        elif name == "paper":
            piece = SENTENCES[place % len(SENTENCES)]
        else:
            piece = SENTENCES[int(generator.integers(len(SENTENCES)))]
        if len(piece.encode()) > left:
            break
        pieces.append(piece)
        left -= len(piece.encode())
        place += 1
    return pieces
