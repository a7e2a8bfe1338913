"""Whole runs with the tiny model: in this process, and on a real Ray."""

import dataclasses
import json
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch

from eunoe.decoder.decoder import Decoder
from eunoe.decoder.tiny import write_tiny_model
from eunoe.decoder.tokenizer import load_tokenizer
from eunoe.eviction import Namm
from eunoe.eviction.backward_attention import NUM_PARAMETERS, SLICES
from eunoe.training.evolution import EvolutionSettings, Generation
from eunoe.training.namm_training import NammTraining, open_workers, train_namm
from eunoe.training.policy_objective import ObjectiveSettings, PolicyObjective
from eunoe.training.run_directory import BadRunDirectory
from eunoe.training.tasks.training_mix import training_mix
from eunoe.training.worker_pool import Call

TEXT = " ".join(f"{name} begat {other}." for name in ["Abel", "Cain", "Enos", "Noah", "Shem"] for other in range(60))


class Interrupting:
    """A watcher that stops a run as Ctrl-C does, in the middle of a generation."""

    def __init__(self, at: str = "", after_calls: int = 3) -> None:
        self._at, self._num_left, self._is_there = at, after_calls, False
        self.generations: list[Generation] = []
        self.began_with: list[str] = []

    def began(self, what: str, num_calls: int) -> None:
        assert num_calls > 0 or what != "normalization"
        self.began_with.append(what)
        self._is_there = what == self._at

    def advanced(self) -> None:
        if self._is_there:
            self._num_left -= 1
            if not self._num_left:
                raise KeyboardInterrupt

    def ended(self, generation: Generation) -> None:
        self.generations.append(generation)


class LocalPool:
    """The same calls without Ray, in a random order."""

    def __init__(self, training: NammTraining) -> None:
        decoder = Decoder.load(training.model_path)
        self._objective = PolicyObjective(decoder, training.cases, training.start.statistics, training.objective)

    def share(self, value: Any) -> Any:
        return value

    def map(self, method: str, calls: Sequence[Call], on_done: Callable[[], None]) -> list[Any]:
        results = {}
        for index in random.sample(range(len(calls)), len(calls)):
            results[index] = getattr(self._objective, method)(*calls[index].arguments)
            on_done()
        return [results[index] for index in range(len(calls))]


def train_here(training: NammTraining, num_generations: int, watcher: Interrupting | None = None) -> Namm:
    return train_namm(training, num_generations, watcher or Interrupting(), LocalPool(training))


@pytest.fixture(scope="module")
def model_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tiny")
    write_tiny_model(path)
    return path


def a_training(directory: Path, model_path: Path, **settings: Any) -> NammTraining:
    cases = training_mix(400, 6, seed=0, tokenizer=load_tokenizer(model_path))
    defaults: dict[str, Any] = {
        "directory": directory,
        "model_path": model_path,
        "cases": cases,
        "data": {"cases": 6},
        "start": Namm.untrained(),
        "num_normalization_cases": 2,
        "objective": ObjectiveSettings(segment_length=128),
        "evolution": EvolutionSettings(
            population=4, num_prompts=4, num_validation_prompts=2, validation_interval=1, race=None
        ),
        "num_workers": 1,
    }
    return NammTraining(**defaults | settings)


def log_of(directory: Path) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (directory / "log.jsonl").read_text().splitlines()]
    return [line | {"seconds": 0} for line in lines]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, model_path: Path) -> Path:
    """The directory of a run of two generations that nothing disturbed."""
    directory = tmp_path_factory.mktemp("whole")
    train_here(a_training(directory, model_path), 2)
    return directory


@pytest.mark.parametrize("at", ["normalization", "generation 0", "generation 2"])
def test_a_run_that_was_interrupted_anywhere_comes_to_the_same(
    tmp_path: Path, model_path: Path, whole: Path, at: str
) -> None:
    with pytest.raises(KeyboardInterrupt):
        train_here(a_training(tmp_path, model_path), 2, Interrupting(at, after_calls=2))
    watcher = Interrupting()

    train_here(a_training(tmp_path, model_path), 2, watcher)

    assert watcher.began_with[0] == at
    assert len(log_of(whole)) == 3
    assert log_of(tmp_path) == log_of(whole)
    assert (tmp_path / "policy.safetensors").read_bytes() == (whole / "policy.safetensors").read_bytes()


@pytest.mark.timeout(180)
@pytest.mark.usefixtures("local_ray")
def test_two_workers_on_ray_come_to_the_same_as_this_process(tmp_path: Path, model_path: Path, whole: Path) -> None:
    training = a_training(tmp_path, model_path, num_workers=2)

    with open_workers(training) as pool:
        train_namm(training, 1, Interrupting(), pool)

    assert log_of(tmp_path) == log_of(whole)[:2]


