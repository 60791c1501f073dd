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
    token_counts: np.ndarray,
    max_length: int,
    validation: Pairs | None = None,
) -> dict[str, Any]:
    """Describe the training pairs, and their overlap with the validation pairs.

    Args:
        training: N labelled pairs.
        taxonomy: names of the labels.
        token_counts: [N] tokens of each pair before truncation.
        max_length: longest text in tokens that the model sees.
        validation: pairs to look for among the training pairs.

    Raises:
        ValueError: the pairs carry no labels.
    """
    if training.labels is None or training.flagged is None:
        raise ValueError("an audit needs labelled pairs")
    repeated = training.weight > 1
    audit: dict[str, Any] = {
        "rows": training.annotations,
        "skipped_rows": len(training.skipped_rows),
        "pairs": len(training),
        "prompts": len(set(training.prompts)),
        "annotations_per_pair": {
            str(count): int((training.weight == count).sum()) for count in np.unique(training.weight)
        },
        "pairs_with_several_annotations": int(repeated.sum()),
        "pairs_with_disagreement_on_flagged": int(((training.flagged > 0) & (training.flagged < 1)).sum()),
        "flagged_share": float(np.average(training.flagged, weights=training.weight)),
        "label_counts": {
            name: float((training.labels[:, index] * training.weight).sum())
            for index, name in enumerate(taxonomy.categories)
        },
        "tokens": {
            "mean": float(token_counts.mean()),
            "median": float(np.median(token_counts)),
            "p95": float(np.percentile(token_counts, 95)),
            "longest": int(token_counts.max()),
            "max_length": max_length,
            "truncated_pairs": int((token_counts > max_length).sum()),
            "truncated_share": float((token_counts > max_length).mean()),
        },
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


def describe_audit(audit: dict[str, Any]) -> list[str]:
    """Return the audit as lines for a log."""
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
