"""Probabilities that mean what they say: a monotone map for each category, and the risk of a pair as a whole.

In: raw probabilities and annotators' votes of validation rows. Out: maps that are stored with the model. Used by step 12.

Everything starts from the raw probability, which any stock loader gives, too.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from scipy.optimize import minimize
from scipy.special import expit, log_expit, logit

MIN_POSITIVES_TO_CALIBRATE = 10
"""Votes of yes, and of no, below which a category keeps its raw probability."""

MIN_POSITIVES_FOR_ISOTONIC = 1000
RISK_CLIP = 1e-4
"""Raw probabilities are clipped to [1e-4, 1 - 1e-4] for the risk: beyond, fp32 leaves too few digits of the logit."""

_CLIP = 1e-12
_FOLDS = 5
_STRICT = 1e-6  # share of the raw probability in an isotonic map, which makes it rise everywhere


@dataclasses.dataclass(frozen=True)
class Calibrator:
    """A rising map from a raw to a calibrated probability.

    Attributes:
        kind: `none`; `temperature`: sigmoid(slope z); `platt`: sigmoid(slope z + intercept), z the raw logit (Platt 1999;
            Guo et al. 2017, arXiv:1706.04599); `isotonic`: straight lines between `knots`.
        slope, intercept: of the logit.
        knots: raw and calibrated probabilities of an isotonic map.
    """

    kind: str = "none"
    slope: float = 1.0
    intercept: float = 0.0
    knots: tuple[tuple[float, ...], tuple[float, ...]] = ((), ())

    def apply(self, raw: np.ndarray) -> np.ndarray:
        """Return calibrated probabilities for raw ones of any shape."""
        if self.kind == "none":
            return np.asarray(raw, dtype=np.float64)
        if self.kind == "isotonic":
            return (1 - _STRICT) * np.interp(raw, *self.knots) + _STRICT * np.asarray(raw)
        return expit(self.slope * logit(np.clip(raw, _CLIP, 1 - _CLIP)) + self.intercept)

    def invert(self, calibrated: float) -> float:
        """Return the raw probability that is mapped to `calibrated`: 0 or 1 where none is."""
        if self.kind == "none":
            return calibrated
        if self.kind == "isotonic":
            low, high = 0.0, 1.0
            for _ in range(60):
                middle = (low + high) / 2
                low, high = (middle, high) if self.apply(np.array(middle)) < calibrated else (low, middle)
            return (low + high) / 2
        if not 0 < calibrated < 1:
            return calibrated
        return float(expit((logit(calibrated) - self.intercept) / self.slope))

    def to_dict(self) -> dict[str, Any]:
        """Return what `from_dict` reads back."""
        if self.kind == "isotonic":
            return {"kind": self.kind, "knots": [list(side) for side in self.knots]}
        return {"kind": self.kind} | ({} if self.kind == "none" else {"slope": self.slope, "intercept": self.intercept})

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Calibrator:
        """Read a map.

        Raises:
            ValueError: it is none, or does not rise.
        """
        kind = values["kind"]
        if kind == "none":
            return cls()
        if kind == "isotonic":
            raw, calibrated = (tuple(map(float, side)) for side in values["knots"])
            rises = len(raw) == len(calibrated) > 1 and bool(
                np.all(np.diff(raw) > 0) and np.all(np.diff(calibrated) >= 0)
            )
            if not rises or not 0 <= raw[0] <= raw[-1] <= 1 or not 0 <= calibrated[0] <= calibrated[-1] <= 1:
                raise ValueError("knots do not rise from 0 to 1")
            return cls(kind, knots=(raw, calibrated))
        slope, intercept = float(values["slope"]), float(values["intercept"])
        if kind not in ("temperature", "platt") or not 0 < slope < np.inf or not np.isfinite(intercept):
            raise ValueError(f"{kind} with slope {slope} and intercept {intercept}")
        return cls(kind, slope, intercept)


@dataclasses.dataclass(frozen=True)
class RiskModel:
    """P(unsafe) of a pair as a logistic function of the C raw logits; no weight is negative.

    Three annotators who each tick another category all say "unsafe", while no category reaches a half: a maximum over
    categories cannot see that, a weighted sum of logits can.
    """

    weights: tuple[float, ...]
    bias: float

    def apply(self, raw: np.ndarray) -> np.ndarray:
        """Return P(unsafe) [N] for raw probabilities [N, C]."""
        return expit(logit(np.clip(raw, RISK_CLIP, 1 - RISK_CLIP)) @ np.asarray(self.weights) + self.bias)


def fit_calibrator(
    raw: np.ndarray, votes: np.ndarray, weight: np.ndarray, groups: np.ndarray
) -> tuple[Calibrator, dict[str, Any]]:
    """Choose and fit the map of one category.

    Args:
        raw: [N] raw probabilities.
        votes: [N] share of annotators who said yes.
        weight: [N] number of annotators.
        groups: [N] prompts; those of one prompt are never on both sides of a cross-validation.

    Returns:
        The map with the lowest cross-validated log-loss, the simplest first where they are equal within a thousandth, and
        what was found: the log-losses, or why nothing was fitted.
    """
    yes, no = float(votes @ weight), float((1 - votes) @ weight)
    if min(yes, no) < MIN_POSITIVES_TO_CALIBRATE:
        return Calibrator(), {"positives": yes, "reason": f"fewer than {MIN_POSITIVES_TO_CALIBRATE} votes of a kind"}
    kinds = ["none", "temperature", "platt"]
    if yes >= MIN_POSITIVES_FOR_ISOTONIC:
        kinds.append("isotonic")
    folds = assign_folds(groups)
    losses = {}
    for kind in kinds:
        held_out = np.empty(len(raw))
        for fold in range(_FOLDS):
            inside = folds != fold
            held_out[~inside] = _fit_kind(kind, raw[inside], votes[inside], weight[inside]).apply(raw[~inside])
        losses[kind] = compute_log_loss_of(held_out, votes, weight)
    chosen = "none"
    for kind in kinds:
        if losses[kind] < losses[chosen] * 0.999:
            chosen = kind
    return _fit_kind(chosen, raw, votes, weight), {"positives": yes, "log_loss": losses}


def _fit_kind(kind: str, raw: np.ndarray, votes: np.ndarray, weight: np.ndarray) -> Calibrator:
    if kind == "none" or not 0 < float(votes @ weight) < float(weight.sum()):
        return Calibrator()
    if kind == "isotonic":
        from sklearn.isotonic import IsotonicRegression

        fit = IsotonicRegression(y_min=0, y_max=1, increasing=True).fit(raw, votes, sample_weight=weight)
        x, y = np.asarray(fit.X_thresholds_, dtype=float), np.asarray(fit.y_thresholds_, dtype=float)
        if x[0] > 0:
            x, y = np.r_[0.0, x], np.r_[y[0], y]
        if x[-1] < 1:
            x, y = np.r_[x, 1.0], np.r_[y, y[-1]]
        keep = np.r_[True, np.diff(x) > 0]
        return Calibrator("isotonic", knots=(tuple(x[keep].tolist()), tuple(y[keep].tolist())))
    z = logit(np.clip(raw, _CLIP, 1 - _CLIP))
    columns = z[:, None] if kind == "temperature" else np.stack([z, np.ones_like(z)], axis=1)
    # a weak pull to slope 1 and intercept 0, as of one vote, keeps separable votes finite
    start = np.array([1.0, 0.0][: columns.shape[1]])
    found = _fit_logistic(columns, votes, weight, start, [(1e-2, 100.0), (None, None)][: len(start)], start, 1.0)
    return Calibrator(kind, float(found[0]), float(found[1]) if len(found) > 1 else 0.0)


def fit_risk_model(raw: np.ndarray, flagged: np.ndarray, weight: np.ndarray, strength: float = 10.0) -> RiskModel:
    """Fit P(unsafe) to the flagged votes.

    Args:
        raw: [N, C] raw probabilities.
        flagged: [N] share of annotators who ticked any category.
        weight: [N] number of annotators.
        strength: of the quadratic pull of all weights to their common mean at the start, 1 / C, in votes.
    """
    z = logit(np.clip(raw, RISK_CLIP, 1 - RISK_CLIP))
    columns = np.concatenate([z, np.ones((len(z), 1))], axis=1)
    start = np.r_[np.full(z.shape[1], 1 / z.shape[1]), 0.0]
    pull = np.r_[np.full(z.shape[1], strength), 1e-3]
    found = _fit_logistic(columns, flagged, weight, start, [*[(0.0, None)] * z.shape[1], (None, None)], start, pull)
    return RiskModel(tuple(found[:-1].tolist()), float(found[-1]))


def cross_fit_risk(raw: np.ndarray, flagged: np.ndarray, weight: np.ndarray, groups: np.ndarray) -> np.ndarray:
    """Return P(unsafe) [N] where each row's model was fitted without its prompt."""
    folds, risk = assign_folds(groups), np.empty(len(raw))
    for fold in range(_FOLDS):
        inside = folds != fold
        risk[~inside] = fit_risk_model(raw[inside], flagged[inside], weight[inside]).apply(raw[~inside])
    return risk


