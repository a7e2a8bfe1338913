"""A connection to Ray for as long as a job runs. Nothing here imports Ray before its environment is set."""

import logging
import os
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from eunoe.runtime.local_ray import local_ray_arguments, local_ray_environment


@contextmanager
def ray_session(address: str | None = None, *, num_cpus: int | None = None, num_threads: int = 1) -> Iterator[None]:
    """Connect to a cluster, or start a Ray of this machine alone, which ends with the block.

    Modules that import Ray must be imported inside of the block.

    Args:
        address: Of a cluster ("auto", "ray://host:10001"); None starts a Ray.
        num_cpus: Of the one that is started; default: those of this machine.
        num_threads: Of a worker, there.

    Raises:
        ConnectionError: If no cluster answers.
    """
    if address is None:
        assert "ray" not in sys.modules or "RAY_AUTH_MODE" in os.environ, (
            "Ray was imported before its environment was set"
        )
        os.environ.update(local_ray_environment(num_threads) | os.environ)
    import ray

    with tempfile.TemporaryDirectory(prefix="eunoe-ray-", ignore_cleanup_errors=True) as directory:
        if address is None:
            arguments = local_ray_arguments(Path(directory), num_cpus or os.cpu_count() or 1)
        else:
            arguments = {"address": address}
        ray.init(**arguments, log_to_driver=False, logging_level=logging.WARNING)
        try:
            yield
        finally:
            ray.shutdown()
