"""Runs a local Ray with the model's Serve application: `python -m eunoe.embedded.ray_host`.

SIGTERM drains: workers commit their streams and give them back, then Ray ends with this process.
"""

import dataclasses
import os
import signal
from dataclasses import dataclass
from pathlib import Path

from eunoe.runtime.config import from_env
from eunoe.runtime.grpc_server import write_ready_file
from eunoe.runtime.local_ray import local_ray_arguments, local_ray_environment

# Ray's own actors and every worker must be placed, whatever the machine has.
_NUM_LOGICAL_CPUS = 16


@dataclass(frozen=True, kw_only=True, slots=True)
class RayHostConfig:
    """What the Ray of an embedded platform is told at start. Environment: EUNOE_RAY_HOST_<FIELD>."""

    model_name: str
    """The model's name in the public API, and the Serve application's."""
    model_path: Path
    """Directory with weights and tokenizer."""
    state_store_address: str
    """host:port of the state store."""
    serve_grpc_port: int
    """Where Serve's gRPC proxy listens."""
    serve_http_port: int
    """Where Serve's HTTP proxy listens; nothing uses it, but Serve has no switch for it."""
    temp_dir: Path
    """Ray's sessions; short, because its socket paths end at 107 bytes."""
    ready_file: Path
    """Gets {"address", "pid"} as JSON when the workers are ready."""
    num_workers: int = 1
    """Model workers."""
    num_threads: int = 2
    """Threads of a worker."""
    memory_limit_bytes: int | None = None
    """Most bytes of resident memory states of a worker; None leaves the worker's default."""
    sidecar_address: str
    """unix:path of the eviction sidecar, which chooses policies and scores."""
    policies_dir: Path
    """Parameters of policies, the sidecar's too."""
    policy: str
    """Evicts until the sidecar says otherwise."""
    payload_dir: Path
    """A directory in memory, the sidecar's too."""


def main() -> None:
    """Run until SIGTERM."""
    config = from_env(RayHostConfig, "EUNOE_RAY_HOST")
    os.environ.update(local_ray_environment(config.num_threads), RAY_SERVE_ENABLE_HA_PROXY="0")
    import ray
    from ray import serve
    from ray.serve.config import gRPCOptions

    from eunoe.model_worker.config import WorkerConfig
    from eunoe.serve_apps.model_worker import build_app

    ray.init(**local_ray_arguments(config.temp_dir, _NUM_LOGICAL_CPUS))
    # After ray.init, which installs a handler of its own.
    for signal_number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(signal_number, _exit)
    serve.start(
        http_options={"host": "127.0.0.1", "port": config.serve_http_port},
        grpc_options=gRPCOptions(
            port=config.serve_grpc_port,
            grpc_servicer_functions=[
                "eunoe.internal.v1.model_worker_pb2_grpc.add_PlacementServiceServicer_to_server",
            ],
            enable_reflection=False,
        ),
    )
    worker_config = WorkerConfig(
        model_name=config.model_name,
        model_path=config.model_path,
        state_store_address=config.state_store_address,
        num_threads=config.num_threads,
        scoring="sidecar",
        sidecar_address=config.sidecar_address,
        policies_dir=config.policies_dir,
        policy=config.policy,
        payload_dir=config.payload_dir,
    )
    if config.memory_limit_bytes is not None:
        worker_config = dataclasses.replace(worker_config, memory_limit_bytes=config.memory_limit_bytes)
    try:
        # Without a route prefix Serve tells its proxy of no endpoint, for gRPC neither.
        route_prefix = f"/{config.model_name}"
        serve.run(build_app(worker_config, config.num_workers), name=config.model_name, route_prefix=route_prefix)
        write_ready_file(config.ready_file, f"127.0.0.1:{config.serve_grpc_port}")
        while True:
            signal.pause()
    finally:
        serve.shutdown()
        ray.shutdown()


def _exit(*_: object) -> None:
    # Once: the drain is not to be interrupted.
    for signal_number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(signal_number, signal.SIG_IGN)
    raise SystemExit(0)


if __name__ == "__main__":
    main()
