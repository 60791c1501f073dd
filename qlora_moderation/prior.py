"""The head starts at the base rates of the categories.

In: a classifier with a fresh head, and training pairs. Out: the same classifier, whose first logits are the log-odds of
each category. Before step 6.

Labels are rare, so every logit has to fall by two or three before anything else pays. A head without a bias, or with one
that moves by a learning rate a step, leaves that to backbone and adapters: they drive the last hidden state of all pairs
to one vector, and runs then stay at the base rate for epochs (seen on all-MiniLM-L6-v2 and on small LLaMAs). Setting the
bias of a rare class to its log-odds is the initialisation of Lin et al. 2017 (arXiv:1708.02002, section 4.1).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from qlora_moderation.adapter import find_head
from qlora_moderation.classifier import Classifier
from qlora_moderation.data import Pairs
from qlora_moderation.distributed import add_whole, sum_over_ranks
from qlora_moderation.scoring import score_windows
from qlora_moderation.tokenization import Window

_SAMPLE = 128  # texts whose mean hidden state stands for all


def compute_log_odds(pairs: Pairs) -> np.ndarray:
    """Return [C] log-odds of the labels over all annotations, with half a count added to yes and to no."""
    assert pairs.labels is not None
    yes = (pairs.labels * pairs.weight[:, None]).sum(axis=0)
    return np.log((yes + 0.5) / (pairs.weight.sum() - yes + 0.5))


def set_head_prior(
    classifier: Classifier, pairs: Pairs, ids: Sequence[np.ndarray], max_tokens: int | None = None
) -> None:
    """Let the new rows of the head start at the log-odds of their categories.

    A head with a bias gets them there. One without (the stock decoders) gets them along the mean last hidden state m of
    some texts: row c grows by log-odds(c) * m / (m . m).

    Args:
        classifier: rows of its head that come from an existing classifier are left alone.
        pairs: N training pairs.
        ids: their N token ids.
        max_tokens: token budget of one forward.
    """
    rows = list(classifier.new_head_rows)
    if not rows:
        return
    head = find_head(classifier.model.classifier)[2]
    offsets = torch.zeros(head.out_features, dtype=head.weight.dtype, device=classifier.model.device)
    offsets[rows] = torch.tensor(compute_log_odds(pairs)[rows], dtype=offsets.dtype, device=offsets.device)
    with torch.no_grad():
        if head.bias is not None:
            add_whole(head.bias, offsets)  # the bias of a new row is zero
            return
        seen: list[torch.Tensor] = []
        hook = head.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].detach().float()))
        texts = [Window(list(text), i) for i, text in enumerate(ids[:: max(1, len(ids) // _SAMPLE)])]

        def forget_filler(done: int) -> None:
            if not done:  # a forward without texts of its own only keeps a sharded rank in step
                seen.pop()

        try:
            score_windows(classifier, texts, max_tokens, forget_filler)
        finally:
            hook.remove()
        total = torch.zeros(head.in_features, device=classifier.model.device)
        for hidden in seen:
            total += hidden.sum(dim=0)
        mean = sum_over_ranks(total) / len(texts)
        add_whole(head.weight, offsets[:, None] * mean / mean.dot(mean))