def _fit_logistic(
    columns: np.ndarray,
    votes: np.ndarray,
    weight: np.ndarray,
    start: np.ndarray,
    bounds: Sequence[tuple[float | None, float | None]],
    center: np.ndarray,
    pull: np.ndarray | float,
) -> np.ndarray:
    def loss(parameters: np.ndarray) -> tuple[float, np.ndarray]:
        scores, away = columns @ parameters, parameters - center
        value = -(weight * (votes * log_expit(scores) + (1 - votes) * log_expit(-scores))).sum()
        gradient = columns.T @ (weight * (expit(scores) - votes))
        return value + 0.5 * float((pull * away**2).sum()), gradient + pull * away

    return minimize(loss, start, jac=True, method="L-BFGS-B", bounds=list(bounds), options={"maxiter": 500}).x


def assign_folds(groups: np.ndarray) -> np.ndarray:
    """Return the fold [N] of each row; rows of one group are in one fold, whatever the order of the rows."""
    names, index = np.unique(groups, return_inverse=True)
    order = np.random.default_rng(0).permutation(len(names))
    return (order % _FOLDS)[index]


def compute_log_loss_of(probabilities: np.ndarray, votes: np.ndarray, weight: np.ndarray) -> float:
    """Return the mean binary cross-entropy in nats a vote."""
    p = np.clip(probabilities, _CLIP, 1 - _CLIP)
    return float(-(weight * (votes * np.log(p) + (1 - votes) * np.log1p(-p))).sum() / weight.sum())


