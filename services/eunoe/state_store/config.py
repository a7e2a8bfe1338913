"""What a state store is told at start."""

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, kw_only=True, slots=True)
class StateStoreConfig:
    """Environment: EUNOE_STATE_STORE_<FIELD>."""

    listen_address: str = "127.0.0.1:7410"
    redis_url: str = "redis://127.0.0.1:6379/0"
    """redis://[[user]:password@]host:port/db, rediss:// for TLS, unix://path for a socket. With Sentinel
    sentinel://[[user]:password@]host:port,host:port/service/db, sentinels:// for TLS; the user is Redis's."""
    redis_tls_ca_file: Path | None = None
    """Whom to trust; without it, whom the system trusts."""
    redis_tls_certificate_file: Path | None = None
    redis_tls_key_file: Path | None = None
    num_replicas: int = 0
    """Replicas of Redis that have a write before it is acknowledged; with fewer, writes and reads fail."""
    data_marker_file: Path | None = None
    """Where it is remembered which Redis has the data, on a volume of the state store's own: an empty or another one
    is refused then. Made at the first start."""
    ready_file: Path | None = None
    """Gets {"address", "pid"} as JSON once the process serves."""
    metrics_port: int | None = None
    tls_certificate_file: Path | None = None
    tls_key_file: Path | None = None
    tls_ca_file: Path | None = None
    """With it, only callers with a certificate of this authority are served."""
    api_key_pepper_file: Path | None = None
    """Secret that API key hashes are keyed with; without it they are plain SHA-256 of 256 random bits."""
    encryption_key_file: Path | None = None
    """256 bits as 64 hex digits. With it, what new streams store is encrypted, under keys that it wraps."""
    allow_unsafe_redis: bool = False
    """Serve although Redis may lose what was acknowledged."""
    max_streams: int = 1_000
    """Streams of a tenant."""
    max_log_bytes: int = 4 << 30
    """Bytes of a tenant's logs."""
    max_checkpoint_bytes: int = 16 << 30
    """Bytes of a tenant's retained checkpoints."""
    max_backlog_bytes: int = 8 << 20
    """Most bytes of a stream that wait for its memory: twice the window at which gateways stop reading."""
    staging_seconds: float = 600.0
    """A staged chunk vanishes after this if no commit names it."""
    outcome_seconds: float = 600.0
    """How long a remembering call's outcome is kept."""
    worker_seconds: float = 10.0
    """A worker that does not renew for this long counts as dead."""
    sweep_seconds: float = 15.0
    """Pause between sweeps, which delete what expired and repair hints."""

    def __post_init__(self) -> None:
        for name in ("staging_seconds", "outcome_seconds", "worker_seconds", "sweep_seconds"):
            if getattr(self, name) <= 0:
                raise ValueError(f"{name}={getattr(self, name)} is not above 0")
        for name in ("max_streams", "max_log_bytes", "max_checkpoint_bytes", "max_backlog_bytes", "num_replicas"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name}={getattr(self, name)} is negative")
