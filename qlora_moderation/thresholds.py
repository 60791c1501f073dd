"""The one threshold truth: what a probability means, and when it counts as a yes.

In and out: `thresholds.json` beside the weights. Training metrics, evaluation and prediction all read it. Every decision is
made on raw probabilities, so that the output of a stock pipeline and this file give the same flags.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import numpy as np

from qlora_moderation.calibration import RISK_CLIP, Calibrator, RiskModel
from qlora_moderation.errors import CheckpointError
from qlora_moderation.metadata import read_json, write_json
from qlora_moderation.taxonomy import Taxonomy

THRESHOLDS_FILE = "thresholds.json"
PREVIOUS_FILE = "thresholds.previous.json"
"""What tuning keeps of the thresholds before."""

DEFAULT_THRESHOLD = 0.4
"""The threshold of the original recipe's `predict`, used until thresholds are tuned."""

FlaggedRule = Literal["max", "calibrated"]


@dataclasses.dataclass(frozen=True)
class Judgement:
    """What is said of N pairs.

    Attributes:
        raw: [N, C] sigmoid of the logits.
        probabilities: [N, C] calibrated.
        risk: [N] what `flagged` is decided by: the highest calibrated probability, or P(unsafe).
        flagged: [N] bool.
        categories: [N, C] bool.
    """

    raw: np.ndarray
    probabilities: np.ndarray
    risk: np.ndarray
    flagged: np.ndarray
    categories: np.ndarray


@dataclasses.dataclass(frozen=True)
class Thresholds:
    """A raw probability above its category's threshold is a yes; `flagged` has a rule and thresholds of its own.

    Attributes:
        per_category: C thresholds of the categories, on the raw probability.
        flagged_per_category: rule `max`: a pair is flagged when any raw probability lies above these C thresholds, which are
            one threshold on the calibrated scale.
        flagged_threshold: of the risk: on the highest calibrated probability, or on P(unsafe).
        rule: `max`, the original recipe's, or `calibrated`: P(unsafe) by `risk_model`.
        calibrators: C maps from raw to calibrated.
        risk_model: None where it was never fitted.
        origin: how the numbers came about.
        fit: what was found while tuning; empty for the default.
    """

    per_category: tuple[float, ...]
    flagged_per_category: tuple[float, ...]
    flagged_threshold: float
    rule: FlaggedRule = "max"
    calibrators: tuple[Calibrator, ...] = ()
    risk_model: RiskModel | None = None
    origin: str = "default"
    fit: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    @classmethod
    def uniform(cls, value: float, count: int) -> Thresholds:
        """Return one threshold for `count` categories and for `flagged`, without calibration."""
        return cls((value,) * count, (value,) * count, value)

    @classmethod
    def default(cls, taxonomy: Taxonomy) -> Thresholds:
        """Return the default for every category."""
        return cls.uniform(DEFAULT_THRESHOLD, len(taxonomy.categories))

    @property
    def is_calibrated(self) -> bool:
        """Whether any calibrated probability differs from the raw one."""
        return any(calibrator.kind != "none" for calibrator in self.calibrators)

    def calibrate(self, raw: np.ndarray) -> np.ndarray:
        """Return calibrated probabilities [N, C]."""
        raw = np.asarray(raw, dtype=np.float64)
        if not self.is_calibrated:
            return raw
        return np.stack([each.apply(raw[:, c]) for c, each in enumerate(self.calibrators)], axis=1)

    def judge(self, raw: np.ndarray) -> Judgement:
        """Judge N pairs by their raw probabilities [N, C]."""
        probabilities = self.calibrate(raw)
        categories = np.asarray(raw > np.asarray(self.per_category))
        if self.rule == "calibrated":
            assert self.risk_model is not None
            risk = self.risk_model.apply(raw)
            flagged = np.asarray(risk > self.flagged_threshold)
        else:
            risk = probabilities.max(axis=1)
            flagged = np.asarray((raw > np.asarray(self.flagged_per_category)).any(axis=1))
        return Judgement(np.asarray(raw), probabilities, risk, flagged, categories)

    def describe(self) -> str:
        """Return the thresholds in a few words."""
        low, high = min(self.per_category), max(self.per_category)
        spread = f"{low:.3g} to {high:.3g}" if high > low else f"{low:.3g}"
        return (
            f"categories above {spread}, flagged by rule {self.rule} above {self.flagged_threshold:.3g} ({self.origin})"
        )

    def to_dict(self, taxonomy: Taxonomy) -> dict[str, Any]:
        """Return the content of `thresholds.json`."""
        names = taxonomy.categories
        calibrators = self.calibrators or (Calibrator(),) * len(names)
        flagged: dict[str, Any] = {"rule": self.rule, "threshold": self.flagged_threshold}
        if self.rule == "max":
            flagged["raw"] = dict(zip(names, self.flagged_per_category, strict=True))
        if self.risk_model is not None:
            weights = dict(zip(names, self.risk_model.weights, strict=True))
            flagged["risk_model"] = {"weights": weights, "bias": self.risk_model.bias, "clip": RISK_CLIP}
        return {
            "origin": self.origin,
            "flagged": flagged,
            "categories": {
                name: {
                    "raw": self.per_category[c],
                    "calibrated": float(calibrators[c].apply(np.array(self.per_category[c]))),
                    "calibration": calibrators[c].to_dict(),
                }
                for c, name in enumerate(names)
            },
            "fit": dict(self.fit),
        }

    def save(self, directory: Path, taxonomy: Taxonomy, name: str = THRESHOLDS_FILE) -> None:
        """Write `thresholds.json`, or the same under another name, into `directory`."""
        write_json(directory / name, self.to_dict(taxonomy))


