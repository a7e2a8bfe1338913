"""A process that ends is started again, if it has ever served."""

import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

# Says that it serves, writes its id, and waits for a signal.
SERVING = "import os, pathlib, signal; {}; pathlib.Path({!r}).touch(); print(os.getpid(), flush=True); signal.pause()"

Start = Callable[..., "subprocess.Popen[str]"]


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    """Starts a keeper of a Python program, formatted with the ready file."""
    started = []

    def run(program: str) -> "subprocess.Popen[str]":
        command = [sys.executable, "-m", "eunoe.embedded.keeper", str(tmp_path / "ready"), sys.executable, "-c"]
        keeper = subprocess.Popen([*command, program], stdout=subprocess.PIPE, text=True, start_new_session=True)
        started.append(keeper)
        return keeper

    yield run
    for keeper in started:
        if keeper.poll() is None:
            os.killpg(keeper.pid, signal.SIGKILL)
        keeper.wait(10)
        assert keeper.stdout is not None
        keeper.stdout.close()


def next_pid(keeper: "subprocess.Popen[str]") -> int:
    assert keeper.stdout is not None
    return int(keeper.stdout.readline())


def test_a_process_that_was_killed_is_started_again_and_again(start: Start, tmp_path: Path) -> None:
    keeper = start(SERVING.format("pass", str(tmp_path / "ready")))
    pids = [next_pid(keeper)]

    for _ in range(2):
        os.kill(pids[-1], signal.SIGKILL)
        pids.append(next_pid(keeper))

    assert len(set(pids)) == 3
    assert keeper.poll() is None


def test_a_process_that_never_served_ends_its_keeper_with_its_status(start: Start) -> None:
    keeper = start("raise SystemExit(3)")

    assert keeper.wait(20) == 3


def test_one_that_served_is_started_again_even_if_it_fails_then(start: Start, tmp_path: Path) -> None:
    (tmp_path / "failures").write_text("..")
    # The second and the third life end before they serve.
    failing = f"""
import os, pathlib
failures = pathlib.Path({str(tmp_path / "failures")!r})
has_served = pathlib.Path({str(tmp_path / "served")!r})
left = failures.read_text()
if has_served.exists() and left:
    failures.write_text(left[1:])
    raise SystemExit(1)
has_served.touch()
"""
    program = failing + SERVING.format("pass", str(tmp_path / "ready"))
    keeper = start(program)

    os.kill(next_pid(keeper), signal.SIGKILL)

    assert psutil.pid_exists(next_pid(keeper))
    assert (tmp_path / "failures").read_text() == ""


def test_a_keeper_that_is_told_to_stop_ends_with_its_process(start: Start, tmp_path: Path) -> None:
    keeper = start(SERVING.format("pass", str(tmp_path / "ready")))
    pid = next_pid(keeper)

    keeper.send_signal(signal.SIGTERM)

    assert keeper.wait(20) == 0
    assert not psutil.pid_exists(pid)
