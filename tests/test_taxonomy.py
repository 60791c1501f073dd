"""What a model's outputs mean, and the files that carry it: taxonomy, thresholds, metadata."""

from __future__ import annotations

import dataclasses
import json

import numpy as np
import pytest
import yaml

from qlora_moderation.calibration import Calibrator, RiskModel
from qlora_moderation.errors import CheckpointError, ConfigError
from qlora_moderation.metadata import METADATA_FILE, ModelMetadata, Quantization, load_metadata, write_json, write_text
from qlora_moderation.taxonomy import BEAVERTAILS_CATEGORIES, DEFAULT_TEMPLATE, Taxonomy, load_taxonomy
from qlora_moderation.thresholds import THRESHOLDS_FILE, Thresholds, load_thresholds

SMALL = Taxonomy(("a,b", "ü", "c"), "Q: {question}\nA: {answer}\n")


def test_the_default_is_beavertails_with_the_original_template():
    taxonomy = Taxonomy()
    assert taxonomy == load_taxonomy(None) and taxonomy.categories == BEAVERTAILS_CATEGORIES
    assert len(taxonomy.categories) == 14 and list(taxonomy.categories) == sorted(taxonomy.categories)
    assert taxonomy.categories[0] == "animal_abuse"
    assert taxonomy.categories[-1] == "violence,aiding_and_abetting,incitement"
    assert DEFAULT_TEMPLATE == "BEGINNING OF CONVERSATION: USER: {question} ASSISTANT:{answer}"
    assert (taxonomy.template, taxonomy.labels_from) == (DEFAULT_TEMPLATE, "category")


@pytest.mark.parametrize(
    "text", ["{}", "{question}", "{answer}", "{0}", "{{", "}", "%s", "%(answer)s", "\\1", "$q", ""]
)
def test_braces_and_format_strings_in_user_text_stay_as_they_are(text):
    assert Taxonomy().render(text, "A") == f"BEGINNING OF CONVERSATION: USER: {text} ASSISTANT:A"
    assert Taxonomy().render("Q", text) == f"BEGINNING OF CONVERSATION: USER: Q ASSISTANT:{text}"
    assert SMALL.render(text, text) == f"Q: {text}\nA: {text}\n"


def test_template_parts_and_braces_in_the_template():
    assert SMALL.template_parts == ("Q: ", "\nA: ", "\n")
    assert Taxonomy(template="{}{question}{x}{answer}%s").render("q", "a") == "{}q{x}a%s"
    assert Taxonomy(template="{question}{answer}").template_parts == ("", "", "")


@pytest.mark.parametrize("taxonomy", [Taxonomy(), SMALL, Taxonomy(("unsafe",), labels_from="is_safe")])
def test_a_yaml_file_gives_the_taxonomy_back(taxonomy, tmp_path):
    path = tmp_path / "taxonomy.yaml"
    path.write_text(yaml.safe_dump(taxonomy.to_dict(), allow_unicode=True), encoding="utf-8")
    assert load_taxonomy(path) == taxonomy == load_taxonomy(str(path))
    assert Taxonomy.from_dict(json.loads(json.dumps(taxonomy.to_dict()))) == taxonomy


