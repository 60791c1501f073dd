"""Bad input gets one line that names place and remedy, exit code 2, and nothing is lost or half-written."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import bad_configuration
import bad_data
import bad_devices
import bad_models
import bad_run_directories
import pytest
from workbench import CASES, Bench

from qlora_moderation.cli import main

ROOT = Path(__file__).resolve().parent.parent
PARTS = (bad_configuration, bad_data, bad_models, bad_run_directories, bad_devices)  # each enters its cases
_LOCKS = (".lock", ".writer-1-of-1")


@pytest.fixture(scope="module")
def adapters(runs):
    return {name: run.weights for name, run in runs.items()}


def snapshot(folder: Path) -> dict[str, bytes]:
    """Return the content of every file below a folder; locks, which hold nothing, and links do not count."""
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and not path.is_symlink() and path.name not in _LOCKS
    }


def test_every_part_has_its_cases():
    assert {case.part for case in CASES.values()} == {module.__name__[4:].replace("_", " ") for module in PARTS}
    assert len(CASES) >= 100


@pytest.mark.parametrize("name", CASES)
def test_one_line_says_what_is_wrong_and_nothing_is_written(name, rows, llama, adapters, tmp_path, monkeypatch, capsys):
    damage, words = CASES[name].damage, CASES[name].words
    bench = Bench(tmp_path, rows, llama, adapters, monkeypatch)
    command = damage(bench)
    before = snapshot(tmp_path)
    with bench.at_end:
        code = main(command)
    monkeypatch.undo()
    error = capsys.readouterr().err
    assert code == 2, error
    assert re.fullmatch(r"(error: [^\n]+\n){1,2}", error), error
    assert len(error) < 600 + 2 * len(str(tmp_path)) and error.replace("\n", "").isprintable()
    for word in words:
        assert word.format(folder=tmp_path) in error
    assert snapshot(tmp_path) == before


@pytest.mark.parametrize("name", ["a last line cut off", "an adapter that is no number"])
def test_a_process_of_its_own_says_the_same(name, rows, llama, adapters, tmp_path, monkeypatch):
    bench = Bench(tmp_path, rows, llama, adapters, monkeypatch)
    job, *flags = CASES[name].damage(bench)
    before = snapshot(tmp_path)
    command = [sys.executable, str(ROOT / "scripts" / f"{job}.py"), *flags]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    said = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert done.returncode == 2 and len(said) == 1 and "Traceback" not in done.stderr, done.stderr
    assert all(word.format(folder=tmp_path) in said[0] for word in CASES[name].words)
    assert snapshot(tmp_path) == before
