"""Ending exactly what was started."""

import dataclasses
import sys
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from eunoe.embedded.processes import ProcessRecord, is_alive, last_lines, start_process, stop_process

# Starts a child, tells its id, and waits.
PARENT = """
import subprocess, sys, time
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
print(child.pid, flush=True)
time.sleep(600)
"""
STUBBORN = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print(0, flush=True); time.sleep(600)"


@pytest.fixture
def start(tmp_path: Path) -> Callable[[str], tuple[ProcessRecord, int]]:
    """Starts a Python program; returns its record and the number that it prints."""

    def run(program: str) -> tuple[ProcessRecord, int]:
        log_file = tmp_path / "log"
        record = start_process("test", [sys.executable, "-c", program], environment={}, log_file=log_file)
        while not last_lines(log_file).strip():
            assert is_alive(record)
        return record, int(last_lines(log_file))

    return run


def test_a_process_ends_with_all_that_it_started(start: Callable[[str], tuple[ProcessRecord, int]]) -> None:
    record, child_pid = start(PARENT)
    child = psutil.Process(child_pid)
    assert is_alive(record)
    assert stop_process(record, grace_seconds=10)
    assert not is_alive(record)
    assert not child.is_running() or child.status() == psutil.STATUS_ZOMBIE


def test_what_a_killed_process_left_is_found(start: Callable[[str], tuple[ProcessRecord, int]]) -> None:
    record, child_pid = start(PARENT)
    child = psutil.Process(child_pid)
    psutil.Process(record.pid).kill()
    psutil.Process(record.pid).wait()
    assert child.is_running()
    assert stop_process(record, grace_seconds=10)
    assert not child.is_running() or child.status() == psutil.STATUS_ZOMBIE


def test_a_process_that_ignores_the_signal_is_killed(start: Callable[[str], tuple[ProcessRecord, int]]) -> None:
    record, _ = start(STUBBORN)
    assert not stop_process(record, grace_seconds=0.1)
    assert not is_alive(record)


def test_a_process_that_got_the_id_of_another_is_left_alone(
    start: Callable[[str], tuple[ProcessRecord, int]],
) -> None:
    record, _ = start(STUBBORN)
    former = dataclasses.replace(record, start_time=record.start_time - 1000)
    assert not is_alive(former)
    assert stop_process(former, grace_seconds=0.1)
    assert is_alive(record)
    stop_process(record, grace_seconds=0.1)
