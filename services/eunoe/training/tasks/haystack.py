"""What needles are hidden in: a book's verses, Python sources, and a manual. What trains a policy never tests it.

Of the book the first 70% trains and the rest tests. Code that trains is the interpreter's standard library, code that
tests is a part of torch's: both are there wherever this package runs, and neither has to be shipped. `constraints.txt`
pins torch exactly, so that cases stay the same from commit to commit. The manual is Python's language reference, modern
prose of which nothing trains.
"""

import functools
import gzip
import pydoc_data.topics
import sysconfig
from collections.abc import Iterable
from pathlib import Path
from typing import Literal

import torch

import eunoe

Split = Literal["train", "test"]
HaystackName = Literal["book", "code", "manual"]

_BOOK = Path(eunoe.__path__[0]).parents[1] / "examples" / "kjv.txt.gz"
_TRAINING_SHARE = 0.7
# Written by hand, and the same in torch's builds for CPU and CUDA.
_TESTING_CODE = ("nn/modules", "optim", "distributions")


@functools.cache
def lines(name: HaystackName, split: Split) -> tuple[str, ...]:
    """All lines of a haystack, each with its newline.

    Raises:
        FileNotFoundError: If the book is not there: it comes with the source tree.
        ValueError: If there is no such haystack, or nothing of it trains.
    """
    if name == "manual":
        if split == "train":
            raise ValueError("the manual is held out: it has nothing to train")
        return tuple(line for _, topic in sorted(pydoc_data.topics.topics.items()) for line in _texts(topic))
    if name == "code":
        return _training_code() if split == "train" else _testing_code()
    if name != "book":
        raise ValueError(f"haystack {name!r} is neither book, code nor manual")
    verses = gzip.decompress(_BOOK.read_bytes()).decode().splitlines(keepends=True)
    cut = int(_TRAINING_SHARE * len(verses))
    return tuple(verses[:cut] if split == "train" else verses[cut:])


def _texts(topic: str) -> list[str]:
    """Its lines without the empty ones."""
    return [line for line in topic.splitlines(keepends=True) if line.strip()]


def _training_code() -> tuple[str, ...]:
    return _lines_of(sorted(Path(sysconfig.get_path("stdlib")).glob("[a-z]*.py")))


def _testing_code() -> tuple[str, ...]:
    package = Path(torch.__path__[0])
    return _lines_of(path for directory in _TESTING_CODE for path in sorted((package / directory).glob("*.py")))


def _lines_of(paths: Iterable[Path]) -> tuple[str, ...]:
    return tuple(line for path in paths for line in path.read_text(encoding="utf-8").splitlines(keepends=True))
