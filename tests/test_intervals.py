"""Intervals: against loops written out, and what they count."""

from __future__ import annotations

import numpy as np
import pytest
import sklearn.metrics as reference
from scipy.stats import binom, binomtest

from qlora_moderation.intervals import Bootstrap, clopper_pearson, compare_by_exchange, upper_bound
from qlora_moderation.metrics import (
    Judged,
    arrange,
    compute_metrics,
    derive_metrics,
    measure,
    measure_all,
    sum_decisions,
)
from qlora_moderation.thresholds import Thresholds

PROMPTS = ["a", "b", "a", "c", "d", "b", "e", "f", "a", "c", "g", "h"]


def rows_of(seed: int = 0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    truth = np.array([1, 0, 1, 0, 0, 1, 1, 0, 0, 1, 1, 0], dtype=bool)
    score = np.round(np.clip(truth * 0.3 + rng.random(12) * 0.7, 0, 1), 1)  # with ties
    return truth, score > 0.5, score


def test_intervals_are_those_of_a_loop_over_drawn_prompts():
    truth, decided, score = rows_of()
    judged = Judged.of(truth, decided, score)
    bootstrap = Bootstrap.of(PROMPTS, replicates=200, seed=3)
    found = bootstrap.intervals(lambda weights: measure(judged, weights))
    rng, names = np.random.default_rng(3), list(dict.fromkeys(PROMPTS))
    each: dict[str, list[float]] = {}
    for _ in range(200):
        drawn = [names[i] for i in rng.integers(0, len(names), len(names))]
        rows = [i for name in drawn for i, prompt in enumerate(PROMPTS) if prompt == name]
        y, d, s = truth[rows], decided[rows], score[rows]
        values = {
            "accuracy": reference.accuracy_score(y, d),
            "precision": reference.precision_score(y, d, zero_division=0),
            "recall": reference.recall_score(y, d) if y.any() else np.nan,
            "f1": reference.f1_score(y, d, zero_division=0),
            "false_positive_rate": d[~y].mean() if (~y).any() else np.nan,
            "flagged_proportion": d.mean(),
            "cohen_kappa": reference.cohen_kappa_score(y, d),
            "auroc": reference.roc_auc_score(y, s) if 0 < y.sum() < len(y) else np.nan,
            "average_precision": reference.average_precision_score(y, s) if y.any() else np.nan,
        }
        for key, value in values.items():
            each.setdefault(key, []).append(value)
    assert set(found) == set(each)
    for key, values in each.items():
        defined = np.array(values)[~np.isnan(values)]
        assert found[key] == pytest.approx(np.percentile(defined, [2.5, 97.5]), abs=1e-12), key


def test_draws_are_the_same_for_all_metrics_and_in_any_chunks(monkeypatch):
    import qlora_moderation.intervals as module

    bootstrap = Bootstrap.of(PROMPTS, replicates=50)
    whole = np.concatenate(list(bootstrap.weightings()))
    monkeypatch.setattr(module, "_CHUNK_NUMBERS", 40)
    parts = list(bootstrap.weightings())
    assert len(parts) > 5 and (np.concatenate(parts) == whole).all()
    # a prompt's rows are drawn together, and as many prompts as there are
    index = np.array([PROMPTS.index(prompt) for prompt in PROMPTS])
    assert (whole == whole[:, index]).all()
    assert (whole[:, [PROMPTS.index(name) for name in dict.fromkeys(PROMPTS)]].sum(axis=1) == 8).all()


def test_a_share_without_an_exception_gets_its_exact_interval():
    decided = np.zeros(12, dtype=bool)
    judged = Judged.of(np.zeros(12, dtype=bool), decided)
    bootstrap = Bootstrap.of(PROMPTS, replicates=50)

    def share(weights):
        return {"flagged_proportion": measure(judged, weights)["flagged_proportion"]}

    assert bootstrap.intervals(share)["flagged_proportion"] == [0, 0]
    found = bootstrap.intervals(share, {"flagged_proportion": np.ones(12, dtype=bool)})["flagged_proportion"]
    assert found == clopper_pearson(0, 8) and found[1] == pytest.approx(1 - 0.025 ** (1 / 8))


def test_what_most_draws_leave_undefined_has_no_interval():
    truth = np.zeros(12, dtype=bool)
    truth[6] = True  # one prompt alone: a third of the draws lack it
    judged = Judged.of(truth, truth)
    bootstrap = Bootstrap.of(PROMPTS, 300)
    assert bootstrap.intervals(lambda weights: measure(judged, weights))["recall"] is None
    found = bootstrap.intervals(lambda weights: measure(judged, weights), {"recall": truth})
    assert found["recall"] == clopper_pearson(1, 1)
    silent = Judged.of(truth, np.zeros(12, dtype=bool))
    found = bootstrap.intervals(lambda weights: measure(silent, weights), {})
    assert found["f1"] is None and found["accuracy"] is not None  # all draws agree on F1, which proves nothing
    assert Bootstrap.of(PROMPTS, 0).intervals(lambda weights: measure(judged, weights)) == {}


@pytest.mark.parametrize(("successes", "trials"), [(0, 10), (3, 10), (10, 10), (59, 1000)])
def test_binomial_bounds_are_scipys(successes, trials):
    exact = binomtest(successes, trials).proportion_ci(0.95, method="exact")
    assert clopper_pearson(successes, trials) == pytest.approx([exact.low, exact.high], abs=1e-9)
    bound = upper_bound(successes, trials, 0.9)
    if successes < trials:
        assert binom.cdf(successes, trials, bound) == pytest.approx(0.1, abs=1e-9)
    else:
        assert bound == 1


def test_59_prompts_are_the_least_for_five_percent():
    assert upper_bound(0, 59, 0.95) <= 0.05 < upper_bound(0, 58, 0.95)


def test_counting_annotations_is_counting_rows():
    """Three annotators of a pair are three rows to scikit-learn."""
    rng = np.random.default_rng(5)
    votes = np.array([[1 / 3, 0], [1, 0.5], [0, 0], [0.25, 1], [2 / 3, 1]])
    annotations = np.array([3, 2, 1, 4, 3])
    flagged = votes.max(axis=1)
    judgement = Thresholds.uniform(0.4, 2).judge(rng.random((5, 2)))
    found = compute_metrics(votes, flagged, judgement, ("x", "y"), annotations)
    for name, column, decided, score in (
        ("x", votes[:, 0], judgement.categories[:, 0], judgement.probabilities[:, 0]),
        ("y", votes[:, 1], judgement.categories[:, 1], judgement.probabilities[:, 1]),
        ("flagged", flagged, judgement.flagged, judgement.risk),
    ):
        yes = np.round(column * annotations).astype(int)
        truth = np.concatenate([[1] * k + [0] * (n - k) for k, n in zip(yes, annotations, strict=True)])
        said, scored = np.repeat(decided, annotations), np.repeat(score, annotations)
        assert found[f"{name}/f1"] == pytest.approx(reference.f1_score(truth, said, zero_division=0))
        assert found[f"{name}/auroc"] == pytest.approx(reference.roc_auc_score(truth, scored))
        assert found[f"{name}/average_precision"] == pytest.approx(reference.average_precision_score(truth, scored))
        assert found[f"{name}/support"] == truth.sum()


def test_measuring_many_weightings_is_measuring_each():
    rng = np.random.default_rng(6)
    votes, raw = (rng.random((30, 3)) > 0.6).astype(float), rng.random((30, 3))
    judgement = Thresholds.uniform(0.5, 3).judge(raw)
    parts = arrange(votes, votes.max(axis=1), judgement, ("a", "b", "c"))
    weights = rng.integers(0, 3, (7, 30)).astype(float)
    together = measure_all(parts, ("a", "b", "c"), weights)
    for b, weight in enumerate(weights):
        alone = measure_all(parts, ("a", "b", "c"), weight[None])
        for key, value in together.items():
            assert value[b] == pytest.approx(alone[key][0], nan_ok=True), key


def test_an_exchange_tells_equals_from_unequals():
    rng = np.random.default_rng(7)
    truth = rng.random(300) < 0.4
    good, bad = truth ^ (rng.random(300) < 0.1), truth ^ (rng.random(300) < 0.3)
    alike = truth ^ (rng.random(300) < 0.1)
    prompts = np.arange(300) // 2

    def p_value(one, other):
        sums = [sum_decisions(Judged.of(truth, decided)) for decided in (one, other)]

        def difference(a, b):
            return derive_metrics(a)["f1"] - derive_metrics(b)["f1"]

        return compare_by_exchange(prompts, lambda w: w @ sums[0], lambda w: w @ sums[1], difference, 500)

    none = Judged.of(np.zeros(300, dtype=bool), good)
    sums = sum_decisions(none)
    undefined = compare_by_exchange(
        prompts, lambda w: w @ sums, lambda w: w @ sums, lambda a, b: derive_metrics(a)["recall"] - 0 * b[:, 0], 50
    )
    assert np.isnan(undefined)
    assert 1 / 501 <= p_value(good, bad) < 0.01 and p_value(good, good) == 1 and p_value(good, alike) > 0.05
