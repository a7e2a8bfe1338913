"""Configuration of a model worker."""

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, kw_only=True, slots=True)
class WorkerConfig:
    """What one model worker is told at start. Environment: EUNOE_WORKER_<FIELD>."""

    model_name: str
    """The model's name in the public API."""
    model_path: Path
    """Directory with weights and tokenizer."""
    state_store_address: str
    """host:port of the state store."""
    listen_host: str = "127.0.0.1"
    """Where to listen, and what others are told to connect to; the port is picked."""
    num_threads: int = 2
    """Threads of the decoder's matmuls; a part of numerics_id."""
    memory_limit_bytes: int = 4 * 1024**3
    """Most bytes of resident memory states, their derived copies and the copies that answers are decoded on."""
    checkpoint_segments: int = 32
    """Commit after so many segments; folding pauses at twice as many uncommitted ones."""
    checkpoint_seconds: float = 10.0
    """Commit at the latest so long after the last commit, if anything was folded."""
    renew_seconds: float = 3.0
    """Between two signs of life to the state store."""
    sweep_seconds: float = 1.0
    """Between two looks at the streams that have a backlog."""
    stall_seconds: float = 10.0
    """Unhealthy after so long without a step while work is pending."""
    metrics_port: int | None = None
    """Where Prometheus metrics are published on `listen_host`; 0 picks a port, None publishes none."""
    policy: str = "sinks-recent/1"
    """Evicts where no sidecar says otherwise: a policy's name, or the stem of a file in `policies_dir`."""
    policies_dir: Path | None = None
    """Parameters of policies; the sidecar's too."""
    sidecar_address: str | None = None
    """unix:path of the eviction sidecar, which then chooses each stream's policy; None: there is none."""
    scoring: str = "in_process"
    """Where slots are scored: `in_process` or `sidecar`; to the same bits."""
    sidecar_deadline_seconds: float = 0.5
    """A sidecar that takes longer is decided without."""
    payload_dir: Path | None = None
    """A directory in memory, the sidecar's too, for features beyond a message's size; `scoring` by the sidecar needs
    one."""
    drain_seconds: float = 10.0
    """How long a drain waits for running calls."""
    ready_file: Path | None = None
    """Gets {"address", "pid"} as JSON once a worker that is a plain process serves."""

    def __post_init__(self) -> None:
        if not self.model_name:
            raise ValueError("model_name is empty")
        if self.checkpoint_segments < 1 or self.num_threads < 1:
            raise ValueError("checkpoint_segments and num_threads must be at least 1")
        if self.scoring not in ("in_process", "sidecar"):
            raise ValueError(f"scoring={self.scoring!r} is neither in_process nor sidecar")
        if self.scoring == "sidecar" and self.sidecar_address is None:
            raise ValueError("scoring is sidecar, and sidecar_address says none")
        if self.scoring == "sidecar" and self.payload_dir is None:
            # A model of any use has features of more than a message's 4 MiB: each eviction would be a fallback.
            raise ValueError("scoring is sidecar, and payload_dir names no directory for features")
        durations = (self.checkpoint_seconds, self.renew_seconds, self.sweep_seconds, self.stall_seconds)
        if min(*durations, self.sidecar_deadline_seconds) <= 0:
            raise ValueError("durations must be positive")
