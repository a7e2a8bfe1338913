"""What a platform's home directory says about it."""

import json
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from eunoe.embedded.processes import ProcessRecord, is_alive


@dataclass(kw_only=True, slots=True)
class PlatformRecord:
    """What platform.json says: all that is needed to find and end a platform.

    Attributes:
        model: The served model's name.
        address: host:port of the gateway; empty until it listens.
        state_store_address: host:port of the state store; empty until it listens.
        temp_dir: Short directory of sockets and Ray's sessions.
        processes: In the order of starting.
    """

    model: str
    temp_dir: str
    address: str = ""
    state_store_address: str = ""
    is_ready: bool = False
    processes: list[ProcessRecord] = field(default_factory=list)

    @property
    def is_running(self) -> bool:
        """Whether it came up and every process is still alive."""
        return self.is_ready and all(is_alive(process) for process in self.processes)


def default_home() -> Path:
    """The variable EUNOE_HOME, or ~/.eunoe."""
    return Path(os.environ.get("EUNOE_HOME") or "~/.eunoe").expanduser()


def read_record(home: Path) -> PlatformRecord | None:
    """What was started with this home and not stopped since; None if nothing was."""
    try:
        values: dict[str, Any] = json.loads((home / "platform.json").read_text())
    except FileNotFoundError:
        return None
    return PlatformRecord(**{**values, "processes": [ProcessRecord(**process) for process in values["processes"]]})
