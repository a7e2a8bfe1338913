"""The plot of a decoder's training: losses, answers, how far the needle stands out, and what the gates let through."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from eunoe.training.curve import new_figure, write_figure

_MILLION = 1 << 20


def draw_training_curve(reports: Sequence[dict[str, Any]], path: Path) -> None:
    """Write a PNG.

    Args:
        reports: Of one or more runs, each run's together and in its order.
    """
    figure = new_figure(8, 9)
    loss_axes, answer_axes, margin_axes, gate_axes = figure.subplots(4, 1, sharex=True)
    steps, starts = _consecutive(reports)
    loss_axes.plot(steps, [report["text_loss"] for report in reports], label="text")
    loss_axes.plot(steps, [report["answer_loss"] for report in reports], label="answers")
    loss_axes.set_ylabel("loss, nats a byte")
    loss_axes.set_yscale("log")
    loss_axes.legend()
    answer_axes.plot(steps, [report["mean_far_accuracy"] for report in reports])
    answer_axes.set_ylim(0, 1.02)
    answer_axes.set_ylabel("answers beyond\nthe window")
    margins = [math.nan if report["margin"] is None else report["margin"] for report in reports]
    margin_axes.plot(steps, margins)
    margin_axes.axhline(math.log(_MILLION), linestyle="--", color="grey", label="ln 1 MiB")
    margin_axes.set_ylabel("margin of the\nbest head, nats")
    margin_axes.legend()
    # Runs have different numbers of heads: each run's heads are lines of their own.
    for start, end in zip(starts, [*starts[1:], len(reports)], strict=True):
        rows = [[gate for layer in report["memory_gates"] for gate in layer] for report in reports[start:end]]
        for gates in zip(*rows, strict=True):
            gate_axes.plot(steps[start:end], gates, linewidth=0.8)
    gate_axes.set_ylim(0, 1)
    gate_axes.set_ylabel("memory gates")
    gate_axes.set_xlabel("step")
    for axes in (loss_axes, answer_axes, margin_axes, gate_axes):
        for start in starts[1:]:
            axes.axvline(steps[start], color="lightgrey", zorder=0)
    write_figure(figure, path)


def _consecutive(reports: Sequence[dict[str, Any]]) -> tuple[list[int], list[int]]:
    """Steps counted through all runs, and the index of each run's first report."""
    steps: list[int] = []
    starts: list[int] = []
    before = 0
    for index, report in enumerate(reports):
        if index == 0 or report["run"] != reports[index - 1]["run"]:
            before = steps[-1] if steps else 0
            starts.append(index)
        steps.append(before + report["step"])
    return steps, starts
