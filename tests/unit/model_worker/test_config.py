"""What a worker refuses to start with."""

from pathlib import Path
from typing import Any

import pytest

from eunoe.model_worker.config import WorkerConfig

NEEDED: dict[str, Any] = {"model_name": "m", "model_path": Path("m"), "state_store_address": "127.0.0.1:1"}
BESIDE: dict[str, Any] = {"scoring": "sidecar", "sidecar_address": "unix:/s.sock", "payload_dir": Path("p")}


@pytest.mark.parametrize(
    ("missing", "problem"),
    [("sidecar_address", "sidecar_address says none"), ("payload_dir", "payload_dir names no directory")],
)
def test_scoring_by_the_sidecar_needs_its_address_and_a_directory_for_features(missing: str, problem: str) -> None:
    with pytest.raises(ValueError, match=problem):
        WorkerConfig(**NEEDED, **BESIDE | {missing: None})


def test_scoring_in_process_needs_no_directory_for_features() -> None:
    config = WorkerConfig(**NEEDED, **BESIDE | {"scoring": "in_process", "payload_dir": None})

    assert config.payload_dir is None
