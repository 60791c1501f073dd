"""The job `audit`: what a data set holds, told without torch."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import silent

from qlora_moderation.audit_config import AuditConfig
from qlora_moderation.data_audit import audit_data
from qlora_moderation.errors import ConfigError, DataError
from qlora_moderation.taxonomy import BEAVERTAILS_CATEGORIES

ROOT = Path(__file__).resolve().parent.parent
NAME = "privacy_violation"


def row(prompt, response, *ticked, **more):
    category = {name: name in ticked for name in BEAVERTAILS_CATEGORIES}
    return {"prompt": prompt, "response": response, "category": category, "is_safe": not ticked, **more}


def save(path, rows):
    path.write_text("".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in rows))
    return str(path)


TRAINING = [
    row("p1", "r1", NAME), row("p1", "r1"), row("p1", "r1", NAME, "self_harm"), row("p2", "longer", NAME), row("p3", "r3"),
    "not json", {"prompt": 3},
]  # fmt: skip
JUDGING = [row("P1 ", "r9"), row("p2", "LONGER"), row("new", "r"), "[]"]


def test_a_hand_made_set_and_its_leakage(tmp_path):
    log: list[str] = []
    training, judging = save(tmp_path / "t.jsonl", TRAINING), save(tmp_path / "e.jsonl", JUDGING)
    audit = audit_data(AuditConfig(training, judging, output_dir=str(tmp_path / "out"), show_bad_rows=1), log.append)
    assert (audit["rows"], audit["pairs"], audit["prompts"], audit["skipped_rows"]) == (5, 3, 3, 2)
    assert audit["annotations_per_pair"] == {"1": 2, "3": 1}
    assert audit["pairs_with_disagreement_on_flagged"] == 1
    assert (
        audit["disagreement"][NAME]
        == audit["disagreement"]["self_harm"]
        == 1
        == sum(audit["disagreement"].values()) - 1
    )
    assert audit["label_counts"][NAME] == pytest.approx(3)
    assert audit["characters"] == {"mean": pytest.approx(16 / 3), "median": 4, "p95": pytest.approx(7.6), "longest": 8}
    assert "tokens" not in audit
    assert audit["evaluation"]["leakage"] == {"pairs_with_a_training_prompt": 2, "pairs_also_in_training": 1}
    assert [line.split(":")[0] for line in audit["bad_rows"]] == [f"{training}, line 6", f"{training}, line 7"]
    assert json.loads((tmp_path / "out" / "audit.json").read_text()) == audit
    said = "\n".join(log)
    for words in (
        "5 usable, 2 broken",
        "3 distinct, of 3 prompts",
        "60.0% of the rows",
        "1 of the 1 pairs with several annotations",
        f"{training}, line 6: is not valid JSON",
        "and 1 more",
        "of these 3 pairs 2 (66.7%) have a prompt of",
        f"written: {tmp_path / 'out' / 'audit.json'}",
    ):
        assert words in said, words
    table = next(line for line in log if line.strip().startswith(NAME)).split()
    assert table == [NAME, "3", "60.0%", "1"]
    assert "line 7" not in said


def test_tokens_and_what_a_model_knows(runs, rows_file):
    log: list[str] = []
    weights = runs["lora"].weights
    audit = audit_data(AuditConfig(str(rows_file), model_name_or_path=str(weights), max_length=32), log.append)
    record = json.loads((runs["lora"].directory / "audit.json").read_text())
    assert audit["tokens"]["max_length"] == 32 and record["tokens"]["max_length"] == 128
    known = audit["known_to_the_model"]
    assert known["pairs_also_in_training"] == record["pairs"] < audit["pairs"]
    assert audit["pairs"] - known["pairs_with_a_training_prompt"] == known["pairs_with_a_selection_prompt"] > 0
    assert audit["tokens"]["longest"] >= record["tokens"]["longest"] > 32
    assert any("are longer than 32" in line for line in log) and any("known to the model" in line for line in log)


def test_judged_rows_have_verdicts_instead_of_labels(tmp_path):
    rows = [
        {"prompt": "p", "response": f"r{i}", "model": "m" * (i % 2 + 1), "flagged": {"human": i == 0}} for i in range(3)
    ]
    log: list[str] = []
    audit = audit_data(AuditConfig(save(tmp_path / "rows.jsonl", rows)), log.append)
    assert audit["verdicts"] == {"human": {"pairs": 3, "flagged_share": pytest.approx(1 / 3)}}
    assert audit["models"] == {"m": 2, "mm": 1} and "label_counts" not in audit
    assert any("33.3% flagged" in line for line in log)


def test_a_run_s_own_audit_is_left_alone(rows_file, tmp_path):
    (tmp_path / "status.json").touch()
    with pytest.raises(ConfigError, match="is a run's directory"):
        audit_data(AuditConfig(str(rows_file), output_dir=str(tmp_path)), silent)
    assert [path.name for path in tmp_path.iterdir()] == ["status.json"]


def test_a_set_without_a_usable_row_is_refused(tmp_path):
    with pytest.raises(DataError, match=r"holds no usable row; the first fault: .*line 1"):
        audit_data(AuditConfig(save(tmp_path / "rows.jsonl", ["x"]), output_dir=str(tmp_path / "out")), silent)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("options", [{"max_length": 64}, {"model_revision": "main"}])
def test_options_of_the_tokenizer_need_a_model(options):
    assert "needs --model_name_or_path" in AuditConfig("rows.jsonl", **options).find_faults()[0]


def test_the_command_needs_no_torch(tmp_path):
    program = (
        "import sys\nfrom qlora_moderation.cli import main\ncode = main(sys.argv[1:])\n"
        "heavy = {'torch', 'transformers', 'datasets'} & set(sys.modules)\nsys.exit(f'imported {heavy}' if heavy else code)"
    )
    command = [
        sys.executable,
        "-c",
        program,
        "audit",
        "--train_data_name_or_path",
        save(tmp_path / "t.jsonl", TRAINING),
    ]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (0, "") and "3 distinct" in done.stdout