def test_a_yaml_file_needs_only_what_differs(tmp_path):
    path = tmp_path / "taxonomy.yaml"
    path.write_text("categories:\n- one\n- two, three\n", encoding="utf-8")
    assert load_taxonomy(path) == Taxonomy(("one", "two, three"))


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "is empty; name the categories"),
        ("- a\n- b\n", "must hold `key: value` lines, found a list"),
        ("catgories: [a]\n", "unknown key catgories; allowed: categories, labels_from, template"),
        ("categories: a, b\n", "categories must be a list of names in their order"),
        ("categories: {a: 1}\n", "categories must be a list of names in their order"),
        ("categories:\n", "categories must be a list of names in their order"),
        ("categories: []\n", "categories must be a list of non-empty names"),
        ("categories: [a, '']\n", "categories must be a list of non-empty names"),
        ("categories: [a, 1]\n", "categories must be a list of non-empty names"),
        ("categories: [a, no]\n", "categories must be a list of non-empty names"),
        ("categories: [b, a, b, c, a]\n", "categories repeat a, b; each name may stand once"),
        ("template: 3\n", "template must be text"),
        ("template:\n", "template must be text"),
        ("template: '{question}'\n", "template must hold {question} and then {answer}"),
        ("template: '{answer} {question}'\n", "template must hold {question} and then {answer}"),
        ("template: '{question} {answer} {answer}'\n", "template must hold {question} and then {answer}"),
        ("template: '{question} {question} {answer}'\n", "template must hold {question} and then {answer}"),
        ("template: '{prompt} {response}'\n", "template must hold {question} and then {answer}"),
        ("labels_from: flagged\n", "labels_from is 'flagged'; allowed: category, is_safe"),
        ("labels_from: is_safe\n", "labels_from: is_safe needs exactly one category"),
        ("flagged_rule: max\n", "unknown key flagged_rule"),
        ("categories: [a\n", "is not valid YAML"),
        ("categories: [a]\ncategories: [b]\n", "categories"),  # the second would silently win
        (
            "categories: [micro, a]\n",
            "micro",
        ),  # metrics.json holds micro/f1, macro/f1 and flagged/f1 beside <category>/f1
        ("categories: [flagged, a]\n", "flagged"),
    ],
)
def test_refusals(text, words, tmp_path):
    path = tmp_path / "taxonomy.yaml"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(ConfigError) as caught:
        load_taxonomy(path)
    assert words in str(caught.value) and str(path) in str(caught.value)


def test_all_faults_of_a_taxonomy_come_at_once():
    with pytest.raises(ConfigError, match=r"repeat a;.*template.*labels_from"):
        Taxonomy(("a", "a"), "", "nothing")


@pytest.mark.parametrize("content", [None, b"\xff\xfe"])
def test_an_unreadable_file_is_refused(content, tmp_path):
    path = tmp_path / "taxonomy.yaml"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ConfigError, match=f"--taxonomy {path}: "):
        load_taxonomy(path)


def test_the_default_threshold_is_the_original_recipes(tmp_path):
    assert Thresholds.default(SMALL).per_category == (0.4, 0.4, 0.4)
    assert load_thresholds(tmp_path, SMALL) == Thresholds.default(SMALL)


def test_a_yes_lies_strictly_above_its_own_threshold():
    thresholds = Thresholds((0.25, 0.5, 1.0), (0.25, 0.5, 1.0), 0.25)
    above = np.nextafter([0.25, 0.5, 1.0], 2)
    probabilities = np.array([[0.25, 0.5, 1.0], [above[0], 0.5, 1.0], [0.25, above[1], 1.0], [0.3, 0.9, 0.99]])
    judged = thresholds.judge(probabilities)
    flagged, categories = judged.flagged, judged.categories
    assert flagged.tolist() == [False, True, True, True] and flagged.dtype == categories.dtype == bool
    assert categories.tolist() == [[False] * 3, [True, False, False], [False, True, False], [True, True, False]]
    assert thresholds.judge(np.zeros((0, 3))).flagged.shape == (0,)


FIT = {
    "pairs": 3,
    "prompts": 2,
    "objective": "best F1",
    "min_positives": 1,
    "categories": {"c": {"threshold_from": "own"}},
    "flagged": {"threshold_from": "best F1"},
}


def test_thresholds_round_trip_by_name(tmp_path):
    maps = (
        Calibrator(),
        Calibrator("platt", 0.5, -1.0),
        Calibrator("isotonic", knots=((0.0, 0.5, 1.0), (0.0, 0.1, 1.0))),
    )
    model = RiskModel((0.5, 0.0, 2.0), -0.1)
    own = tuple(each.invert(0.2) for each in maps)
    thresholds = Thresholds((0.0, 1 / 3, 1.0), own, 0.2, "max", maps, model, "tuned", FIT)
    thresholds.save(tmp_path, SMALL)
    assert load_thresholds(tmp_path, SMALL) == thresholds
    by_risk = dataclasses.replace(thresholds, rule="calibrated", flagged_per_category=(1.0,) * 3)
    by_risk.save(tmp_path / "other", SMALL)
    assert load_thresholds(tmp_path / "other", SMALL) == by_risk
    turned = Taxonomy(SMALL.categories[::-1])
    assert load_thresholds(tmp_path, turned).per_category == (1.0, 1 / 3, 0.0)
    assert json.loads((tmp_path / THRESHOLDS_FILE).read_text(encoding="utf-8"))["categories"]["ü"]["raw"] == 1 / 3


