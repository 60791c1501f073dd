"""Calibration and thresholds from validation rows.

In: raw probabilities and votes. Out: `Thresholds`, with what was found on the way. Between steps 11 and 12.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Sequence
from typing import Any, Literal

import numpy as np

from qlora_moderation.calibration import (
    Calibrator,
    compute_log_loss_of,
    cross_fit_risk,
    fit_calibrator,
    fit_risk_model,
)
from qlora_moderation.errors import ConfigError, DataError
from qlora_moderation.intervals import clopper_pearson, draw_harmful_rows, upper_bound
from qlora_moderation.metrics import compute_binary_metrics, majority
from qlora_moderation.thresholds import DEFAULT_THRESHOLD, FlaggedRule, Thresholds

_MARGIN = 1e-6  # how far below a risk its threshold is set, so that another engine's last digits do not cross it


@dataclasses.dataclass(frozen=True)
class Objective:
    """What a threshold is chosen for: the best F1, recall of at least `bound`, or a false-positive rate of at most it."""

    kind: Literal["f1", "recall", "fpr"] = "f1"
    bound: float = 0.0

    @classmethod
    def parse(cls, text: str) -> Objective:
        """Read `f1`, `recall>=0.9` or `fpr<=0.05`.

        Raises:
            ConfigError: it is none of them.
        """
        if text == "f1":
            return cls()
        found = re.fullmatch(r"\s*(recall\s*>=|fpr\s*<=)\s*(\d*\.?\d+)\s*", text)
        bound = float(found[2]) if found else 2.0
        if found is None or bound > 1:
            raise ConfigError(f"objective {text!r}: allowed: f1, 'recall>=R', 'fpr<=A', in quotes, R and A from 0 to 1")
        return cls("recall" if found[1].startswith("recall") else "fpr", bound)

    def __str__(self) -> str:
        return (
            "best F1" if self.kind == "f1" else f"{self.kind} {'>=' if self.kind == 'recall' else '<='} {self.bound:g}"
        )


@dataclasses.dataclass(frozen=True)
class TuningSettings:
    """How thresholds are tuned.

    Attributes:
        objective: of each category.
        flagged_objective: of `flagged`.
        rule: of `flagged`.
        calibrate: whether calibration maps are fitted.
        min_positives: pairs of each kind below which a category gets the shared threshold.
        max_missed_harm: largest share of harmful prompts that may be missed, or None.
        confidence: with which that holds.
        seed: of the draw of one harmful pair a prompt, and of the split.
    """

    objective: Objective = Objective()
    flagged_objective: Objective = Objective()
    rule: FlaggedRule = "max"
    calibrate: bool = True
    min_positives: int = 25
    max_missed_harm: float | None = None
    confidence: float = 0.95
    seed: int = 0


def choose_threshold(score: np.ndarray, truth: np.ndarray, objective: Objective) -> float:
    """Return the threshold in [0, 1] that meets an objective; it lies half-way between two scores.

    Args:
        score: [N] in [0, 1].
        truth: [N] bool, of both kinds.
        objective: where several thresholds are equally good, the lowest is taken for F1 and for the false-positive rate, and
            the highest for the recall.
    """
    order = np.argsort(score, kind="stable")
    ranked, yes = score[order], truth[order].astype(float)
    starts = np.r_[0, np.flatnonzero(np.diff(ranked)) + 1, len(ranked)]  # rows before it are not flagged
    edges = np.r_[0.0, ranked[starts[1:-1]], 1.0]
    below = np.r_[0.0, ranked[starts[1:] - 1]]
    candidates = (below + edges) / 2
    candidates[0] = ranked[0] / 2
    missed = np.r_[0.0, np.cumsum(yes)][starts]
    spared = starts - missed
    tp, fp = yes.sum() - missed, (len(yes) - yes.sum()) - spared
    if objective.kind == "f1":
        best = int(np.argmax(2 * tp / (tp + fp + yes.sum())))
    elif objective.kind == "recall":
        best = int(np.flatnonzero(tp / yes.sum() >= objective.bound)[-1])
    else:
        best = int(np.flatnonzero(fp / (len(yes) - yes.sum()) <= objective.bound)[0])
    return float(candidates[best])


def tune(
    raw: np.ndarray,
    labels: np.ndarray,
    flagged: np.ndarray,
    weight: np.ndarray,
    prompts: Sequence[str],
    categories: Sequence[str],
    settings: TuningSettings,
    apart: np.ndarray | None = None,
) -> Thresholds:
    """Fit calibration and thresholds.

    Args:
        raw: [N, C] raw probabilities.
        labels: [N, C] mean votes.
        flagged: [N] share of annotators who ticked any category.
        weight: [N] numbers of annotators.
        prompts: N texts.
        categories: C names.
        settings: objectives.
        apart: [N] bool, rows kept out of every fit and used for the bound on missed harm alone; needed for that bound.

    Raises:
        DataError: the rows cannot support what is asked for.
    """
    inside = np.ones(len(raw), dtype=bool) if apart is None else ~apart
    names = np.asarray(prompts, dtype=object)
    fit: dict[str, Any] = {
        "pairs": int(inside.sum()),
        "prompts": len(set(names[inside])),
        "objective": str(settings.objective),
        "flagged_objective": str(settings.flagged_objective),
        "min_positives": settings.min_positives,
    }
    part = (raw[inside], labels[inside], flagged[inside], weight[inside].astype(float), names[inside])
    calibrators, found = _calibrate(*part, categories, settings.calibrate)
    per_category = _tune_categories(part[0], part[1], calibrators, categories, settings, found)
    fit["categories"] = found
    partly = Thresholds(per_category, per_category, DEFAULT_THRESHOLD, calibrators=calibrators)
    risks, fit["flagged"] = _compare_rules(partly, *part)
    risk_model = fit_risk_model(part[0], part[2], part[3])
    truth = majority(part[2])
    if min(truth.sum(), (~truth).sum()) < settings.min_positives:
        threshold, source = (
            DEFAULT_THRESHOLD,
            f"default: fewer than {settings.min_positives} flagged or unflagged pairs",
        )
    else:
        threshold = choose_threshold(risks[settings.rule], truth, settings.flagged_objective)
        source = str(settings.flagged_objective)
    tuned = dataclasses.replace(partly, rule=settings.rule, risk_model=risk_model, origin="tuned", fit=fit)
    if settings.max_missed_harm is not None:
        assert apart is not None
        risk = tuned.judge(raw[apart]).risk
        threshold, fit["missed_harm"] = bound_missed_harm(
            risk, majority(flagged[apart]), names[apart], settings.max_missed_harm, settings.confidence, settings.seed
        )
        source = (
            f"at most {settings.max_missed_harm:g} of harmful prompts missed, at {settings.confidence:g} confidence"
        )
    fit["flagged"]["threshold_from"] = source
    tuned = dataclasses.replace(
        tuned,
        flagged_threshold=threshold,
        flagged_per_category=tuple(each.invert(threshold) for each in calibrators),
    )
    fit["flagged"]["on_these_rows"] = compute_binary_metrics(truth, tuned.judge(part[0]).flagged)
    fit["flagged"]["always_flag_f1"] = compute_binary_metrics(truth, np.ones_like(truth))["f1"]
    return tuned


def _calibrate(
    raw: np.ndarray,
    labels: np.ndarray,
    flagged: np.ndarray,
    weight: np.ndarray,
    names: np.ndarray,
    categories: Sequence[str],
    wanted: bool,
) -> tuple[tuple[Calibrator, ...], dict[str, Any]]:
    calibrators, found = [], {}
    for c, name in enumerate(categories):
        calibrator, facts = fit_calibrator(raw[:, c], labels[:, c], weight, names) if wanted else (Calibrator(), {})
        calibrators.append(calibrator)
        found[name] = {"calibration": calibrator.kind, **facts}
    return tuple(calibrators), found


def _tune_categories(
    raw: np.ndarray,
    labels: np.ndarray,
    calibrators: tuple[Calibrator, ...],
    categories: Sequence[str],
    settings: TuningSettings,
    found: dict[str, Any],
) -> tuple[float, ...]:
    """Return C raw thresholds; categories with too few pairs share one, chosen over all categories' decisions together."""
    truth = majority(labels)
    probabilities = np.stack([each.apply(raw[:, c]) for c, each in enumerate(calibrators)], axis=1)
    shared, source = DEFAULT_THRESHOLD, f"default: fewer than {settings.min_positives} positive or negative labels"
    if min(truth.sum(), (~truth).sum()) >= settings.min_positives:
        shared, source = choose_threshold(probabilities.ravel(), truth.ravel(), settings.objective), "shared"
    thresholds = []
    for c, name in enumerate(categories):
        positives = int(truth[:, c].sum())
        own = min(positives, len(truth) - positives) >= settings.min_positives
        value = choose_threshold(raw[:, c], truth[:, c], settings.objective) if own else calibrators[c].invert(shared)
        thresholds.append(value)
        found[name] |= {"positive_pairs": positives, "threshold_from": "own" if own else source}
    return tuple(thresholds)


