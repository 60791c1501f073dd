"""Metrics against scikit-learn called directly and against sums written out, undefined cases, baselines, agreement."""

from __future__ import annotations

import math

import numpy as np
import pytest
import sklearn.metrics as reference

from qlora_moderation.analysis import OURS, compute_all_agreements, compute_flagged_proportion
from qlora_moderation.baselines import compute_constant_baselines, compute_text_baselines
from qlora_moderation.data import Pairs
from qlora_moderation.intervals import Bootstrap
from qlora_moderation.metrics import (
    compute_agreement,
    compute_binary_metrics,
    compute_log_loss,
    compute_metrics,
    majority,
)
from qlora_moderation.thresholds import Thresholds

CATEGORIES = ("a", "b,c", "d")
THRESHOLDS = Thresholds((0.4, 0.5, 0.6), (0.4, 0.5, 0.6), 0.4)
YES, NO = True, False


def random_set(seed: int, size: int = 80) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Soft labels of up to four annotators, share of them who ticked anything, and probabilities that know a little."""
    rng = np.random.default_rng(seed)
    votes = rng.random((size, 4, 3)) < 0.3
    annotators = rng.integers(1, 5, size)
    labels = np.array([votes[i, :k].mean(axis=0) for i, k in enumerate(annotators)])
    flagged = np.array([votes[i, :k].any(axis=1).mean() for i, k in enumerate(annotators)])
    return labels, flagged, np.clip(labels * 0.4 + rng.random(labels.shape) * 0.6, 0, 1)


def expected_binary(truth: np.ndarray, predicted: np.ndarray, score: np.ndarray) -> dict[str, float]:
    return {
        "accuracy": reference.accuracy_score(truth, predicted),
        "precision": reference.precision_score(truth, predicted, zero_division=0),
        "recall": reference.recall_score(truth, predicted),
        "f1": reference.f1_score(truth, predicted),
        "support": truth.sum(),
        "false_positive_rate": (predicted & ~truth).sum() / (~truth).sum(),
        "auroc": reference.roc_auc_score(truth, score),
        "average_precision": reference.average_precision_score(truth, score),
    }


@pytest.mark.parametrize("seed", range(3))
def test_metrics_are_scikit_learns(seed):
    labels, flagged, probabilities = random_set(seed)
    metrics = compute_metrics(labels, flagged, THRESHOLDS.judge(probabilities), CATEGORIES)
    truth, decided = labels >= 0.5, probabilities > np.array([0.4, 0.5, 0.6])
    expected = {
        "flagged": expected_binary(flagged >= 0.5, decided.any(axis=1), probabilities.max(axis=1)),
        "micro": expected_binary(truth.ravel(), decided.ravel(), probabilities.ravel()),
        **{name: expected_binary(truth[:, c], decided[:, c], probabilities[:, c]) for c, name in enumerate(CATEGORIES)},
        "macro": {
            "precision": reference.precision_score(truth, decided, average="macro"),
            "recall": reference.recall_score(truth, decided, average="macro"),
            "f1": reference.f1_score(truth, decided, average="macro"),
            "auroc": reference.roc_auc_score(truth, probabilities, average="macro"),
            "average_precision": reference.average_precision_score(truth, probabilities, average="macro"),
        },
    }
    said = decided.any(axis=1)
    expected["flagged"]["flagged_proportion"] = said.mean()
    expected["flagged"]["cohen_kappa"] = reference.cohen_kappa_score(flagged >= 0.5, said)
    flat = {f"{part}/{key}": value for part, values in expected.items() for key, value in values.items()}
    assert metrics == pytest.approx({**flat, "log_loss": compute_log_loss(labels, probabilities)}, abs=1e-12)
    assert all(type(value) in (float, int) for value in metrics.values())


def test_flagged_uses_the_flagged_vote_and_not_the_labels():
    labels, flagged = np.full((2, 3), 1 / 3), np.array([1.0, 0.0])  # three annotators who each tick another category
    metrics = compute_metrics(labels, flagged, THRESHOLDS.judge(np.array([[0.9, 0, 0], [0, 0, 0.1]])), CATEGORIES)
    assert metrics["flagged/support"] == 1 and metrics["flagged/f1"] == metrics["flagged/auroc"] == 1
    assert metrics["micro/support"] == 0 and metrics["micro/recall"] is None


def test_a_tie_counts_as_yes():
    votes = np.array([0, 1 / 3, 0.5, 2 / 4, 3 / 6, 2 / 3, 1])
    assert majority(votes).tolist() == [NO, NO, YES, YES, YES, YES, YES]


@pytest.mark.parametrize(
    ("truth", "predicted", "expected"),
    [
        ([0, 0], [0, 1], {"accuracy": 0.5, "precision": 0, "recall": None, "f1": 0, "auroc": None, "average_precision": None}),
        ([0, 0], [0, 0], {"accuracy": 1, "precision": 0, "recall": None, "f1": 0, "auroc": None, "average_precision": None}),
        ([1, 1], [0, 0], {"accuracy": 0, "precision": 0, "recall": 0, "f1": 0, "auroc": None, "average_precision": 1}),
        ([1, 1], [0, 1], {"accuracy": 0.5, "precision": 1, "recall": 0.5, "f1": 2 / 3, "auroc": None, "average_precision": 1}),
        ([0, 1], [0, 0], {"accuracy": 0.5, "precision": 0, "recall": 0, "f1": 0, "auroc": 1, "average_precision": 1}),
    ],
)  # fmt: skip
def test_undefined_cases(truth, predicted, expected):
    truth, predicted = np.array(truth, dtype=bool), np.array(predicted, dtype=bool)
    found = compute_binary_metrics(truth, predicted, np.linspace(0, 1, len(truth)))
    negatives = int((~truth).sum())
    rate = found.pop("false_positive_rate")
    assert rate == (int((predicted & ~truth).sum()) / negatives if negatives else None)
    assert found == pytest.approx({**expected, "support": int(truth.sum())})
    assert compute_binary_metrics(truth, predicted) == {"false_positive_rate": rate} | {
        key: value for key, value in found.items() if key not in ("auroc", "average_precision")
    }


def test_macro_averages_over_the_categories_where_a_metric_is_defined():
    labels = np.array([[1, 0, 1], [0, 0, 1], [0, 0, 1.0]])
    probabilities = np.array([[0.9, 0.9, 0.9], [0.8, 0.1, 0.1], [0.1, 0.1, 0.9]])
    metrics = compute_metrics(labels, labels.max(axis=1), THRESHOLDS.judge(probabilities), CATEGORIES)
    assert metrics["b,c/recall"] is None and metrics["d/auroc"] is None
    assert metrics["macro/recall"] == pytest.approx((1 + 2 / 3) / 2)
    assert metrics["macro/auroc"] == metrics["a/auroc"] == 1
    assert metrics["macro/average_precision"] == pytest.approx((1 + 1) / 2)
    assert metrics["macro/precision"] == pytest.approx((1 / 2 + 0 + 1) / 3)
    empty = compute_metrics(np.zeros((2, 3)), np.zeros(2), THRESHOLDS.judge(np.full((2, 3), 0.1)), CATEGORIES)
    assert empty["macro/recall"] is None and empty["macro/auroc"] is None and empty["macro/f1"] == 0


def test_log_loss_is_the_written_out_sum():
    labels, _, probabilities = random_set(5, 20)
    total = 0.0
    for row, chances in zip(labels, probabilities, strict=True):
        for y, p in zip(row, chances, strict=True):
            total -= y * math.log(p) + (1 - y) * math.log(1 - p)
    assert compute_log_loss(labels, probabilities) == pytest.approx(total / labels.size, rel=1e-12)


@pytest.mark.parametrize(("label", "probability", "nats"), [(1, 1, 0), (0, 0, 0), (0.5, 0.5, math.log(2))])
def test_log_loss_at_the_ends(label, probability, nats):
    assert compute_log_loss(np.array([[label]]), np.array([[probability]])) == pytest.approx(nats, abs=1e-11)
    assert 20 < compute_log_loss(np.array([[1.0]]), np.array([[0.0]])) < 40  # finite


def test_kappa_by_hand():
    # 20 both yes, 5 only the reference, 10 only judged, 15 neither: agreement 0.7, by chance 0.5 x 0.6 + 0.5 x 0.4
    truth = np.array([YES] * 25 + [NO] * 25)
    judged = np.array([YES] * 20 + [NO] * 5 + [YES] * 10 + [NO] * 15)
    assert compute_agreement(truth, judged) == pytest.approx(
        {
            "cohen_kappa": (0.7 - 0.5) / (1 - 0.5),
            "recall": 20 / 25,
            "precision": 20 / 30,
            "f1": 40 / 55,
            "agreement": 0.7,
            "reference_flagged": 0.5,
            "judged_flagged": 0.6,
            "pairs": 50,
        }
    )
    assert next(iter(compute_agreement(truth, judged))) == "cohen_kappa"


@pytest.mark.parametrize(
    ("truth", "judged", "kappa"),
    [([1, 1], [1, 1], None), ([0, 0], [0, 0], None), ([1, 1], [0, 0], 0), ([1, 0], [1, 0], 1), ([1, 0], [0, 1], -1)],
)
def test_kappa_of_constant_raters(truth, judged, kappa):
    found = compute_agreement(np.array(truth, dtype=bool), np.array(judged, dtype=bool))["cohen_kappa"]
    assert found == (kappa if kappa is None else pytest.approx(kappa))


def test_constant_baselines():
    truth = np.array([YES, NO, NO, NO])
    assert compute_constant_baselines(truth) == {
        "always_flag": {
            "accuracy": 0.25,
            "precision": 0.25,
            "recall": 1.0,
            "f1": 0.4,
            "false_positive_rate": 1.0,
            "support": 1,
        },
        "never_flag": {
            "accuracy": 0.75,
            "precision": 0.0,
            "recall": 0.0,
            "f1": 0.0,
            "false_positive_rate": 0.0,
            "support": 1,
        },
    }


def pairs_of(texts: list[tuple[str, str]], flagged: list[float], weight: list[int] | None = None) -> Pairs:
    prompts, responses = ([pair[side] for pair in texts] for side in (0, 1))
    votes = np.array(flagged, dtype=float)
    return Pairs(prompts, responses, votes[:, None], votes, np.array(weight or [1] * len(texts)), [""] * len(texts))


def test_text_baselines_see_what_their_view_shows():
    questions, answers = ["risky question", "harmless question"], ["willing answer", "refusing answer"]
    texts = [(q, a) for q in questions for a in answers] * 6
    truths = {
        "question": [q == questions[0] for q, a in texts],
        "answer": [a == answers[0] for q, a in texts],
    }
    for shown, truth in truths.items():
        both = pairs_of(texts, truth)
        found = compute_text_baselines(both, both, 0.5)
        assert sorted(found) == ["tfidf_answer", "tfidf_pair", "tfidf_question"]
        for view in ("question", "answer"):
            assert found[f"tfidf_{view}"]["auroc"] == pytest.approx(1 if view == shown else 0.5)
        assert found["tfidf_pair"]["auroc"] == 1 and found["tfidf_pair"]["f1"] == 1


def test_the_pair_baseline_keeps_a_question_apart_from_an_answer():
    # a new word beside each of the two, so that no pair of words tells the order
    texts = [pair for i in range(20) for pair in ((f"black {i}q", f"{i}a white"), (f"white {i}q", f"{i}a black"))]
    training, judged = pairs_of(texts[:20], [YES, NO] * 10), pairs_of(texts[20:], [YES, NO] * 10)
    assert compute_text_baselines(training, judged, 0.5)["tfidf_pair"]["auroc"] == 1


def test_text_baselines_weigh_annotations_and_need_two_kinds():
    training = pairs_of([("same", "same")] * 2, [1, 0], weight=[9, 1])
    judged = pairs_of([("same", "same")], [1])
    # the only thing to learn is the base rate, 0.9
    for threshold, accuracy in ((0.5, 1), (0.88, 1), (0.92, 0)):
        assert compute_text_baselines(training, judged, threshold)["tfidf_pair"]["accuracy"] == accuracy
    training.weight = np.array([1, 9])
    assert compute_text_baselines(training, judged, 0.5)["tfidf_pair"]["accuracy"] == 0
    assert compute_text_baselines(pairs_of([("a", "b")] * 2, [1, 0.5]), judged, 0.5) == {}


NAN = float("nan")
VERDICTS = {
    OURS: np.array([1.0, 1, 0, 0]),
    "human": np.array([1, 1, 0.5, NAN]),
    "api": np.array([0, NAN, 1, NAN]),
}
MODELS = ["alpaca", "alpaca", "vicuna", "vicuna"]


def proportions(verdicts: dict, models: list[str] | None) -> dict:
    return compute_flagged_proportion(verdicts, models, Bootstrap(np.arange(len(verdicts[OURS])), 0))[0]


def agreements(verdicts: dict, models: list[str] | None) -> list[dict]:
    return compute_all_agreements(verdicts, models, Bootstrap(np.arange(len(verdicts[OURS])), 0))


def test_flagged_proportion_of_each_model_and_moderator():
    shares = proportions(VERDICTS, MODELS)
    assert shares == {
        "alpaca": {OURS: 1, "human": 1, "api": 0},
        "vicuna": {OURS: 0, "human": 1, "api": 1},
        "all": {OURS: 0.5, "human": 1, "api": 0.5},
    }
    assert list(shares) == ["alpaca", "vicuna", "all"]
    assert proportions(VERDICTS, None) == {"all": shares["all"]}
    # nobody judged the last pair, so its model has our share alone
    assert proportions(VERDICTS, ["a", "a", "a", "b"])["b"] == {OURS: 0}


def test_agreement_with_each_moderator_over_what_it_judged():
    rows = agreements(VERDICTS, MODELS)
    named = {(row["reference"], row["model"]): row for row in rows}
    assert [*named] == [(who, model) for who in ("human", "api") for model in ("all", "alpaca", "vicuna")]
    assert len(rows) == len(named)
    assert {key: row["pairs"] for key, row in named.items()} == {
        ("human", "all"): 3, ("human", "alpaca"): 2, ("human", "vicuna"): 1,
        ("api", "all"): 2, ("api", "alpaca"): 1, ("api", "vicuna"): 1,
    }  # fmt: skip
    assert named["api", "all"]["cohen_kappa"] == -1
    expected = compute_agreement(np.array([YES, YES, YES]), np.array([YES, YES, NO]))  # a tie counts as yes
    assert expected["recall"] == pytest.approx(2 / 3) and expected["precision"] == 1
    assert {key: named["human", "all"][key] for key in expected} == expected
    assert [row["model"] for row in agreements(VERDICTS, None)] == ["all", "all"]


def test_pairs_without_a_model_are_no_second_group_of_all_pairs():
    models = ["alpaca", "", "alpaca", ""]  # as `load_pairs` gives them where some rows name no model
    groups = [row["model"] for row in agreements({OURS: VERDICTS[OURS], "human": np.ones(4)}, models)]
    assert groups.count("all") == 1


def test_agreement_leaves_moderators_without_verdicts_out():
    assert agreements({OURS: np.ones(2), "api": np.full(2, NAN)}, ["a", "b"]) == []
    assert proportions({OURS: np.ones(2), "api": np.full(2, NAN)}, None) == {"all": {OURS: 1}}
