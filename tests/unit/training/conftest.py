from collections.abc import Iterator
from pathlib import Path

import pytest

from eunoe.decoder.tokenizer import Tokenizer, load_tokenizer, write_tiny_tokenizer
from eunoe.training.ray_session import ray_session


@pytest.fixture(scope="session")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    """The tiny one: some two bytes of English a token."""
    directory: Path = tmp_path_factory.mktemp("tokenizer")
    write_tiny_tokenizer(directory)
    return load_tokenizer(directory)


@pytest.fixture(scope="session")
def local_ray() -> Iterator[None]:
    """A Ray of this machine with room for four workers."""
    with ray_session(num_cpus=4):
        yield