GOOD_THRESHOLDS = Thresholds.uniform(0.3, 3).to_dict(SMALL)["categories"]


@pytest.mark.parametrize(
    ("stored", "words"),
    [
        ({"a,b": GOOD_THRESHOLDS["c"]}, "categories are not those of the model"),
        ({**GOOD_THRESHOLDS, "d": GOOD_THRESHOLDS["c"]}, "categories are not those of the model"),
        ({**GOOD_THRESHOLDS, "ü": {"raw": 0.1}}, "calibration"),
        *(
            ({**GOOD_THRESHOLDS, "ü": {"raw": 0.1, "calibration": calibration}}, words)
            for calibration, words in (
                ({"kind": "platt", "slope": -1, "intercept": 0}, "platt with slope -1"),
                ({"kind": "temperature", "slope": float("nan"), "intercept": 0}, "temperature with slope nan"),
                ({"kind": "magic", "slope": 1, "intercept": 0}, "magic"),
                ({"kind": "isotonic", "knots": [[0, 1], [0.9, 0.1]]}, "knots do not rise"),
                ({"kind": "isotonic", "knots": [[0, 1], [0, 2]]}, "knots do not rise"),
            )
        ),
        ([0.1, 0.2, 0.3], "categories are not those of the model"),
        (None, "categories are not those of the model"),
        *(
            (
                {**GOOD_THRESHOLDS, "ü": {**GOOD_THRESHOLDS["c"], "raw": value}},
                "a threshold that is not a number from 0 to 1",
            )
            for value in (float("nan"), float("inf"), "0.5", -0.01, 1.01, True, None, [0.5])
        ),
    ],
    ids=str,
)
def test_unusable_thresholds_are_refused(stored, words, tmp_path):
    flagged = Thresholds.uniform(0.3, 3).to_dict(SMALL)["flagged"]
    write_json(tmp_path / THRESHOLDS_FILE, {"origin": "tuned", "flagged": flagged, "categories": stored})
    with pytest.raises(CheckpointError, match=f"{THRESHOLDS_FILE}: .*{words}"):
        load_thresholds(tmp_path, SMALL)


@pytest.mark.parametrize(
    ("flagged", "words"),
    [
        (None, "flagged"),
        ({}, "rule"),
        ({"rule": "mean", "threshold": 0.1}, "the rule 'mean'"),
        ({"rule": "max", "threshold": 0.1}, "raw"),
        ({"rule": "max", "threshold": 2, "raw": dict.fromkeys(SMALL.categories, 0.1)}, "not a number from 0 to 1"),
        ({"rule": "max", "threshold": 0.5, "raw": dict.fromkeys(SMALL.categories, 0.1)}, "which disagree"),
        ({"rule": "calibrated", "threshold": 0.1}, "holds"),
        *(
            ({"rule": "calibrated", "threshold": 0.1, "risk_model": {"weights": w, "bias": b, "clip": clip}}, "holds")
            for w, b, clip in (
                (dict.fromkeys(SMALL.categories, -1), 0, 1e-4),
                (dict.fromkeys(SMALL.categories, 1), float("inf"), 1e-4),
                (dict.fromkeys(SMALL.categories, float("nan")), 0, 1e-4),
                (dict.fromkeys(SMALL.categories, 1), 0, 0.3),
                (dict.fromkeys(SMALL.categories, "x"), 0, 1e-4),
            )
        ),
        ({"rule": "calibrated", "threshold": 0.1, "risk_model": {"weights": {"c": 1}, "bias": 0}}, "a,b"),
    ],
    ids=str,
)
def test_unusable_rules_of_flagged_are_refused(flagged, words, tmp_path):
    values = {"origin": "tuned", "categories": GOOD_THRESHOLDS} | ({} if flagged is None else {"flagged": flagged})
    write_json(tmp_path / THRESHOLDS_FILE, values)
    with pytest.raises(CheckpointError, match=f"{THRESHOLDS_FILE}: .*{words}"):
        load_thresholds(tmp_path, SMALL)


