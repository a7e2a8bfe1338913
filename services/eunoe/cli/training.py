"""Training: offline jobs on Ray."""

import math
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from eunoe.cli.local import DEFAULT_MODEL
from eunoe.cli.output import JsonOption, note, print_json

if TYPE_CHECKING:
    from eunoe.training.evolution import Generation

train = typer.Typer(help="Train parts of a model, on Ray.", no_args_is_help=True, rich_markup_mode=None)

_NUM_VALIDATION_CASES = 8


def _above_zero(value: float) -> float:
    if not 0 < value < math.inf:
        raise typer.BadParameter(f"{value} is no finite number above 0.")
    return value


def _finite(value: float) -> float:
    if not math.isfinite(value):
        raise typer.BadParameter(f"{value} is not finite.")
    return value


@train.command("namm")
def _namm(
    out: Annotated[Path, typer.Option(help="Directory of the run; one that was interrupted there goes on.")],
    model: Annotated[str, typer.Option(help="As in `eunoe up`.")] = DEFAULT_MODEL,
    generations: Annotated[int, typer.Option(min=0, help="How many in all, earlier runs counted.")] = 200,
    start: Annotated[
        Path | None, typer.Option(help="NAMM to begin with, its normalization kept; default: all parameters zero.")
    ] = None,
    evolve: Annotated[
        Literal["network", "score"],
        typer.Option(help="All parameters, or only the weight of each of the features in the score."),
    ] = "network",
    share: Annotated[
        float,
        typer.Option(
            max=1,
            callback=_above_zero,
            help="What the memory may have of the bytes of a full cache, while it is trained; above 0.",
        ),
    ] = 0.25,
    segment: Annotated[int, typer.Option(min=1, help="Tokens of a segment.")] = 512,
    context: Annotated[int, typer.Option(min=1, help="Tokens of a case's context.")] = 4096,
    cases: Annotated[int, typer.Option(help=f"Cases, the {_NUM_VALIDATION_CASES} for validation among them.")] = 64,
    prompts: Annotated[int, typer.Option(min=1, help="Cases that a generation is evaluated on.")] = 16,
    population: Annotated[int, typer.Option(min=4, help="Members of a generation.")] = 32,
    sigma: Annotated[
        float, typer.Option(callback=_above_zero, help="First standard deviation of every parameter; above 0.")
    ] = 0.065,
    covariance: Annotated[
        Literal["separable", "full"],
        typer.Option(help="What is learned of the distribution's shape: a variance each, or a matrix (slow)."),
    ] = "separable",
    reading_weight: Annotated[
        float,
        typer.Option(
            min=0, callback=_finite, help="What the cases count, one of four, that ask for nothing but to read on."
        ),
    ] = 0.25,
    race: Annotated[bool, typer.Option(help="Drop members that are clearly behind after 4, 8, ... prompts.")] = True,
    seed: Annotated[int, typer.Option(min=0, help="Of cases, samples and prompts.")] = 0,
    workers: Annotated[
        int | None, typer.Option(min=1, help="Default: as many as there are CPUs for, now and later.")
    ] = None,
    threads: Annotated[int, typer.Option(min=1, help="Threads, and Ray's CPUs, of each worker.")] = 1,
    ray_address: Annotated[
        str | None, typer.Option(help="Ray cluster to use (auto, host:port); default: a Ray of this machine alone.")
    ] = None,
    json_output: JsonOption = False,
) -> None:
    """Evolve the NAMM that decides what a bounded memory keeps. Ctrl-C stops; the same command goes on.

    The memory is as small while the policy is trained as it will be when it is served: a member's fitness is what the
    model loses in log-likelihood a token against a cache from which nothing is evicted, at best 0. Writes
    policy.safetensors, card.json and curve.png into the run's directory after every generation.
    """
    if cases < _NUM_VALIDATION_CASES + prompts:
        raise typer.BadParameter(
            f"--cases {cases} is too few: {_NUM_VALIDATION_CASES} for validation and --prompts {prompts} of the others"
        )
    from eunoe.embedded.models import resolve_model
    from eunoe.eviction import Namm
    from eunoe.training.ray_session import ray_session

    begun_with = Namm.untrained() if start is None else Namm.load(start)
    _, model_path = resolve_model(model, on_step=note)
    with ray_session(ray_address, num_cpus=workers and workers * threads, num_threads=threads):
        # They import Ray, which has its environment only now.
        from eunoe.cli.training_progress import TrainingProgress
        from eunoe.decoder.tokenizer import load_tokenizer
        from eunoe.training.evolution import EvolutionSettings
        from eunoe.training.namm_training import NammTraining, open_workers, train_namm
        from eunoe.training.policy_objective import ObjectiveSettings
        from eunoe.training.racing import RaceSettings
        from eunoe.training.tasks.training_mix import training_mix

        training = NammTraining(
            directory=out,
            model_path=model_path,
            cases=training_mix(context, cases, seed=seed, tokenizer=load_tokenizer(model_path)),
            data={"cases": cases, "context": context, "seed": seed, "split": "train"},
            start=begun_with,
            evolved=evolve,
            keeps_normalization=start is not None,
            objective=ObjectiveSettings(share=share, segment_length=segment, reading_weight=reading_weight),
            evolution=EvolutionSettings(
                population=population,
                sigma=sigma,
                covariance=covariance,
                seed=seed,
                num_prompts=prompts,
                num_validation_prompts=_NUM_VALIDATION_CASES,
                race=RaceSettings() if race else None,
            ),
            num_workers=workers,
            num_threads=threads,
        )
        on_generation = _print_generation if json_output else None
        with open_workers(training) as pool, TrainingProgress(on_generation) as progress:
            policy = train_namm(training, generations, progress, pool)
    if json_output:
        print_json({"name": policy.name, "policy": str(out / "policy.safetensors")})
    else:
        print(f"{policy.name} is in {out / 'policy.safetensors'}; card.json says what it was made from")


