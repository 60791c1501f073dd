"""What is said of a pair to those who use a model: one mapping, whoever computed the probabilities.

In: raw probabilities and the model's thresholds. Out: what `QAModeration.predict` returns.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from qlora_moderation.errors import CheckpointError
from qlora_moderation.taxonomy import Taxonomy
from qlora_moderation.thresholds import Thresholds

Result = dict[str, Any]


def describe_pairs(
    taxonomy: Taxonomy,
    thresholds: Thresholds,
    questions: Sequence[str],
    answers: Sequence[str],
    raw: np.ndarray,
    return_bool: bool = False,
    threshold: float | None = None,
) -> list[Result]:
    """Return what `predict` says of N pairs with raw probabilities [N, C]; see there.

    Raises:
        CheckpointError: a probability is not a number; such a pair would pass as not flagged.
    """
    if not np.isfinite(raw).all():
        raise CheckpointError(
            "the model gives probabilities that are no numbers; its weights are damaged, copy it again"
        )
    judged = thresholds.judge(raw)
    flagged, decided = judged.flagged, judged.categories
    if threshold is not None:
        decided = np.asarray(judged.probabilities > threshold)
        flagged = np.asarray(judged.risk > threshold)
    shown: np.ndarray = decided if return_bool else judged.probabilities
    return [
        {
            "text": taxonomy.render(questions[i], answers[i]),
            "flagged": bool(flagged[i]),
            "risk": float(judged.risk[i]),
            "categories": dict(zip(taxonomy.categories, shown[i].tolist(), strict=True)),
        }
        for i in range(len(questions))
    ]