@pytest.mark.parametrize(
    "fit",
    [5, [[1, 2]], {"x": 1}, {**FIT, "categories": "abc"}, {**FIT, "flagged": None}, {**FIT, "missed_harm": {"x": 1}}],
    ids=str,
)
def test_a_record_of_tuning_that_reports_cannot_read_is_refused(fit, tmp_path):
    write_json(tmp_path / THRESHOLDS_FILE, {**Thresholds.uniform(0.3, 3).to_dict(SMALL), "fit": fit})
    with pytest.raises(CheckpointError, match=THRESHOLDS_FILE):
        load_thresholds(tmp_path, SMALL)


@pytest.mark.parametrize("text", ["[]", "3", '{"categories": ', ""])
def test_a_thresholds_file_that_is_none_is_refused(text, tmp_path):
    (tmp_path / THRESHOLDS_FILE).write_text(text)
    with pytest.raises(CheckpointError, match=THRESHOLDS_FILE):
        load_thresholds(tmp_path, SMALL)


METADATA = ModelMetadata(
    taxonomy=SMALL,
    max_length=77,
    method="qlora",
    kind="adapter",
    base_model="Modelle/ü",
    base_revision="abc",
    pad_token="<unk>",
    quantization=Quantization(double_quant=False, weights_dtype="bfloat16"),
    long_text="truncate",
    training={"steps": 3, "warnings": ["w"]},
)


@pytest.mark.parametrize("metadata", [METADATA, ModelMetadata(Taxonomy(), 512, "full", "full", "base")])
def test_metadata_round_trip(metadata, tmp_path):
    assert load_metadata(tmp_path) is None
    metadata.save(tmp_path / "new")
    assert load_metadata(tmp_path / "new") == metadata
    assert [path.name for path in (tmp_path / "new").iterdir()] == [METADATA_FILE]


@pytest.mark.parametrize("share", [0, 0.1, 0.5, 0.99])
def test_truncated_metadata_is_refused(share, tmp_path):
    METADATA.save(tmp_path)
    path = tmp_path / METADATA_FILE
    raw = path.read_bytes().rstrip()
    path.write_bytes(raw[: int(len(raw) * share)])
    with pytest.raises(CheckpointError, match=f"{path}: .*copy it again"):
        load_metadata(tmp_path)


@pytest.mark.parametrize(
    "change",
    [
        {"taxonomy": None},
        {"taxonomy": {"categories": []}},
        {"quantization": [1]},
        {"quantization": {"bits": 4}},
        {"colour": "red"},
        {"max_length": ...},
        {"taxonomy": ...},
        {"quantization": ...},
    ],
    ids=str,
)
def test_metadata_of_another_shape_is_refused(change, tmp_path):
    values = {**METADATA.to_dict(), **change}
    write_json(tmp_path / METADATA_FILE, {key: value for key, value in values.items() if value is not ...})
    with pytest.raises(CheckpointError, match=METADATA_FILE):
        load_metadata(tmp_path)


@pytest.mark.parametrize("content", [b"[]", b"\xff", b"null"])
def test_metadata_that_is_no_mapping_is_refused(content, tmp_path):
    (tmp_path / METADATA_FILE).write_bytes(content)
    with pytest.raises(CheckpointError, match=METADATA_FILE):
        load_metadata(tmp_path)


def test_a_file_is_replaced_whole(tmp_path):
    path = tmp_path / "deep" / "file.json"
    write_json(path, {"a": "ü" * 1000})
    with pytest.raises(UnicodeEncodeError):
        write_text(path, "half\ud800")
    assert json.loads(path.read_text(encoding="utf-8")) == {"a": "ü" * 1000}