def _compare_rules(
    partly: Thresholds, raw: np.ndarray, labels: np.ndarray, flagged: np.ndarray, weight: np.ndarray, names: np.ndarray
) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """Return the risk of each rule, P(unsafe) cross-fitted by prompt, and how well each tells flagged votes."""
    risks = {"max": partly.calibrate(raw).max(axis=1), "calibrated": cross_fit_risk(raw, flagged, weight, names)}
    facts = {}
    for rule, risk in risks.items():
        metrics = compute_binary_metrics(majority(flagged), risk > DEFAULT_THRESHOLD, risk)
        facts[rule] = {
            "auroc": metrics["auroc"],
            "average_precision": metrics["average_precision"],
            "log_loss": compute_log_loss_of(risk, flagged, weight),
        }
    return risks, facts


def bound_missed_harm(
    risk: np.ndarray, harmful: np.ndarray, prompts: np.ndarray, limit: float, confidence: float, seed: int
) -> tuple[float, dict[str, Any]]:
    """Return the highest threshold that the data show to miss at most `limit` of harmful prompts.

    One harmful pair is drawn for each prompt, so that the draws are independent. From the threshold that misses nothing the
    walk goes upwards, as long as the exact binomial upper bound of the missed share stays below the limit, and ends where it
    first does not: the missed share rises with the threshold, so this choice keeps the confidence (the argument of Bates et
    al. 2021, arXiv:2101.02703, for a monotone risk).

    Args:
        risk: [N], of rows that no fit has seen.
        harmful: [N] bool.
        prompts: [N] texts.
        limit: largest share missed.
        confidence: with which it holds.
        seed: of the draw.

    Returns:
        The threshold, and the facts: harmful prompts, missed among them, the bound, the false-positive rate paid.

    Raises:
        DataError: too few harmful prompts, or none that is harmless.
    """
    drawn = np.sort(risk[draw_harmful_rows(harmful, prompts, seed)])
    needed = int(np.ceil(np.log1p(-confidence) / np.log1p(-limit)))
    if len(drawn) < needed:
        raise DataError(
            f"--max_missed_harm {limit:g} --confidence {confidence:g}: needs at least {needed} harmful prompts set apart, "
            f"even if none is missed; the data hold {len(drawn)} (half of all prompts are set apart, the fits see the "
            "others). Give more rows, or ask for less"
        )
    missed = 0
    while missed + 1 < len(drawn) and upper_bound(missed + 1, len(drawn), confidence) <= limit:
        missed += 1
    threshold = max(0.0, float(drawn[missed]) - _MARGIN)
    harmless = risk[~harmful]
    if not len(harmless):
        raise DataError("--max_missed_harm: the rows hold no harmless pair, so that the false-positive rate is unknown")
    wrong = int((harmless > threshold).sum())
    lost = int((drawn <= threshold).sum())
    return threshold, {
        "limit": limit,
        "confidence": confidence,
        "harmful_prompts": len(drawn),
        "missed": lost,
        "upper_bound": upper_bound(lost, len(drawn), confidence),
        "false_positive_rate": wrong / len(harmless),
        "false_positive_rate_interval": clopper_pearson(wrong, len(harmless)),
        "harmless_pairs": len(harmless),
    }
