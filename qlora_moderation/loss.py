"""Weighted multi-label binary cross-entropy.

In: logits and soft labels of one micro-batch. Out: its share of the step's loss. Step 7 of the straight line.
"""

from __future__ import annotations

import torch


def compute_loss(logits: torch.Tensor, labels: torch.Tensor, weight: torch.Tensor, step_weight: float) -> torch.Tensor:
    """Return this micro-batch's share of `sum(w * BCE) / sum(w * C)`, the step's loss in nats per label.

    Shares of all micro-batches and ranks add up to the step's loss, however the step was cut.

    Args:
        logits: [S, C].
        labels: [S, C] mean votes in [0, 1].
        weight: [S] number of annotations; 0 for a filler.
        step_weight: sum of the weights of the whole step, over all ranks.
    """
    losses = torch.nn.functional.binary_cross_entropy_with_logits(logits, labels, reduction="none")
    return (losses.sum(dim=1) * weight).sum() / (step_weight * logits.shape[1])
