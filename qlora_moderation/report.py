"""Figures and reports of an evaluation, from its saved files only.

In: `predictions.jsonl` and `metrics.json`. Out: PNG files, `report.md`, `report.html`. Part of step 12.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from qlora_moderation.analysis import OURS, collect_verdicts
from qlora_moderation.errors import CheckpointError
from qlora_moderation.metadata import read_json, write_text
from qlora_moderation.metrics import majority
from qlora_moderation.plots import (
    plot_flagged_proportion,
    plot_ranking_curves,
    plot_reliability,
    plot_threshold_sweep,
)
from qlora_moderation.predictions import PREDICTIONS_FILE, Predictions, read_predictions
from qlora_moderation.refusals import refusals
from qlora_moderation.rendering import render_markdown, render_page
from qlora_moderation.sections import build_parts

REPORT_FILES = (
    "report.md",
    "report.html",
    "flagged_proportion.png",
    "ranking_curves.png",
    "reliability.png",
    "threshold_sweep.png",
)


def remake_report(directory: Path) -> None:
    """Do `write_report` again on files that may have been moved or edited.

    Raises:
        CheckpointError: they are missing or damaged, or the report cannot be written.
    """
    try:
        with refusals(f"--evaluation_dir {directory}"):
            write_report(directory)
    except (KeyError, TypeError, AttributeError, ValueError, IndexError) as error:
        raise CheckpointError(f"{directory / 'metrics.json'}: lacks or garbles {error}; evaluate again") from None


def write_report(directory: Path) -> None:
    """Draw the figures and write both reports into the directory of an evaluation.

    Raises:
        CheckpointError: its files are missing or damaged.
    """
    predictions, categories = read_predictions(directory / PREDICTIONS_FILE)
    result = read_json(directory / "metrics.json")
    plot_flagged_proportion(
        result["flagged_proportion"], directory / "flagged_proportion.png", result["flagged_intervals"]
    )
    if predictions.votes is not None and predictions.flagged_vote is not None:
        columns = {"flagged": (majority(predictions.flagged_vote), predictions.judgement.risk)}
        soft = {"flagged": (predictions.flagged_vote, predictions.judgement.risk)}
        for c, name in enumerate(categories):
            probabilities = predictions.judgement.probabilities[:, c]
            columns[name] = majority(predictions.votes[:, c]), probabilities
            soft[name] = predictions.votes[:, c], probabilities
        plot_ranking_curves(columns, directory / "ranking_curves.png")
        plot_reliability(soft, directory / "reliability.png")
        threshold = result["settings"]["thresholds"]["flagged"]["threshold"]
        plot_threshold_sweep(*columns["flagged"], threshold, directory / "threshold_sweep.png")
    parts = build_parts(result, categories)
    title = f"Evaluation on {result['data']['name']}"
    write_text(directory / "report.md", render_markdown(title, parts))
    write_text(directory / "report.html", render_page(title, parts, _collect_rows(predictions, categories), directory))


def _collect_rows(predictions: Predictions, categories: Sequence[str]) -> dict[str, Any]:
    """Return what the page's browser of rows reads, with short keys: there may be tens of thousands of rows."""
    models = list(dict.fromkeys(predictions.models or []))
    verdicts = {name: votes for name, votes in collect_verdicts(predictions).items() if name != OURS}
    judged = predictions.judgement
    rows = []
    for i in range(len(predictions)):
        votes = None if predictions.votes is None else np.flatnonzero(majority(predictions.votes[i])).tolist()
        row = {
            "p": predictions.prompts[i],
            "r": predictions.responses[i],
            "m": None if predictions.models is None else models.index(predictions.models[i]),
            "f": int(judged.flagged[i]),
            "k": round(float(judged.risk[i]), 4),
            "c": np.flatnonzero(judged.categories[i]).tolist(),
            "q": [round(value, 4) for value in judged.probabilities[i].tolist()],
            "t": votes,
            "v": [None if np.isnan(vote[i]) else int(majority(vote[i])) for vote in verdicts.values()],
            "w": int(predictions.windows[i]),
            "n": int(predictions.known_prompt is not None and bool(predictions.known_prompt[i])),
        }
        rows.append(row)
    return {"categories": list(categories), "models": models, "references": list(verdicts), "rows": rows}
