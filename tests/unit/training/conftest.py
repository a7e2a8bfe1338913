from pathlib import Path

import pytest

from eunoe.decoder.tokenizer import Tokenizer, write_tiny_tokenizer


@pytest.fixture(scope="session")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    """The tiny one: some two bytes of English a token."""
    directory: Path = tmp_path_factory.mktemp("tokenizer")
    write_tiny_tokenizer(directory)
    return Tokenizer.load(directory)
