"""Metrics as pure functions of labels and probabilities.

In: majorities, probabilities, thresholds. Out: flat mappings such as `flagged/f1`. Steps 9 and 12 of the straight line.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence

import numpy as np
import sklearn.metrics

from qlora_moderation.thresholds import Thresholds

Metrics = dict[str, float | None]


_BINARY = ("accuracy", "precision", "recall", "f1", "auroc", "average_precision")


def selecting_metrics(categories: Sequence[str]) -> list[str]:
    """Return the names by which weights can be selected: those of `compute_metrics` where higher is better."""
    names = [f"{part}/{key}" for part in ("flagged", "micro", "macro", *categories) for key in _BINARY]
    return [name for name in names if name != "macro/accuracy"]


def majority(votes: np.ndarray) -> np.ndarray:
    """Return where at least half of the annotators said yes; a tie counts as yes, the cautious reading."""
    return votes >= 0.5


def compute_binary_metrics(truth: np.ndarray, predicted: np.ndarray, score: np.ndarray | None = None) -> Metrics:
    """Return accuracy, precision, recall, F1 and support, with a score also AUROC and average precision.

    Args:
        truth: [N] bool.
        predicted: [N] bool.
        score: [N], higher means more likely true.

    Returns:
        None stands where a metric is undefined: recall, AUROC and average precision without positives, AUROC without
        negatives. Precision without predictions and F1 without either count as 0, as in scikit-learn.
    """
    precision, recall, f1, _ = sklearn.metrics.precision_recall_fscore_support(
        truth, predicted, average="binary", zero_division=0
    )
    positives = int(truth.sum())
    metrics: Metrics = {
        "accuracy": float((truth == predicted).mean()),
        "precision": float(precision),
        "recall": float(recall) if positives else None,
        "f1": float(f1),
        "support": positives,
    }
    if score is not None:
        both = 0 < positives < len(truth)
        metrics["auroc"] = float(sklearn.metrics.roc_auc_score(truth, score)) if both else None
        metrics["average_precision"] = (
            float(sklearn.metrics.average_precision_score(truth, score)) if positives else None
        )
    return metrics


def compute_metrics(
    labels: np.ndarray,
    flagged: np.ndarray,
    probabilities: np.ndarray,
    thresholds: Thresholds,
    categories: Sequence[str],
) -> Metrics:
    """Return `flagged/...`, `<category>/...`, `micro/...` and `macro/...`.

    Args:
        labels: [N, C] mean votes.
        flagged: [N] share of annotators who ticked any category.
        probabilities: [N, C].
        thresholds: decide what is a yes.
        categories: C names.

    Returns:
        The score of `flagged` is the highest probability of a pair. `micro` pools all N x C decisions; `macro` averages
        over the categories where a metric is defined.
    """
    truth, decided = majority(labels), thresholds.decide(probabilities)
    parts = {"flagged": compute_binary_metrics(majority(flagged), decided[0], probabilities.max(axis=1))}
    by_category = {
        name: compute_binary_metrics(truth[:, c], decided[1][:, c], probabilities[:, c])
        for c, name in enumerate(categories)
    }
    parts.update(by_category)
    parts["micro"] = compute_binary_metrics(truth.ravel(), decided[1].ravel(), probabilities.ravel())
    parts["macro"] = {
        key: _mean_of_defined([metrics[key] for metrics in by_category.values()])
        for key in ("precision", "recall", "f1", "auroc", "average_precision")
    }
    result = {f"{part}/{key}": value for part, metrics in parts.items() for key, value in metrics.items()}
    result["log_loss"] = compute_log_loss(labels, probabilities)
    return result


def _mean_of_defined(values: Sequence[float | None]) -> float | None:
    defined = [value for value in values if value is not None]
    return float(np.mean(defined)) if defined else None


def compute_log_loss(labels: np.ndarray, probabilities: np.ndarray) -> float:
    """Return the mean binary cross-entropy in nats per label, against soft labels."""
    p = np.clip(probabilities, 1e-12, 1 - 1e-12)
    return float(-(labels * np.log(p) + (1 - labels) * np.log1p(-p)).mean())


def compute_agreement(reference: np.ndarray, judged: np.ndarray) -> Metrics:
    """Compare two sets of verdicts; leads with Cohen's kappa, since rare flags make plain agreement look good.

    Args:
        reference: [N] bool, for example a human's verdicts.
        judged: [N] bool.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # kappa of two constant raters is undefined; it comes back as NaN
        kappa = float(sklearn.metrics.cohen_kappa_score(reference, judged))
    metrics = compute_binary_metrics(reference, judged)
    return {
        "cohen_kappa": kappa if np.isfinite(kappa) else None,
        "recall": metrics["recall"],
        "precision": metrics["precision"],
        "f1": metrics["f1"],
        "agreement": metrics["accuracy"],
        "reference_flagged": float(reference.mean()),
        "judged_flagged": float(judged.mean()),
        "pairs": len(reference),
    }
