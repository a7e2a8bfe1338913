"""A client of the Redis that a URL names: one server, or whichever server Sentinel says is the primary."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import redis.asyncio as redis
from redis.asyncio.retry import Retry
from redis.asyncio.sentinel import Sentinel, SentinelConnectionPool
from redis.backoff import ExponentialBackoff, NoBackoff

SOCKET_TIMEOUT_SECONDS = 5.0
_NUM_RETRIES = 3
_DEFAULT_SENTINEL_PORT = 26379


@dataclass(frozen=True, kw_only=True, slots=True)
class RedisTls:
    """Files for TLS: whom to trust (else whom the system trusts), and with a certificate, who this is."""

    ca_file: Path | None = None
    certificate_file: Path | None = None
    key_file: Path | None = None

    def options(self) -> dict[str, Any]:
        """As redis-py names them. The server's certificate must be trusted and have the name that was connected to."""
        files = {"ca_certs": self.ca_file, "certfile": self.certificate_file, "keyfile": self.key_file}
        chosen = {f"ssl_{name}": str(path) for name, path in files.items() if path is not None}
        return {**chosen, "ssl_cert_reqs": "required", "ssl_check_hostname": True}


class _SentinelPool(SentinelConnectionPool, redis.BlockingConnectionPool):  # type: ignore[misc]
    """Asks Sentinel for the primary at each new connection; calls queue for connections as in the other pool."""


def open_client(url: str, *, tls: RedisTls | None = None, max_connections: int) -> redis.Redis:
    """A client, not connected yet.

    After a failover, connections break (Sentinel has the old primary close them), and the next call asks for the new
    one. A primary that is cut off from Sentinel but not from here goes on answering: num_replicas is against that.

    Args:
        url: As `StateStoreConfig.redis_url`.
        tls: For rediss:// and sentinels://; the latter use it for Sentinel as well.
        max_connections: Most at once; further calls queue.

    Raises:
        ValueError: If the URL is malformed, or files for TLS come with one that does not use it.
    """
    options: dict[str, Any] = {
        "socket_timeout": SOCKET_TIMEOUT_SECONDS,
        "socket_connect_timeout": SOCKET_TIMEOUT_SECONDS,
    }
    pool_options: dict[str, Any] = {
        "max_connections": max_connections,
        "timeout": SOCKET_TIMEOUT_SECONDS,
        "retry": Retry(ExponentialBackoff(cap=0.5, base=0.02), _NUM_RETRIES),
    }
    parts = urlsplit(url)
    if parts.scheme in ("rediss", "sentinels"):
        options |= (tls or RedisTls()).options()
    elif tls is not None and tls != RedisTls():
        raise ValueError(f"files for TLS are set, but redis_url begins with {parts.scheme}://, which does not use it")
    if parts.scheme not in ("sentinel", "sentinels"):
        pool = redis.BlockingConnectionPool.from_url(url, **options, **pool_options)
        return redis.Redis.from_pool(pool)

    if parts.scheme == "sentinels":
        options["ssl"] = True
    credentials, _, hosts = parts.netloc.rpartition("@")
    user, _, password = credentials.partition(":")
    service, _, database = parts.path.strip("/").partition("/")
    if not hosts or not service or not (database or "0").isdecimal():
        raise ValueError("redis_url is not sentinel://[[user]:password@]host:port[,host:port...]/service[/database]")
    # A Sentinel that does not answer is not asked again, as redis-py would for seconds: the next one is.
    sentinel_options = {**options, "retry": Retry(NoBackoff(), 0)}
    sentinel = Sentinel([_address(host) for host in hosts.split(",")], sentinel_kwargs=sentinel_options)
    pool = _SentinelPool(
        service,
        sentinel,
        db=int(database or 0),
        username=unquote(user) or None,
        password=unquote(password) or None,
        **options,
        **pool_options,
    )
    return redis.Redis.from_pool(pool)


async def close_client(client: redis.Redis) -> None:
    """Let go of all connections, those to Sentinel too."""
    pool = client.connection_pool
    await client.aclose()
    await pool.disconnect()
    if isinstance(pool, SentinelConnectionPool):
        await pool.sentinel_manager.aclose()


def _address(host: str) -> tuple[str, int]:
    name, _, port = host.rpartition(":") if ":" in host else (host, "", str(_DEFAULT_SENTINEL_PORT))
    return name, int(port)
