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

from qlora_moderation.errors import printable
from qlora_moderation.metadata import written_whole

COLOURS = ("#0072b2", "#e69f00", "#009e73", "#cc79a7", "#56b4e9", "#d55e00")
"""Okabe and Ito's palette, told apart by the colour-blind."""

HATCHES = ("", "//", "..", "xx", "--", "oo")
"""Told apart without any colour, as in print."""


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
    _save(figure, path, dpi=120)


def plot_flagged_proportion(
    proportions: Mapping[str, Mapping[str, float]],
    path: Path,
    intervals: Mapping[str, Mapping[str, Sequence[float] | None]] | None = None,
) -> None:
    """Draw the flagged proportion of each model as bars, one bar for each moderator.

    Args:
        proportions: model -> moderator -> share in [0, 1]; a missing one leaves a gap.
        path: PNG file.
        intervals: model -> moderator -> [low, high].
    """
    models = list(proportions)
    moderators = list(dict.fromkeys(name for shares in proportions.values() for name in shares))
    figure, axes = plt.subplots(figsize=(max(5.0, 1.6 * len(models)), 4), layout="constrained")
    width = min(0.3, 0.8 / max(1, len(moderators)))
    for index, moderator in enumerate(moderators):
        places = np.arange(len(models)) + (index - (len(moderators) - 1) / 2) * width
        shares = np.array([100 * proportions[model].get(moderator, float("nan")) for model in models])
        edges = [((intervals or {}).get(model) or {}).get(moderator) for model in models]
        whiskers = np.array([[np.nan, np.nan] if edge is None else [100 * edge[0], 100 * edge[1]] for edge in edges])
        axes.bar(
            places,
            shares,
            width,
            color=COLOURS[index % len(COLOURS)],
            label=_shorten(moderator),
            hatch=HATCHES[index % len(HATCHES)],
            edgecolor="white",
            linewidth=0.5,
        )
        reach = np.clip(np.stack([shares - whiskers[:, 0], whiskers[:, 1] - shares]), 0, None)
        axes.errorbar(places, shares, yerr=reach, fmt="none", ecolor="#333333", elinewidth=0.9, capsize=2)
        for place, share, high in zip(places, shares, whiskers[:, 1], strict=True):
            if not np.isnan(share):
                top = (place, np.nanmax([share, high]))
                axes.annotate(f"{share:.1f}", top, xytext=(0, 2), textcoords="offset points", ha="center", fontsize=7)
    axes.set_xticks(range(len(models)), [_shorten(model) for model in models])
    axes.set(ylabel="flagged answers (%)")
    axes.margins(y=0.12)
    figure.legend(title="moderator", fontsize=8, loc="outside right upper")
    _save(figure, path, dpi=120)


_MOST_BARS = 40


def plot_shares(panels: Mapping[str, Mapping[str, tuple[float, Sequence[float] | None]]], path: Path) -> None:
    """Draw shares as lying bars with their intervals, one panel under another; of a long panel the first 40.

    Args:
        panels: title -> name -> (share in [0, 1], [low, high] or None).
        path: PNG file.
    """
    shown = {title: dict(list(shares.items())[:_MOST_BARS]) for title, shares in panels.items()}
    heights = [1 + len(shares) for shares in shown.values()]
    size = (7, 0.8 + 0.26 * sum(heights))
    figure, grid = plt.subplots(
        len(shown), figsize=size, layout="constrained", squeeze=False, sharex=True, height_ratios=heights
    )
    for axes, (title, shares) in zip(grid.ravel(), shown.items(), strict=True):
        more = len(panels[title]) - len(shares)
        axes.set_title(
            _shorten(title) + (f" (the first {_MOST_BARS} of {len(panels[title])})" if more else ""), fontsize=9
        )
        values = np.array([100 * share for share, _ in shares.values()])
        whiskers = np.array([[100 * edge for edge in edges or (share, share)] for share, edges in shares.values()])
        if len(shares):
            axes.barh(range(len(shares)), values, 0.7, color=COLOURS[0])
            reach = np.clip(np.stack([values - whiskers[:, 0], whiskers[:, 1] - values]), 0, None)
            axes.errorbar(
                values, range(len(shares)), xerr=reach, fmt="none", ecolor="#333333", elinewidth=0.9, capsize=2
            )
            for place, (value, high) in enumerate(zip(values, whiskers[:, 1], strict=True)):
                text = (max(value, high), place)
                axes.annotate(f"{value:.1f}", text, xytext=(4, 0), textcoords="offset points", va="center", fontsize=7)
        axes.set_yticks(range(len(shares)), [_shorten(name) for name in shares], fontsize=8)
        axes.invert_yaxis()
    farthest = max(
        (edges[1] if edges else share for bars in shown.values() for share, edges in bars.values()), default=0
    )
    grid.ravel()[0].set_xlim(0, 112 * farthest or 100)  # room for the numbers behind the bars
    grid.ravel()[-1].set_xlabel("rows (%)")
    _save(figure, path, dpi=120)


def plot_ranking_curves(columns: Mapping[str, tuple[np.ndarray, np.ndarray]], path: Path) -> None:
    """Draw precision over recall and true-positive over false-positive rate, one panel for each name.

    Args:
        columns: name -> (truth [N] bool, score [N]).
        path: PNG file.
    """
    from sklearn.metrics import precision_recall_curve, roc_curve

    figure, panels = _build_panels(len(columns))
    for axes, (name, (truth, score)) in zip(panels, columns.items(), strict=False):
        positives = int(truth.sum())
        axes.set_title(f"{_shorten(name)}\n{positives} of {len(truth)}", fontsize=8)
        if 0 < positives < len(truth):
            precision, recall, _ = precision_recall_curve(truth, score)
            false, true, _ = roc_curve(truth, score)
            axes.plot(recall, precision, color=COLOURS[0], linewidth=1.4, label="precision over recall")
            axes.plot(false, true, color=COLOURS[5], linewidth=1.4, linestyle="--", label="ROC")
            axes.axhline(
                positives / len(truth), color="#777777", linewidth=0.7, linestyle=":", label="share of positives"
            )
        else:
            axes.text(0.5, 0.5, "undefined", ha="center", va="center", fontsize=8)
    _finish_panels(figure, panels, len(columns), "recall, or false-positive rate", "precision, or recall", path)


