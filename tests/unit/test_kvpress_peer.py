"""`benchmarks/_kvpress_peer.py`, where there is an environment: `make kvpress-env`, or EUNOE_TEST_KVPRESS_PYTHON."""

import json
import os
import subprocess
from pathlib import Path

import numpy as np
import pytest

from eunoe.decoder.tiny import write_tiny_model

ROOT = Path(__file__).parents[2]
PYTHON = Path(os.environ.get("EUNOE_TEST_KVPRESS_PYTHON", ROOT / "out/kvpress/bin/python"))
# One of each kind: no press, scores, random ones (of two seeds), heads of unequal shares, a press around another,
# attention weights.
PRESSES = (
    "full-cache",
    "SnapKVPress",
    "CompactorPress",
    "RandomPress",
    "RandomPress@1",
    "AdaKVPress(ExpectedAttentionPress)",
    "CriticalKVPress(KnormPress)",
    "EntropyGatedChunkKVPress(CompactorPress)",
    "ObservedAttentionPress",
)


@pytest.mark.skipif(not PYTHON.exists(), reason="no environment with kvpress")
def test_presses_of_one_prefill_leave_and_answer_what_each_does_alone(tmp_path: Path) -> None:
    write_tiny_model(tmp_path)
    # Few are asked: for many queries of random weights AdaKV finds no key that none of them attends to.
    drawn = np.random.default_rng(0).integers(0, 250, 206).tolist()
    job = {"case": "a", "context": drawn[:200], "question": drawn[200:203], "answer": drawn[203:], "is_checked": True}
    job["presses"] = [[press, 1.0 if press == "full-cache" else 0.25] for press in PRESSES]
    given = {"model": str(tmp_path), "dtype": "float32", "threads": 1, "jobs": [job]}

    peer = subprocess.run(
        [PYTHON, ROOT / "benchmarks/_kvpress_peer.py"], input=json.dumps(given), capture_output=True, text=True
    )

    assert peer.returncode == 0, peer.stderr
    lines = [json.loads(line) for line in peer.stdout.splitlines()]
    assert [line["press"] for line in lines] == list(PRESSES)
    assert [line["num_slots"] for line in lines] == [200, 50, 50, 50, 50, 50, 50, 50, 50]
    assert lines[3]["log_likelihood"] != lines[4]["log_likelihood"]
