"""The gRPC server of every process: errors, health, keepalive, drain and the ready file in one place."""

import asyncio
import json
import logging
import os
import signal
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path

import grpc
from grpc_health.v1 import health, health_pb2, health_pb2_grpc

from eunoe.runtime.auth import TlsConfig
from eunoe.runtime.grpc_channel import FRAME_OPTIONS, KEEPALIVE_OPTIONS, KEEPALIVE_SECONDS, MAX_MESSAGE_BYTES
from eunoe.runtime.interception import ErrorInterceptor
from eunoe.runtime.telemetry import MetricsInterceptor

logger = logging.getLogger(__name__)

_OPTIONS = (
    *KEEPALIVE_OPTIONS,
    *FRAME_OPTIONS,
    ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
    ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
    ("grpc.max_metadata_size", 16 * 1024),
    # Pings more often than clients of this platform send them are an attack.
    ("grpc.http2.min_ping_interval_without_data_ms", KEEPALIVE_SECONDS * 1000 // 2),
    ("grpc.http2.max_ping_strikes", 2),
    # A second process on the same port must fail, not share it.
    ("grpc.so_reuseport", 0),
)


_STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT)


class GrpcServer:
    """A grpc.aio server with the platform's options.

    Args:
        address: host:port to listen on; port 0 picks a free one. Or unix:path.
        add_servicers: Called with the server once, to register the servicers.
        service_names: Full names for the health service (and reflection).
        tls: Certificates; None listens in plain text.
        interceptors: Run inside the error interceptor, first one outermost: they may raise the error tree.
        reflection: Offer server reflection; for development.
        max_concurrent_rpcs: Beyond it calls are answered RESOURCE_EXHAUSTED; None sets no limit.
    """

    def __init__(
        self,
        *,
        address: str,
        add_servicers: Callable[[grpc.aio.Server], None],
        service_names: Sequence[str],
        tls: TlsConfig | None = None,
        interceptors: Sequence[grpc.aio.ServerInterceptor] = (),
        reflection: bool = False,
        max_concurrent_rpcs: int | None = None,
    ) -> None:
        self._listen_address = address
        self._add_servicers = add_servicers
        self._service_names = ["", *service_names]
        self._tls = tls
        self._interceptors = (MetricsInterceptor(), ErrorInterceptor(), *interceptors)
        self._has_reflection = reflection
        self._max_concurrent_rpcs = max_concurrent_rpcs
        self._server: grpc.aio.Server | None = None
        self._health = health.aio.HealthServicer()
        self._port = 0

    @property
    def address(self) -> str:
        """host:port (or unix:path) that clients connect to, once started."""
        if self._listen_address.startswith("unix:"):
            return self._listen_address
        return f"{self._listen_address.rpartition(':')[0]}:{self._port}"

    async def start(self) -> int:
        """Listen and say SERVING; returns the port.

        Raises:
            RuntimeError: If the address cannot be bound.
        """
        self._server = grpc.aio.server(
            interceptors=self._interceptors, options=_OPTIONS, maximum_concurrent_rpcs=self._max_concurrent_rpcs
        )
        self._add_servicers(self._server)
        health_pb2_grpc.add_HealthServicer_to_server(self._health, self._server)
        if self._has_reflection:
            from grpc_reflection.v1alpha import reflection

            reflection.enable_server_reflection([*self._service_names[1:], reflection.SERVICE_NAME], self._server)
        if self._tls is None:
            self._port = self._server.add_insecure_port(self._listen_address)
        else:
            self._port = self._server.add_secure_port(self._listen_address, self._tls.server_credentials())
        await self._server.start()
        await self.set_serving(True)
        return self._port

    async def set_serving(self, is_serving: bool) -> None:
        """What the health service answers for the server and each of its services."""
        status = health_pb2.HealthCheckResponse.SERVING if is_serving else health_pb2.HealthCheckResponse.NOT_SERVING
        for name in self._service_names:
            await self._health.set(name, status)

    async def drain(self, grace_seconds: float) -> None:
        """Say NOT_SERVING, take no new calls, wait up to `grace_seconds` for running ones, then cancel them."""
        assert self._server is not None, "drained before it was started"
        await self._health.enter_graceful_shutdown()
        await self._server.stop(grace_seconds)


async def run_process(
    server: GrpcServer,
    *,
    ready_file: Path | None = None,
    on_drain: Callable[[], Awaitable[None]] | None = None,
    grace_seconds: float = 20.0,
) -> None:
    """Start the server, serve until SIGTERM or SIGINT, drain, return.

    Args:
        server: Not yet started.
        ready_file: Gets {"address", "pid"} as JSON, at once and whole, when the server listens; removed at the end.
        on_drain: Awaited after the health service says NOT_SERVING and before running calls are waited for: the place
            to end calls that would never end by themselves.
        grace_seconds: Longest wait for running calls.
    """
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for signal_number in _STOP_SIGNALS:
        loop.add_signal_handler(signal_number, stop.set)
    await server.start()
    logger.info("the server listens", extra={"address": server.address})
    if ready_file is not None:
        write_ready_file(ready_file, server.address)
    try:
        await stop.wait()
    finally:
        for signal_number in _STOP_SIGNALS:
            loop.remove_signal_handler(signal_number)
    logger.info("draining")
    await server.set_serving(False)
    if on_drain is not None:
        await on_drain()
    await server.drain(grace_seconds)
    if ready_file is not None:
        await asyncio.to_thread(ready_file.unlink, missing_ok=True)
    logger.info("drained")


def write_ready_file(path: Path, address: str) -> None:
    """Tell whoever started this process that it listens: {"address", "pid"}, by atomic rename."""
    partial = path.with_name(f"{path.name}.{os.getpid()}")
    partial.write_text(json.dumps({"address": address, "pid": os.getpid()}))
    partial.replace(path)
