"""One pipeline for full, adapter and merged models."""

from __future__ import annotations

import dataclasses
import json
import re

import numpy as np
import pytest
from conftest import silent

from qlora_moderation.config import EvaluateConfig, MergeConfig
from qlora_moderation.errors import CheckpointError, DataError
from qlora_moderation.evaluate import evaluate
from qlora_moderation.merge import merge_adapter
from qlora_moderation.report import REPORT_FILES


@pytest.fixture(scope="module")
def judged(tmp_path_factory):
    """Rows in the evaluation layout: two models, two moderators, one of them silent on some rows."""
    rows = [
        {
            "prompt": f"question {i // 2}",
            "response": f"answer {i % 5}",
            "model": "ab"[i % 2],
            "category": "Some Topic",
            "flagged": {"human": i % 4 == 0} | ({"other": i % 3 == 0} if i % 5 else {}),
        }
        for i in range(40)
    ]
    path = tmp_path_factory.mktemp("judged") / "judged.json"
    path.write_text(json.dumps(rows, indent=1))
    return path


def test_adapter_full_and_merged_models_give_all_files(runs, rows_file, tmp_path):
    merge_adapter(MergeConfig(str(runs["qlora"].weights), str(tmp_path / "merged")), silent)
    models = {"adapter": runs["qlora"].weights, "merged": tmp_path / "merged", "full": runs["full"].weights}
    results = {}
    some = tmp_path / "some.jsonl"  # a part of the training rows: the baselines must be fitted without it
    some.write_text("".join(rows_file.read_text().splitlines(keepends=True)[:100]))
    for kind, path in models.items():
        output = tmp_path / "e" / kind
        config = EvaluateConfig(str(path), str(some), str(output), train_data_name_or_path=str(rows_file))
        results[kind] = evaluate(config, silent)
        names = {file.name for file in output.iterdir()}
        assert names == {"predictions.jsonl", "metrics.json", *REPORT_FILES}
        assert json.loads((output / "metrics.json").read_text()) == results[kind]
        assert results[kind]["model"]["kind"] == kind
        lines = [json.loads(line) for line in (output / "predictions.jsonl").read_text().splitlines()]
        assert len(lines) == results[kind]["data"]["pairs"] and {"flagged", "probabilities", "votes"} <= lines[0].keys()
    probabilities = {
        kind: [
            list(json.loads(line)["probabilities"].values())
            for line in (tmp_path / "e" / kind / "predictions.jsonl").read_text().splitlines()
        ]
        for kind in ("adapter", "merged")
    }
    np.testing.assert_allclose(probabilities["adapter"], probabilities["merged"], atol=1e-5)
    # ranks of near ties may change with the last digit; nothing else
    assert results["adapter"]["metrics"] == pytest.approx(results["merged"]["metrics"], abs=5e-3)
    metrics = results["full"]["metrics"]
    assert {"flagged/accuracy", "privacy_violation/f1", "micro/average_precision", "macro/auroc"} <= metrics.keys()
    baselines = results["full"]["baselines"]
    assert baselines["tfidf_pair"]["f1"] < 1
    assert set(baselines) == {"always_flag", "never_flag", "tfidf_question", "tfidf_answer", "tfidf_pair"}
    report = (tmp_path / "e" / "full" / "report.md").read_text()
    assert "above 0.4" in report and "tfidf_pair" in report and "| flagged |" in report
    # some of these prompts selected the weights; the model was trained on all others
    full = results["full"]
    known = full["data"]["pairs"] - full["clean"]["pairs"]
    assert 0 < full["clean"]["known_pairs"] <= known < full["data"]["pairs"]  # the others selected the weights
    low, high = full["intervals"]["flagged/auroc"]
    assert low < full["metrics"]["flagged/auroc"] < high and full["bootstrap"]["unit"] == "prompt"
    assert full["flagged_intervals"]["all"]["qlora_moderation"] is not None
    assert set(full["calibration"]) == {"flagged", *full["settings"]["thresholds"]["categories"]}
    # evaluating again replaces the files of an evaluation and nothing else
    (tmp_path / "e" / "full" / "notes.txt").write_text("mine")
    with pytest.raises(CheckpointError, match="holds other files than an evaluation's"):
        evaluate(EvaluateConfig(str(runs["full"].weights), str(rows_file), str(tmp_path / "e" / "full")), silent)


