"""Flagged proportions of a stream: the same whatever the pieces, intervals like those of an evaluation."""

from __future__ import annotations

import json
import random

import numpy as np
import pytest

from qlora_moderation import plots
from qlora_moderation.intervals import Bootstrap, clopper_pearson
from qlora_moderation.proportions import MISSING, MOST_GROUPS, Proportions, draw_poisson
from qlora_moderation.summary import render_summary


def build_rows(prompts: int, answers: int, seed: int = 0) -> list[dict]:
    """Answers to one prompt resemble each other: a prompt's own share decides them."""
    rng = random.Random(seed)
    rows = []
    for prompt in range(prompts):
        share = rng.choice([0.05, 0.8])
        for answer in range(answers):
            flags = {"a": rng.random() < share, "b": False}
            row = {"prompt": f"q{prompt}", "model": "xyz"[answer % 3], "doc": {"n": answer}, "flagged": flags["a"]}
            rows.append(
                row | {"categories": flags, "windows": 1 + (prompt == 0), "truncated": prompt == 1, "error": None}
            )
    rng.shuffle(rows)
    return rows


def count(rows: list[dict], pieces: int, group_by=("model",), replicates: int = 400) -> dict:
    counts = Proportions("prompt", group_by, "", replicates)
    for start in range(0, len(rows), pieces):
        counts.add(rows[start : start + pieces])
    return counts.to_dict()


def test_pieces_and_order_change_nothing():
    rows = build_rows(50, 6)
    bad = [{"prompt": None, "error": "is no text", "flagged": None, "categories": None}]
    found = count([*rows, *bad], 7)
    assert found == count([*bad, *rows], 1000) == count([*rows[::-1], *bad], 50)
    assert (found["rows"], found["judged"], found["bad_rows"], found["prompts"]) == (301, 300, 1, 50)
    assert (found["windows"], found["rows_in_several_windows"], found["truncated_rows"]) == (306, 6, 6)
    share = sum(row["flagged"] for row in rows) / 300
    assert found["flagged"]["share"] == found["categories"]["a"]["share"] == pytest.approx(share)
    assert found["categories"]["b"]["interval"] == clopper_pearson(0, 50)
    groups = found["groups"]["model"]
    assert sorted(groups) == ["x", "y", "z"] and sum(group["judged"] for group in groups.values()) == 300
    assert [group["flagged"]["share"] for group in groups.values()] == sorted(
        (group["flagged"]["share"] for group in groups.values()), reverse=True
    )
    assert any("0 of 300" in line for line in render_summary(found)) and json.dumps(found)


def test_intervals_agree_with_those_that_draw_prompts_from_a_list():
    rows = build_rows(150, 6)
    found = count(rows, 100, (), 2000)["flagged"]["interval"]
    flagged = np.array([row["flagged"] for row in rows])
    listed = Bootstrap.of([row["prompt"] for row in rows], 2000)
    expected = listed.interval(listed.draw(lambda w: {"share": (w @ flagged) / w.sum(axis=1)})["share"])
    by_row = 2 * 1.96 * np.sqrt(flagged.mean() * (1 - flagged.mean()) / len(rows))
    assert found == pytest.approx(expected, abs=0.02)
    assert found[1] - found[0] > 1.5 * by_row, "answers to one prompt are no independent trials"


def test_draws_are_poisson_and_a_function_of_the_prompt():
    hashes = np.arange(20000, dtype=np.uint64)
    drawn = draw_poisson(hashes, 30)
    assert drawn.shape == (20000, 30) and (drawn[5:9] == draw_poisson(hashes[5:9], 30)).all()
    assert drawn.mean() == pytest.approx(1, abs=0.01) and drawn.var() == pytest.approx(1, abs=0.02)
    assert abs(np.corrcoef(drawn[:, :8].T)[np.triu_indices(8, 1)]).max() < 0.03
    assert np.corrcoef(drawn[:-1, 0], drawn[1:, 0])[0, 1] == pytest.approx(0, abs=0.03)


def test_many_prompts_are_counted_within_a_few_percent():
    rows = [row | {"prompt": f"p{i}"} for i, row in enumerate(build_rows(2, 10000))]
    assert count(rows, 2048, (), 0)["prompts"] == pytest.approx(20000, rel=0.05)


def test_groups_are_nested_missing_or_too_many():
    rows = build_rows(MOST_GROUPS + 1, 2)
    found = count(rows, 100, ("doc.n", "gone", "prompt"), 0)
    assert set(found["groups"]["doc.n"]) == {"0", "1"} and list(found["groups"]["gone"]) == [MISSING]
    assert found["groups"]["prompt"] is None and found["flagged"]["interval"] is None
    assert "--group_by prompt: has more than 256 values" in "\n".join(render_summary(found))
    assert render_summary(count([], 1))[-1] == "no row could be judged"


def test_a_small_share_is_not_printed_as_none():
    found = count(build_rows(2, 3), 10, ())
    found["flagged"] = {"rows": 1, "share": 1e-5, "interval": [0.0, 4.4e-5]}
    line = render_summary(found | {"judged": 100_000})[2]
    assert line.split() == ["flagged", "1", "of", "100,000", "0.001", "%", "0.00", "to", "0.004", "%"]


def test_the_figure_shows_every_bar_to_its_end(tmp_path, monkeypatch):
    figures: list = []
    monkeypatch.setattr(plots.plt, "close", figures.append)
    many = {f"m$_{i}": (i / 100, None) for i in range(60)}
    plots.plot_shares({"all rows": {"flagged": (0.1, [0.05, 0.2])}, "by model": many, "empty": {}}, tmp_path / "a.png")
    assert (tmp_path / "a.png").stat().st_size > 1000
    for axes in figures[0].axes:
        assert axes.get_xlim()[0] == 0 and axes.get_xlim()[1] > 39
    assert "the first 40 of 60" in figures[0].axes[1].get_title()
    plots.plot_shares({"all rows": {}}, tmp_path / "a.png")
