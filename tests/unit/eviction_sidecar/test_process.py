"""How the process ends when it cannot do its work."""

import asyncio
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from eunoe.eviction.catalogue import PolicyCatalogue
from eunoe.eviction_sidecar.__main__ import serve
from eunoe.eviction_sidecar.config import EvictionSidecarConfig
from eunoe.runtime.config import to_env


@pytest.fixture
def directory() -> Iterator[Path]:
    # Not pytest's tmp_path: a socket's path ends at 107 bytes.
    with tempfile.TemporaryDirectory(prefix="eunoe-sidecar-") as name:
        yield Path(name)


async def test_a_process_whose_watch_fails_drains_and_says_why(
    directory: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(catalogue: PolicyCatalogue) -> bool:
        raise RuntimeError("a bug")

    monkeypatch.setattr(PolicyCatalogue, "refresh", fail)
    config = EvictionSidecarConfig(
        listen_address=f"unix:{directory}/sidecar.sock", reload_seconds=0.2, ready_file=directory / "ready"
    )

    with pytest.raises(RuntimeError, match="a bug"), caplog.at_level("INFO"):
        await asyncio.wait_for(serve(config), timeout=20)

    assert "the policies are not watched any more, so the process ends" in caplog.messages
    assert caplog.messages[-1] == "drained"
    assert not (directory / "ready").exists()


def test_without_the_policies_directory_a_process_ends_with_a_message_and_no_traceback(directory: Path) -> None:
    config = EvictionSidecarConfig(listen_address=f"unix:{directory}/sidecar.sock", policies_dir=directory / "missing")

    ended = subprocess.run(
        [sys.executable, "-m", "eunoe.eviction_sidecar"],
        env={**os.environ, **to_env(config, "EUNOE_EVICTION_SIDECAR")},
        capture_output=True,
        text=True,
        check=False,
    )

    assert ended.returncode == 1
    assert "the eviction sidecar does not serve" in ended.stderr
    assert f"{directory}/missing" in ended.stderr
    assert "Traceback" not in ended.stderr
