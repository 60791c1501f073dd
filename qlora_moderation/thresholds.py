"""The one threshold truth: when a probability counts as a yes.

In and out: `thresholds.json` beside the weights. Training metrics, evaluation and prediction all read it.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np

from qlora_moderation.errors import CheckpointError
from qlora_moderation.metadata import read_json, write_json
from qlora_moderation.taxonomy import Taxonomy

THRESHOLDS_FILE = "thresholds.json"
DEFAULT_THRESHOLD = 0.4
"""The threshold of the original recipe's `predict`, used until thresholds are tuned."""


@dataclasses.dataclass(frozen=True)
class Thresholds:
    """A probability above its category's threshold is a yes; a pair is flagged when any category is."""

    per_category: tuple[float, ...]
    origin: str = "default"

    @classmethod
    def default(cls, taxonomy: Taxonomy) -> Thresholds:
        """Return the default for every category."""
        return cls((DEFAULT_THRESHOLD,) * len(taxonomy.categories))

    def decide(self, probabilities: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return (flagged [N], categories [N, C]) for probabilities [N, C]."""
        categories: np.ndarray = np.asarray(probabilities > np.asarray(self.per_category))
        return np.asarray(categories.any(axis=1)), categories

    def save(self, directory: Path, taxonomy: Taxonomy) -> None:
        """Write `thresholds.json` into `directory`."""
        values = dict(zip(taxonomy.categories, self.per_category, strict=True))
        write_json(
            directory / THRESHOLDS_FILE, {"origin": self.origin, "rule": taxonomy.flagged_rule, "categories": values}
        )


def load_thresholds(directory: Path, taxonomy: Taxonomy) -> Thresholds:
    """Read `thresholds.json`; the default where there is none.

    Raises:
        CheckpointError: the file does not give each category of the taxonomy a number in [0, 1].
    """
    path = directory / THRESHOLDS_FILE
    if not path.is_file():
        return Thresholds.default(taxonomy)
    values = read_json(path)
    stored = values.get("categories") if isinstance(values, dict) else None
    if not isinstance(stored, dict) or set(stored) != set(taxonomy.categories):
        raise CheckpointError(f"{path}: its categories are not those of the model; restore the file of this model")
    numbers = tuple(stored[name] for name in taxonomy.categories)
    if not all(
        isinstance(number, int | float) and not isinstance(number, bool) and 0 <= number <= 1 for number in numbers
    ):
        raise CheckpointError(f"{path}: a threshold is not a number from 0 to 1; restore the file of this model")
    return Thresholds(tuple(map(float, numbers)), str(values.get("origin", "default")))
