"""Prometheus metrics of a process: RPCs counted and timed at the server, published over HTTP on request."""

import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from typing import Any

import grpc
from prometheus_client import Counter, Histogram, start_http_server

from eunoe.runtime.interception import AroundInterceptor

RPC_CALLS = Counter("eunoe_rpc_calls", "RPCs that ended at this server, by method and status code.", ["method", "code"])
RPC_DURATION = Histogram(
    "eunoe_rpc_duration_seconds",
    "Seconds from an RPC's arrival to its end, streaming calls whole.",
    ["method"],
    buckets=(0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 300),
)


class MetricsInterceptor(AroundInterceptor):
    """Counts RPCs by method and status code, and times them."""

    @asynccontextmanager
    async def around(self, method: str, context: Any) -> AsyncIterator[None]:
        start = time.monotonic()
        code = "CANCELLED"
        try:
            yield
            code = _name(context.code()) or "OK"
        except grpc.aio.AbortError:
            code = _name(context.code()) or "UNKNOWN"
            raise
        finally:
            RPC_CALLS.labels(method, code).inc()
            RPC_DURATION.labels(method).observe(time.monotonic() - start)


@contextmanager
def serve_metrics(port: int | None, host: str = "127.0.0.1") -> Iterator[int | None]:
    """Publish the process's metrics at http://host:port/metrics while the context lasts; None publishes nothing.

    Yields the port that is listened on; port 0 picks a free one.
    """
    if port is None:
        yield None
        return
    server, thread = start_http_server(port, host)
    try:
        yield server.server_port
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def _name(code: Any) -> str | None:
    """The name of a status code as grpc.aio keeps it: an enumeration member, its number, or nothing."""
    if not code:
        return None
    return (
        code.name if isinstance(code, grpc.StatusCode) else next(c.name for c in grpc.StatusCode if c.value[0] == code)
    )