def load_thresholds(directory: Path, taxonomy: Taxonomy) -> Thresholds:
    """Read `thresholds.json`; the default where there is none.

    Raises:
        CheckpointError: the file does not give each category of the taxonomy a number in [0, 1], or a map that rises.
    """
    path = directory / THRESHOLDS_FILE
    if not os.path.lexists(path):
        return Thresholds.default(taxonomy)
    values = read_json(path)
    names = taxonomy.categories
    stored = values.get("categories") if isinstance(values, dict) else None
    if not isinstance(stored, dict) or set(stored) != set(names):
        raise CheckpointError(f"{path}: its categories are not those of the model; restore the file of this model")
    try:
        flagged = values["flagged"]
        rule = flagged["rule"]
        if rule not in ("max", "calibrated"):
            raise ValueError(f"the rule {rule!r}; allowed: max, calibrated")
        model = flagged.get("risk_model")
        risk_model = None
        if model is not None or rule == "calibrated":
            risk_model = RiskModel(tuple(float(model["weights"][name]) for name in names), float(model["bias"]))
            numbers = [*risk_model.weights, risk_model.bias]
            if not np.isfinite(numbers).all() or min(risk_model.weights) < 0 or model["clip"] != RISK_CLIP:
                raise ValueError(f"a risk model with a negative or infinite number, or a clip other than {RISK_CLIP}")
        own = [flagged["raw"][name] for name in names] if rule == "max" else [1.0] * len(names)
        per_category = [stored[name]["raw"] for name in names]
        numbers = [*per_category, *own, flagged["threshold"]]
        if not all(isinstance(n, int | float) and not isinstance(n, bool) and 0 <= n <= 1 for n in numbers):
            raise ValueError("a threshold that is not a number from 0 to 1")
        calibrators = tuple(Calibrator.from_dict(stored[name]["calibration"]) for name in names)
        scale = [float(each.apply(np.array(value))) for each, value in zip(calibrators, own, strict=True)]
        if rule == "max" and not np.allclose(scale, flagged["threshold"], atol=1e-6):
            raise ValueError("flagged.raw and flagged.threshold, which disagree")
        origin = str(values.get("origin", "unknown"))
        origin.encode()
        return Thresholds(
            per_category=tuple(map(float, per_category)),
            flagged_per_category=tuple(map(float, own)),
            flagged_threshold=float(flagged["threshold"]),
            rule=rule,
            calibrators=calibrators,
            risk_model=risk_model,
            origin=origin,
            fit=_check_fit(values.get("fit", {})),
        )
    except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
        raise CheckpointError(f"{path}: holds {error}; restore the file of this model") from None


def _check_fit(fit: Any) -> Mapping[str, Any]:
    """Return what tuning found, where it is whole: reports read it."""
    if fit:
        for key in ("pairs", "prompts", "objective", "min_positives"):
            _ = fit[key]
        _ = [found["threshold_from"] for found in fit["categories"].values()], fit["flagged"]["threshold_from"]
        for key in ("missed", "harmful_prompts", "upper_bound", "confidence", "false_positive_rate"):
            _ = float(fit.get("missed_harm", {key: 0})[key])
        _, _ = fit.get("missed_harm", {}).get("false_positive_rate_interval", (0, 0))
    return dict(fit)
