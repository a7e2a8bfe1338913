"""The plot of a run: fitness and step size over the generations."""

import io
from collections.abc import Sequence
from pathlib import Path

from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from eunoe.training.evolution import Generation
from eunoe.training.run_directory import write_whole


def new_figure(width: float, height: float) -> Figure:
    """A figure of so many inches."""
    # Not pyplot, which keeps every figure and may want a screen.
    return Figure(figsize=(width, height), layout="constrained")


def draw_curve(generations: Sequence[Generation], path: Path) -> None:
    """Write a PNG: best and mean fitness of each generation, validation of the mean, and sigma."""
    figure = new_figure(8, 5)
    fitness_axes, sigma_axes = figure.subplots(2, 1, sharex=True, height_ratios=[3, 1])
    evolved = [generation for generation in generations if generation.ranking]
    numbers = [generation.number for generation in evolved]
    fitness_axes.plot(numbers, [generation.best_fitness for generation in evolved], label="best member")
    fitness_axes.plot(numbers, [generation.mean_fitness for generation in evolved], label="mean of all members")
    validated = [(each.number, each.validation) for each in generations if each.validation is not None]
    fitness_axes.plot(*zip(*validated, strict=True), marker="o", label="validation of the distribution's mean")
    fitness_axes.set_ylabel("fitness")
    fitness_axes.legend()
    sigma_axes.plot(numbers, [generation.sigma for generation in evolved])
    sigma_axes.set_ylabel("sigma")
    sigma_axes.set_xlabel("generation")
    sigma_axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    write_figure(figure, path)


def write_figure(figure: Figure, path: Path) -> None:
    """Write a PNG, or leave what was there."""
    content = io.BytesIO()
    figure.savefig(content, format="png", dpi=120)
    write_whole(path, content.getvalue())