def test_moderators_are_compared_by_model(runs, judged, tmp_path):
    result = evaluate(EvaluateConfig(str(runs["lora"].weights), str(judged), str(tmp_path / "e")), silent)
    assert "metrics" not in result
    shares = result["flagged_proportion"]
    assert set(shares) == {"a", "b", "all"} and set(shares["a"]) == {"qlora_moderation", "human", "other"}
    assert shares["a"]["human"] == 0.5 and shares["b"]["human"] == 0.0
    predictions = [json.loads(line) for line in (tmp_path / "e" / "predictions.jsonl").read_text().splitlines()]
    flagged = np.mean([row["flagged"] for row in predictions if row["model"] == "a"])
    assert shares["a"]["qlora_moderation"] == pytest.approx(flagged)
    assert {(row["reference"], row["model"]) for row in result["agreement"]} == {
        (moderator, model) for moderator in ("human", "other") for model in ("all", "a", "b")
    }
    silent_rows = [row for row in predictions if row["verdicts"]["other"] is None]
    assert len(silent_rows) == 8 and next(r for r in result["agreement"] if r["reference"] == "other")["pairs"] == 32
    row = next(r for r in result["agreement"] if r["reference"] == "human")
    assert row["intervals"]["agreement"][0] <= row["agreement"] <= row["intervals"]["agreement"][1]
    assert {(r["reference"], r["moderator"]) for r in result["paired"]} == {("human", "other"), ("other", "human")}
    report = (tmp_path / "e" / "report.md").read_text()
    assert "cohen kappa" in report and "flagged_proportion.png" in report


def test_stored_thresholds_decide(runs, rows_file, tmp_path):
    import shutil

    model = tmp_path / "model"
    shutil.copytree(runs["full"].weights, model)
    stored = json.loads((model / "thresholds.json").read_text())
    for value, share in ((0.0, 1.0), (1.0, 0.0)):
        stored["flagged"] |= {"raw": dict.fromkeys(stored["categories"], value), "threshold": value}
        for entry in stored["categories"].values():
            entry["raw"] = value
        (model / "thresholds.json").write_text(json.dumps(stored))
        result = evaluate(EvaluateConfig(str(model), str(rows_file), str(tmp_path / str(value))), silent)
        assert result["flagged_proportion"]["all"]["qlora_moderation"] == share
        assert {entry["raw"] for entry in result["settings"]["thresholds"]["categories"].values()} == {value}
        assert result["metrics"]["micro/recall"] == (1 if share else 0)