def plot_reliability(columns: Mapping[str, tuple[np.ndarray, np.ndarray]], path: Path) -> None:
    """Draw the share of yes among votes over the probability given, in ten bins of equally many rows.

    Args:
        columns: name -> (votes [N], probability [N]).
        path: PNG file.
    """
    figure, panels = _build_panels(len(columns))
    for axes, (name, (votes, probability)) in zip(panels, columns.items(), strict=False):
        axes.set_title(_shorten(name), fontsize=8)
        axes.plot([0, 1], [0, 1], color="#777777", linewidth=0.7, linestyle=":", label="perfect")
        order = np.argsort(probability, kind="stable")
        bins = [part for part in np.array_split(order, min(10, max(1, len(order) // 10))) if len(part)]
        given = np.array([probability[part].mean() for part in bins])
        seen = np.array([votes[part].mean() for part in bins])
        edges = np.array([_find_wilson_interval(votes[part].mean(), len(part)) for part in bins])
        reach = np.clip(np.stack([seen - edges[:, 0], edges[:, 1] - seen]), 0, None)
        axes.errorbar(given, seen, yerr=reach, fmt="o-", color=COLOURS[0], markersize=3, linewidth=1, label="seen")
    _finish_panels(figure, panels, len(columns), "probability", "share of yes", path)


def plot_threshold_sweep(truth: np.ndarray, score: np.ndarray, threshold: float, path: Path) -> None:
    """Draw precision, recall, F1 and the false-positive rate over the threshold, and where it stands.

    Args:
        truth: [N] bool.
        score: [N].
        threshold: the one in force.
        path: PNG file.
    """
    grid = np.linspace(0, 1, 201)
    decided = score[None, :] > grid[:, None]
    tp, fp = (decided & truth).sum(axis=1), (decided & ~truth).sum(axis=1)
    yes, no = max(1, int(truth.sum())), max(1, int((~truth).sum()))
    recall, false = tp / yes, fp / no
    precision = np.where(tp + fp > 0, tp / np.maximum(1, tp + fp), np.nan)
    lines = {
        "precision": precision,
        "recall": recall,
        "F1": 2 * tp / np.maximum(1, tp + fp + yes),
        "false-positive rate": false,
    }
    figure, axes = plt.subplots(figsize=(7, 3.6), layout="constrained")
    for (name, values), colour, style in zip(lines.items(), COLOURS, ("-", "--", "-.", ":"), strict=False):
        axes.plot(grid, values, color=colour, linestyle=style, label=name)
    axes.axvline(threshold, color="#333333", linewidth=0.8)
    axes.annotate(f"{threshold:.3g}", (threshold, 1.0), xytext=(3, 2), textcoords="offset points", fontsize=8)
    axes.set(xlabel="threshold of flagged", xlim=(0, 1), ylim=(0, 1.06))
    axes.legend(fontsize=8)
    _save(figure, path, dpi=120)


def _save(figure: Any, path: Path, dpi: int) -> None:
    """Write a figure whole, and forget it."""
    try:
        with written_whole(path) as file:
            figure.savefig(file, dpi=dpi, format=path.suffix[1:])
    finally:
        plt.close(figure)


def _build_panels(count: int) -> tuple[Any, list[Any]]:
    columns = min(5, count)
    rows = -(-count // columns)
    figure, grid = plt.subplots(rows, columns, figsize=(2.4 * columns, 2.5 * rows), layout="constrained", squeeze=False)
    return figure, list(grid.ravel())


def _finish_panels(figure: Any, panels: list[Any], count: int, across: str, up: str, path: Path) -> None:
    for axes in panels[count:]:
        axes.axis("off")
    for axes in panels[:count]:
        axes.set(xlim=(-0.02, 1.02), ylim=(-0.02, 1.02), xticks=[0, 0.5, 1], yticks=[0, 0.5, 1])
        axes.tick_params(labelsize=7)
    handles: dict[str, Any] = {}
    for axes in panels[:count]:
        for handle, label in zip(*axes.get_legend_handles_labels(), strict=True):
            handles.setdefault(label, handle)
    figure.supxlabel(across, fontsize=9)
    figure.supylabel(up, fontsize=9)
    if handles:
        figure.legend(handles.values(), handles.keys(), loc="outside upper center", ncols=len(handles), fontsize=8)
    _save(figure, path, dpi=110)


def _find_wilson_interval(share: float, count: int) -> tuple[float, float]:
    """Return the 95 % interval of Wilson 1927, defined for fractional votes, too."""
    z2 = 1.96**2
    middle = (share + z2 / (2 * count)) / (1 + z2 / count)
    reach = 1.96 / (1 + z2 / count) * np.sqrt(share * (1 - share) / count + z2 / (4 * count**2))
    return float(middle - reach), float(middle + reach)


def _shorten(name: str) -> str:
    """Return a name short enough for a panel, with what matplotlib would read as mathematics escaped."""
    name = printable(name)
    short = name if len(name) <= 28 else name[:27] + "\u2026"
    return short.replace("$", r"\$")
