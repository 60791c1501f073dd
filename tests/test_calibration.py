"""Calibration: maps that rise, are chosen by what they gain, and tell the risk that a maximum cannot see."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.special import expit, logit

from qlora_moderation.calibration import (
    Calibrator,
    RiskModel,
    assign_folds,
    compute_calibration_line,
    compute_ece,
    compute_ece_of_the_perfect,
    compute_log_loss_of,
    cross_fit_risk,
    fit_calibrator,
    fit_risk_model,
)
from qlora_moderation.metrics import compute_binary_metrics

MAPS = [
    Calibrator(),
    Calibrator("temperature", 0.4),
    Calibrator("platt", 2.0, -1.5),
    Calibrator("isotonic", knots=((0.0, 0.2, 0.6, 1.0), (0.1, 0.1, 0.1, 0.9))),
]


@pytest.mark.parametrize("calibrator", MAPS, ids=lambda each: each.kind)
def test_maps_rise_everywhere_and_are_inverted(calibrator):
    raw = np.linspace(0.001, 0.999, 500)
    given = calibrator.apply(raw)
    assert (np.diff(given) > 0).all() and given[0] >= 0 and given[-1] <= 1
    for value in (given[3], given[250], given[-4]):
        assert calibrator.apply(np.array(calibrator.invert(value))) == pytest.approx(value, abs=1e-9)
    assert Calibrator.from_dict(calibrator.to_dict()) == calibrator


def draw(size: int, slope: float, intercept: float, seed: int = 0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Raw probabilities, votes of one annotator drawn from a distorted map of them, and prompts of three rows each."""
    rng = np.random.default_rng(seed)
    raw = expit(rng.normal(-1, 2, size))
    votes = (rng.random(size) < expit(slope * logit(raw) + intercept)).astype(float)
    return raw, votes, np.array([f"prompt {i // 3}" for i in range(size)])


@pytest.mark.parametrize(
    ("slope", "intercept", "kind"), [(0.5, 0.0, "temperature"), (1.0, -1.5, "platt"), (1.0, 0.0, "none")]
)
def test_the_map_is_found_that_made_the_votes(slope, intercept, kind):
    raw, votes, prompts = draw(6000, slope, intercept)
    votes[votes.cumsum() > 900] = 0  # below the number of positives that isotonic regression needs
    kept = votes.cumsum() < 900
    raw, votes, prompts = raw[kept], votes[kept], prompts[kept]
    calibrator, found = fit_calibrator(raw, votes, np.ones(len(raw)), prompts)
    assert calibrator.kind == kind and "isotonic" not in found["log_loss"]
    if kind != "none":
        assert calibrator.slope == pytest.approx(slope, abs=0.1)
        assert calibrator.intercept == pytest.approx(intercept, abs=0.15)
    found_intercept, found_slope = compute_calibration_line(calibrator.apply(raw), votes, np.ones(len(raw)))
    assert found_slope == pytest.approx(1, abs=0.12) and found_intercept == pytest.approx(0, abs=0.12)


def test_isotonic_needs_a_thousand_positives_and_wins_where_no_line_fits():
    rng = np.random.default_rng(1)
    raw = rng.random(8000)
    votes = (rng.random(8000) < np.where(raw < 0.5, 0.1, 0.6)).astype(float)
    calibrator, _ = fit_calibrator(raw, votes, np.ones(8000), np.arange(8000).astype(str))
    assert calibrator.kind == "isotonic"
    assert calibrator.apply(np.array([0.2, 0.9])) == pytest.approx([0.1, 0.6], abs=0.05)
    few, _ = fit_calibrator(raw[:1000], votes[:1000], np.ones(1000), np.arange(1000).astype(str))
    assert few.kind != "isotonic"


def test_too_few_votes_of_a_kind_keep_the_raw_probability():
    raw, votes, prompts = draw(200, 1.0, 0.0)
    votes[:] = 0
    votes[:9] = 1
    calibrator, found = fit_calibrator(raw, votes, np.ones(200), prompts)
    assert calibrator.kind == "none" and "fewer than 10" in found["reason"]


def test_folds_keep_a_prompt_together_whatever_the_order():
    prompts = np.array([f"p{i % 40}" for i in range(200)])
    folds = assign_folds(prompts)
    assert all(len(set(folds[prompts == prompt])) == 1 for prompt in set(prompts)) and set(folds) == set(range(5))
    order = np.random.default_rng(0).permutation(200)
    assert (assign_folds(prompts[order]) == folds[order]).all()