def compute_calibration_line(
    probabilities: np.ndarray, votes: np.ndarray, weight: np.ndarray, start: tuple[float, float] = (0.0, 1.0)
) -> tuple[float, float]:
    """Return (intercept, slope) of the votes on the logit of the probabilities.

    The slope is that of a logistic regression, 1 for the perfect and below 1 for the overconfident; the intercept is fitted
    with the slope held at 1, 0 for the perfect and above 0 where too little is expected (Cox 1958; Van Calster et al. 2016).
    NaN where the votes are all of one kind. `start` is where the search begins: near the answer it takes fewer steps.
    """
    if not 0 < float(votes @ weight) < float(weight.sum()):
        return float("nan"), float("nan")
    z = logit(np.clip(probabilities, _CLIP, 1 - _CLIP))
    intercept = _fit_by_newton(np.ones((len(z), 1)), z, votes, weight, np.array([start[0]]))[0]
    slope = _fit_by_newton(np.stack([z, np.ones_like(z)], axis=1), 0.0, votes, weight, np.array([start[1], 0.0]))[0]
    return float(intercept), float(slope)


def _fit_by_newton(
    columns: np.ndarray, offset: np.ndarray | float, votes: np.ndarray, weight: np.ndarray, start: np.ndarray
) -> np.ndarray:
    """Return the parameters of a small logistic regression; a trace of a pull to zero keeps separable votes finite."""
    found = start.astype(float)
    for _ in range(50):
        p = expit(columns @ found + offset)
        gradient = columns.T @ (weight * (p - votes)) + 1e-3 * found
        curvature = (columns * (weight * p * (1 - p))[:, None]).T @ columns + 1e-3 * np.eye(len(found))
        step = np.clip(np.linalg.solve(curvature, gradient), -2, 2)
        found = found - step
        if np.abs(step).max() < 1e-9:
            break
    return found


def compute_ece(probabilities: np.ndarray, votes: np.ndarray, weight: np.ndarray, bins: int = 10) -> float:
    """Return the expected calibration error over `bins` equally wide bins (Naeini et al. 2015)."""
    index = np.minimum((probabilities * bins).astype(int), bins - 1)
    gap = np.bincount(index, weight * (votes - probabilities), minlength=bins)
    return float(np.abs(gap).sum() / weight.sum())


def compute_ece_of_the_perfect(probabilities: np.ndarray, weight: np.ndarray, draws: int = 200) -> float:
    """Return the mean ECE that these probabilities would show if they were perfect: votes drawn from them."""
    rng = np.random.default_rng(0)
    counts = weight.astype(np.int64)
    return float(
        np.mean(
            [compute_ece(probabilities, rng.binomial(counts, probabilities) / counts, weight) for _ in range(draws)]
        )
    )
