"""The book that benchmarks read."""

import gzip
from pathlib import Path

from eunoe.decoder.tokenizer import Tokenizer

_PATH = Path(__file__).parents[1] / "examples" / "kjv.txt.gz"


def the_book() -> str:
    """All of it."""
    return gzip.decompress(_PATH.read_bytes()).decode()


def its_beginning(tokenizer: Tokenizer, num_tokens: int) -> str:
    """As many tokens of it, and 16 more: the last ones of a text wait for what follows."""
    return tokenizer.decode(tokenizer.encode(the_book()[: 8 * num_tokens])[: num_tokens + 16])
