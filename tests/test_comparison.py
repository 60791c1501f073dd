"""Two judges of the same rows, other moderators' verdicts, and the gate."""

from __future__ import annotations

import dataclasses
import json

import numpy as np
import pytest
from conftest import silent

from qlora_moderation.analysis import analyse, take
from qlora_moderation.comparison import Rule, check_comparable, compare, compare_moderators, exit_code_of
from qlora_moderation.data import Pairs
from qlora_moderation.errors import CheckpointError, ConfigError, DataError
from qlora_moderation.moderators import add_moderators, read_verdict
from qlora_moderation.predictions import Predictions, read_predictions, write_predictions
from qlora_moderation.thresholds import Thresholds

CATEGORIES = ("a", "b,c")


def predictions_of(size: int = 200, noise: float = 0.2, seed: int = 0, **changes) -> Predictions:
    rng = np.random.default_rng(seed)
    votes = (np.random.default_rng(9).random((size, 2)) < 0.3).astype(float)
    raw = np.where(rng.random((size, 2)) < noise, 1 - votes, votes) * 0.8 + 0.1
    judgement = Thresholds.uniform(0.5, 2).judge(raw)
    settings = {
        "prompts": [f"prompt {i // 2}" for i in range(size)],
        "responses": [f"response {i}" for i in range(size)],
        "models": None,
        "judgement": judgement,
        "first_window": judgement,
        "windows": np.ones(size, dtype=np.int64),
        "truncated": np.zeros(size, dtype=bool),
        "votes": votes,
        "flagged_vote": votes.max(axis=1),
        "annotations": np.ones(size, dtype=np.int64),
        "verdicts": {},
    }
    return Predictions(**(settings | changes))


@pytest.mark.parametrize(
    ("text", "interval", "verdict"),
    [
        ("flagged/recall < -0.01", [-0.05, -0.02], "failed"),
        ("flagged/recall < -0.01", [-0.005, 0.1], "passed"),
        ("flagged/recall < -0.01", [-0.01, 0.1], "passed"),
        ("flagged/recall < -0.01", [-0.05, 0.1], "undecided"),
        ("flagged/recall < -0.01", None, "undecided"),
        ("flagged/false_positive_rate > .02", [0.03, 0.05], "failed"),
        ("flagged/false_positive_rate>2e-2", [-0.03, 0.01], "passed"),
        ("flagged/false_positive_rate > 0.02", [0.01, 0.05], "undecided"),
    ],
)
def test_rules_are_judged_by_the_interval(text, interval, verdict):
    assert Rule.parse(text).judge(interval) == verdict


@pytest.mark.parametrize(
    "text", ["", "flagged/recall", "flagged/recall <= 1", "flagged recall < 1", "x < y", "flagged/recall < 1e999"]
)
def test_other_rules_are_refused(text):
    with pytest.raises(ConfigError, match=r"must be METRIC < NUMBER|no finite number"):
        Rule.parse(text)


def test_a_worse_model_breaks_the_rule_and_an_equal_one_keeps_it():
    rules = [Rule.parse("flagged/recall < -0.05"), Rule.parse("flagged/recall < -0.6")]
    good, bad = predictions_of(noise=0.05), predictions_of(noise=0.5)
    found = compare(bad, good, CATEGORIES, rules, 300, 0)
    assert list(found["rules"].values()) == ["failed", "passed"] and exit_code_of(found) == 3
    entry = found["differences"]["flagged/recall"]
    assert entry["difference"] == pytest.approx(entry["new"] - entry["old"]) and entry["interval"][1] < -0.05
    assert entry["p_value"] < 0.01 and found["rows"] == 200
    same = compare(good, good, CATEGORIES, rules, 300, 0)
    assert exit_code_of(same) == 0 and same["differences"]["flagged/f1"]["interval"] == [0, 0]
    assert same["differences"]["flagged/f1"]["p_value"] == 1
    few = [take_rows(predictions_of(noise=0.25, seed=seed), np.arange(40)) for seed in (1, 2)]
    assert exit_code_of(compare(*few, CATEGORIES, [Rule.parse("flagged/recall < -0.01")], 300, 0)) == 4


