"""Thresholds from validation rows: what they promise, on which scale, and when they refuse."""

from __future__ import annotations

import json

import numpy as np
import pytest
from conftest import silent
from scipy.special import expit, logit

from qlora_moderation import QAModeration
from qlora_moderation.calibration import Calibrator
from qlora_moderation.config import MergeConfig, TuneConfig
from qlora_moderation.errors import ConfigError, DataError
from qlora_moderation.merge import merge_adapter
from qlora_moderation.metadata import read_json
from qlora_moderation.sample import build_sample
from qlora_moderation.tune import tune_model
from qlora_moderation.tuning import Objective, TuningSettings, bound_missed_harm, choose_threshold, tune


@pytest.mark.parametrize("text", ["f1", "recall>=0.8", "recall >= 1", "fpr<=0.2", "fpr<=0"])
@pytest.mark.parametrize("seed", range(4))
def test_thresholds_are_those_of_a_search_over_all_cuts(text, seed):
    rng = np.random.default_rng(seed)
    truth = rng.random(40) < 0.4
    score = np.round(np.clip(truth * 0.2 + rng.random(40) * 0.8, 0, 1), 1)
    objective = Objective.parse(text)
    found = choose_threshold(score, truth, objective)

    def measured(threshold):
        said = score > threshold
        tp, fp = (said & truth).sum(), (said & ~truth).sum()
        return {
            "f1": 2 * tp / (2 * tp + fp + (~said & truth).sum()),
            "recall": tp / truth.sum(),
            "fpr": fp / (~truth).sum(),
        }

    cuts = [-1.0, *sorted(set(score))]
    if objective.kind == "f1":
        assert measured(found)["f1"] == max(measured(cut)["f1"] for cut in cuts)
    elif objective.kind == "recall":
        allowed = [cut for cut in cuts if measured(cut)["recall"] >= objective.bound]
        assert measured(found) == measured(max(allowed))
    else:
        allowed = [cut for cut in cuts if measured(cut)["fpr"] <= objective.bound]
        assert measured(found) == measured(min(allowed))
    assert 0 <= found <= 1 and not np.isclose(score, found, atol=1e-9).any()


@pytest.mark.parametrize("text", ["f2", "recall>=1.1", "recall<=0.5", "fpr>=0.1", "recall", "fpr<=x", ""])
def test_other_objectives_are_refused(text):
    with pytest.raises(ConfigError, match=r"allowed: f1, 'recall>=R', 'fpr<=A'"):
        Objective.parse(text)


def rows_of(size: int = 900, seed: int = 0):
    """Raw probabilities of three categories, the first overconfident, the last with a handful of positives."""
    rng = np.random.default_rng(seed)
    truth = rng.random((size, 3)) < np.array([0.3, 0.2, 0.006])
    raw = expit(np.where(truth, 1.5, -1.5) + rng.normal(0, 1.5, (size, 3)))
    raw[:, 0] = expit(3 * logit(raw[:, 0]))
    labels = truth.astype(float)
    prompts = [f"prompt {i // 2}" for i in range(size)]
    return raw, labels, labels.max(axis=1), np.ones(size, dtype=np.int64), prompts


CATEGORIES = ("a", "b", "c")


@pytest.mark.parametrize("rule", ["max", "calibrated"])
def test_both_scales_say_the_same(rule):
    raw, labels, flagged, weight, prompts = rows_of()
    tuned = tune(raw, labels, flagged, weight, prompts, CATEGORIES, TuningSettings(rule=rule))
    assert tuned.calibrators[0].kind in ("temperature", "platt") and tuned.calibrators[0].slope < 0.6
    judged = tuned.judge(raw)
    calibrated = [each.apply(np.array(tuned.per_category[c])) for c, each in enumerate(tuned.calibrators)]
    assert (judged.categories == (judged.probabilities > np.array(calibrated))).all()
    assert (judged.flagged == (judged.risk > tuned.flagged_threshold)).all()
    if rule == "max":
        assert (judged.risk == judged.probabilities.max(axis=1)).all()
        assert (judged.flagged == (raw > np.array(tuned.flagged_per_category)).any(axis=1)).all()
    sources = {name: tuned.fit["categories"][name]["threshold_from"] for name in CATEGORIES}
    assert sources == {"a": "own", "b": "own", "c": "shared"}
    assert tuned.fit["categories"]["c"]["calibration"] == "none"


