"""What the benchmarks of the scripts folder reckon with: simulated annotators, seconds to a target, sizes before weights."""

from __future__ import annotations

import argparse
import importlib
import itertools
import json
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

from qlora_moderation.sample import build_sample

SCRIPTS = Path(__file__).resolve().parent.parent / "scripts"


@pytest.fixture
def load(monkeypatch):
    """Import a module of the scripts folder, which imports its neighbours by their bare names."""
    monkeypatch.setattr(sys, "path", [str(SCRIPTS), *sys.path])
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    return importlib.import_module


def test_annotators_disagree_as_reported_and_their_majority_is_near_the_real_label(load):
    rows = build_sample(seed=0)["train"] * 10
    made = load("annotators").simulate_annotations(rows)
    groups = (
        list(itertools.batched(made, 3)) if sys.version_info >= (3, 12) else list(zip(*[iter(made)] * 3, strict=True))
    )
    assert len(groups) == len(rows)
    verdicts = [[row["is_safe"] for row in group] for group in groups]
    agreeing = [one == other for group in verdicts for one, other in itertools.combinations(group, 2)]
    assert sum(agreeing) / len(agreeing) == pytest.approx(0.817, abs=0.01)
    kept = [Counter(group).most_common(1)[0][0] == row["is_safe"] for group, row in zip(verdicts, rows, strict=True)]
    assert sum(kept) / len(kept) == pytest.approx(0.97, abs=0.01)
    assert all(any(row["category"].values()) != row["is_safe"] for row in made)


@pytest.mark.parametrize(
    ("kind", "good", "bad"),
    [
        (lambda flags: flags.whole(2), "2", ["1", "0", "-3", "2.5", "x", ""]),
        (lambda flags: flags.whole(64, 64), "128", ["63", "0", "96"]),
        (lambda flags: flags.above_zero, "1e-3", ["0", "-1", "nan", "inf", "x"]),
        (lambda flags: flags.rows_file, "{place}/rows.jsonl", ["{place}/none.jsonl", "{place}", "{place}/rows.txt"]),
        (lambda flags: flags.model_name, "owner/name", ["{place}/none", "./none", "/none"]),
        (lambda flags: flags.existing_folder, "{place}", ["{place}/none", "{place}/rows.txt"]),
        (lambda flags: flags.new_file, "{place}/figures.json", ["{place}", "{place}/none/figures.json"]),
    ],
    ids=["whole", "multiple", "above zero", "rows", "model", "folder", "file"],
)
def test_values_that_nothing_can_be_measured_with_are_refused_on_the_command_line(kind, good, bad, load, tmp_path):
    for name in ("rows.jsonl", "rows.txt"):
        (tmp_path / name).touch()
    read = kind(load("flags"))
    assert str(read(good.format(place=tmp_path))) in (good.format(place=tmp_path), "0.001")
    for text in bad:
        with pytest.raises(argparse.ArgumentTypeError):
            read(text.format(place=tmp_path))


def test_a_benchmark_refuses_its_flags_before_it_imports_torch():
    program = "import runpy, sys; sys.modules['torch'] = None; del sys.argv[0]; runpy.run_path(*sys.argv[:1], None, '__main__')"
    for script, flags in (
        ("bench_train", "--rows nowhere.jsonl"),
        ("bench_train", "--contenders dynamic"),
        ("bench_train", "--steps 1"),
        ("bench_data", "--rows 0"),
        ("bench_startup", "--repeats 0"),
    ):
        command = [sys.executable, "-c", program, str(SCRIPTS / f"{script}.py"), *flags.split()]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 2 and f"{script}.py: error: " in done.stderr.splitlines()[-1], done.stderr
        assert flags.split()[0] in done.stderr.splitlines()[-1]


def test_rows_of_a_benchmark_are_distinct_and_a_broken_one_is_named(load, tmp_path, capsys):
    rivals, path = load("rivals"), tmp_path / "rows.jsonl"
    rows = build_sample(seed=0)["train"][:3]
    path.write_text("".join(json.dumps(row) + "\n" for row in [*rows, rows[0]]))
    assert rivals.load_rows(str(path), 0) == rows
    for line, reason in (
        ('{"prompt": 1', "is not valid JSON"),
        ('{"a": 1}', "column prompt is missing"),
        ("", "no row"),
    ):
        path.write_text(f"{line}\n")
        with pytest.raises(SystemExit) as caught:
            rivals.load_rows(str(path), 0)
        assert caught.value.code == 2 and reason in capsys.readouterr().err


def test_seconds_to_a_target_are_found_and_a_target_never_reached_is_called_so(load):
    bench = load("bench_quality")

    def curve(*values):
        return [{"wall": 10.0 * i, "cpu": 20.0 * i, "value": value} for i, value in enumerate(values)]

    assert bench.find_seconds(curve(0.1, 0.3, 0.2, 0.5), 0.4) == pytest.approx(20 + 10 * 2 / 3)
    assert bench.find_seconds(curve(0.1, 0.3, 0.2, 0.5), 0.2, "cpu") == pytest.approx(10)
    assert bench.find_seconds(curve(0.1, 0.3), 0.4) is None
    rival = {1e-3: curve(0.1, 0.2, 0.3), 3e-3: curve(0.1, 0.3, 0.4)}
    reached = bench.summarize({"rival": rival, "ours": {1e-3: curve(0.2, 0.6, 0.6), 3e-3: curve(0.0, 0.2, 0.9)}})
    assert reached["target"] == 0.4 and reached["contenders"]["rival"]["wall"] == 20
    assert reached["contenders"]["ours"]["rate"] == 1e-3 and reached["contenders"]["ours"][
        "wall_ratio"
    ] == pytest.approx(4)
    missed = bench.summarize({"rival": rival, "ours": {1e-3: curve(0.0, 0.2), 3e-3: curve(0.0, 0.1)}})
    assert missed["contenders"]["ours"]["rate"] == 1e-3
    assert "not reached" in bench.show("single", missed)[1]
