"""Named places in the code where a test makes this process die, stop or fail.

`failpoint("worker.chunks-staged")` does nothing unless it is armed: by EUNOE_FAILPOINTS, read once at import
("worker.chunks-staged=kill@3, store.x=stop": at the third pass, at the first), or by `arm` in the same process.
"""

import os
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass

VARIABLE = "EUNOE_FAILPOINTS"


@dataclass(slots=True)
class _Armed:
    action: Callable[[], None]
    num_passes_left: int


_armed: dict[str, _Armed] = {}


def failpoint(name: str) -> None:
    """A place where a process may be made to fail."""
    if not _armed:
        return
    if (armed := _armed.get(name)) is None:
        return
    armed.num_passes_left -= 1
    if armed.num_passes_left == 0:
        armed.action()


def arm(name: str, action: Callable[[], None], at_pass: int = 1) -> None:
    """Have `action` called when the place is passed for the `at_pass`-th time from now, and not again."""
    _armed[name] = _Armed(action, at_pass)


def disarm() -> None:
    """Make every place harmless again."""
    _armed.clear()


def arm_from(text: str) -> None:
    """Arm by "name=action@pass, ...", where the pass is 1 if it is left out.

    Actions: `kill` and `stop` send the process SIGKILL and SIGSTOP; `hang` keeps the thread for ever, and `end` ends it
    by an error that nobody catches.

    Raises:
        ValueError: If the text is something else.
    """
    for part in filter(None, (part.strip() for part in text.split(","))):
        name, _, what = part.partition("=")
        action, _, at_pass = what.partition("@")
        if action not in _ACTIONS or not (at_pass or "1").isdigit():
            raise ValueError(f"{VARIABLE}: {part!r} is no name=action@pass with an action of {sorted(_ACTIONS)}")
        arm(name, _ACTIONS[action], int(at_pass or "1"))


def _signal_itself(signal_number: int) -> Callable[[], None]:
    return lambda: os.kill(os.getpid(), signal_number)


def _hang() -> None:
    while True:
        time.sleep(3600.0)


def _end_thread() -> None:
    raise SystemExit("ended at a failpoint")


_ACTIONS: dict[str, Callable[[], None]] = {
    "kill": _signal_itself(signal.SIGKILL),
    "stop": _signal_itself(signal.SIGSTOP),
    "hang": _hang,
    "end": _end_thread,
}

arm_from(os.environ.get(VARIABLE, ""))
