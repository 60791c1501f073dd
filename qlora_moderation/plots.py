"""Figures, drawn from saved numbers only.

In: records of `metrics.jsonl`, flagged proportions. Out: PNG files.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np

matplotlib.use("Agg")
from matplotlib import pyplot as plt

COLOURS = ("#0072b2", "#e69f00", "#009e73", "#cc79a7", "#56b4e9", "#d55e00")
"""Okabe and Ito's palette, told apart by the colour-blind."""


def plot_curves(records: Sequence[Mapping[str, Any]], metric: str, path: Path) -> None:
    """Draw training loss, validation loss and the selecting metric over steps."""
    train = [(r["step"], r["loss"]) for r in records if "loss" in r]
    evaluated = [(r["step"], r["eval"]) for r in records if "eval" in r]
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 3.6), layout="constrained")
    if train:
        left.plot(*zip(*train, strict=True), color=COLOURS[0], linewidth=0.8, alpha=0.7, label="training, each step")
    if evaluated:
        steps = [step for step, _ in evaluated]
        left.plot(steps, [m["log_loss"] for _, m in evaluated], "o-", color=COLOURS[5], label="validation")
        for colour, name in zip(COLOURS, dict.fromkeys((metric, "flagged/f1", "flagged/auroc")), strict=False):
            right.plot(steps, [m.get(name, np.nan) for _, m in evaluated], "o-", color=colour, label=name)
        right.legend()
    left.set(xlabel="step", ylabel="loss (nats per label)")
    right.set(xlabel="step", ylabel="validation", ylim=(0, 1.02))
    left.legend() if train or evaluated else None
    figure.savefig(path, dpi=120)
    plt.close(figure)


def plot_flagged_proportion(proportions: Mapping[str, Mapping[str, float]], path: Path) -> None:
    """Draw the flagged proportion of each model as bars, one bar for each moderator.

    Args:
        proportions: model -> moderator -> share in [0, 1]; NaN leaves a gap.
        path: PNG file.
    """
    models = list(proportions)
    moderators = list(dict.fromkeys(name for shares in proportions.values() for name in shares))
    figure, axes = plt.subplots(figsize=(max(5.0, 1.6 * len(models)), 4), layout="constrained")
    width = 0.8 / max(1, len(moderators))
    for index, moderator in enumerate(moderators):
        places = np.arange(len(models)) + (index - (len(moderators) - 1) / 2) * width
        shares = [100 * proportions[model].get(moderator, float("nan")) for model in models]
        bars = axes.bar(places, shares, width, color=COLOURS[index % len(COLOURS)], label=moderator)
        axes.bar_label(bars, fmt="%.1f", fontsize=7)
    axes.set_xticks(range(len(models)), models)
    axes.set(ylabel="flagged answers (%)")
    axes.margins(y=0.12)
    axes.legend(title="moderator")
    figure.savefig(path, dpi=120)
    plt.close(figure)