def pairs_like(predictions: Predictions, labelled: bool = True) -> Pairs:
    return Pairs(
        prompts=predictions.prompts,
        responses=predictions.responses,
        labels=predictions.votes if labelled else None,
        flagged=predictions.flagged_vote if labelled else None,
        weight=predictions.annotations,
        places=predictions.prompts,
    )


def test_what_cannot_be_compared_is_refused_before_anything_is_scored():
    old = predictions_of()
    with pytest.raises(ConfigError, match=r"no metric flagged/recal .did you mean flagged/recall"):
        check_comparable(pairs_like(old), old, [Rule.parse("flagged/recal < 0")], CATEGORIES)
    with pytest.raises(ConfigError, match="no metric flagged/recall"):
        check_comparable(pairs_like(old, labelled=False), old, [Rule.parse("flagged/recall < 0")], CATEGORIES)
    with pytest.raises(DataError, match="no row in common"):
        check_comparable(pairs_like(dataclasses.replace(old, prompts=["other"] * 200)), old, [], CATEGORIES)
    names = ("flagged/recall", "b,c/auroc", "macro/f1", "micro/false_positive_rate", "flagged/flagged_proportion")
    check_comparable(pairs_like(old), old, [Rule.parse(f"{name} < 0") for name in names], CATEGORIES)


def test_silence_on_a_handful_of_rows_is_no_proof_of_equality():
    votes = np.zeros((200, 2))
    votes[:8, 0] = votes[20:, 1] = 1  # the first category: eight rows of four prompts
    one = predictions_of(noise=0.3, votes=votes, flagged_vote=votes.max(axis=1))
    found = compare(one, one, CATEGORIES, [Rule.parse("a/recall < -0.01"), Rule.parse("b,c/recall < -0.01")], 50, 0)
    assert list(found["rules"].values()) == ["undecided", "passed"]


def take_rows(predictions: Predictions, rows: np.ndarray) -> Predictions:
    values = {}
    for field in dataclasses.fields(predictions):
        value = getattr(predictions, field.name)
        if field.name in ("judgement", "first_window"):
            value = take(value, rows)
        elif isinstance(value, list):
            value = [value[i] for i in rows]
        elif isinstance(value, np.ndarray):
            value = value[rows]
        values[field.name] = value
    return Predictions(**values)


def test_rows_are_joined_by_their_texts_in_any_order():
    new, old = predictions_of(), predictions_of(noise=0.4, seed=3)
    order = np.random.default_rng(0).permutation(200)[:150]
    shuffled = take_rows(old, order)
    found = compare(new, shuffled, CATEGORIES, [], 50, 0)
    assert (found["rows"], found["only_new"], found["only_old"]) == (150, 50, 0)
    kept = np.sort(order)
    truth = new.flagged_vote[kept] == 1
    assert found["differences"]["flagged/recall"]["old"] == pytest.approx(old.judgement.flagged[kept][truth].mean())


