"""The model worker as a Ray Serve application.

Ray places replicas, restarts and drains them; it carries no data. A replica runs one worker with a gRPC server of its
own. Only a stream's first placement passes through Serve's gRPC proxy, with metadata `application` (the model) and
`session_id` (the stream): consistent hashing sends it to the replica that most likely owns the stream, which answers
with the owner's address.
"""

from ray import serve
from ray.serve.config import RequestRouterConfig

from eunoe.internal.v1 import model_worker_pb2 as pb
from eunoe.model_worker.config import WorkerConfig
from eunoe.model_worker.worker import ModelWorker
from eunoe.runtime.errors import EunoeError

# A drain commits every stream; a replica killed before that loses nothing, but the next owner replays.
_DRAIN_SECONDS = 120.0


class ModelWorkerReplica:
    """One replica. Serve runs all of it, constructor and destructor too, in the same event loop."""

    async def __init__(self, config: WorkerConfig) -> None:  # type: ignore[misc]
        self._worker = ModelWorker(config)
        await self._worker.start()

    async def PlaceStream(self, request: pb.PlaceStreamRequest) -> pb.PlaceStreamResponse:
        """PlacementService.PlaceStream. The status is in band because Serve's proxy drops error details."""
        suspect = request.suspect if request.HasField("suspect") else None
        try:
            return pb.PlaceStreamResponse(lease=await self._worker.place(request.name, suspect))
        except EunoeError as error:
            return pb.PlaceStreamResponse(error=error.to_status())

    async def check_health(self) -> None:
        """Serve replaces a replica whose check raises."""
        self._worker.check_health()

    async def __del__(self) -> None:
        # Serve awaits this when it stops a replica, after it has taken the replica out of the router.
        await self._worker.drain()


def build_app(config: WorkerConfig, num_replicas: int = 1) -> serve.Application:
    """The application that serves one model; run it under the model's name.

    Serve's gRPC proxy must know `add_PlacementServiceServicer_to_server`, and RAY_SERVE_ENABLE_HA_PROXY must be 0:
    behind HAProxy a gRPC call's `session_id` routes nothing.

    Args:
        config: Of every replica.
        num_replicas: Workers to keep running.
    """
    deployment = serve.deployment(
        ModelWorkerReplica,
        name="ModelWorker",
        num_replicas=num_replicas,
        # Placements only: they are short, and a replica that refused one would break the stickiness.
        max_ongoing_requests=1000,
        graceful_shutdown_timeout_s=_DRAIN_SECONDS,
        graceful_shutdown_wait_loop_s=0.5,
        health_check_period_s=5.0,
        health_check_timeout_s=15.0,
        # Ray sets OMP_NUM_THREADS to num_cpus where it is given; the worker sets its threads itself.
        ray_actor_options={"num_cpus": config.num_threads},
        request_router_config=RequestRouterConfig(
            request_router_class="ray.serve.experimental.consistent_hash_router.ConsistentHashRouter",
            request_router_kwargs={"num_fallback_replicas": 0},
        ),
    )
    return deployment.bind(config)