@pytest.mark.faults
@pytest.mark.timeout(300)
@pytest.mark.parametrize("signal_number", [signal.SIGINT, signal.SIGKILL], ids=["Ctrl-C", "kill -9"])
def test_the_command_goes_on_where_it_was_stopped_and_leaves_no_process(
    tmp_path: Path, model_path: Path, signal_number: signal.Signals
) -> None:
    sizes = "--generations 4 --segment 128 --context 400 --cases 12 --prompts 4 --population 4 --workers 1"

    def start(name: str) -> subprocess.Popen[bytes]:
        files = ["--out", tmp_path / name, "--model", model_path]
        command = [sys.executable, "-m", "eunoe.cli.main", "train", "namm", *files, *sizes.split()]
        return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)

    assert start("whole").wait(120) == 0
    with start("cut") as process:
        deadline = time.monotonic() + 120
        log = tmp_path / "cut" / "log.jsonl"
        while not log.exists() or log.read_bytes().count(b"\n") < 2:
            assert time.monotonic() < deadline
            time.sleep(0.05)
        children = psutil.Process(process.pid).children(recursive=True)
        process.send_signal(signal_number)
        assert process.wait(30) == (130 if signal_number == signal.SIGINT else -signal.SIGKILL)
    # After kill -9 two of Ray's agents take a minute to notice that they are alone.
    assert psutil.wait_procs(children, timeout=120)[1] == []
    assert len(log_of(tmp_path / "cut")) < 5
    assert start("cut").wait(120) == 0

    assert log_of(tmp_path / "cut") == log_of(tmp_path / "whole")
    written = [(tmp_path / name / "policy.safetensors").read_bytes() for name in ("cut", "whole")]
    assert written[0] == written[1]


def test_a_run_leaves_a_policy_a_card_and_a_curve(tmp_path: Path, model_path: Path) -> None:
    training = a_training(tmp_path, model_path)

    policy = train_here(training, 1)

    assert Namm.load(tmp_path / "policy.safetensors").name == policy.name
    assert (tmp_path / "curve.png").read_bytes().startswith(b"\x89PNG")
    card = json.loads((tmp_path / "card.json").read_text())
    assert card["name"] == policy.name
    assert card["data"].pop("sha256")
    assert card["data"] == {"cases": 6}
    assert card["recipe"]["evolution"] == dataclasses.asdict(training.evolution)
    assert card["cost"]["evaluations"] == 16
    assert card["figures"]["validation"] >= card["figures"]["validation_at_start"]
    assert not list(tmp_path.glob("*.new"))
    # Constants of real spectrograms, not those of an untrained policy.
    assert 0 < policy.normalization.mean.min() < policy.normalization.mean.max() < 1


def test_a_given_start_is_the_first_mean_with_its_constants(tmp_path: Path, model_path: Path) -> None:
    given = Namm.untrained()
    given = replace(given, num_recent_tokens=5, network=replace(given.network, parameters=given.network.parameters + 1))
    watcher = Interrupting()

    policy = train_here(a_training(tmp_path, model_path, start=given, keeps_normalization=True), 0, watcher)

    assert policy.name == given.name
    assert watcher.began_with == ["generation 0"]


def test_a_run_does_not_go_on_with_other_cases(tmp_path: Path, model_path: Path) -> None:
    training = a_training(tmp_path, model_path)
    train_here(training, 0)
    others = training_mix(400, 6, seed=1, tokenizer=load_tokenizer(model_path))

    with pytest.raises(BadRunDirectory, match=r"data\.sha256"):
        train_here(a_training(tmp_path, model_path, cases=others), 0)


class RememberingPool(LocalPool):
    """Keeps the policies that it was to judge."""

    def __init__(self, training: NammTraining) -> None:
        super().__init__(training)
        self.policies: list[Namm] = []

    def share(self, value: Namm) -> Namm:
        self.policies.append(value)
        return value


def test_evolving_the_score_leaves_all_other_parameters_as_they_were(tmp_path: Path, model_path: Path) -> None:
    start = Namm.untrained()
    start = replace(start, network=replace(start.network, parameters=start.network.parameters + 1))
    training = a_training(tmp_path, model_path, start=start, evolved="score")
    pool = RememberingPool(training)

    train_namm(training, 1, Interrupting(), pool)

    of_the_score = torch.zeros(NUM_PARAMETERS, dtype=torch.bool)
    of_the_score[SLICES["score_weight"]] = True
    # The first one is the start; then there are four members and the mean that they moved.
    changed = [policy.network.parameters != start.network.parameters for policy in pool.policies[1:]]
    assert len(changed) == 5
    assert all(torch.equal(each, of_the_score) for each in changed)


class NoPool:
    """Workers that nobody may ask for."""

    def share(self, value: Any) -> Any:
        raise AssertionError

    def map(self, method: str, calls: Sequence[Call], on_done: Callable[[], None]) -> list[Any]:
        raise AssertionError


@pytest.mark.parametrize(
    ("objective", "reason"),
    [
        (ObjectiveSettings(segment_length=8), "a segment has 8"),
        (ObjectiveSettings(segment_length=128, share=0.001), "4 of them for sink tokens"),
    ],
    ids=["short segments", "small share"],
)
def test_cases_that_cannot_be_used_are_refused_before_a_worker_starts_or_a_run_begins(
    tmp_path: Path, model_path: Path, objective: ObjectiveSettings, reason: str
) -> None:
    training = a_training(tmp_path / "run", model_path, objective=objective)

    with pytest.raises(ValueError, match=reason):
        train_namm(training, 1, Interrupting(), NoPool())

    assert not (tmp_path / "run").exists()


def test_too_few_cases_are_refused_before_anything_is_done(tmp_path: Path, model_path: Path) -> None:
    with pytest.raises(ValueError, match="6 prompts are too few: 2 for validation and 5"):
        a_training(tmp_path, model_path, evolution=EvolutionSettings(num_prompts=5, num_validation_prompts=2))


def test_a_quarter_of_the_training_mix_reads_on_and_nothing_is_held_out(model_path: Path) -> None:
    mix = training_mix(400, 16, seed=0, tokenizer=load_tokenizer(model_path))

    assert [case.task == "continuation" for case in mix] == [False, False, False, True] * 4
    assert len({(case.task, case.kind) for case in mix}) > 4
    assert not any(case.is_held_out for case in mix)
