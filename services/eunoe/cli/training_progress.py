"""A training run on the terminal: a bar for the generation that runs, a line for each that is done."""

from collections.abc import Callable
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from eunoe.training.evolution import Generation


class TrainingProgress:
    """A `Watcher` that shows what happens on standard error.

    Args:
        on_generation: What to do with a generation instead of printing a line.
    """

    def __init__(self, on_generation: Callable[[Generation], None] | None = None) -> None:
        self._on_generation = on_generation or self._print
        console = Console(stderr=True)
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("evaluations at most"),
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
        self._progress.console.print("  ".join(parts), highlight=False, soft_wrap=True)
