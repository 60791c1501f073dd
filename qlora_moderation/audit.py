"""What a data set holds: repeated annotations, disagreement, lengths, leakage.

In: `Pairs` and token counts. Out: a JSON-ready mapping and a few lines for the log.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from qlora_moderation.data import Pairs
from qlora_moderation.taxonomy import Taxonomy


def compute_audit(
    training: Pairs,
    taxonomy: Taxonomy,
    token_counts: np.ndarray | None,
    max_length: int,
    validation: Pairs | None = None,
) -> dict[str, Any]:
    """Describe the training pairs, and their overlap with the validation pairs.

    Args:
        training: N pairs, with labels or with moderators' verdicts only.
        taxonomy: names of the labels.
        token_counts: [N] tokens of each pair before truncation; None: they were not counted.
        max_length: longest text in tokens that the model sees.
        validation: pairs to look for among the training pairs.
    """
    audit: dict[str, Any] = {
        "rows": training.annotations,
        "skipped_rows": len(training.skipped_rows),
        "pairs": len(training),
        "prompts": len(set(training.prompts)),
        "annotations_per_pair": {
            str(count): int((training.weight == count).sum()) for count in np.unique(training.weight)
        },
        "pairs_with_several_annotations": int((training.weight > 1).sum()),
    }
    if training.labels is not None and training.flagged is not None:
        audit |= {
            "pairs_with_disagreement_on_flagged": int(_is_split(training.flagged).sum()),
            "flagged_share": float(np.average(training.flagged, weights=training.weight)),
            "label_counts": {
                name: float((training.labels[:, index] * training.weight).sum())
                for index, name in enumerate(taxonomy.categories)
            },
        }
    if training.verdicts:
        audit["verdicts"] = {name: _count_verdicts(votes) for name, votes in training.verdicts.items()}
    if token_counts is not None:
        audit["tokens"] = describe_lengths(token_counts) | {
            "max_length": max_length,
            "truncated_pairs": int((token_counts > max_length).sum()),
            "truncated_share": float((token_counts > max_length).mean()),
        }
    if validation is not None:
        prompts = set(training.prompts)
        pairs = set(zip(training.prompts, training.responses, strict=True))
        shared = [pair in pairs for pair in zip(validation.prompts, validation.responses, strict=True)]
        audit["validation"] = {
            "rows": validation.annotations,
            "pairs": len(validation),
            "prompts": len(set(validation.prompts)),
            "pairs_with_a_training_prompt": sum(prompt in prompts for prompt in validation.prompts),
            "pairs_also_in_training": sum(shared),
        }
    return audit


def describe_lengths(counts: np.ndarray) -> dict[str, Any]:
    """Return mean, median, 95th percentile and the longest of [N] lengths."""
    return {
        "mean": float(counts.mean()),
        "median": float(np.median(counts)),
        "p95": float(np.percentile(counts, 95)),
        "longest": int(counts.max()),
    }


def count_disagreement(pairs: Pairs, taxonomy: Taxonomy) -> dict[str, int]:
    """Return for each category the pairs whose annotators do not agree on it."""
    assert pairs.labels is not None
    split = _is_split(pairs.labels).sum(axis=0)
    return dict(zip(taxonomy.categories, split.tolist(), strict=True))


def _is_split(votes: np.ndarray) -> np.ndarray:
    return (votes > 0) & (votes < 1)


def _count_verdicts(votes: np.ndarray) -> dict[str, Any]:
    given = votes[~np.isnan(votes)]
    return {"pairs": len(given), "flagged_share": float(given.mean()) if len(given) else None}


def describe_audit(audit: dict[str, Any]) -> list[str]:
    """Return the audit of labelled pairs with counted tokens as lines for a log."""
    tokens = audit["tokens"]
    lines = [
        f"training data: {audit['rows']:,} rows, {audit['pairs']:,} distinct pairs, {audit['prompts']:,} prompts, "
        f"{audit['flagged_share']:.1%} flagged, {audit['skipped_rows']} broken rows left out",
        f"annotations: {audit['pairs_with_several_annotations']:,} pairs have several, "
        f"{audit['pairs_with_disagreement_on_flagged']:,} of them disagree on flagged",
        f"tokens a pair: mean {tokens['mean']:.0f}, median {tokens['median']:.0f}, p95 {tokens['p95']:.0f}, longest "
        f"{tokens['longest']}; {tokens['truncated_pairs']} ({tokens['truncated_share']:.2%}) are cut at "
        f"{tokens['max_length']}",
    ]
    if "validation" in audit:
        seen = audit["validation"]
        lines.append(
            f"validation data: {seen['pairs']:,} distinct pairs; {seen['pairs_with_a_training_prompt']:,} have a prompt "
            f"that is trained on, {seen['pairs_also_in_training']:,} are trained on themselves"
        )
    return lines
