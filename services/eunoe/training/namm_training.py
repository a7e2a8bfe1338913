"""Evolving a NAMM: constants first, then generations, each written down before the next one begins.

A run's directory holds, beside what `RunDirectory` keeps there:

start.safetensors     the policy to begin with, with its normalization constants
policy.safetensors    the best so far, for `Namm.load`
card.json             what it was made from and how, what it cost, what it reached
curve.png             fitness and step size, drawn anew after each generation
"""

import dataclasses
import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, Protocol

import torch

from eunoe.decoder.checkpoint import load_config, load_dtypes
from eunoe.eviction import Namm
from eunoe.eviction.backward_attention import slices
from eunoe.training.curve import draw_curve
from eunoe.training.evolution import Evaluate, Evolution, EvolutionSettings, Generation
from eunoe.training.policy_objective import ObjectiveSettings, ObjectiveWorker, check_cases
from eunoe.training.racing import Unit
from eunoe.training.run_directory import RunDirectory, write_whole
from eunoe.training.spectrogram_moments import normalization_of
from eunoe.training.strategy import Parameters
from eunoe.training.tasks.case import Case
from eunoe.training.worker_pool import Call, WorkerPool

Evolved = Literal["network", "score"]
"""Parameters that change: all of them, or only the weight of each feature in the score, 26 at most. As long as the
others are zero, all that a slot sees of others is a product of three small random matrices, and most of what the whole
network's members differ in has no effect."""


@dataclass(frozen=True, kw_only=True, slots=True)
class NammTraining:
    """What to evolve, on what, with whom.

    Raises:
        ValueError: If there are too few cases.
    """

    directory: Path
    """Of the run; one that holds a run with the same settings goes on with it."""
    model_path: Path
    """Of the model, on every node."""
    cases: Sequence[Case]
    """The first ones are for validation and for normalization."""
    data: dict[str, Any]
    """Where the cases come from, for the card."""
    start: Namm
    """Settings and first parameters."""
    evolved: Evolved = "network"
    """What of it changes."""
    keeps_normalization: bool = False
    """Whether the start's constants stay; else they are collected from the cases."""
    num_normalization_cases: int = 8
    objective: ObjectiveSettings = dataclasses.field(default_factory=ObjectiveSettings)
    evolution: EvolutionSettings = dataclasses.field(default_factory=EvolutionSettings)
    num_workers: int | None = None
    """See `WorkerPool`."""
    num_threads: int = 1
    """Of a worker."""

    def __post_init__(self) -> None:
        self.evolution.check_num_prompts(len(self.cases))


class Watcher(Protocol):
    """Is told how a run gets on."""

    def began(self, what: str, num_calls: int) -> None:
        """Workers have so many calls to do, at most."""

    def advanced(self) -> None:
        """One more of them is done."""

    def ended(self, generation: Generation) -> None:
        """A generation is done and written down."""


class Pool(Protocol):
    """Objectives that answer calls: `WorkerPool`, as far as it is needed here."""

    def share(self, value: Any) -> Any:
        """What stands for a value in many calls, so that it travels once."""

    def map(self, method: str, calls: Sequence[Call], on_done: Callable[[], None]) -> list[Any]:
        """Call a method of `PolicyObjective`."""


def open_workers(training: NammTraining) -> WorkerPool:
    """Workers for `train_namm`, on the Ray that is connected; they start when there is work."""
    return WorkerPool(
        ObjectiveWorker,
        (
            training.model_path,
            list(training.cases),
            training.start.statistics,
            training.objective,
            training.num_threads,
        ),
        num_workers=training.num_workers,
        num_cpus=training.num_threads,
    )


def train_namm(training: NammTraining, num_generations: int, watcher: Watcher, pool: Pool) -> Namm:
    """Run until a number of generations is done, those of earlier runs counted, and return the best policy.

    What is interrupted goes on after the last whole generation when it is called again.

    Raises:
        BadRunDirectory: If the directory holds another run.
        ValueError: If a case cannot be used.
        Unavailable: If no worker starts.
    """
    # Before a worker fails of them, and before the directory is this run's.
    check_cases(
        training.cases,
        training.start.statistics,
        training.objective,
        load_config(training.model_path),
        load_dtypes(training.model_path),
    )
    with RunDirectory(training.directory, _settings(training)) as run:
        start = _start(training, pool, watcher)
        evolution = Evolution(
            training.evolution,
            start.network.parameters[_evolved(training)].numpy(),
            len(training.cases),
            _evaluator(training, start, pool, watcher.advanced),
            run.generations,
        )
        while evolution.num_generations < num_generations:
            number = evolution.num_generations + 1
            watcher.began(f"generation {number}", _most_calls(training.evolution, number))
            generation = evolution.step()
            run.append(generation)
            _write_results(run, training, start, evolution)
            watcher.ended(generation)
        # Once more: the last run may have been killed before it had written them.
        return _write_results(run, training, start, evolution)


