"""Simulated annotators who disagree as those of BeaverTails do. Imported by `bench_quality.py`.

Each turns the verdict of a row round with the same probability e, so that two of them agree with probability e^2 + (1 - e)^2.
"""

from __future__ import annotations

import math
import random
from typing import Any

AGREEMENT = 0.817
"""Pairwise agreement on safe or unsafe that the authors report (Ji et al. 2023, arXiv:2307.04657)."""


def compute_error_rate(agreement: float) -> float:
    """Return the smaller e with e^2 + (1 - e)^2 = `agreement`, for an agreement of at least 0.5."""
    return (1 - math.sqrt(2 * agreement - 1)) / 2


def simulate_annotations(
    rows: list[dict[str, Any]], annotators: int = 3, agreement: float = AGREEMENT, seed: int = 0
) -> list[dict[str, Any]]:
    """Return what `annotators` say of each row, one row after the other.

    Args:
        rows: in BeaverTails' layout; some are unsafe.
        annotators: of each row.
        agreement: share of pairs of annotators with the same verdict.
        seed: of everything random.

    Returns:
        One row for each annotation. A verdict turned to safe has no category; one turned to unsafe has those of another unsafe
        row; an annotator who agrees that a row is unsafe misses each category as often as verdicts are turned, but never all.
    """
    rng, error = random.Random(f"annotators {seed}"), compute_error_rate(agreement)
    ticked = [[name for name, yes in row["category"].items() if yes] for row in rows]
    unsafe = [names for names in ticked if names]
    made = []
    for row, real in zip(rows, ticked, strict=True):
        for _ in range(annotators):
            if rng.random() < error:
                names = [] if real else rng.choice(unsafe)
            else:
                names = [name for name in real if rng.random() >= error] or real[:1]
            category = {name: name in names for name in row["category"]}
            made.append({**row, "category": category, "is_safe": not names})
    return made
