import fcntl
from collections.abc import Iterator
from contextlib import ExitStack
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
def local_ray(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """A Ray of this machine with room for four workers."""
    # Of two that start at the same moment, one in each process of the run, one may find its ports taken and never come.
    shared = tmp_path_factory.getbasetemp().parent
    with (shared / "ray.lock").open("w") as lock, ExitStack() as stack:
        fcntl.flock(lock, fcntl.LOCK_EX)
        stack.enter_context(ray_session(num_cpus=4))
        fcntl.flock(lock, fcntl.LOCK_UN)
        yield
