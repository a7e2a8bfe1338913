from collections.abc import Iterator

import pytest

from eunoe.training.ray_session import ray_session


@pytest.fixture(scope="session")
def local_ray() -> Iterator[None]:
    """A Ray of this machine with room for four workers."""
    with ray_session(num_cpus=4):
        yield
