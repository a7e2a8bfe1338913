"""One gateway: its parts put together, started and drained."""

from eunoe.api.v1 import long_context_pb2, long_context_pb2_grpc
from eunoe.clients.model_worker import PlacementClient
from eunoe.clients.state_store import StateStoreClient
from eunoe.gateway.authentication import AdmissionInterceptor, Authenticator
from eunoe.gateway.config import GatewayConfig
from eunoe.gateway.limits import TenantLimits
from eunoe.gateway.models import ModelDirectory
from eunoe.gateway.placement import Placement
from eunoe.gateway.servicer import LongContextServicer
from eunoe.runtime.auth import tls_from_files
from eunoe.runtime.grpc_channel import open_channel
from eunoe.runtime.grpc_server import GrpcServer, run_process
from eunoe.runtime.telemetry import serve_metrics

SERVICE_NAME = long_context_pb2.DESCRIPTOR.services_by_name["LongContextService"].full_name


class Gateway:
    """The public server of this config, not yet started. Make it inside a running event loop."""

    def __init__(self, config: GatewayConfig) -> None:
        self._config = config
        self._is_draining = False
        store_tls = tls_from_files(
            config.state_store_tls_certificate_file, config.state_store_tls_key_file, config.state_store_tls_ca_file
        )
        self._channels = [open_channel(config.state_store_address, store_tls)]
        store = StateStoreClient(self._channels[0])
        serve = None
        if config.serve_address is not None:
            self._channels.append(open_channel(config.serve_address))
            serve = PlacementClient(self._channels[1])
        limits = TenantLimits(
            max_concurrent_calls=config.max_tenant_concurrent_calls,
            append_bytes_per_second=config.max_tenant_append_bytes_per_second,
        )
        self._placement = Placement(store, serve)
        servicer = LongContextServicer(
            store=store,
            placement=self._placement,
            models=ModelDirectory(store),
            limits=limits,
            window_bytes=config.window_bytes,
            is_draining=lambda: self._is_draining,
        )
        authenticator = Authenticator(store, requires_key=config.requires_key, cache_seconds=config.key_cache_seconds)
        self.server = GrpcServer(
            address=config.listen_address,
            add_servicers=lambda server: long_context_pb2_grpc.add_LongContextServiceServicer_to_server(
                servicer, server
            ),
            service_names=[SERVICE_NAME],
            tls=tls_from_files(config.tls_certificate_file, config.tls_key_file, config.tls_client_ca_file),
            interceptors=[
                AdmissionInterceptor(authenticator, limits, min_deadline_seconds=config.min_deadline_seconds)
            ],
            reflection=config.has_reflection,
            max_concurrent_rpcs=config.max_concurrent_calls,
        )

    async def run(self) -> None:
        """Serve until SIGTERM or SIGINT, then drain and close."""
        config = self._config
        with serve_metrics(config.metrics_port, config.metrics_host):
            await run_process(
                self.server,
                ready_file=config.ready_file,
                on_drain=self.begin_drain,
                grace_seconds=config.grace_seconds,
            )
        await self.close()

    async def begin_drain(self) -> None:
        """End the Appends, whose clients go on at another gateway; answers that are on their way may finish."""
        self._is_draining = True

    async def close(self) -> None:
        """Close the channels to the state store, Serve and the workers, after the server has drained."""
        await self._placement.close()
        for channel in self._channels:
            await channel.close()
