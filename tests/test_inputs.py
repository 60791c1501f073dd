"""What is wrong with a command is said before torch is imported."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import make_config

from qlora_moderation.config import EvaluateConfig, TuneConfig
from qlora_moderation.errors import ConfigError
from qlora_moderation.inputs import check_inputs

ROOT = Path(__file__).resolve().parent.parent
TRAIN = "train --model_name_or_path m --output_dir {folder}/run --train_data_name_or_path"
FAULTS = {
    "trian --help": ["error: unknown job trian (did you mean train?); the jobs are train, plan, merge, "],
    "train --lerning_rate 3": ["error: unknown flag --lerning_rate (did you mean --learning_rate?)"],
    "merge --config {folder}/broken.yaml": ["error: --config {folder}/broken.yaml: is not valid YAML"],
    f"{TRAIN} a/b:train --taxonomy {{folder}}/broken.yaml": [
        "error: --taxonomy {folder}/broken.yaml: is not valid YAML"
    ],
    f"{TRAIN} nowhere.jsonl --eval_data_name_or_path b.csv --metric_for_best_model micro/f2": [
        "error: nowhere.jsonl: no such file",
        "error: b.csv: no such file",
        "error: --metric_for_best_model micro/f2: is no metric of this taxonomy (did you mean micro/f1?)",
    ],
    "evaluate --model_path m --output_dir o --eval_dataset rows.txt": ["error: rows.txt: is neither a file ending in"],
    "evaluate --model_path m --output_dir o --eval_dataset a/b:c --compare d --fail_if x": [
        "error: --fail_if 'x': must"
    ],
    "tune --model_path m --eval_dataset a/b:c --objective f2": ["error: objective 'f2': allowed: f1"],
    "backbone --output_dir o --train_data_name_or_path nowhere.csv": ["error: nowhere.csv: no such file"],
}
PROGRAM = """
import contextlib, io, json, sys
from qlora_moderation.cli import main
said = []
for arguments in json.load(sys.stdin):
    error = io.StringIO()
    with contextlib.redirect_stderr(error):
        code = main(arguments)
    said.append((code, error.getvalue()))
print(json.dumps([said, sorted({"torch", "transformers", "datasets"} & set(sys.modules))]))
"""


def test_faults_are_reported_without_torch(tmp_path):
    (tmp_path / "broken.yaml").write_text("lora_r: [")
    commands = [command.format(folder=tmp_path).split() for command in FAULTS]
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM],
        cwd=ROOT,
        input=json.dumps(commands),
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    said, heavy = json.loads(done.stdout)
    assert heavy == []
    for (command, expected), (code, error) in zip(FAULTS.items(), said, strict=True):
        assert code == 2 and all(words.format(folder=tmp_path) in error for words in expected), (command, error)
        assert all(line.startswith("error: ") for line in error.splitlines())
    assert [path.name for path in tmp_path.iterdir()] == ["broken.yaml"]


def test_good_inputs_pass_and_several_processes_leave_it_to_rank_0(rows_file, tmp_path, monkeypatch):
    check_inputs(make_config(tmp_path, rows_file, tmp_path / "run"))
    check_inputs(EvaluateConfig("m", str(rows_file), "o", compare="c", fail_if=("flagged/f1 < 0",)))
    check_inputs(TuneConfig("m", str(rows_file), "recall>=0.9", "f1"))
    missing = make_config(tmp_path, tmp_path / "nowhere.csv", tmp_path / "run")
    with pytest.raises(ConfigError, match="no such file"):
        check_inputs(missing)
    monkeypatch.setenv("WORLD_SIZE", "2")
    check_inputs(missing)
