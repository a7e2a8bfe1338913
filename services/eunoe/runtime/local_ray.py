"""How a Ray of this machine alone is started. Nothing here imports Ray."""

import secrets
from pathlib import Path
from typing import Any

# Ray's own floor is 75 MB. Tensors of a stream never go through the object store: it holds small change.
_OBJECT_STORE_BYTES = 200 * 1000 * 1000


def local_ray_environment(num_threads: int) -> dict[str, str]:
    """Variables that must be set before Ray is imported, by this process and by those that it starts.

    Args:
        num_threads: Of each of Ray's workers.
    """
    return {
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_OBJECT_STORE_ALLOW_SLOW_STORAGE": "1",
        "RAY_ENABLE_UV_RUN_RUNTIME_ENV": "0",
        # Ray's ports listen on every interface, whatever it is told; this token keeps others out.
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN": secrets.token_hex(32),
        "OMP_NUM_THREADS": str(num_threads),
        # Ray would run the workers at nice 15, where any other process starves them.
        "RAY_worker_niceness": "0",
    }


def local_ray_arguments(temp_dir: Path, num_cpus: int) -> dict[str, Any]:
    """What `ray.init` is told.

    Args:
        temp_dir: Ray's sessions; short, because its socket paths end at 107 bytes.
        num_cpus: Logical ones.
    """
    return {
        "num_cpus": num_cpus,
        "object_store_memory": _OBJECT_STORE_BYTES,
        "include_dashboard": False,
        # Not the address of some network, which may go away.
        "_node_ip_address": "127.0.0.1",
        "_temp_dir": str(temp_dir),
        "namespace": "eunoe",
    }
