"""What an evaluation says of every row, and its file: all later figures are computed from it, without the model.

In and out: `predictions.jsonl`. Part of step 12.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from qlora_moderation.data import Pairs
from qlora_moderation.errors import CheckpointError
from qlora_moderation.leakage import TrainingHashes
from qlora_moderation.thresholds import Judgement, Thresholds

if TYPE_CHECKING:  # figures are made from this module without torch
    from qlora_moderation.scoring import Scores

PREDICTIONS_FILE = "predictions.jsonl"


@dataclasses.dataclass(frozen=True)
class Predictions:
    """N judged pairs.

    Attributes:
        prompts, responses: N texts each.
        models: N names of the answering models, or None.
        judgement: of the pairs.
        first_window: judgement by the first window alone, which is what plain truncation reads.
        windows: [N] windows scored.
        truncated: [N] whether tokens were left unread.
        votes: [N, C] mean votes, or None where rows carry moderators' verdicts only.
        flagged_vote: [N] share of annotators who ticked any category, or None.
        annotations: [N] numbers of annotators.
        verdicts: moderator -> [N] mean verdict; NaN where there is none.
        known_prompt, known_pair: [N] whether the model was trained on them; None where that is not known.
    """

    prompts: list[str]
    responses: list[str]
    models: list[str] | None
    judgement: Judgement
    first_window: Judgement
    windows: np.ndarray
    truncated: np.ndarray
    votes: np.ndarray | None
    flagged_vote: np.ndarray | None
    annotations: np.ndarray
    verdicts: dict[str, np.ndarray]
    known_prompt: np.ndarray | None = None
    known_pair: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.prompts)


def judge_scores(pairs: Pairs, scores: Scores, thresholds: Thresholds, hashes: TrainingHashes | None) -> Predictions:
    """Turn scores into predictions."""
    return Predictions(
        prompts=pairs.prompts,
        responses=pairs.responses,
        models=pairs.models,
        judgement=thresholds.judge(scores.probabilities),
        first_window=thresholds.judge(scores.first_window_probabilities),
        windows=scores.windows,
        truncated=scores.truncated,
        votes=pairs.labels,
        flagged_vote=pairs.flagged,
        annotations=pairs.weight,
        verdicts=pairs.verdicts,
        known_prompt=None if hashes is None else hashes.has_prompts(pairs.prompts),
        known_pair=None if hashes is None else hashes.has_pairs(pairs.prompts, pairs.responses),
    )


def write_predictions(path: Path, predictions: Predictions, categories: Sequence[str]) -> None:
    """Write one line for each pair."""
    judged, first = predictions.judgement, predictions.first_window
    with path.open("w", encoding="utf-8") as file:
        for i in range(len(predictions)):
            row: dict[str, Any] = {"prompt": predictions.prompts[i], "response": predictions.responses[i]}
            if predictions.models is not None:
                row["model"] = predictions.models[i]
            row["flagged"], row["risk"] = bool(judged.flagged[i]), float(judged.risk[i])
            row["categories"] = _named(categories, judged.categories[i].tolist())
            row["probabilities"] = _named(categories, judged.probabilities[i].tolist())
            row["raw_probabilities"] = _named(categories, judged.raw[i].tolist())
            row["windows"], row["truncated"] = int(predictions.windows[i]), bool(predictions.truncated[i])
            if predictions.windows[i] > 1:
                row["first_window"] = {
                    "flagged": bool(first.flagged[i]),
                    "risk": float(first.risk[i]),
                    "categories": _named(categories, first.categories[i].tolist()),
                    "probabilities": _named(categories, first.probabilities[i].tolist()),
                    "raw_probabilities": _named(categories, first.raw[i].tolist()),
                }
            if predictions.votes is not None and predictions.flagged_vote is not None:
                row["votes"] = _named(categories, predictions.votes[i].tolist())
                row["flagged_vote"] = float(predictions.flagged_vote[i])
            row["annotations"] = int(predictions.annotations[i])
            if predictions.verdicts:
                row["verdicts"] = {
                    name: None if np.isnan(votes[i]) else float(votes[i])
                    for name, votes in predictions.verdicts.items()
                }
            if predictions.known_prompt is not None and predictions.known_pair is not None:
                row["known"] = {"prompt": bool(predictions.known_prompt[i]), "pair": bool(predictions.known_pair[i])}
            file.write(json.dumps(row, ensure_ascii=False) + "\n")


def _named(categories: Sequence[str], values: Sequence[Any]) -> dict[str, Any]:
    return dict(zip(categories, values, strict=True))


def read_predictions(path: Path) -> tuple[Predictions, tuple[str, ...]]:
    """Read predictions and the names of the categories.

    Raises:
        CheckpointError: the file is missing or damaged.
    """
    rows = []
    try:
        with path.open("rb") as file:
            for number, line in enumerate(file, 1):
                try:
                    if line.strip():
                        rows.append(json.loads(line.decode("utf-8-sig")))
                except (ValueError, RecursionError):
                    raise CheckpointError(f"{path}, line {number}: is no JSON; evaluate again") from None
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error.strerror}); give the output of an evaluation") from None
    if not rows:
        raise CheckpointError(f"{path}: is empty; evaluate again")
    try:
        _check_types(rows)
        return _collect(rows)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise CheckpointError(f"{path}: lacks or garbles {error}; evaluate again with this version") from None


def _check_types(rows: list[dict[str, Any]]) -> None:
    for number, row in enumerate(rows, 1):
        texts = [row["prompt"], row["response"], row.get("model", "")]
        flags = [row["flagged"], row["truncated"], *row["categories"].values()]
        numbers = [row["risk"], *row["probabilities"].values(), *row["raw_probabilities"].values()]
        good = all(isinstance(text, str) for text in texts) and all(isinstance(flag, bool) for flag in flags)
        if not good or not all(isinstance(value, int | float) and 0 <= value <= 1 for value in numbers):
            raise ValueError(f"a value of row {number}")


def _collect(rows: list[dict[str, Any]]) -> tuple[Predictions, tuple[str, ...]]:
    categories = tuple(rows[0]["probabilities"])

    def table(source: Sequence[dict[str, Any]], key: str, kind: type) -> np.ndarray:
        return np.array([[row[key][name] for name in categories] for row in source], dtype=kind)

    def judgement(source: Sequence[dict[str, Any]]) -> Judgement:
        return Judgement(
            raw=table(source, "raw_probabilities", float),
            probabilities=table(source, "probabilities", float),
            risk=np.array([row["risk"] for row in source], dtype=float),
            flagged=np.array([row["flagged"] for row in source], dtype=bool),
            categories=table(source, "categories", bool),
        )

    moderators = list(rows[0].get("verdicts", {}))
    voted, hashed = "votes" in rows[0], "known" in rows[0]
    return Predictions(
        prompts=[row["prompt"] for row in rows],
        responses=[row["response"] for row in rows],
        models=[row["model"] for row in rows] if "model" in rows[0] else None,
        judgement=judgement(rows),
        first_window=judgement([row.get("first_window", row) for row in rows]),
        windows=np.array([row["windows"] for row in rows], dtype=np.int64),
        truncated=np.array([row["truncated"] for row in rows], dtype=bool),
        votes=table(rows, "votes", float) if voted else None,
        flagged_vote=np.array([row["flagged_vote"] for row in rows], dtype=float) if voted else None,
        annotations=np.array([row["annotations"] for row in rows], dtype=np.int64),
        verdicts={
            name: np.array(
                [np.nan if row["verdicts"][name] is None else row["verdicts"][name] for row in rows], dtype=float
            )
            for name in moderators
        },
        known_prompt=np.array([row["known"]["prompt"] for row in rows], dtype=bool) if hashed else None,
        known_pair=np.array([row["known"]["pair"] for row in rows], dtype=bool) if hashed else None,
    ), categories
