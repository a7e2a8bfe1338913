"""A training run on the terminal: a bar for what runs, and a line for each generation or report."""

from collections.abc import Callable, Sequence
from typing import Any, Self

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from eunoe.training.decoder.recipe import Recipe
from eunoe.training.evolution import Generation


class _Bar:
    """A bar on standard error while the block runs, and lines above it."""

    def __init__(self, counted: str) -> None:
        console = Console(stderr=True)
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn(counted),
            TimeElapsedColumn(),
            console=console,
            transient=True,
            # A pipe gets the lines alone.
            disable=not console.is_terminal,
        )
        self._bar = self._progress.add_task("starting", total=None)

    def __enter__(self) -> Self:
        self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._progress.stop()

    def _print_line(self, parts: Sequence[str]) -> None:
        self._progress.console.print("  ".join(parts), highlight=False, soft_wrap=True)


class TrainingProgress(_Bar):
    """A `Watcher` that shows what happens on standard error.

    Args:
        on_generation: What to do with a generation instead of printing a line.
    """

    def __init__(self, on_generation: Callable[[Generation], None] | None = None) -> None:
        self._on_generation = on_generation or self._print
        super().__init__("evaluations at most")

    def began(self, what: str, num_calls: int) -> None:
        """See `Watcher`."""
        self._progress.reset(self._bar, description=what, total=num_calls)

    def advanced(self) -> None:
        """See `Watcher`."""
        self._progress.advance(self._bar)

    def ended(self, generation: Generation) -> None:
        """See `Watcher`."""
        self._on_generation(generation)

    def _print(self, generation: Generation) -> None:
        parts = [f"generation {generation.number:4}"]
        if generation.best_fitness is not None:
            parts.append(f"best {generation.best_fitness:8.4f}  mean {generation.mean_fitness:8.4f}")
        if generation.validation is not None:
            parts.append(f"validation {generation.validation:8.4f}")
        parts.append(f"sigma {generation.sigma:.4f}  {generation.num_evaluations} evaluations")
        parts.append(f"{generation.seconds:.1f} s")
        self._print_line(parts)


class DecoderTrainingProgress(_Bar):
    """Shows the reports of a decoder's training on standard error.

    Args:
        recipe: What is trained.
        on_report: What to do with a report instead of printing a line.
    """

    def __init__(self, recipe: Recipe, on_report: Callable[[dict[str, Any]], None] | None = None) -> None:
        self._runs = recipe.runs()
        self._on_report = on_report or self._print
        super().__init__("steps at most")

    def __call__(self, report: dict[str, Any]) -> None:
        """Show a report."""
        stages = self._runs[report["run"]].stages
        self._progress.update(
            self._bar,
            description=f"{report['run']}, stage {report['stage'] + 1} of {len(stages)}",
            total=stages[report["stage"]].max_steps,
            completed=report["stage_step"],
        )
        self._on_report(report)

    def _print(self, report: dict[str, Any]) -> None:
        parts = [
            f"{report['run']:7} step {report['step']:4}",
            f"text {report['text_loss']:.3f}",
            f"answers {report['answer_loss']:.3f}",
            f"recalled {report['mean_far_accuracy']:.2f}",
        ]
        if report["margin"] is not None:
            parts.append(f"margin {report['margin']:.1f}")
        parts.append(f"{report['bytes_per_second']:,.0f} bytes/s")
        self._print_line(parts)
