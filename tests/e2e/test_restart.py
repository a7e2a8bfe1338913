"""A crash of a part and of the whole platform, and its end. These tests run last: they break what the others share."""

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil

from eunoe.client import Client
from eunoe.embedded.platform import Platform

Run = Callable[..., Any]


def test_a_sidecar_that_was_killed_is_started_again(eunoe: Run, platform: Platform) -> None:
    (keeper,) = (process for process in platform.record.processes if process.name == "eviction_sidecar")
    (killed,) = psutil.Process(keeper.pid).children()
    ready_file = Path(platform.record.temp_dir) / "eviction_sidecar.json"

    killed.kill()
    give_up_at = time.monotonic() + 60
    while not ready_file.exists() or json.loads(ready_file.read_text())["pid"] == killed.pid:
        assert time.monotonic() < give_up_at, "no other sidecar serves"
        time.sleep(0.05)

    assert [child.pid for child in psutil.Process(keeper.pid).children()] != [killed.pid]
    assert eunoe("status").code == 0


def test_after_a_crash_up_goes_on_with_the_same_data(
    eunoe: Run, platform: Platform, client: Client, model_directory: Path
) -> None:
    client.create_stream("lasting")
    before = client.append("lasting", "All that was acknowledged is still there. " * 100)
    for process in platform.record.processes:
        psutil.Process(process.pid).kill()
    assert eunoe("status").code == 4
    assert eunoe("stream", "lasting").code == 4
    done = eunoe("up", "--model", str(model_directory), "--port", "0", "--json")
    assert done.code == 0, done.error
    assert not done.json["was_running"]
    assert eunoe("stream", "lasting", "--json").json["state_digest"] == before.state_digest
    assert eunoe("ask", "lasting", "What is there?", "--max-tokens", "2").code == 0


def test_down_ends_every_process_and_works_twice(eunoe: Run, platform: Platform) -> None:
    status = eunoe("status", "--json").json
    processes = [psutil.Process(process["pid"]) for process in status["processes"]]
    assert eunoe("down", "--json").json == {"was_running": True}
    assert not any(process.is_running() and process.status() != psutil.STATUS_ZOMBIE for process in processes)
    assert eunoe("status").code == 4
    assert eunoe("down", "--json").json == {"was_running": False}
