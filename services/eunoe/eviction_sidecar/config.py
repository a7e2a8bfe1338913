"""What an eviction sidecar is told at start."""

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, kw_only=True, slots=True)
class EvictionSidecarConfig:
    """Environment: EUNOE_EVICTION_SIDECAR_<FIELD>."""

    listen_address: str
    """unix:path; the path has at most 107 bytes. Workers beside it connect to it, nobody else."""
    policies_dir: Path | None = None
    """Parameters and rules; None knows only the policies without parameters."""
    policy: str = "sinks-recent/1"
    """For streams that no rule matches, unless the rules name another."""
    payload_dir: Path | None = None
    """A directory in memory, the workers' too: larger tensors come and go there. None takes what fits in a message."""
    audit_file: Path | None = None
    """Evictions as JSON lines; None keeps none."""
    audit_file_bytes: int = 64 << 20
    """Then it is renamed to .1, the one before it to .2, and so on."""
    num_audit_files: int = 8
    """With the one that is written; from 2 on, since a single one would never be cut off."""
    reload_seconds: float = 1.0
    """Between two looks at the policies' directory."""
    ready_file: Path | None = None
    """Gets {"address", "pid"} as JSON once the process serves."""
    metrics_port: int | None = None

    def __post_init__(self) -> None:
        if not self.listen_address.startswith("unix:"):
            raise ValueError(f"listen_address={self.listen_address!r} is no unix:path")
        if self.reload_seconds <= 0 or self.audit_file_bytes <= 0 or self.num_audit_files < 2:
            raise ValueError("reload_seconds and audit_file_bytes must be above 0, and num_audit_files at least 2")

    @property
    def socket_path(self) -> Path:
        """The socket's file."""
        return Path(self.listen_address.removeprefix("unix:"))
