"""Two judges of the same rows: differences with intervals, p-values, and the gate of a release pipeline.

In: two sets of predictions, rules such as `flagged/recall < -0.01`. Out: differences, and a verdict. Part of step 12.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import numpy as np

from qlora_moderation.analysis import take
from qlora_moderation.data import Pairs
from qlora_moderation.errors import ConfigError, DataError
from qlora_moderation.intervals import Bootstrap, compare_by_exchange
from qlora_moderation.metrics import Judged, arrange, derive_metrics, measure, measure_all, sum_decisions
from qlora_moderation.options import nearest
from qlora_moderation.predictions import Predictions
from qlora_moderation.thresholds import Judgement

FAILED_EXIT_CODE = 3
UNDECIDED_EXIT_CODE = 4

_FEWEST_PROMPTS = 10
_COUNTED = ("accuracy", "precision", "recall", "f1", "false_positive_rate", "flagged_proportion")


@dataclasses.dataclass(frozen=True)
class Rule:
    """A release is refused when the difference, new minus old, of `metric` lies on the wrong side of `bound`."""

    metric: str
    sign: Literal["<", ">"]
    bound: float

    @classmethod
    def parse(cls, text: str) -> Rule:
        """Read `METRIC < NUMBER` or `METRIC > NUMBER`.

        Raises:
            ConfigError: it is neither.
        """
        found = re.fullmatch(r"\s*(\S+)\s*([<>])\s*([-+]?\d*\.?\d+(?:[eE][-+]?\d+)?)\s*", text)
        if found is None:
            raise ConfigError(
                f"--fail_if {text!r}: must be METRIC < NUMBER or METRIC > NUMBER, as 'flagged/recall < -0.01'"
            )
        bound = float(found[3])
        if not np.isfinite(bound):
            raise ConfigError(f"--fail_if {text!r}: {found[3]} is no finite number")
        return cls(found[1], "<" if found[2] == "<" else ">", bound)

    def __str__(self) -> str:
        return f"{self.metric} {self.sign} {self.bound}"

    def judge(self, interval: Sequence[float] | None) -> str:
        """Return `passed`, `failed` or `undecided`."""
        if interval is None:
            return "undecided"
        low, high = interval
        if self.sign == ">":
            low, high = -high, -low
        bound = self.bound if self.sign == "<" else -self.bound
        return "failed" if high < bound else "passed" if low >= bound else "undecided"


def check_comparable(new: Pairs, old: Predictions, rules: Sequence[Rule], categories: Sequence[str]) -> None:
    """Check, before anything is scored, that two models can be compared on these rows.

    Raises:
        DataError: no row in common.
        ConfigError: a rule names no metric of these rows.
    """
    if not set(_keys(new)) & set(_keys(old)):
        raise DataError("--compare: the two evaluations have no row in common")
    known = ["flagged/flagged_proportion"]
    if new.labels is not None:
        nothing = np.zeros((1, len(categories)))
        judgement = Judgement(nothing, nothing, nothing[:, 0], nothing[:, 0] > 0, nothing > 0)
        known = list(measure_all(arrange(nothing, nothing[:, 0], judgement, categories), categories))
    for rule in rules:
        if rule.metric not in known:
            raise ConfigError(
                f"--fail_if '{rule}': these rows give no metric {rule.metric}{nearest(rule.metric, known)}"
            )


def compare(
    new: Predictions,
    old: Predictions,
    categories: Sequence[str],
    rules: Sequence[Rule],
    replicates: int,
    seed: int,
) -> dict[str, Any]:
    """Compare two models on the rows that both have judged; the votes are those of the new evaluation.

    Returns:
        `rows`, `only_new`, `only_old`, `differences` (metric -> old, new, difference, interval, and for decisions of
        `flagged` a p-value), `rules` (rule -> passed, failed or undecided).

    See `check_comparable` for what must hold.
    """
    places = {key: i for i, key in enumerate(_keys(old))}
    mine = [(i, places[key]) for i, key in enumerate(_keys(new)) if key in places]
    rows, others = (np.array(side, dtype=np.int64) for side in zip(*mine, strict=True))
    bootstrap = Bootstrap.of([new.prompts[i] for i in rows], replicates, seed)
    one, other = take(new.judgement, rows), take(old.judgement, others)
    if new.votes is not None and new.flagged_vote is not None:
        votes, flagged = new.votes[rows], new.flagged_vote[rows]
        parts = [arrange(votes, flagged, judgement, categories) for judgement in (one, other)]
    else:
        nobody = np.zeros(len(rows), dtype=bool)
        parts = [{"flagged": Judged.of(nobody, judgement.flagged)} for judgement in (one, other)]

    def measure_both(weights: np.ndarray | None) -> tuple[Mapping[str, np.ndarray], Mapping[str, np.ndarray]]:
        if "micro" in parts[0]:
            return measure_all(parts[0], categories, weights), measure_all(parts[1], categories, weights)
        key = "flagged_proportion"
        shares = [{f"flagged/{key}": measure(part["flagged"], weights)[key]} for part in parts]
        return shares[0], shares[1]

    ahead, behind = measure_both(None)
    for rule in rules:
        if rule.metric not in ahead:
            raise ConfigError(
                f"--fail_if '{rule}': these rows give no metric {rule.metric}{nearest(rule.metric, ahead)}"
            )

    def subtract(weights: np.ndarray) -> dict[str, np.ndarray]:
        first, second = measure_both(weights)
        return {key: first[key] - second[key] for key in first}

    intervals = bootstrap.intervals(subtract)
    if int(bootstrap.prompts.max()) + 1 < _FEWEST_PROMPTS:
        intervals = dict.fromkeys(intervals)
    for part, judged in parts[0].items():
        if (
            judged.row is None
            and len(np.unique(bootstrap.prompts[judged.yes > 0])) < _FEWEST_PROMPTS
            and "micro" in parts[0]
        ):
            # both models may be equally silent on the few there are: that is no proof of equality
            intervals |= {key: None for key in intervals if key.startswith(f"{part}/")}
    differences = {
        key: {
            "old": _plain(behind[key]),
            "new": _plain(ahead[key]),
            "difference": _plain(ahead[key] - behind[key]),
            "interval": intervals.get(key),
        }
        for key in ahead
    }
    for key in _COUNTED:
        if f"flagged/{key}" in differences:
            differences[f"flagged/{key}"]["p_value"] = _exchange(
                parts[0]["flagged"], parts[1]["flagged"], bootstrap, key
            )
    return {
        "rows": len(rows),
        "only_new": len(new) - len(rows),
        "only_old": len(old) - len(rows),
        "differences": differences,
        "rules": {str(rule): rule.judge(intervals.get(rule.metric)) for rule in rules},
    }


def compare_moderators(
    verdicts: Mapping[str, np.ndarray], ours: str, prompts: Sequence[str], replicates: int, seed: int
) -> list[dict[str, Any]]:
    """Compare our verdicts with each moderator's against every other one taken as the truth, on the rows that all judged.

    Returns:
        One entry for each (reference, moderator): differences, ours minus theirs, of the decisions' metrics.
    """
    found = []
    for reference, truth in verdicts.items():
        for moderator, votes in verdicts.items():
            if ours in (reference, moderator) or reference == moderator:
                continue
            rows = ~np.isnan(truth) & ~np.isnan(votes)
            if not rows.any():
                continue
            yes = truth[rows] >= 0.5
            parts = [Judged.of(yes, verdicts[name][rows] >= 0.5) for name in (ours, moderator)]
            bootstrap = Bootstrap.of(
                [prompt for prompt, kept in zip(prompts, rows, strict=True) if kept], replicates, seed
            )

            def subtract(weights: np.ndarray | None, parts: list[Judged] = parts) -> dict[str, np.ndarray]:
                first, second = (measure(part, weights) for part in parts)
                return {key: first[key] - second[key] for key in (*_COUNTED, "cohen_kappa")}

            whole, intervals = subtract(None), bootstrap.intervals(subtract)
            found.append(
                {
                    "reference": reference,
                    "moderator": moderator,
                    "pairs": int(rows.sum()),
                    "differences": {
                        key: {
                            "difference": _plain(value),
                            "interval": intervals.get(key),
                            **({"p_value": _exchange(parts[0], parts[1], bootstrap, key)} if key in _COUNTED else {}),
                        }
                        for key, value in whole.items()
                    },
                }
            )
    return found


def exit_code_of(comparison: Mapping[str, Any]) -> int:
    """Return 3 when a rule has failed, 4 when one is undecided, else 0."""
    verdicts = set(comparison["rules"].values())
    return FAILED_EXIT_CODE if "failed" in verdicts else UNDECIDED_EXIT_CODE if "undecided" in verdicts else 0


def _keys(predictions: Predictions | Pairs) -> list[tuple[str, str, str]]:
    models = predictions.models or [""] * len(predictions)
    return list(zip(predictions.prompts, predictions.responses, models, strict=True))


def _plain(value: np.ndarray) -> float | None:
    return None if np.isnan(value[0]) else float(value[0])


def _exchange(first: Judged, second: Judged, bootstrap: Bootstrap, key: str) -> float | None:
    """Return the p-value of a difference in one metric of decisions, by exchanging the judges prompt by prompt."""
    if not bootstrap.replicates:
        return None
    parts = sum_decisions(first), sum_decisions(second)
    p_value = compare_by_exchange(
        bootstrap.prompts,
        lambda weights: weights @ parts[0],
        lambda weights: weights @ parts[1],
        lambda one, other: derive_metrics(one)[key] - derive_metrics(other)[key],
        bootstrap.replicates,
        bootstrap.seed,
    )
    return None if np.isnan(p_value) else p_value
