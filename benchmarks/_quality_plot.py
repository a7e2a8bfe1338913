"""The picture of eviction_quality."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import mean

import numpy as np
from matplotlib.figure import Figure

from eunoe.training.bootstrap import share_interval


def plot(path: Path, exact: Mapping[float, Mapping[str, Sequence[float]]], *, full: float) -> None:
    """A bar with its interval for everybody, a panel for each share of bytes.

    Args:
        path: Of the picture, whose directory is made.
        exact: By share of bytes and label: 1 for each case that is answered, else 0.
        full: Share of the cases that the full cache answers.
    """
    figure = Figure(figsize=(6 * len(exact) + 1, 5), layout="tight")
    axes = figure.subplots(1, len(exact), squeeze=False)
    for axis, (share, found) in zip(axes[0], exact.items(), strict=True):
        ordered = sorted(found.items(), key=lambda pair: mean(pair[1]))
        means = np.array([mean(values) for _, values in ordered])
        ends = np.array([share_interval(round(sum(values)), len(values)) for _, values in ordered])
        labels = [label for label, _ in ordered]
        axis.barh(labels, means, xerr=np.abs(ends.T - means), color="#4477aa", ecolor="#222222")
        axis.axvline(full, color="#222222", linestyle="--", label="full cache")
        axis.set(title=f"{100 * share:.0f}% of the bytes", xlabel="held-out cases answered", xlim=(0, 1))
        axis.legend(loc="lower right")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)
