"""A channel with credentials, and the rules of retrying."""

import asyncio
import random
import time
from collections.abc import Awaitable, Callable
from typing import Any, TypeVar

import grpc

from eunoe.api.v1 import long_context_pb2_grpc
from eunoe.runtime.auth import TlsConfig
from eunoe.runtime.errors import EunoeError, Overloaded, QuotaExceeded, Unavailable, from_rpc_error
from eunoe.runtime.grpc_channel import open_channel

T = TypeVar("T")

UNARY_TIMEOUT_SECONDS = 30.0

_FIRST_WAIT_SECONDS = 0.05
_LONGEST_WAIT_SECONDS = 5.0


def error_of(rpc_error: grpc.RpcError) -> EunoeError:
    """The typed error of a failed call; a call that was cut off counts as Unavailable."""
    error = from_rpc_error(rpc_error)
    if rpc_error.code() is grpc.StatusCode.CANCELLED:
        return Unavailable(error.message)
    return error


class Backoff:
    """Waits between attempts: doubling, with jitter, at least as long as the server asked for.

    Args:
        patience_seconds: Give up when nothing has gone forward for so long.
    """

    def __init__(self, patience_seconds: float) -> None:
        self._patience_seconds = patience_seconds
        self.went_forward()

    def went_forward(self) -> None:
        """Start over with short waits and full patience."""
        self._wait_seconds = _FIRST_WAIT_SECONDS
        self._give_up_at = time.monotonic() + self._patience_seconds

    async def wait(self, error: EunoeError) -> None:
        """Wait for the next attempt, or raise `error` if it cannot be helped by waiting or patience is at its end."""
        if not isinstance(error, Unavailable | Overloaded) or isinstance(error, QuotaExceeded):
            raise error
        # A status without RetryInfo arrives with the class's default of a second, which a restart rarely takes.
        asked_for = error.retry_after_seconds if isinstance(error, Overloaded) else 0.0
        seconds = max(asked_for, self._wait_seconds * random.uniform(0.5, 1.0))
        if time.monotonic() + seconds > self._give_up_at:
            raise error
        self._wait_seconds = min(2 * self._wait_seconds, _LONGEST_WAIT_SECONDS)
        await asyncio.sleep(seconds)


class Connection:
    """The stub of one server address; it connects at the first call, on the event loop that makes it.

    Args:
        address: host:port.
        api_key: Sent with every call; None sends none.
        tls: None speaks plain text.
        retry_seconds: Patience of every `Backoff`.
    """

    def __init__(self, address: str, *, api_key: str | None, tls: TlsConfig | None, retry_seconds: float) -> None:
        self.address = address
        self.metadata = () if api_key is None else (("authorization", f"Bearer {api_key}"),)
        self._tls = tls
        self._retry_seconds = retry_seconds
        self._channel: grpc.aio.Channel | None = None

    @property
    def stub(self) -> Any:
        """The service's stub (the generated class has no types)."""
        if self._channel is None:
            self._channel = open_channel(self.address, self._tls)
            self._stub = long_context_pb2_grpc.LongContextServiceStub(self._channel)
        return self._stub

    def backoff(self) -> Backoff:
        """A new one, for one operation."""
        return Backoff(self._retry_seconds)

    async def retry(self, attempt: Callable[[], Awaitable[T]]) -> T:
        """Repeat `attempt` while the platform is away or overloaded; raises typed errors."""
        backoff = self.backoff()
        while True:
            try:
                return await attempt()
            except grpc.RpcError as rpc_error:
                await backoff.wait(error_of(rpc_error))

    async def unary(self, method: str, request: Any) -> Any:
        """Call a unary RPC that may be repeated."""

        async def attempt() -> Any:
            return await getattr(self.stub, method)(request, metadata=self.metadata, timeout=UNARY_TIMEOUT_SECONDS)

        return await self.retry(attempt)

    async def close(self) -> None:
        """Close the channel; running calls are cancelled."""
        if self._channel is not None:
            await self._channel.close()
            self._channel = None
