"""Metrics as pure functions of votes and decisions, for all rows at once or for many weightings of them.

In: votes, decisions, risks. Out: flat mappings such as `flagged/f1`. Steps 9 and 12 of the straight line.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

import numpy as np

from qlora_moderation.errors import ConfigError
from qlora_moderation.options import nearest
from qlora_moderation.thresholds import Judgement

Metrics = dict[str, float | None]


_BINARY = ("accuracy", "precision", "recall", "f1", "auroc", "average_precision")
_MACRO = ("precision", "recall", "f1", "auroc", "average_precision")


def selecting_metrics(categories: Sequence[str]) -> list[str]:
    """Return the names by which weights can be selected: those of `compute_metrics` where higher is better."""
    names = [f"{part}/{key}" for part in ("flagged", "micro", "macro", *categories) for key in _BINARY]
    return [name for name in names if name != "macro/accuracy"]


def check_selecting(name: str, categories: Sequence[str]) -> None:
    """Refuse a metric by which no weights can be selected.

    Raises:
        ConfigError: with the nearest known one.
    """
    allowed = selecting_metrics(categories)
    if name not in allowed:
        raise ConfigError(f"--metric_for_best_model {name}: is no metric of this taxonomy{nearest(name, allowed)}")


def majority(votes: np.ndarray) -> np.ndarray:
    """Return where at least half of the annotators said yes; a tie counts as yes, the cautious reading."""
    return votes >= 0.5


@dataclasses.dataclass(frozen=True)
class Judged:
    """N decisions beside the truth.

    Attributes:
        yes, no: [N] how much each row counts as truly yes and as truly no. A majority gives 1 and 0; counting every annotation
            by itself gives the numbers of annotators.
        decided: [N] bool.
        score: [N] higher means more likely yes, or None.
        row: [N] the row that each decision belongs to, where several do (micro averages); None: its own.
    """

    yes: np.ndarray
    no: np.ndarray
    decided: np.ndarray
    score: np.ndarray | None = None
    row: np.ndarray | None = None

    @classmethod
    def of(cls, truth: np.ndarray, decided: np.ndarray, score: np.ndarray | None = None) -> Judged:
        """Return decisions beside a plain truth [N] bool."""
        return cls(truth.astype(float), 1.0 - truth.astype(float), decided, score)


def measure(judged: Judged, weights: np.ndarray | None = None) -> dict[str, np.ndarray]:
    """Return every metric for each of B weightings of the rows.

    Args:
        judged: the decisions.
        weights: [B, rows]; None: one weighting, all ones.

    Returns:
        Metric -> [B]. NaN where it is undefined: recall, AUROC and average precision without a yes, AUROC and false-positive
        rate without a no, kappa where chance agreement is certain. Precision without decisions and F1 without either count as
        0, as in scikit-learn.
    """
    rows = np.arange(len(judged.yes)) if judged.row is None else judged.row
    count = int(rows.max()) + 1 if len(rows) else 0
    if weights is None:
        weights = np.ones((1, count))
    found = derive_metrics(weights @ sum_decisions(judged))
    if judged.score is not None:
        found["auroc"], found["average_precision"] = _measure_ranking(judged, rows, weights)
    return found


def sum_decisions(judged: Judged) -> np.ndarray:
    """Return what each row adds to true positives, false negatives, false positives and true negatives, [rows, 4]."""
    rows = np.arange(len(judged.yes)) if judged.row is None else judged.row
    yes, no = judged.decided, ~judged.decided
    parts = (judged.yes * yes, judged.yes * no, judged.no * yes, judged.no * no)
    return np.stack([np.bincount(rows, part) for part in parts], axis=1)


def derive_metrics(sums: np.ndarray) -> dict[str, np.ndarray]:
    """Return the metrics of decisions, each [B], from sums [B, 4] of `sum_decisions`."""
    tp, fn, fp, tn = sums.T
    total = tp + fn + fp + tn
    with np.errstate(divide="ignore", invalid="ignore"):
        chance = ((tp + fn) * (tp + fp) + (fp + tn) * (fn + tn)) / total**2
        agreement = (tp + tn) / total
        return {
            "accuracy": agreement,
            "precision": np.where(tp + fp > 0, tp / (tp + fp), 0.0),
            "recall": tp / (tp + fn),
            "f1": np.where(2 * tp + fp + fn > 0, 2 * tp / (2 * tp + fp + fn), 0.0),
            "false_positive_rate": fp / (fp + tn),
            "flagged_proportion": (tp + fp) / total,
            "cohen_kappa": np.where(chance < 1, (agreement - chance) / (1 - chance), np.nan),
        }


def _measure_ranking(judged: Judged, rows: np.ndarray, weights: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return AUROC [B] and average precision [B]; equal scores count together."""
    assert judged.score is not None
    order = np.argsort(-judged.score, kind="stable")
    ends = np.r_[np.flatnonzero(np.diff(judged.score[order])), len(order) - 1]
    taken, yes, no = rows[order], judged.yes[order], judged.no[order]
    auroc, precision = np.empty(len(weights)), np.empty(len(weights))
    for b, weight in enumerate(weights):
        each = weight[taken]
        tp, fp = np.cumsum(each * yes)[ends], np.cumsum(each * no)[ends]
        rise = np.diff(tp, prepend=0.0)
        with np.errstate(divide="ignore", invalid="ignore"):
            shares = np.where(tp + fp > 0, tp / (tp + fp), 0.0)
            precision[b] = (rise * shares).sum() / tp[-1]
            area = (np.diff(fp, prepend=0.0) * (tp - rise / 2)).sum()
            auroc[b] = area / (tp[-1] * fp[-1])
    return auroc, precision


