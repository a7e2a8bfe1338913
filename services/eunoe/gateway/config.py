"""Configuration of a gateway."""

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, kw_only=True, slots=True)
class GatewayConfig:
    """What a gateway is told at start. Environment: EUNOE_GATEWAY_<FIELD>."""

    state_store_address: str
    """host:port of the state store."""
    listen_address: str = "127.0.0.1:8400"
    """host:port to listen on; port 0 picks a free one."""
    serve_address: str | None = None
    """host:port of Ray Serve's gRPC proxy. Without it streams are placed by the worker directory alone."""
    requires_key: bool = True
    """False lets callers on the loopback interface in without a key, as tenant "default"."""
    key_cache_seconds: float = 10.0
    """How long a revoked key may still be let in."""
    tls_certificate_file: Path | None = None
    """PEM certificate of this server; without it the gateway speaks plain text."""
    tls_key_file: Path | None = None
    """PEM key of the certificate."""
    tls_client_ca_file: Path | None = None
    """PEM authority that every client must have a certificate of (mTLS)."""
    state_store_tls_ca_file: Path | None = None
    """PEM authority of the state store's certificate; without it the connection is plain text."""
    state_store_tls_certificate_file: Path | None = None
    """PEM certificate that this gateway shows the state store (mTLS)."""
    state_store_tls_key_file: Path | None = None
    """PEM key of that certificate."""
    window_bytes: int = 4 * 1024 * 1024
    """An Append stops reading while accepted - applied exceeds this."""
    max_concurrent_calls: int = 1024
    """Calls at once, of all tenants."""
    max_tenant_concurrent_calls: int = 128
    """Calls at once, of one tenant."""
    max_tenant_append_bytes_per_second: int = 64 * 1024 * 1024
    """Bytes of records a second that one tenant may append at this gateway; bursts up to as many."""
    min_deadline_seconds: float = 0.05
    """A call that must end sooner is refused at once."""
    grace_seconds: float = 20.0
    """How long a drain waits for running calls."""
    ready_file: Path | None = None
    """Gets the address as JSON when the gateway listens."""
    metrics_port: int | None = None
    """Port of the Prometheus endpoint; none by default."""
    metrics_host: str = "127.0.0.1"
    """Where the Prometheus endpoint listens."""
    has_reflection: bool = False
    """Offer gRPC server reflection; for development."""
    log_format: str = "plain"
    """"plain" or "json"."""
    log_level: str = "INFO"
    """Least level that is logged."""

    def __post_init__(self) -> None:
        for name in ("window_bytes", "max_concurrent_calls", "max_tenant_concurrent_calls"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1")
        if self.max_tenant_append_bytes_per_second < 1024 * 1024:
            raise ValueError("max_tenant_append_bytes_per_second must let a record of 1 MiB through")
