"""Starts a process again whenever it ends: `python -m eunoe.embedded.keeper READY_FILE COMMAND...`.

For a process that others can do without for a while. One that ends before it has ever served has a reason that another
start would not remove: the keeper then ends too, with its status. On SIGTERM both end.
"""

import logging
import os
import signal
import sys
from pathlib import Path

from eunoe.runtime.logging import configure_logging

logger = logging.getLogger(__name__)

_STOP_SIGNALS = {signal.SIGTERM, signal.SIGINT}
_POLL_SECONDS = 0.1
_FIRST_PAUSE_SECONDS = 0.2
_LONGEST_PAUSE_SECONDS = 5.0


class _Stopped(Exception):
    """A signal to stop has come."""


def keep(ready_file: Path, command: list[str]) -> int:
    """Run the command until a signal to stop comes, or it ends without having served; the exit status.

    Args:
        ready_file: There is one while the command's process serves.
        command: With the path of its program.
    """
    # Taken one by one where they are waited for: none is lost between two looks.
    signal.pthread_sigmask(signal.SIG_BLOCK, _STOP_SIGNALS)
    has_ever_served, pause_seconds = False, _FIRST_PAUSE_SECONDS
    while True:
        # Of one that was killed.
        ready_file.unlink(missing_ok=True)
        pid = os.posix_spawn(command[0], command, os.environ, setsigmask=[])
        try:
            has_served, status = _watch(pid, ready_file)
            has_ever_served = has_ever_served or has_served
            if not has_ever_served:
                return status
            logger.error("a process ended and is started again", extra={"command": command[-1], "status": status})
            pause_seconds = _FIRST_PAUSE_SECONDS if has_served else min(2 * pause_seconds, _LONGEST_PAUSE_SECONDS)
            _wait(pause_seconds)
        except _Stopped:
            return _ended(pid)


def _watch(pid: int, ready_file: Path) -> tuple[bool, int]:
    """Wait for the process's end; whether it had served, and its exit status."""
    has_served = False
    while True:
        has_served = has_served or ready_file.exists()
        found, status = os.waitpid(pid, os.WNOHANG)
        if found:
            return has_served, os.waitstatus_to_exitcode(status)
        _wait(_POLL_SECONDS)


def _wait(seconds: float) -> None:
    if signal.sigtimedwait(_STOP_SIGNALS, seconds) is not None:
        raise _Stopped


def _ended(pid: int) -> int:
    """Have the process end, if it runs; 0."""
    try:
        os.kill(pid, signal.SIGTERM)
        os.waitpid(pid, 0)
    except (ProcessLookupError, ChildProcessError):
        pass
    return 0


if __name__ == "__main__":
    configure_logging()
    sys.exit(keep(Path(sys.argv[1]), sys.argv[2:]))