def three_annotators(size: int = 600) -> tuple[np.ndarray, np.ndarray]:
    """Half of the pairs: three annotators who each tick another of three categories. The model knows the shares exactly."""
    rng = np.random.default_rng(2)
    flagged = (np.arange(size) % 2).astype(float)
    raw = np.where(flagged[:, None] == 1, 1 / 3, 0.02) * rng.uniform(0.9, 1.1, (size, 3))
    # among the others, one category alone reaches as high as any of the three does
    raw[flagged == 0, 0] = rng.uniform(0.02, 0.39, int((flagged == 0).sum()))
    return raw, flagged


def test_three_annotators_who_each_tick_another_category_are_flagged_by_the_risk_alone():
    raw, flagged = three_annotators()
    truth = flagged == 1
    model = fit_risk_model(raw, flagged, np.full(len(raw), 3.0))
    assert min(model.weights) >= 0
    by_max = compute_binary_metrics(truth, raw.max(axis=1) > 0.4, raw.max(axis=1))
    by_risk = compute_binary_metrics(truth, model.apply(raw) > 0.5, model.apply(raw))
    assert by_risk["recall"] > 0.97 and by_risk["auroc"] > 0.99 > 0.96 > by_max["auroc"] and by_max["recall"] < 0.2
    prompts = np.arange(len(raw)).astype(str)
    held_out = cross_fit_risk(raw, flagged, np.full(len(raw), 3.0), prompts)
    assert compute_binary_metrics(truth, held_out > 0.5, held_out)["auroc"] > 0.99


def test_no_weight_of_the_risk_is_negative():
    rng = np.random.default_rng(3)
    raw = rng.random((500, 2))
    flagged = (raw[:, 0] > raw[:, 1]).astype(float)  # the second category speaks against
    assert fit_risk_model(raw, flagged, np.ones(500)).weights[1] == 0
    assert RiskModel((1.0, 0.0), 0.0).apply(np.array([[0.0, 0.5], [1.0, 0.5]])).tolist() == pytest.approx(
        [1e-4, 1 - 1e-4]
    )


def test_a_line_is_the_written_out_logistic_regression():
    from sklearn.linear_model import LogisticRegression

    raw, votes, _ = draw(2000, 0.6, 0.4)
    fit = LogisticRegression(C=1e9, tol=1e-10).fit(logit(raw)[:, None], votes)
    intercept, slope = compute_calibration_line(raw, votes, np.ones(2000))
    assert slope == pytest.approx(float(fit.coef_[0, 0]), rel=1e-4)
    # the intercept is the one with slope 1: expected and seen numbers of yes agree
    assert expit(logit(raw) + intercept).sum() == pytest.approx(votes.sum(), rel=1e-4)
    assert np.isnan(compute_calibration_line(raw, np.zeros(2000), np.ones(2000))).all()


def test_fractional_votes_count_as_annotations():
    raw = draw(300, 1.0, 0.0)[0]
    soft, weight = np.array([0.25, 1.0]), np.array([4.0, 2.0])
    rows = np.array([raw[0]] * 4 + [raw[1]] * 2), np.array([1.0, 0, 0, 0, 1, 1]), np.ones(6)
    assert compute_log_loss_of(raw[:2], soft, weight) == pytest.approx(compute_log_loss_of(*rows))
    assert compute_ece(raw[:2], soft, weight) == pytest.approx(compute_ece(*rows))
    assert compute_calibration_line(raw[:2], soft, weight) == pytest.approx(compute_calibration_line(*rows))


def test_ece_by_hand_and_that_of_the_perfect():
    probabilities = np.array([0.05, 0.05, 0.95, 0.95])
    assert compute_ece(probabilities, np.array([0.0, 1, 1, 1]), np.ones(4)) == pytest.approx((2 * 0.45 + 2 * 0.05) / 4)
    rng = np.random.default_rng(0)
    perfect = compute_ece_of_the_perfect(rng.beta(0.7, 1.0, 600), np.ones(600))
    assert 0.03 < perfect < 0.06  # about .044 for 600 rows
    assert compute_ece_of_the_perfect(rng.beta(0.7, 1.0, 60_000), np.ones(60_000)) < 0.01