def _single(found: Mapping[str, np.ndarray]) -> Metrics:
    return {key: None if np.isnan(value[0]) else float(value[0]) for key, value in found.items()}


def compute_binary_metrics(truth: np.ndarray, decided: np.ndarray, score: np.ndarray | None = None) -> Metrics:
    """Return the metrics of `measure` for decisions beside a plain truth, and `support`, the number of true ones.

    Args:
        truth: [N] bool.
        decided: [N] bool.
        score: [N], higher means more likely true; without it neither AUROC nor average precision.

    Returns:
        None stands where a metric is undefined.
    """
    found = _single(measure(Judged.of(truth, decided, score)))
    del found["cohen_kappa"], found["flagged_proportion"]
    return {**found, "support": int(truth.sum())}


def arrange(
    labels: np.ndarray,
    flagged: np.ndarray,
    judgement: Judgement,
    categories: Sequence[str],
    annotations: np.ndarray | None = None,
) -> dict[str, Judged]:
    """Set decisions beside the votes: `flagged`, `micro`, and each category.

    Args:
        labels: [N, C] mean votes.
        flagged: [N] share of annotators who ticked any category.
        judgement: of the N pairs.
        categories: C names.
        annotations: [N] numbers of annotators, to count every annotation by itself; None: the majority of each pair.
    """
    if annotations is None:
        labels, flagged = majority(labels).astype(float), majority(flagged).astype(float)
        annotations = np.ones(len(labels))

    def judged(votes: np.ndarray, decided: np.ndarray, score: np.ndarray) -> Judged:
        return Judged(votes * annotations, (1 - votes) * annotations, decided, score)

    parts = {"flagged": judged(flagged, judgement.flagged, judgement.risk)}
    count = len(categories)
    each = np.repeat(annotations, count)
    parts["micro"] = Judged(
        labels.ravel() * each,
        (1 - labels.ravel()) * each,
        judgement.categories.ravel(),
        judgement.probabilities.ravel(),
        np.repeat(np.arange(len(labels)), count),
    )
    for c, name in enumerate(categories):
        parts[name] = judged(labels[:, c], judgement.categories[:, c], judgement.probabilities[:, c])
    return parts


def measure_all(
    parts: Mapping[str, Judged], categories: Sequence[str], weights: np.ndarray | None = None
) -> dict[str, np.ndarray]:
    """Return `part/metric` -> [B] for the parts of `arrange`, and `macro`, the mean over categories where one is defined."""
    found = {
        f"{part}/{key}": value for part, judged in parts.items() for key, value in measure(judged, weights).items()
    }
    for key in _MACRO:
        each = np.stack([found[f"{name}/{key}"] for name in categories])
        defined = ~np.isnan(each)
        with np.errstate(invalid="ignore"):
            found[f"macro/{key}"] = np.where(defined, each, 0.0).sum(axis=0) / defined.sum(axis=0)
    untold = ("/cohen_kappa", "/flagged_proportion")
    return {name: value for name, value in found.items() if name.startswith("flagged/") or not name.endswith(untold)}


def compute_metrics(
    labels: np.ndarray,
    flagged: np.ndarray,
    judgement: Judgement,
    categories: Sequence[str],
    annotations: np.ndarray | None = None,
) -> Metrics:
    """Return `flagged/...`, `micro/...`, `macro/...`, `<category>/...` and `log_loss`.

    Args:
        labels, flagged, judgement, categories, annotations: see `arrange`.

    Returns:
        The score of `flagged` is the risk. `micro` pools all N x C decisions; `macro` averages over the categories where a
        metric is defined. `support` is the number of true pairs (or annotations).
    """
    parts = arrange(labels, flagged, judgement, categories, annotations)
    result = _single(measure_all(parts, categories))
    result |= {f"{part}/support": _count(judged) for part, judged in parts.items()}
    result["log_loss"] = compute_log_loss(labels, judgement.probabilities)
    return result


def _count(judged: Judged) -> int:
    return round(float(judged.yes.sum()))


def compute_log_loss(labels: np.ndarray, probabilities: np.ndarray) -> float:
    """Return the mean binary cross-entropy in nats per label, against soft labels."""
    p = np.clip(probabilities, 1e-12, 1 - 1e-12)
    return float(-(labels * np.log(p) + (1 - labels) * np.log1p(-p)).mean())


AGREEMENT = ("cohen_kappa", "recall", "precision", "f1", "accuracy")
"""What is told of two sets of verdicts; led by kappa, since rare flags make plain agreement look good."""


def compute_agreement(reference: np.ndarray, judged: np.ndarray) -> Metrics:
    """Compare two sets of verdicts.

    Args:
        reference: [N] bool, for example a human's verdicts.
        judged: [N] bool.
    """
    found = _single(measure(Judged.of(reference, judged)))
    told = {("agreement" if key == "accuracy" else key): found[key] for key in AGREEMENT}
    shares = {"reference_flagged": float(reference.mean()), "judged_flagged": float(judged.mean())}
    return {**told, **shares, "pairs": len(reference)}