def test_objectives_are_met_on_the_rows_they_were_fitted_on():
    raw, labels, flagged, weight, prompts = rows_of()
    settings = TuningSettings(objective=Objective("recall", 0.9), flagged_objective=Objective("fpr", 0.1))
    judged = tune(raw, labels, flagged, weight, prompts, CATEGORIES, settings).judge(raw)
    for c in (0, 1):
        yes = labels[:, c] == 1
        assert judged.categories[yes, c].mean() >= 0.9
    assert 0.08 < judged.flagged[flagged == 0].mean() <= 0.1


def test_nothing_to_fit_on_keeps_the_default():
    raw, labels, flagged, weight, prompts = rows_of(40)
    tuned = tune(raw, labels, flagged, weight, prompts, CATEGORIES, TuningSettings(min_positives=1000))
    assert tuned.flagged_threshold == 0.4 and "fewer than 1000" in tuned.fit["flagged"]["threshold_from"]
    assert tuned.judge(raw).categories.shape == (40, 3)
    for c, calibrator in enumerate(tuned.calibrators):
        assert calibrator.apply(np.array(tuned.per_category[c])) == pytest.approx(0.4)
    plain = tune(raw, labels, flagged, weight, prompts, CATEGORIES, TuningSettings(calibrate=False))
    assert plain.calibrators == (Calibrator(),) * 3


def test_the_walk_ends_where_the_bound_is_first_crossed():
    rng = np.random.default_rng(0)
    risk, harmful = rng.random(400), np.arange(400) < 300
    prompts = np.array([f"p{i}" for i in range(400)])
    threshold, facts = bound_missed_harm(risk, harmful, prompts, 0.05, 0.95, 0)
    from scipy.stats import binom

    # by hand: with 300 harmful prompts, nine may be missed: P(at most 9 of 300 | 5 %) is the last below 5 %
    most = max(k for k in range(300) if binom.cdf(k, 300, 0.05) <= 0.05)
    assert facts["missed"] == most == (risk[harmful] <= threshold).sum()
    assert np.sort(risk[harmful])[most] == pytest.approx(threshold, abs=2e-6)
    assert facts["upper_bound"] <= 0.05 and facts["harmful_prompts"] == 300
    assert facts["false_positive_rate"] == (risk[~harmful] > threshold).mean()


def test_one_harmful_pair_of_each_prompt_counts():
    harmful = np.array([True] * 200 + [False] * 10)
    prompts = np.array([f"p{i // 2}" for i in range(210)])
    risk = np.tile([0.9, 0.1], 105)  # of each prompt, one answer is easy and one is hard
    drawn = {seed: bound_missed_harm(risk, harmful, prompts, 0.4, 0.95, seed) for seed in (0, 0, 1)}
    assert drawn[0][1]["harmful_prompts"] == 100
    assert 0 < drawn[0][0] < 0.1  # some hard answer was drawn for more than 40 % of the prompts
    easy = bound_missed_harm(np.where(harmful, 0.9, 0.1), harmful, prompts, 0.05, 0.95, 0)
    assert easy[0] == pytest.approx(0.9, abs=1e-5) and easy[1]["missed"] == 0 and easy[1]["false_positive_rate"] == 0


@pytest.mark.parametrize(("count", "works"), [(58, False), (59, True)])
def test_59_harmful_prompts_are_needed_for_five_percent(count, works):
    harmful = np.array([True] * count + [False])
    prompts = np.array([f"p{i}" for i in range(count + 1)])
    risk = np.linspace(0.5, 0.9, count + 1)
    if works:
        assert bound_missed_harm(risk, harmful, prompts, 0.05, 0.95, 0)[1]["missed"] == 0
    else:
        with pytest.raises(DataError, match=r"needs at least 59 harmful prompts .*; the data hold 58 "):
            bound_missed_harm(risk, harmful, prompts, 0.05, 0.95, 0)


@pytest.fixture(scope="module")
def validation_file(tmp_path_factory):
    """600 rows with prompts that the runs were not trained on."""
    path = tmp_path_factory.mktemp("validation") / "validation.jsonl"
    rows = [{**row, "prompt": f"Tell me. {row['prompt']}"} for row in build_sample(seed=0)["train"][:600]]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.mark.parametrize("rule", ["max", "calibrated"])
