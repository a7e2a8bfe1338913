"""Who calls: the tenant comes from the API key alone, and a call without one does not reach a servicer."""

import hashlib
import time
from collections import OrderedDict
from collections.abc import AsyncIterator, Callable, Iterable
from contextlib import asynccontextmanager
from contextvars import ContextVar
from typing import Any
from urllib.parse import unquote

from eunoe.clients.state_store import StateStoreClient
from eunoe.gateway.limits import TenantLimits
from eunoe.internal.v1 import state_store_pb2 as store_pb
from eunoe.runtime.errors import DeadlineTooShort, Unauthenticated
from eunoe.runtime.interception import AroundInterceptor

DEFAULT_TENANT = "default"

# What load balancers and developers ask without a key. Everything else is denied by default.
_OPEN_SERVICES = ("/grpc.health.v1.Health/", "/grpc.reflection.")
_MAX_CACHED_KEYS = 10_000

_tenant: ContextVar[str] = ContextVar("tenant")


def current_tenant() -> str:
    """The tenant of the running call. A call that was not authenticated has none: LookupError."""
    return _tenant.get()


class Authenticator:
    """Finds the tenant of a credential, and remembers the answer for a short time.

    Args:
        store: Knows the keys.
        requires_key: False lets callers on the loopback interface in without one.
        cache_seconds: How long an answer is remembered.
        clock: Seconds that never go back.
    """

    def __init__(
        self,
        store: StateStoreClient,
        *,
        requires_key: bool,
        cache_seconds: float,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._store = store
        self._requires_key = requires_key
        self._cache_seconds = cache_seconds
        self._clock = clock
        # Digest of the secret -> (tenant, when to ask again), oldest first: a core dump holds no secrets from here.
        self._cache: OrderedDict[bytes, tuple[str, float]] = OrderedDict()

    async def tenant(self, metadata: Iterable[tuple[str, str | bytes]], peer: str) -> str:
        """The tenant that a call with this metadata, from this peer, belongs to.

        Raises:
            Unauthenticated: If it has no valid key, and needs one.
        """
        credentials = [str(value) for key, value in metadata if key == "authorization"]
        if not credentials:
            if self._requires_key or not _is_loopback(peer):
                raise Unauthenticated("metadata `authorization: Bearer <API key>` is missing")
            return DEFAULT_TENANT
        scheme, _, secret = credentials[0].partition(" ")
        if len(credentials) > 1 or scheme.lower() != "bearer" or not secret:
            raise Unauthenticated("metadata `authorization` must be `Bearer <API key>`, once")
        return await self._tenant_of_key(secret)

    async def _tenant_of_key(self, secret: str) -> str:
        digest = hashlib.sha256(secret.encode()).digest()
        tenant, ask_again = self._cache.get(digest, ("", 0.0))
        if self._clock() < ask_again:
            return tenant
        self._cache.pop(digest, None)
        tenant = (await self._store.authenticate(store_pb.AuthenticateRequest(secret=secret))).tenant
        self._cache[digest] = (tenant, self._clock() + self._cache_seconds)
        if len(self._cache) > _MAX_CACHED_KEYS:
            self._cache.popitem(last=False)
        return tenant


class AdmissionInterceptor(AroundInterceptor):
    """Lets a call in: it must have a valid credential, time left, and its tenant few enough calls running."""

    def __init__(self, authenticator: Authenticator, limits: TenantLimits, *, min_deadline_seconds: float) -> None:
        self._authenticator = authenticator
        self._limits = limits
        self._min_deadline_seconds = min_deadline_seconds

    @asynccontextmanager
    async def around(self, method: str, context: Any) -> AsyncIterator[None]:
        if method.startswith(_OPEN_SERVICES):
            yield
            return
        tenant = await self._authenticator.tenant(context.invocation_metadata() or (), context.peer())
        seconds_left = context.time_remaining()
        if seconds_left is not None and seconds_left < self._min_deadline_seconds:
            raise DeadlineTooShort(f"the call's deadline leaves {max(seconds_left, 0.0):.3f} s")
        with self._limits.call(tenant):
            token = _tenant.set(tenant)
            try:
                yield
            finally:
                _tenant.reset(token)


def _is_loopback(peer: str) -> bool:
    kind, _, address = unquote(peer).partition(":")
    return (
        kind == "unix"
        or (kind == "ipv4" and address.startswith("127."))
        or (kind == "ipv6" and address.startswith("[::1]:"))
    )
