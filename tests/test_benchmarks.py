"""What the benchmarks of the scripts folder reckon with: simulated annotators, seconds to a target, sizes before weights."""

from __future__ import annotations

import importlib
import itertools
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