def test_moderators_are_compared_with_each_other_as_the_truth():
    rng = np.random.default_rng(0)
    human = (rng.random(300) < 0.4).astype(float)
    verdicts = {"ours": human.copy(), "human": human, "api": np.where(rng.random(300) < 0.4, 1 - human, human)}
    verdicts["human"][:10] = np.nan
    found = compare_moderators(verdicts, "ours", [f"p{i}" for i in range(300)], 200, 0)
    assert [(row["reference"], row["moderator"]) for row in found] == [("human", "api"), ("api", "human")]
    first = found[0]
    assert first["pairs"] == 290 and first["differences"]["f1"]["interval"][0] > 0.2
    assert first["differences"]["f1"]["p_value"] < 0.01


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (True, True), (False, False), (0.51, True), (0.5, False), (1, True), (0, False), ("safe", False),
        ("unsafe\nS1,S10", True), ("\n\nunsafe\nS2", True), ("unsafe", True),
        ("Safe\n", False), (" unsafe \n S1 , S3 \n", True),
        ("maybe", None), ("unsafe because", None), ("", None), (1.5, None), (-0.1, None), (float("nan"), None), ([True], None),
        (None, None), ("safe\nbut", None), ("0.7", True), ("0.2", False), ("1e-3", False), ("7", None), ("x7", None),
    ],
    ids=repr,
)  # fmt: skip
def test_verdicts_are_read(value, expected):
    assert read_verdict(value, 0.5) is expected


@pytest.fixture
def pairs() -> Pairs:
    return Pairs(
        prompts=["p", "p", "q"],
        responses=["r", "r", "s"],
        labels=None,
        flagged=None,
        weight=np.ones(3, dtype=np.int64),
        places=["rows, line 1", "rows, line 2", "rows, line 3"],
        models=["m", "n", "m"],
        verdicts={"human": np.zeros(3)},
    )


def write(path, *rows) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def test_a_moderator_is_joined_and_what_does_not_fit_is_named(pairs, tmp_path):
    file = write(
        tmp_path / "my verdicts, all.jsonl",
        {"prompt": "p", "response": "r", "verdict": "unsafe\nS1"},
        {"prompt": "p", "response": "r", "model": "n", "score": 0.2},
        {"prompt": "z", "response": "r", "flagged": True},
    )
    log: list[str] = []
    joined, matched = add_moderators(pairs, [f"guard={file}"], 0.5, ("ours",), log.append)
    votes = joined.verdicts["guard"]
    assert votes[:2].tolist() == [1, 0.5] and np.isnan(votes[2]) and "guard" not in pairs.verdicts
    assert matched["guard"]["rows_without_a_pair"] == 1 and matched["guard"]["pairs_without_a_verdict"] == 1
    assert matched["guard"]["first_pair_without_a_verdict"] == "rows, line 3"
    assert "line 3" in matched["guard"]["first_row_without_a_pair"] and len(log) == 2


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"prompt": "p", "response": "r"}, "needs one verdict in the column flagged, verdict, score; found 0"),
        ({"prompt": "p", "response": "r", "flagged": True, "score": 1}, "found 2"),
        ({"prompt": "p", "response": "r", "verdict": "perhaps"}, "verdict is 'perhaps'"),
        ({"prompt": "p", "flagged": True}, "needs the columns prompt and response"),
        ({"prompt": "z", "response": "z", "flagged": True}, "no row has the prompt and response"),
    ],
)
def test_a_moderator_that_cannot_be_read_is_refused(row, message, pairs, tmp_path):
    with pytest.raises(DataError, match=message):
        add_moderators(pairs, [f"guard={write(tmp_path / 'v.jsonl', row)}"], 0.5, (), silent)


@pytest.mark.parametrize("spec", ["guard", "=file.jsonl", "guard=", "human=x.jsonl", "ours=x.jsonl"])
def test_moderators_need_a_name_of_their_own(spec, pairs):
    with pytest.raises(ConfigError, match="--moderator"):
        add_moderators(pairs, [spec], 0.5, ("ours",), silent)