@train.command("decoder")
def _decoder(
    out: Annotated[Path, typer.Option(help="Directory of the run; one that was interrupted there goes on.")],
    name: Annotated[
        str | None, typer.Option(help="Of the model, and of its directory; default: eunoe-nano or eunoe-nano-window.")
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="Of first weights and samples; 0 is the recipe's own.")] = 0,
    workers: Annotated[int, typer.Option(min=1, help="They share the samples of each step.")] = 1,
    threads: Annotated[int, typer.Option(min=1, help="Threads, and Ray's CPUs, of each worker.")] = 1,
    window_only: Annotated[
        bool, typer.Option("--window-only", help="End without the memory: a twin to compare with.")
    ] = False,
    quick: Annotated[bool, typer.Option("--quick", help="A tiny model in a few steps: does everything work?")] = False,
    ray_address: Annotated[
        str | None, typer.Option(help="Ray cluster to use (auto, host:port); default: a Ray of this machine alone.")
    ] = None,
    json_output: JsonOption = False,
) -> None:
    """Train the byte-level decoder whose compressive memory recalls what left its window. Ctrl-C stops; the same
    command goes on.

    From random weights, by the recipe of eunoe-nano: hours on one thread. Writes curve.jsonl and curve.png (losses,
    answers, gates, and how far a hidden key stands out in the memory), and at the end the model's directory, which
    `eunoe up --model` takes.
    """
    from eunoe.training.ray_session import ray_session

    with ray_session(ray_address, num_cpus=workers * threads, num_threads=threads):
        # They import Ray, which has its environment only now.
        from eunoe.cli.training_progress import DecoderTrainingProgress
        from eunoe.training.decoder.ray_training import DecoderTraining, train_decoder
        from eunoe.training.decoder.recipe import NANO, NANO_TWIN

        name = name or ("eunoe-nano-window" if window_only else "eunoe-nano")
        recipe = NANO_TWIN if window_only else NANO
        recipe = recipe.in_a_few_steps() if quick else recipe
        training = DecoderTraining(
            directory=out, name=name, recipe=recipe.seeded(seed), num_workers=workers, num_threads=threads
        )
        with DecoderTrainingProgress(recipe, print_json if json_output else None) as progress:
            path = train_decoder(training, progress)
    if json_output:
        print_json({"name": name, "model": str(path)})
    else:
        print(f"{name} is in {path}; curve.png beside it shows how it was trained")


@train.command("novelty")
def _novelty(
    out: Annotated[Path, typer.Option(help="The NAMM file to write.")],
    model: Annotated[str, typer.Option(help="As in `eunoe up`.")] = DEFAULT_MODEL,
    context: Annotated[int, typer.Option(min=200, help="Tokens of a case's context.")] = 1000,
    cases: Annotated[int, typer.Option(min=1, help="How many.")] = 120,
    seed: Annotated[int, typer.Option(min=0, help="Of the cases.")] = 1,
    attention: Annotated[
        float, typer.Option(callback=_finite, help="What attention received counts in the score.")
    ] = 0.25,
    novelty: Annotated[float, typer.Option(callback=_finite, help="What novelty counts in the score.")] = 1.0,
    threads: Annotated[int | None, typer.Option(min=1, help="Of the model; default: all.")] = None,
    json_output: JsonOption = False,
) -> None:
    """Learn what marks the tokens that questions will need; the result is a NAMM to start `eunoe train namm` from.

    By logistic regression on keys and values of contexts whose needed tokens are known: minutes, without Ray.
    """
    # Before the minutes, not after them.
    if out.is_dir() or not out.parent.is_dir():
        raise typer.BadParameter(f"--out {out} is no file in a directory that is there")
    from rich.console import Console
    from rich.progress import track

    from eunoe.decoder.decoder import Decoder
    from eunoe.decoder.tokenizer import load_tokenizer
    from eunoe.embedded.models import resolve_model
    from eunoe.training.novelty_training import NoveltyTraining, train_novelty
    from eunoe.training.tasks.suite import suite

    _, model_path = resolve_model(model, on_step=note)
    decoder = Decoder.load(model_path, num_threads=threads)
    drawn = suite(context, cases, seed=seed, split="train", tokenizer=load_tokenizer(model_path))
    console = Console(stderr=True)
    shown = track(drawn, "reading contexts", console=console, transient=True, disable=not console.is_terminal)
    policy = train_novelty(decoder, shown, NoveltyTraining(attention=attention, novelty=novelty))
    policy.save(out)
    if json_output:
        print_json({"name": policy.name, "policy": str(out)})
    else:
        print(f"{policy.name} is in {out}")


def _print_generation(generation: "Generation") -> None:
    print_json(
        {
            "generation": generation.number,
            "best": generation.best_fitness,
            "mean": generation.mean_fitness,
            "validation": generation.validation,
            "sigma": generation.sigma,
            "evaluations": generation.num_evaluations,
            "seconds": generation.seconds,
        }
    )