def test_a_stock_pipeline_and_the_file_give_our_flags_on_every_row(rule, runs, validation_file, tmp_path):
    """Nothing of this library after the file: probabilities of transformers' pipeline, thresholds.json, arithmetic."""
    from transformers import pipeline

    merged = tmp_path / "m"
    merge_adapter(MergeConfig(str(runs["qlora"].weights), str(merged)), silent)
    log: list[str] = []
    options = {"flagged_rule": rule, "min_positives": 5, "use_cpu": True}
    tune_model(TuneConfig(str(merged), str(validation_file), **options), log.append)
    moderation = QAModeration.from_pretrained(merged)
    rows = [row for part in build_sample(seed=1).values() for row in part][:150]
    questions, answers = [row["prompt"] for row in rows], [row["response"] for row in rows]
    ours = moderation.predict(questions, answers, return_bool=True)
    stored = read_json(merged / "thresholds.json")
    assert stored["origin"] == "tuned" and stored["flagged"]["rule"] == rule
    assert len({entry["raw"] for entry in stored["categories"].values()}) > 1
    classify = pipeline("text-classification", model=str(merged), top_k=None, function_to_apply="sigmoid")
    seen = set()
    for mine, result in zip(ours, classify([one["text"] for one in ours]), strict=True):
        stock = {item["label"]: item["score"] for item in result}
        categories = {name: stock[name] > entry["raw"] for name, entry in stored["categories"].items()}
        flagged = stored["flagged"]
        if rule == "max":
            verdict = any(stock[name] > threshold for name, threshold in flagged["raw"].items())
        else:
            model = flagged["risk_model"]
            clipped = {name: min(max(p, model["clip"]), 1 - model["clip"]) for name, p in stock.items()}
            score = model["bias"] + sum(w * np.log(clipped[n] / (1 - clipped[n])) for n, w in model["weights"].items())
            verdict = 1 / (1 + np.exp(-score)) > flagged["threshold"]
        assert mine["categories"] == categories and mine["flagged"] == bool(verdict)
        seen.add(verdict)
    assert len(seen) == 2 and any("rule" in line for line in log)  # both verdicts occur


def test_rows_that_the_model_was_trained_on_do_not_tune_it(runs, rows_file, validation_file, tmp_path):
    import shutil

    model = tmp_path / "m"
    shutil.copytree(runs["full"].weights, model)
    before = (model / "thresholds.json").read_text()
    prompts = {json.loads(line)["prompt"] for line in rows_file.read_text().splitlines()}
    with pytest.raises(DataError, match=r"trained on the prompts of all these rows|selected|needs"):
        known = tmp_path / "known.jsonl"
        held_out = (runs["full"].directory / "validation.jsonl").read_text().splitlines()
        selected = {json.loads(line)["prompt"] for line in held_out}
        lines = [line for line in rows_file.read_text().splitlines() if json.loads(line)["prompt"] not in selected]
        known.write_text("\n".join(lines) + "\n")
        assert prompts - selected
        tune_model(TuneConfig(str(model), str(known)), silent)
    assert (model / "thresholds.json").read_text() == before
    both = tmp_path / "both.jsonl"
    both.write_text(known.read_text() + validation_file.read_text())
    log: list[str] = []
    tuned = tune_model(TuneConfig(str(model), str(both), min_positives=5), log.append)
    assert any("are left out: the model was trained on their prompts" in line for line in log)
    untuned = "warning: the threshold of flagged is not tuned, it keeps the default: fewer than 1000 "
    assert not any(line.startswith(untuned) for line in log)
    tune_model(TuneConfig(str(model), str(both), min_positives=1000, objective="recall>=0.9"), log.append)
    assert any(line.startswith(untuned) for line in log)
    stored = (model / "thresholds.json").read_text()
    with pytest.raises(DataError, match=r"both\.jsonl: of \d+ pairs \d+ are flagged, too few of a kind to tune"):
        tune_model(TuneConfig(str(model), str(both), min_positives=1000, calibrate=False), silent)
    assert (model / "thresholds.json").read_text() == stored
    tuned = tune_model(TuneConfig(str(model), str(both), min_positives=5), log.append)
    fresh = {(r["prompt"], r["response"]) for r in map(json.loads, validation_file.read_text().splitlines())}
    assert tuned.fit["pairs"] == len(fresh)
    with pytest.raises(DataError, match=r"--max_missed_harm 0.05 --confidence 0.95: needs at least 59"):
        tune_model(TuneConfig(str(model), str(validation_file), max_missed_harm=0.05), silent)
    bound = tune_model(TuneConfig(str(model), str(validation_file), max_missed_harm=0.4, confidence=0.8), log.append)
    assert bound.fit["missed_harm"]["upper_bound"] <= 0.4 and any(line.startswith("missed harm: ") for line in log)
