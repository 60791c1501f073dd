"""What any classifier must beat: constant answers, and TF-IDF with logistic regression.

In: training and evaluation pairs. Out: metrics of `flagged` for each baseline. Part of step 12.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from qlora_moderation.data import Pairs
from qlora_moderation.metrics import Metrics, compute_binary_metrics, majority


def compute_constant_baselines(truth: np.ndarray) -> dict[str, Metrics]:
    """Return the metrics of flagging everything and of flagging nothing."""
    return {
        "always_flag": compute_binary_metrics(truth, np.ones_like(truth)),
        "never_flag": compute_binary_metrics(truth, np.zeros_like(truth)),
    }


def compute_text_baselines(training: Pairs, evaluation: Pairs, threshold: float) -> dict[str, Metrics]:
    """Return the metrics of TF-IDF (words and word pairs) with logistic regression on three views of a pair.

    Annotations count as often as they were given.

    Args:
        training: N labelled pairs to fit on.
        evaluation: labelled pairs to judge.
        threshold: a pair is flagged above this probability; the model's own, to be fair.

    Returns:
        `tfidf_question`, `tfidf_answer`, `tfidf_pair`; empty where the training pairs are all of one kind.
    """
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline

    assert training.flagged is not None and evaluation.flagged is not None
    target = majority(training.flagged)
    if len(np.unique(target)) < 2:
        return {}
    results = {}
    for name in ("question", "answer", "pair"):
        fit: Any = make_pipeline(
            TfidfVectorizer(ngram_range=(1, 2), sublinear_tf=True, token_pattern=r"(?u)\S+"),
            LogisticRegression(max_iter=1000, C=10.0),
        )
        fit.fit(_view(training, name), target, logisticregression__sample_weight=training.weight)
        probability = fit.predict_proba(_view(evaluation, name))[:, 1]
        results[f"tfidf_{name}"] = compute_binary_metrics(
            majority(evaluation.flagged), probability > threshold, probability
        )
    return results


def _view(pairs: Pairs, name: str) -> list[str]:
    if name == "question":
        return pairs.prompts
    if name == "answer":
        return pairs.responses
    # the marks keep a question's word apart from the same word in an answer
    return [
        " ".join([f"q:{w}" for w in q.lower().split()] + [f"a:{w}" for w in a.lower().split()])
        for q, a in zip(pairs.prompts, pairs.responses, strict=True)
    ]
