"""Training the decoder as a job of Ray Train, which starts lost workers again from the last checkpoint.

A run's directory holds:

run.json        the recipe; a run is only resumed with the same one
ray_train/      Ray Train's own, with the last checkpoint; on more than one node it must be on storage that all share
curve.jsonl     a line a report
curve.png       the same drawn, anew after each
<name>/         model.safetensors and config.json, when the training is over
"""

import json
import signal
import tempfile
import threading
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import ray
import ray.train
import torch
from ray.train.torch import TorchTrainer

from eunoe.training.decoder.data_parallel import rank_and_count
from eunoe.training.decoder.differentiable import NanoDecoder
from eunoe.training.decoder.export import export
from eunoe.training.decoder.margin import shut_gates
from eunoe.training.decoder.recipe import Recipe, train_nano
from eunoe.training.decoder.training import OnStep
from eunoe.training.decoder.training_curve import draw_training_curve
from eunoe.training.run_directory import RunDirectory, write_whole

_MAX_FAILURES = 3
_LOOK_INTERVAL_SECONDS = 0.5


@dataclass(frozen=True, kw_only=True, slots=True)
class DecoderTraining:
    """What to train, where, with how many.

    Attributes:
        directory: Of the run; one that holds a run of the same settings goes on with it.
        name: Of the model.
        num_workers: They share each step's samples; the weights depend on their number only by rounding.
        num_threads: Of a worker.
    """

    directory: Path
    name: str
    recipe: Recipe
    num_workers: int = 1
    num_threads: int = 1


def train_decoder(training: DecoderTraining, on_report: OnStep) -> Path:
    """Train on the Ray that is connected, and return the directory that the decoder loads.

    Args:
        on_report: Called with each report, by another thread; what it raises is raised here, once the model is written.

    Raises:
        BadRunDirectory: If the directory holds another run, or is in use.
        ray.train.TrainingFailedError: If the training failed again and again.
    """
    settings = {"recipe": asdict(training.recipe), "workers": training.num_workers, "threads": training.num_threads}
    with RunDirectory(training.directory, settings) as run:
        reports = ray.remote(num_cpus=0)(_Reports).remote()
        trainer = TorchTrainer(
            _train_on_worker,
            train_loop_config={"recipe": training.recipe, "num_threads": training.num_threads, "reports": reports},
            scaling_config=ray.train.ScalingConfig(
                num_workers=training.num_workers, resources_per_worker={"CPU": training.num_threads}
            ),
            # A run of the same name and place goes on from its last checkpoint.
            run_config=ray.train.RunConfig(
                name="ray_train",
                storage_path=str(run.path.resolve()),
                checkpoint_config=ray.train.CheckpointConfig(num_to_keep=1),
                failure_config=ray.train.FailureConfig(max_failures=_MAX_FAILURES),
            ),
        )
        curve = _Curve(run.path)
        with _listening(reports, curve, on_report) as told, _interruptible():
            result = trainer.fit()
        assert result.checkpoint is not None, "every run ends with a checkpoint"
        with result.checkpoint.as_directory() as checkpoint:
            model = _last_model(training.recipe, Path(checkpoint))
        if not training.recipe.recalling.uses_memory:
            shut_gates(model)
        last_stage = training.recipe.recalling.stages[-1]
        export(model, run.path / training.name, last_stage.segment_length, training.recipe.longest())
        for each in told:
            each.result()
        return run.path / training.name


def _train_on_worker(config: dict[str, Any]) -> None:
    """What each of Ray Train's workers does."""
    torch.set_num_threads(config["num_threads"])
    is_first = rank_and_count()[0] == 0
    with tempfile.TemporaryDirectory(prefix="eunoe-train-") as name:
        directory = Path(name)
        checkpoint = ray.train.get_checkpoint()
        if checkpoint is not None:
            checkpoint.to_directory(directory)

        def on_step(report: dict[str, Any]) -> None:
            config["reports"].add.remote(report)

        def on_checkpoint() -> None:
            # All report, so that none is ahead; the others have written nothing.
            ray.train.report({}, ray.train.Checkpoint.from_directory(directory) if is_first else None)

        train_nano(config["recipe"], directory, on_step, on_checkpoint)


def _last_model(recipe: Recipe, directory: Path) -> NanoDecoder:
    name, config = list(recipe.runs().items())[-1]
    model = NanoDecoder(config.model)
    model.load_state_dict(torch.load(directory / name / "checkpoint.pt", weights_only=True)["model"])
    return model


class _Reports:
    """An actor between the worker that reports and the process that shows it."""

    def __init__(self) -> None:
        self._waiting: list[dict[str, Any]] = []

    def add(self, report: dict[str, Any]) -> None:
        self._waiting.append(report)

    def take(self) -> list[dict[str, Any]]:
        taken, self._waiting = self._waiting, []
        return taken


@contextmanager
def _listening(reports: Any, curve: "_Curve", on_report: OnStep) -> Iterator[list[Future[None]]]:
    """Keep and tell what is reported, for as long as the block runs, which itself waits for Ray.

    Yields what came of keeping and telling: done when the block has ended.
    """
    is_over = threading.Event()
    told: list[Future[None]] = []

    def listen() -> None:
        is_last = False
        while not is_last:
            is_last = is_over.wait(_LOOK_INTERVAL_SECONDS)
            if taken := ray.get(reports.take.remote()):
                curve.add(taken)
                told.extend(teller.submit(on_report, report) for report in taken)

    # Two threads: an error of whoever is told must not end the curve.
    with ThreadPoolExecutor(1, "teller") as teller, ThreadPoolExecutor(1, "listener") as listener:
        told.append(listener.submit(listen))
        try:
            yield told
        finally:
            is_over.set()


@contextmanager
def _interruptible() -> Iterator[None]:
    """Have Ctrl-C end the block as it ends others: Ray Train stops its workers at it, and then exits the process."""
    handler = signal.getsignal(signal.SIGINT)
    try:
        yield
    except SystemExit:
        raise KeyboardInterrupt from None
    finally:
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGINT, handler)


class _Curve:
    """The reports of a run, also of its earlier parts; steps that a resumed run does again replace those before."""

    def __init__(self, directory: Path) -> None:
        self._path = directory / "curve.jsonl"
        self._reports: dict[tuple[str, int], dict[str, Any]] = {}
        if self._path.exists():
            for line in self._path.read_text().splitlines():
                self._keep(json.loads(line))

    def _keep(self, report: dict[str, Any]) -> None:
        self._reports[report["run"], report["step"]] = report

    def add(self, new: list[dict[str, Any]]) -> None:
        """Write them down and draw all."""
        for report in new:
            self._keep(report)
        reports = list(self._reports.values())
        write_whole(self._path, "".join(json.dumps(each) + "\n" for each in reports).encode())
        draw_training_curve(reports, self._path.with_suffix(".png"))