def _settings(training: NammTraining) -> dict[str, Any]:
    """What makes a run this one and no other."""
    return {
        "model": {"name": training.model_path.name, "sha256": _digest_of_model(training.model_path)},
        "data": training.data | {"sha256": _digest_of_cases(training.cases)},
        "start": training.start.name,
        "evolved": training.evolved,
        "keeps_normalization": training.keeps_normalization,
        "num_normalization_cases": training.num_normalization_cases,
        "objective": dataclasses.asdict(training.objective),
        "evolution": dataclasses.asdict(training.evolution),
        "num_threads": training.num_threads,
    }


def _digest_of_model(directory: Path) -> str:
    digest = hashlib.sha256()
    for path in sorted([directory / "config.json", *directory.glob("*.safetensors")]):
        with path.open("rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()


def _digest_of_cases(cases: Sequence[Case]) -> str:
    """The same seed makes other cases with another interpreter, tokenizer or book."""
    return hashlib.sha256("".join(case.digest for case in cases).encode()).hexdigest()


def _start(training: NammTraining, pool: Pool, watcher: Watcher) -> Namm:
    """The policy to begin with, as an earlier run wrote it, or with its constants."""
    path = training.directory / "start.safetensors"
    if not path.exists():
        start = training.start
        if not training.keeps_normalization:
            num_cases = min(training.num_normalization_cases, len(training.cases))
            watcher.began("normalization", num_cases)
            calls = [Call((prompt,), key=prompt) for prompt in range(num_cases)]
            start = replace(start, normalization=normalization_of(pool.map("moments", calls, watcher.advanced)))
        start.save(path)
    return Namm.load(path)


def _evaluator(training: NammTraining, start: Namm, pool: Pool, on_done: Callable[[], None]) -> Evaluate:
    def evaluate(members: Parameters, units: list[Unit]) -> list[float]:
        chosen = {member for member, _ in units}
        policies = {member: pool.share(_policy(training, start, members[member])) for member in chosen}
        calls = [Call((policies[member], prompt), key=prompt) for member, prompt in units]
        return pool.map("fitness", calls, on_done)

    return evaluate


def _evolved(training: NammTraining) -> slice:
    return slice(None) if training.evolved == "network" else slices(training.start.network.num_features)["score_weight"]


def _policy(training: NammTraining, start: Namm, evolved: Parameters) -> Namm:
    parameters = start.network.parameters.clone()
    parameters[_evolved(training)] = torch.tensor(evolved)
    return replace(start, network=replace(start.network, parameters=parameters))


def _most_calls(settings: EvolutionSettings, number: int) -> int:
    num_calls = settings.population * settings.num_prompts if number else 0
    return num_calls + (settings.num_validation_prompts if number % settings.validation_interval == 0 else 0)


def _write_results(run: RunDirectory, training: NammTraining, start: Namm, evolution: Evolution) -> Namm:
    best = _policy(training, start, evolution.best)
    best.save(run.path / "policy.safetensors")
    card = {
        "kind": "namm",
        "name": best.name,
        "data": run.settings["data"],
        "recipe": {name: value for name, value in run.settings.items() if name != "data"},
        "seeds": {"evolution": training.evolution.seed},
        "cost": {
            "generations": evolution.num_generations,
            "evaluations": sum(generation.num_evaluations for generation in run.generations),
            "seconds": round(sum(generation.seconds for generation in run.generations), 1),
        },
        "figures": {
            "validation_at_start": run.generations[0].validation,
            "validation": evolution.best_validation,
            "best_generation": evolution.best_generation,
        },
    }
    write_whole(run.path / "card.json", json.dumps(card, indent=2).encode() + b"\n")
    draw_curve(run.generations, run.path / "curve.png")
    return best
