"""The table of methods, seeds and data sets: what ran, what did not, and rows with unknown prompts."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

SCRIPT = Path(__file__).resolve().parent.parent / "scripts" / "reproduce.py"


def load():
    spec = importlib.util.spec_from_file_location("reproduce", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def write(folder, f1, pairs=100, clean=None, seconds=120):
    metrics = {"flagged/f1": f1, "flagged/auroc": f1, "micro/average_precision": f1}
    result = {"metrics": metrics, "data": {"pairs": pairs}, "clean": clean or {"pairs": pairs}}
    (folder / "evaluation").mkdir(parents=True)
    (folder / "evaluation" / "metrics.json").write_text(json.dumps(result))
    (folder / "seconds.json").write_text(json.dumps(seconds))


def test_cells_that_did_not_run_say_so(tmp_path):
    reproduce = load()
    write(tmp_path / "30k" / "lora-0", 0.5)
    write(tmp_path / "30k" / "lora-1", 0.7, clean={"pairs": 10, "metrics": {"flagged/f1": 0.2}})
    write(tmp_path / "30k" / "full-0", 0.6, clean={"pairs": 0})
    lines = reproduce.build_table(tmp_path, ["30k", "330k"], ["lora", "full"], [0, 1]).splitlines()
    rows = {tuple(line.split(" | ")[:2]): line.strip("| \n").split(" | ") for line in lines[2:]}
    lora, full, missing = rows["| 30k", "lora"], rows["| 30k", "full"], rows["| 330k", "lora"]
    assert lora[2:4] == ["2 of 2", "0.600 ± 0.141"] and lora[7] == "0.350 ± 0.212" and lora[-1] == "2.0"
    assert full[2:4] == ["1 of 2", "0.600"] and full[6:8] == ["0 of 100", "not measured"]
    assert missing[2] == "0 of 2" and set(missing[3:]) == {"not measured"}


def test_what_there_is_no_time_for_is_named_and_not_run(tmp_path):
    command = [sys.executable, str(SCRIPT), "--backbone", "nothing", "--output", str(tmp_path / "o"), "--minutes", "0"]
    done = subprocess.run([*command, "--methods", "lora", "--seeds", "0"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "no time: 330k lora seed 0" in done.stdout and "not measured" in (tmp_path / "o" / "results.md").read_text()
