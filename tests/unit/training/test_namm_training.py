"""Whole runs on a real Ray with the tiny model."""

import dataclasses
import json
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest

from eunoe.decoder.memory_state import MemorySettings
from eunoe.decoder.tiny import write_tiny_model
from eunoe.decoder.tokenizer import Tokenizer
from eunoe.eviction import Namm
from eunoe.training.evolution import EvolutionSettings, Generation
from eunoe.training.namm_training import NammTraining, train_namm
from eunoe.training.policy_objective import ObjectiveSettings
from eunoe.training.text_cases import read_text, text_cases

pytestmark = pytest.mark.usefixtures("local_ray")

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


@pytest.fixture(scope="module")
def model_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tiny")
    write_tiny_model(path)
    return path


def a_training(directory: Path, model_path: Path, **settings: Any) -> NammTraining:
    cases = text_cases(Tokenizer.load(model_path), TEXT, num_cases=6, num_context_tokens=100, seed=0)
    defaults: dict[str, Any] = {
        "directory": directory,
        "model_path": model_path,
        "cases": cases,
        "data": {"text": "begat"},
        "start": Namm.untrained(),
        "num_normalization_cases": 2,
        "objective": ObjectiveSettings(memory=MemorySettings(kv_budget_tokens=48, segment_length=32)),
        "evolution": EvolutionSettings(
            population=4, num_prompts=4, num_validation_prompts=2, validation_interval=1, race=None
        ),
        "num_workers": 1,
    }
    return NammTraining(**defaults | settings)


def log_of(directory: Path) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (directory / "log.jsonl").read_text().splitlines()]
    return [line | {"seconds": 0} for line in lines]


def test_a_run_of_one_worker_that_was_interrupted_comes_to_the_same_as_one_of_two(
    tmp_path: Path, model_path: Path
) -> None:
    whole = train_namm(a_training(tmp_path / "whole", model_path, num_workers=2), 2, Interrupting())
    with pytest.raises(KeyboardInterrupt):
        train_namm(a_training(tmp_path / "cut", model_path), 2, Interrupting("generation 2"))
    watcher = Interrupting()
    cut = train_namm(a_training(tmp_path / "cut", model_path), 2, watcher)

    assert [generation.number for generation in watcher.generations] == [2]
    assert len(log_of(tmp_path / "whole")) == 3
    assert log_of(tmp_path / "cut") == log_of(tmp_path / "whole")
    assert cut.name == whole.name


@pytest.mark.faults
@pytest.mark.parametrize("at", ["normalization", "generation 0", "generation 1"])
def test_a_run_that_was_interrupted_anywhere_comes_to_the_same(tmp_path: Path, model_path: Path, at: str) -> None:
    whole = train_namm(a_training(tmp_path / "whole", model_path), 2, Interrupting())
    with pytest.raises(KeyboardInterrupt):
        train_namm(a_training(tmp_path / "cut", model_path), 2, Interrupting(at, after_calls=1))

    cut = train_namm(a_training(tmp_path / "cut", model_path), 2, Interrupting())

    assert log_of(tmp_path / "cut") == log_of(tmp_path / "whole")
    assert cut.name == whole.name


@pytest.mark.faults
@pytest.mark.timeout(300)
@pytest.mark.parametrize("signal_number", [signal.SIGINT, signal.SIGKILL], ids=["Ctrl-C", "kill -9"])
def test_the_command_goes_on_where_it_was_stopped_and_leaves_no_process(
    tmp_path: Path, model_path: Path, signal_number: signal.Signals
) -> None:
    (tmp_path / "text.txt").write_text(TEXT)
    sizes = "--generations 4 --budget 48 --segment 32 --context 100 --cases 12 --prompts 4 --population 4 --workers 1"

    def start(name: str) -> subprocess.Popen[bytes]:
        files = ["--out", tmp_path / name, "--text", tmp_path / "text.txt", "--model", model_path]
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
    assert psutil.wait_procs(children, timeout=30)[1] == []
    assert len(log_of(tmp_path / "cut")) < 5
    assert start("cut").wait(120) == 0

    assert log_of(tmp_path / "cut") == log_of(tmp_path / "whole")
    written = [(tmp_path / name / "policy.safetensors").read_bytes() for name in ("cut", "whole")]
    assert written[0] == written[1]


def test_a_run_leaves_a_policy_a_card_and_a_curve(tmp_path: Path, model_path: Path) -> None:
    training = a_training(tmp_path, model_path)

    policy = train_namm(training, 1, Interrupting())

    assert Namm.load(tmp_path / "policy.safetensors").name == policy.name
    assert (tmp_path / "curve.png").read_bytes().startswith(b"\x89PNG")
    card = json.loads((tmp_path / "card.json").read_text())
    assert card["name"] == policy.name
    assert card["data"] == {"text": "begat"}
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

    policy = train_namm(a_training(tmp_path, model_path, start=given, keeps_normalization=True), 0, watcher)

    assert policy.name == given.name
    assert watcher.began_with == ["generation 0"]


def test_text_is_cut_into_cases_whose_answer_goes_on(tmp_path: Path, model_path: Path) -> None:
    (tmp_path / "text.txt").write_text(TEXT)
    tokenizer = Tokenizer.load(model_path)
    text, _ = read_text(tmp_path / "text.txt")

    cases = text_cases(tokenizer, text, num_cases=3, num_context_tokens=100, seed=0)

    for case in cases:
        whole = np.concatenate([case.context, case.question, case.answer])
        assert tokenizer.decode(whole.tolist()) in TEXT
        assert len(case.context) == 100


def test_text_that_is_too_short_or_no_text_is_refused(tmp_path: Path, model_path: Path) -> None:
    (tmp_path / "bytes.txt").write_bytes(b"\xff\xfe")

    with pytest.raises(ValueError, match="not UTF-8"):
        read_text(tmp_path / "bytes.txt")
    with pytest.raises(ValueError, match="a case takes 180"):
        text_cases(Tokenizer.load(model_path), "short", num_cases=1, num_context_tokens=100, seed=0)
