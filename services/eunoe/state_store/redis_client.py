"""Clients of the Redis that a URL names: one server, or whichever server Sentinel says is the primary.

After a failover, connections break (Sentinel has the old primary close them), and the next call asks for the new one.
A primary that is cut off from Sentinel but not from here goes on answering: num_replicas is against that.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import unquote, urlsplit

import redis as blocking_redis
import redis.asyncio as redis
from redis import sentinel as blocking_sentinel
from redis.asyncio import sentinel
from redis.asyncio.retry import Retry
from redis.backoff import ExponentialBackoff, NoBackoff
from redis.retry import Retry as BlockingRetry

_SOCKET_TIMEOUT_SECONDS = 5.0
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


# Both ask Sentinel for the primary at each new connection; calls queue for connections as in any other pool.
class _SentinelPool(sentinel.SentinelConnectionPool, redis.BlockingConnectionPool):  # type: ignore[misc]
    pass


class _ThreadsSentinelPool(blocking_sentinel.SentinelConnectionPool, blocking_redis.BlockingConnectionPool):  # type: ignore[misc]
    pass


def open_client(url: str, *, tls: RedisTls | None = None, max_connections: int) -> redis.Redis:
    """A client, not connected yet.

    Args:
        url: As `StateStoreConfig.redis_url`.
        tls: For rediss:// and sentinels://; the latter use it for Sentinel as well.
        max_connections: Most at once; further calls queue.

    Raises:
        ValueError: If the URL is malformed, or files for TLS come with one that does not use it.
    """
    socket_options, pool_options = _options(url, tls, max_connections)
    pool_options["retry"] = Retry(ExponentialBackoff(cap=0.5, base=0.02), _NUM_RETRIES)
    if (service := _service(url)) is None:
        return redis.Redis.from_pool(redis.BlockingConnectionPool.from_url(url, **socket_options, **pool_options))
    # A Sentinel that does not answer is not asked again, as redis-py would for seconds: the next one is.
    sentinel_options = {**socket_options, "retry": Retry(NoBackoff(), 0)}
    asked = sentinel.Sentinel(service.sentinels, sentinel_kwargs=sentinel_options)
    return redis.Redis.from_pool(_SentinelPool(service.name, asked, **service.login, **socket_options, **pool_options))


def open_blocking_client(url: str, *, tls: RedisTls | None = None, max_connections: int) -> blocking_redis.Redis:
    """As `open_client`, for threads."""
    socket_options, pool_options = _options(url, tls, max_connections)
    pool_options["retry"] = BlockingRetry(ExponentialBackoff(cap=0.5, base=0.02), _NUM_RETRIES)
    if (service := _service(url)) is None:
        return blocking_redis.Redis.from_pool(
            blocking_redis.BlockingConnectionPool.from_url(url, **socket_options, **pool_options)
        )
    sentinel_options = {**socket_options, "retry": BlockingRetry(NoBackoff(), 0)}
    asked = blocking_sentinel.Sentinel(service.sentinels, sentinel_kwargs=sentinel_options)
    return blocking_redis.Redis.from_pool(
        _ThreadsSentinelPool(service.name, asked, **service.login, **socket_options, **pool_options)
    )


async def close_client(client: redis.Redis) -> None:
    """Let go of all connections, those to Sentinel too."""
    pool = client.connection_pool
    await client.aclose()
    await pool.disconnect()
    if isinstance(pool, sentinel.SentinelConnectionPool):
        await pool.sentinel_manager.aclose()


def close_blocking_client(client: blocking_redis.Redis) -> None:
    """As `close_client`."""
    pool = client.connection_pool
    client.close()
    pool.disconnect()
    if isinstance(pool, blocking_sentinel.SentinelConnectionPool):
        for each in pool.sentinel_manager.sentinels:
            each.close()


class _Service(NamedTuple):
    """What Sentinel watches: its name there, where Sentinels are, and how to log in at the primary."""

    name: str
    sentinels: list[tuple[str, int]]
    login: dict[str, Any]


def _service(url: str) -> _Service | None:
    """Out of a URL with Sentinel; None for any other."""
    parts = urlsplit(url)
    if parts.scheme not in ("sentinel", "sentinels"):
        return None
    credentials, _, hosts = parts.netloc.rpartition("@")
    user, _, password = credentials.partition(":")
    name, _, database = parts.path.strip("/").partition("/")
    if not hosts or not name or not (database or "0").isdecimal():
        raise ValueError("redis_url is not sentinel://[[user]:password@]host:port[,host:port...]/service[/database]")
    login = {
        "db": int(database or 0),
        "username": unquote(user) or None,
        "password": unquote(password) or None,
    }
    return _Service(name, [_address(host) for host in hosts.split(",")], login)


def _options(url: str, tls: RedisTls | None, max_connections: int) -> tuple[dict[str, Any], dict[str, Any]]:
    """(options of every socket, options of the pool)."""
    socket_options: dict[str, Any] = {
        "socket_timeout": _SOCKET_TIMEOUT_SECONDS,
        "socket_connect_timeout": _SOCKET_TIMEOUT_SECONDS,
    }
    scheme = urlsplit(url).scheme
    if scheme in ("rediss", "sentinels"):
        socket_options |= (tls or RedisTls()).options()
    elif tls is not None and tls != RedisTls():
        raise ValueError(f"files for TLS are set, but redis_url begins with {scheme}://, which does not use it")
    if scheme == "sentinels":
        socket_options["ssl"] = True
    return socket_options, {"max_connections": max_connections, "timeout": _SOCKET_TIMEOUT_SECONDS}


def _address(host: str) -> tuple[str, int]:
    parts = urlsplit(f"//{host}")
    return parts.hostname or "", parts.port or _DEFAULT_SENTINEL_PORT
