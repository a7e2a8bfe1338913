"""Training a decoder on Ray: what interrupts it changes no byte, and what shares it changes nothing but rounding."""

import json
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch

from eunoe.decoder.decoder import Decoder
from eunoe.training.decoder.export import load
from eunoe.training.decoder.recipe import QUICK, train_nano
from eunoe.training.run_directory import BadRunDirectory

pytestmark = [
    pytest.mark.usefixtures("local_ray"),
    # Ray Train makes a context of Ray Data, which sets options that it deprecates.
    pytest.mark.filterwarnings("ignore::DeprecationWarning:ray"),
    # Workers import torch, which takes its time on a busy machine.
    pytest.mark.timeout(300),
]

STEPS = [(run, step) for run in ("shallow", "deep", "reading") for step in (2, 4, 6, 8)]


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, torch.Tensor], list[dict[str, Any]]]:
    """Weights and reports of the quick recipe, trained in this process without a break."""
    reports: list[dict[str, Any]] = []
    return train_nano(QUICK, tmp_path_factory.mktemp("alone"), reports.append).state_dict(), reports


def train_on_ray(directory: Path, num_workers: int = 1, on_report: Any = lambda _: None) -> Path:
    """The quick recipe, on the Ray that the tests share."""
    # It imports Ray, which has its environment only now.
    from eunoe.training.decoder.ray_training import DecoderTraining, train_decoder

    training = DecoderTraining(directory=directory, name="quick", recipe=QUICK, num_workers=num_workers)
    return train_decoder(training, on_report)


def interrupt(directory: Path, run: str) -> None:
    """Begin with the command, and press Ctrl-C when a run reports for the first time."""
    command = [sys.executable, "-m", "eunoe.cli.main", "train", "decoder", "--quick", "--name", "quick", "--json"]
    with subprocess.Popen(
        [*command, "--out", str(directory)], stdout=subprocess.PIPE, text=True, start_new_session=True
    ) as process:
        assert process.stdout is not None
        try:
            for line in process.stdout:
                if json.loads(line)["run"] == run:
                    process.send_signal(signal.SIGINT)
                    break
            assert process.wait() == 130
        finally:
            process.kill()
    assert not (directory / "quick").exists()


def test_a_run_that_was_interrupted_and_then_lost_its_worker_ends_with_the_bytes_of_an_undisturbed_one(
    tmp_path: Path, alone: tuple[dict[str, torch.Tensor], list[dict[str, Any]]]
) -> None:
    killed: list[int] = []
    told: list[str] = []

    def kill_once(report: dict[str, Any]) -> None:
        told.append(report["run"])
        if report["run"] == "reading" and not killed:
            for process in psutil.Process().children(recursive=True):
                if "TrainWorker" in " ".join(process.cmdline()):
                    killed.append(process.pid)
                    process.kill()

    interrupt(tmp_path, "deep")
    path = train_on_ray(tmp_path, on_report=kill_once)

    weights, reports = alone
    for name, tensor in load(path).state_dict().items():
        assert torch.equal(tensor, weights[name]), name
    assert killed
    assert "shallow" not in told
    # What was done twice is told once.
    curve = [json.loads(line) for line in (tmp_path / "curve.jsonl").read_text().splitlines()]
    assert [(report["run"], report["step"]) for report in curve] == STEPS
    assert [report["loss"] for report in curve] == [report["loss"] for report in reports]
    assert (tmp_path / "curve.png").read_bytes().startswith(b"\x89PNG")
    assert Decoder.load(path).config.compressive_memory is not None


def test_two_workers_take_the_steps_of_one(
    tmp_path: Path, alone: tuple[dict[str, torch.Tensor], list[dict[str, Any]]]
) -> None:
    reports: list[dict[str, Any]] = []
    train_on_ray(tmp_path, num_workers=2, on_report=reports.append)
    assert [(report["run"], report["step"]) for report in reports] == STEPS
    for ours, theirs in zip(reports, alone[1], strict=True):
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-4)
        assert ours["far_accuracy"] == pytest.approx(theirs["far_accuracy"], rel=1e-4)
        assert ours["gradient_norm"] == pytest.approx(theirs["gradient_norm"], rel=1e-3)


def test_a_directory_of_another_run_is_refused(tmp_path: Path) -> None:
    (tmp_path / "run.json").write_text(json.dumps({"version": 1, "workers": 2}))
    with pytest.raises(BadRunDirectory, match="workers was 2, not 1"):
        train_on_ray(tmp_path)
