"""Everything that `metrics.json` holds, computed from predictions.

In: predictions of N pairs. Out: metrics with intervals, calibration, proportions, agreement, views. Step 12.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from qlora_moderation.calibration import (
    MIN_POSITIVES_TO_CALIBRATE,
    compute_calibration_line,
    compute_ece,
    compute_ece_of_the_perfect,
    compute_log_loss_of,
)
from qlora_moderation.intervals import Bootstrap, draw_harmful_rows, upper_bound
from qlora_moderation.metrics import (
    AGREEMENT,
    Judged,
    arrange,
    compute_agreement,
    compute_binary_metrics,
    compute_metrics,
    majority,
    measure,
    measure_all,
)
from qlora_moderation.predictions import Predictions
from qlora_moderation.thresholds import Judgement, Thresholds

OURS = "qlora_moderation"
"""Name of this project's verdicts beside other moderators'."""

POOLED = "all"
"""Name of the answers of all models together."""

_CALIBRATION_DRAWS = 200
_WINDOW_GROUPS = ((1, 1), (2, 2), (3, 4), (5, None))


def analyse(
    predictions: Predictions, thresholds: Thresholds, categories: Sequence[str], replicates: int, seed: int
) -> dict[str, Any]:
    """Return metrics, views, calibration, flagged proportions and agreement.

    Args:
        predictions: of N pairs.
        thresholds: that made them.
        categories: C names.
        replicates: bootstrap draws; 0: no intervals.
        seed: of the draws.
    """
    bootstrap = Bootstrap.of(predictions.prompts, replicates, seed)
    result: dict[str, Any] = {"bootstrap": {"replicates": replicates, "level": bootstrap.level, "unit": "prompt"}}
    if predictions.votes is not None and predictions.flagged_vote is not None:
        everything = np.ones(len(predictions), dtype=bool)
        result |= _measure_rows(predictions, everything, categories, bootstrap)
        if (predictions.annotations > 1).any():
            rows = _measure_rows(predictions, everything, categories, bootstrap, by_annotation=True)
            result["by_annotation"] = rows | {"rows": int(predictions.annotations.sum())}
        if predictions.known_prompt is not None and predictions.known_pair is not None:
            clean = ~predictions.known_prompt
            result["clean"] = {"pairs": int(clean.sum()), "known_pairs": int(predictions.known_pair.sum())}
            if clean.any() and not clean.all():
                result["clean"] |= _measure_rows(predictions, clean, categories, bootstrap)
        result["calibration"] = _describe_calibration(predictions, thresholds, categories, bootstrap)
        result["rules"] = _compare_rules(predictions, thresholds)
        result["missed_harm"] = _count_missed_harm(predictions, seed)
    verdicts = collect_verdicts(predictions)
    result["flagged_proportion"], result["flagged_intervals"] = compute_flagged_proportion(
        verdicts, predictions.models, bootstrap
    )
    if predictions.verdicts:
        result["agreement"] = compute_all_agreements(verdicts, predictions.models, bootstrap)
    if (predictions.windows > 1).any():
        result["windows"] = _describe_windows(predictions)
    return result


def collect_verdicts(predictions: Predictions) -> dict[str, np.ndarray]:
    """Return moderator -> [N] share of yes: ours first, then the rows' own, then the labels' majority."""
    verdicts = {OURS: predictions.judgement.flagged.astype(float), **predictions.verdicts}
    if predictions.flagged_vote is not None and "labels" not in verdicts:
        verdicts["labels"] = majority(predictions.flagged_vote).astype(float)
    return verdicts


def take(judgement: Judgement, rows: np.ndarray) -> Judgement:
    """Return the judgement of some rows."""
    return Judgement(**{name: value[rows] for name, value in vars(judgement).items()})


def _measure_rows(
    predictions: Predictions,
    rows: np.ndarray,
    categories: Sequence[str],
    bootstrap: Bootstrap,
    by_annotation: bool = False,
) -> dict[str, Any]:
    assert predictions.votes is not None and predictions.flagged_vote is not None
    votes, flagged = predictions.votes[rows], predictions.flagged_vote[rows]
    judgement = take(predictions.judgement, rows)
    annotations = predictions.annotations[rows] if by_annotation else None
    parts = arrange(votes, flagged, judgement, categories, annotations)
    return {
        "metrics": compute_metrics(votes, flagged, judgement, categories, annotations),
        "intervals": bootstrap.take(rows).intervals(
            lambda weights: measure_all(parts, categories, weights), _find_shares(parts)
        ),
    }


def _find_shares(parts: Mapping[str, Judged]) -> dict[str, np.ndarray]:
    """Return metric -> rows over which it is a plain share."""
    shares: dict[str, np.ndarray] = {}
    for part, judged in parts.items():
        if judged.row is None:
            yes = judged.yes > judged.no
            shares |= {f"{part}/recall": yes, f"{part}/precision": judged.decided, f"{part}/false_positive_rate": ~yes}
            shares |= {f"{part}/accuracy": np.ones_like(yes), f"{part}/flagged_proportion": np.ones_like(yes)}
    return shares


def _describe_calibration(
    predictions: Predictions, thresholds: Thresholds, categories: Sequence[str], bootstrap: Bootstrap
) -> dict[str, Any]:
    """Return for each category, and for `flagged`, how far its probabilities are those of the votes."""
    assert predictions.votes is not None and predictions.flagged_vote is not None
    judged, weight = predictions.judgement, predictions.annotations.astype(float)
    columns = {"flagged": (judged.raw.max(axis=1), judged.risk, predictions.flagged_vote)}
    for c, name in enumerate(categories):
        columns[name] = judged.raw[:, c], judged.probabilities[:, c], predictions.votes[:, c]
    draws = Bootstrap(bootstrap.prompts, min(_CALIBRATION_DRAWS, bootstrap.replicates), bootstrap.seed, bootstrap.level)
    found = {}
    for name, (raw, probabilities, votes) in columns.items():
        intercept, slope = line = compute_calibration_line(probabilities, votes, weight)
        if min(votes @ weight, (1 - votes) @ weight) < MIN_POSITIVES_TO_CALIBRATE:
            intercept = slope = float("nan")  # a line through a handful of votes says nothing
        intervals = {}
        if not np.isnan(slope):

            def lines(weights: np.ndarray, p: Any = probabilities, v: Any = votes, start: Any = line) -> dict[str, Any]:
                pairs = np.array([compute_calibration_line(p, v, weight * each, start) for each in weights])
                return {"intercept": pairs[:, 0], "slope": pairs[:, 1]}

            intervals = draws.intervals(lines)
        found[name] = {
            "log_loss": compute_log_loss_of(probabilities, votes, weight),
            "raw_log_loss": compute_log_loss_of(raw, votes, weight),
            "intercept": None if np.isnan(intercept) else intercept,
            "slope": None if np.isnan(slope) else slope,
            "intervals": intervals,
            "ece": compute_ece(probabilities, votes, weight),
            "ece_if_perfect": compute_ece_of_the_perfect(probabilities, weight),
        }
    return found


def _compare_rules(predictions: Predictions, thresholds: Thresholds) -> dict[str, Any]:
    """Return how well the highest category and P(unsafe) each tell the flagged votes of these rows."""
    assert predictions.flagged_vote is not None
    risks = {"max": predictions.judgement.probabilities.max(axis=1)}
    if thresholds.risk_model is not None:
        risks["calibrated"] = thresholds.risk_model.apply(predictions.judgement.raw)
    truth, weight = majority(predictions.flagged_vote), predictions.annotations.astype(float)
    found = {}
    for rule, risk in risks.items():
        metrics = compute_binary_metrics(truth, risk > 0.5, risk)
        found[rule] = {
            "auroc": metrics["auroc"],
            "average_precision": metrics["average_precision"],
            "log_loss": compute_log_loss_of(risk, predictions.flagged_vote, weight),
        }
    return found


def _count_missed_harm(predictions: Predictions, seed: int) -> dict[str, Any]:
    """Return how many harmful prompts are missed, by one harmful pair of each, with the exact upper bound."""
    assert predictions.flagged_vote is not None
    rows = draw_harmful_rows(majority(predictions.flagged_vote), predictions.prompts, seed)
    missed = int((~predictions.judgement.flagged[rows]).sum())
    bound = upper_bound(missed, len(rows), 0.95) if len(rows) else None
    return {"harmful_prompts": len(rows), "missed": missed, "upper_bound": bound, "confidence": 0.95}


def _groups(models: list[str] | None, count: int) -> dict[str, np.ndarray]:
    """Return answering model -> [N] bool, and all of them together; a model named like the pool gets quotes."""
    groups = {}
    for model in dict.fromkeys(models or []):
        if model:
            groups[f"'{model}'" if model == POOLED else model] = np.array([name == model for name in models or []])
    return groups | {POOLED: np.ones(count, dtype=bool)}


def compute_flagged_proportion(
    verdicts: Mapping[str, np.ndarray], models: list[str] | None, bootstrap: Bootstrap
) -> tuple[dict[str, dict[str, float]], dict[str, dict[str, list[float] | None]]]:
    """Return model -> moderator -> share of its judged answers that the moderator flags, and the same for the intervals."""
    shares: dict[str, dict[str, float]] = {}
    intervals: dict[str, dict[str, list[float] | None]] = {}
    for group, members in _groups(models, len(bootstrap.prompts)).items():
        for moderator, votes in verdicts.items():
            rows = members & ~np.isnan(votes)
            if not rows.any():
                continue
            flagged = majority(votes[rows])
            shares.setdefault(group, {})[moderator] = float(flagged.mean())
            intervals.setdefault(group, {})[moderator] = _find_share_interval(flagged, bootstrap.take(rows))
    return shares, intervals


def _find_share_interval(flagged: np.ndarray, bootstrap: Bootstrap) -> list[float] | None:
    judged, key = Judged.of(np.zeros_like(flagged), flagged), "flagged_proportion"
    found = bootstrap.intervals(lambda weights: {key: measure(judged, weights)[key]}, {key: np.ones_like(flagged)})
    return found.get(key)


def compute_all_agreements(
    verdicts: Mapping[str, np.ndarray], models: list[str] | None, bootstrap: Bootstrap
) -> list[dict[str, Any]]:
    """Compare this project's verdicts with each moderator's, over all pairs and for each answering model."""
    rows = []
    groups = _groups(models, len(bootstrap.prompts))
    for moderator, votes in verdicts.items():
        if moderator == OURS:
            continue
        for model in [POOLED, *(name for name in groups if name != POOLED)]:
            members = ~np.isnan(votes) & groups[model]
            if not members.any():
                continue
            reference, ours = majority(votes[members]), verdicts[OURS][members] > 0
            intervals = _find_agreement_intervals(Judged.of(reference, ours), bootstrap.take(members))
            rows.append(
                {"reference": moderator, "model": model, **compute_agreement(reference, ours), "intervals": intervals}
            )
    return rows


def _find_agreement_intervals(judged: Judged, bootstrap: Bootstrap) -> dict[str, list[float] | None]:
    shares = {key.partition("/")[2]: rows for key, rows in _find_shares({"": judged}).items()}
    found = bootstrap.intervals(lambda weights: {key: measure(judged, weights)[key] for key in AGREEMENT}, shares)
    return {("agreement" if key == "accuracy" else key): edges for key, edges in found.items()}


def _describe_windows(predictions: Predictions) -> list[dict[str, Any]]:
    """Return, by number of windows, what the windows flag and what the first one alone, plain truncation, flags."""
    reference = predictions.flagged_vote
    name = "labels"
    if reference is None and predictions.verdicts:
        name, reference = next(iter(predictions.verdicts.items()))
    found = []
    for low, high in _WINDOW_GROUPS:
        rows = (predictions.windows >= low) & (predictions.windows <= (high or np.inf))
        if not rows.any():
            continue
        entry: dict[str, Any] = {
            "windows": str(low) if low == high else f"{low} to {high}" if high else f"{low} or more"
        }
        entry["pairs"] = int(rows.sum())
        for key, judgement in (("windowed", predictions.judgement), ("truncated", predictions.first_window)):
            entry[f"flagged, {key}"] = float(judgement.flagged[rows].mean())
            if reference is not None:
                known = rows & ~np.isnan(reference)
                if known.any():
                    metrics = compute_binary_metrics(majority(reference[known]), judgement.flagged[known])
                    entry[f"recall, {key}"] = metrics["recall"]
                    entry[f"false-positive rate, {key}"] = metrics["false_positive_rate"]
                    entry["reference"] = name
        found.append(entry)
    return found