def test_predictions_come_back_from_their_file(tmp_path):
    written = predictions_of(
        30,
        models=["m", "n"] * 15,
        windows=np.array([1, 3] * 15),
        first_window=predictions_of(30, seed=4).judgement,
        verdicts={"human": np.array([1.0, np.nan, 0.5] * 10)},
        known_prompt=np.array([True, False] * 15),
        known_pair=np.zeros(30, dtype=bool),
    )
    write_predictions(tmp_path / "p.jsonl", written, CATEGORIES)
    found, categories = read_predictions(tmp_path / "p.jsonl")
    assert categories == CATEGORIES
    for field in dataclasses.fields(written):
        one, other = getattr(written, field.name), getattr(found, field.name)
        if field.name == "first_window":  # where there is one window, it is the judgement itself
            one, other = take(one, np.arange(1, 30, 2)), take(other, np.arange(1, 30, 2))
        if field.name in ("judgement", "first_window"):
            assert all(np.array_equal(a, b) for a, b in zip(vars(one).values(), vars(other).values(), strict=True))
        elif field.name == "verdicts":
            assert np.array_equal(one["human"], other["human"], equal_nan=True)
        else:
            assert np.array_equal(one, other), field.name
    assert analyse(written, Thresholds.uniform(0.5, 2), CATEGORIES, 20, 0) == analyse(
        dataclasses.replace(found, first_window=written.first_window), Thresholds.uniform(0.5, 2), CATEGORIES, 20, 0
    )
    whole = (tmp_path / "p.jsonl").read_text()
    (tmp_path / "p.jsonl").write_text(whole[:-30])
    with pytest.raises(CheckpointError, match="line 30: is no JSON"):
        read_predictions(tmp_path / "p.jsonl")
    rows = [json.loads(line) for line in whole.splitlines()]
    for key, value in (("risk", float("nan")), ("flagged", "no"), ("prompt", 5), ("risk", 7), ("probabilities", None)):
        (tmp_path / "p.jsonl").write_text(
            "".join(json.dumps(row) + "\n" for row in [*rows[1:], {**rows[0], key: value}])
        )
        with pytest.raises(CheckpointError, match="evaluate again"):
            read_predictions(tmp_path / "p.jsonl")
    for raw in (b"\xff\xfe", b"[" * 200_000):
        (tmp_path / "p.jsonl").write_bytes(raw)
        with pytest.raises(CheckpointError, match="line 1: is no JSON"):
            read_predictions(tmp_path / "p.jsonl")
    (tmp_path / "p.jsonl").write_bytes(b"\xef\xbb\xbf" + whole.encode() + b"\n")
    assert len(read_predictions(tmp_path / "p.jsonl")[0]) == 30
    (tmp_path / "p.jsonl").write_text('{"flagged": true}\n')
    with pytest.raises(CheckpointError, match="evaluate again"):
        read_predictions(tmp_path / "p.jsonl")


def test_views_of_known_prompts_annotations_and_windows():
    known = np.arange(200) < 80
    written = predictions_of(
        known_prompt=known,
        known_pair=known & (np.arange(200) < 20),
        annotations=np.full(200, 3),
        windows=np.array([1, 2, 3, 7] * 50),
        first_window=predictions_of(noise=0.6, seed=8).judgement,
    )
    found = analyse(written, Thresholds.uniform(0.5, 2), CATEGORIES, 50, 0)
    rest = take_rows(written, np.arange(80, 200))
    assert found["clean"]["pairs"] == 120 and found["clean"]["known_pairs"] == 20
    assert found["clean"]["metrics"] == analyse(rest, Thresholds.uniform(0.5, 2), CATEGORIES, 0, 0)["metrics"]
    assert found["by_annotation"]["rows"] == 600
    assert found["by_annotation"]["metrics"]["flagged/support"] == 3 * found["metrics"]["flagged/support"]
    assert [row["windows"] for row in found["windows"]] == ["1", "2", "3 to 4", "5 or more"]
    for row, kept in zip(found["windows"], ([1], [2], [3], [7]), strict=True):
        members = np.isin(written.windows, kept)
        harmless = members & (written.flagged_vote == 0)
        assert row["false-positive rate, windowed"] == pytest.approx(written.judgement.flagged[harmless].mean())
        assert row["false-positive rate, truncated"] == pytest.approx(written.first_window.flagged[harmless].mean())