def test_the_gate_of_a_release_pipeline(runs, rows_file, judged, tmp_path, capsys):
    """An old evaluation, a model that flags nothing, and the exit codes."""
    import shutil

    from qlora_moderation.cli import run_job

    def run(model, output, *more, rows=rows_file):
        command = ["--model_path", str(model), "--eval_dataset", str(rows), "--output_dir", str(tmp_path / output)]
        return run_job("evaluate", [*command, "--bootstrap_replicates", "100", *more])

    old = runs["full"].weights
    assert run(old, "old") == 0
    mute = tmp_path / "mute"
    shutil.copytree(old, mute)
    stored = json.loads((mute / "thresholds.json").read_text())
    stored["flagged"] |= {"raw": dict.fromkeys(stored["categories"], 1.0), "threshold": 1.0}
    (mute / "thresholds.json").write_text(json.dumps(stored))
    rule = ["--compare", str(tmp_path / "old"), "--fail_if", "flagged/flagged_proportion < -0.01"]
    flags = json.loads((tmp_path / "old" / "metrics.json").read_text())["flagged_proportion"]["all"]["qlora_moderation"]
    if flags < 0.05:  # the old one must flag something to lose
        stored["flagged"] |= {"raw": dict.fromkeys(stored["categories"], 0.0), "threshold": 0.0}
        (mute / "thresholds.json").write_text(json.dumps(stored))
        rule[-1] = "flagged/flagged_proportion > 0.01"
    assert run(mute, "new", *rule) == 3
    assert ": failed; new minus old " in capsys.readouterr().out
    comparison = json.loads((tmp_path / "new" / "metrics.json").read_text())["comparison"]
    assert comparison["rows"] > 100 and comparison["differences"]["flagged/flagged_proportion"]["p_value"] < 0.05
    assert "Against the earlier evaluation" in (tmp_path / "new" / "report.html").read_text()
    assert run(old, "same", *rule) == 0
    # a rule behind a flag of its own counts like the first one
    assert run(mute, "new", *rule, "--fail_if", "flagged/f1 < -1") == 3
    few = tmp_path / "few.jsonl"
    few.write_text("".join(rows_file.read_text().splitlines(keepends=True)[:3]))
    assert run(old, "few", *rule, rows=few) == 4  # three rows decide nothing
    assert "compared on 3 rows" in capsys.readouterr().out
    assert run(old, "other", "--compare", str(tmp_path / "old"), "--fail_if", "nonsense") == 2
    assert run(old, "other", "--fail_if", "flagged/f1 < 0") == 2
    assert run(old, "other", "--compare", str(tmp_path)) == 2
    assert run(old, "other", *rule, rows=judged) == 2  # no row in common
    assert run(old, "other", *rule, "--bootstrap_replicates", "10") == 2
    assert not (tmp_path / "other").exists()


def test_odd_output_directories(runs, judged, tmp_path, monkeypatch):
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    config = EvaluateConfig(str(runs["lora"].weights), str(judged), str(tmp_path / "link"), bootstrap_replicates=0)
    for _ in range(2):
        evaluate(config, silent)
    assert (tmp_path / "link").is_symlink() and (tmp_path / "real" / "report.html").is_file()
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    evaluate(dataclasses.replace(config, output_dir="."), silent)
    assert (tmp_path / "here" / "report.html").is_file()
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match="is no directory that can be written in"):
        evaluate(dataclasses.replace(config, output_dir=str(tmp_path / "file" / "x")), silent)


def test_a_moderator_named_as_the_labels_are_is_refused(runs, tmp_path):
    row = {"prompt": "p", "response": "r", "model": "m", "flagged": {"labels": True}}
    (tmp_path / "rows.jsonl").write_text(json.dumps(row) + "\n")
    with pytest.raises(DataError, match="names a moderator labels"):
        evaluate(EvaluateConfig(str(runs["lora"].weights), str(tmp_path / "rows.jsonl"), str(tmp_path / "e")), silent)


def test_other_moderators_come_from_files(runs, judged, tmp_path):
    file = tmp_path / "guard.jsonl"
    lines = [
        {"prompt": f"question {i // 2}", "response": f"answer {i % 5}", "verdict": "unsafe\nS1" if i % 3 else "safe"}
        for i in range(30)
    ]
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    config = EvaluateConfig(
        str(runs["lora"].weights),
        str(judged),
        str(tmp_path / "e"),
        moderator=(f"guard={file}",),
        bootstrap_replicates=50,
    )
    log: list[str] = []
    result = evaluate(config, log.append)
    assert any(re.search(r"^flagged, all: .*guard 66\.7% of the 30 pairs that it judged", line) for line in log)
    assert result["moderators"]["guard"]["matched"] == 30
    assert result["moderators"]["guard"]["pairs_without_a_verdict"] == 10
    assert result["flagged_proportion"]["all"]["guard"] == pytest.approx(20 / 30)
    assert "10 pairs have no verdict" in (tmp_path / "e" / "report.html").read_text()
