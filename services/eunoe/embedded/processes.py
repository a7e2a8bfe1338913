"""Starting processes that outlive their starter, and ending exactly those.

Each process leads a session of its own, so a Ctrl-C in the terminal does not reach it, and what it starts in turn can
be found. A process is known by its id and its start time: an id that the system gave to somebody else since is left
alone.
"""

import contextlib
import os
import socket
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil

# Start times are compared after a round trip through JSON and with the kernel's resolution of 10 ms.
_START_TIME_TOLERANCE_SECONDS = 0.05


@dataclass(frozen=True, kw_only=True, slots=True)
class ProcessRecord:
    """What must be known to find a process again: `start_time` is in seconds since the epoch."""

    name: str
    pid: int
    start_time: float
    log_file: str


def start_process(
    name: str, command: Sequence[str], *, environment: Mapping[str, str], log_file: Path
) -> ProcessRecord:
    """Start a process in a session of its own, its output appended to `log_file`.

    Raises:
        OSError: If the command cannot be run.
    """
    log_file.parent.mkdir(parents=True, exist_ok=True)
    flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND
    pid = os.posix_spawnp(
        command[0],
        list(command),
        dict(environment),
        file_actions=[
            (os.POSIX_SPAWN_OPEN, 0, os.devnull, os.O_RDONLY, 0),
            (os.POSIX_SPAWN_OPEN, 1, str(log_file), flags, 0o600),
            (os.POSIX_SPAWN_DUP2, 1, 2),
        ],
        setsid=True,
    )
    return ProcessRecord(name=name, pid=pid, start_time=psutil.Process(pid).create_time(), log_file=str(log_file))


def is_alive(record: ProcessRecord) -> bool:
    """Whether this very process still runs."""
    return _find(record) is not None


def stop_process(record: ProcessRecord, *, grace_seconds: float) -> bool:
    """End a process and whatever it started: SIGTERM to the process, then SIGKILL to all that is left of its session.

    Returns:
        Whether it ended by itself within `grace_seconds`, or was dead already.
    """
    has_ended = True
    if process := _find(record):
        process.terminate()
        _, alive = psutil.wait_procs([process], timeout=grace_seconds)
        has_ended = not alive
    left = _session_members(record)
    for process in left:
        try:
            process.kill()
        except psutil.NoSuchProcess:
            continue
    psutil.wait_procs(left, timeout=5.0)
    return has_ended


def last_lines(log_file: str | Path, num_lines: int = 15) -> str:
    """The end of a log, for people."""
    path = Path(log_file)
    if not path.exists():
        return ""
    with path.open("rb") as file:
        file.seek(max(0, path.stat().st_size - 16 * 1024))
        return "\n".join(file.read().decode(errors="replace").splitlines()[-num_lines:])


def _find(record: ProcessRecord) -> psutil.Process | None:
    try:
        process = psutil.Process(record.pid)
        is_it = abs(process.create_time() - record.start_time) <= _START_TIME_TOLERANCE_SECONDS
        return process if is_it and process.status() != psutil.STATUS_ZOMBIE else None
    except psutil.NoSuchProcess:
        return None


def _session_members(record: ProcessRecord) -> list[psutil.Process]:
    """Living processes of the record's session. The kernel gives its id to no new process while it has members."""
    members = []
    for process in psutil.process_iter():
        try:
            has_session = os.getsid(process.pid) == record.pid
            if (
                process.pid == record.pid
                and abs(process.create_time() - record.start_time) > _START_TIME_TOLERANCE_SECONDS
            ):
                # Somebody else's session by now.
                return []
            is_later = process.create_time() >= record.start_time - _START_TIME_TOLERANCE_SECONDS
            if has_session and is_later and process.status() != psutil.STATUS_ZOMBIE:
                members.append(process)
        except (psutil.NoSuchProcess, ProcessLookupError, PermissionError):
            continue
    return members


def free_ports(num_ports: int) -> list[int]:
    """Ports that nobody listens on now, all held at once so that they differ."""
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(num_ports)]
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [each.getsockname()[1] for each in sockets]


def is_port_free(port: int) -> bool:
    """Whether a server can listen on a port of loopback; 0 always."""
    with socket.socket() as probe:
        # As servers do: connections of a former server that are still closing are no hindrance.
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            return False
        return True
