"""Training a decoder on Ray: what interrupts it changes no byte, and what shares it changes nothing but rounding."""

import json
import os
import signal
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch

from eunoe.decoder.decoder import Decoder
from eunoe.training.decoder.export import load
from eunoe.training.decoder.recipe import NANO, Recipe, train_nano
from eunoe.training.decoder.training import TrainingConfig
from eunoe.training.run_directory import BadRunDirectory

pytestmark = [
    pytest.mark.ray_train,
    pytest.mark.usefixtures("local_ray"),
    # Ray Train makes a context of Ray Data, which sets options that it deprecates.
    pytest.mark.filterwarnings("ignore::DeprecationWarning:ray"),
    # Workers import torch, which takes its time on a busy machine.
    pytest.mark.timeout(600),
]


def longer(config: TrainingConfig) -> TrainingConfig:
    """With time to interrupt it."""
    return replace(config, stages=tuple(replace(stage, max_steps=10) for stage in config.stages))


QUICK = NANO.in_a_few_steps()
RECIPE = replace(QUICK, deep=longer(QUICK.deep), recalling=longer(QUICK.recalling))
LAST_STEPS = {"shallow": 8, "deep": 20, "reading": 8, "recalling": 20}
STEPS = [(run, step) for run, last in LAST_STEPS.items() for step in range(2, last + 1, 2)]


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, torch.Tensor], list[dict[str, Any]]]:
    """Weights and reports of the quick recipe, trained in this process without a break."""
    reports: list[dict[str, Any]] = []
    return train_nano(RECIPE, tmp_path_factory.mktemp("alone"), reports.append).state_dict(), reports


def train_on_ray(
    directory: Path, num_workers: int = 1, on_report: Any = lambda _: None, recipe: Recipe = RECIPE
) -> Path:
    """The quick recipe, on the Ray that the tests share."""
    # It imports Ray, which has its environment only now.
    from eunoe.training.decoder.ray_training import DecoderTraining, train_decoder

    training = DecoderTraining(directory=directory, name="quick", recipe=recipe, num_workers=num_workers)
    return train_decoder(training, on_report)


def once_in(run: str, act: Callable[[], None]) -> Callable[[dict[str, Any]], None]:
    """Act when a run reports for the first time."""
    acted = threading.Event()

    def on_report(report: dict[str, Any]) -> None:
        if report["run"] == run and not acted.is_set():
            acted.set()
            act()

    return on_report


def workers() -> list[psutil.Process]:
    """Ray Train's."""
    children = psutil.Process().children(recursive=True)
    return [process for process in children if "TrainWorker" in " ".join(process.cmdline())]


def test_a_run_that_was_interrupted_and_then_lost_its_worker_ends_with_the_bytes_of_an_undisturbed_one(
    tmp_path: Path, alone: tuple[dict[str, torch.Tensor], list[dict[str, Any]]]
) -> None:
    handler = signal.getsignal(signal.SIGINT)
    # Ctrl-C.
    with pytest.raises(KeyboardInterrupt):
        train_on_ray(tmp_path, on_report=once_in("deep", lambda: os.kill(os.getpid(), signal.SIGINT)))
    assert not (tmp_path / "quick").exists()
    assert signal.getsignal(signal.SIGINT) is handler
    told: list[tuple[str, int]] = []
    killed: list[psutil.Process] = []

    def kill_workers() -> None:
        killed.extend(workers())
        for process in killed:
            process.kill()

    kill = once_in("recalling", kill_workers)

    def on_report(report: dict[str, Any]) -> None:
        told.append((report["run"], report["step"]))
        kill(report)

    path = train_on_ray(tmp_path, on_report=on_report)

    weights, reports = alone
    for name, tensor in load(path).state_dict().items():
        assert torch.equal(tensor, weights[name]), name
    assert ("shallow", 2) not in told
    assert ("recalling", 20) in told
    assert len(killed) == 1
    # What was done twice is in the curve once.
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


def test_what_the_listener_raises_is_raised_and_costs_neither_report_nor_model(tmp_path: Path) -> None:
    twin = replace(QUICK, recalling=replace(QUICK.recalling, uses_memory=False))

    def on_report(report: dict[str, Any]) -> None:
        raise BrokenPipeError

    with pytest.raises(BrokenPipeError):
        train_on_ray(tmp_path, on_report=on_report, recipe=twin)
    curve = [json.loads(line) for line in (tmp_path / "curve.jsonl").read_text().splitlines()]
    assert [(each["run"], each["step"]) for each in curve] == [
        (run, step) for run in twin.runs() for step in (2, 4, 6, 8)
    ]

    model = load(tmp_path / "quick")
    # It never learned what to do with what its memory would say.
    assert not any(gate for layer in model.memory_gates() for gate in layer)


def test_a_directory_of_another_run_is_refused(tmp_path: Path) -> None:
    (tmp_path / "run.json").write_text(json.dumps({"version": 1, "workers": 2}))
    with pytest.raises(BadRunDirectory, match="workers was 2, not 1"):
        train_on_ray(tmp_path)
