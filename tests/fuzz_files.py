"""Whatever stands in the files of a model is its meaning, or a line that names the file."""

from __future__ import annotations

import copy
import json
from typing import Any

import numpy as np
from fuzz import Property
from fuzz_config import ODD, check_told, folder
from hypothesis import strategies as st

from qlora_moderation.calibration import Calibrator, RiskModel
from qlora_moderation.errors import ModerationError
from qlora_moderation.metadata import METADATA_FILE, ModelMetadata, Quantization, load_metadata
from qlora_moderation.serving.rule import Rule
from qlora_moderation.taxonomy import Taxonomy
from qlora_moderation.thresholds import THRESHOLDS_FILE, Thresholds, load_thresholds

TAXONOMY = Taxonomy(categories=("a", "b,c"))
JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=4) | st.sampled_from([*ODD, 10**400]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=5,
)
_FIT = {
    **dict.fromkeys(("pairs", "prompts", "objective", "min_positives"), 1),
    "categories": {name: {"threshold_from": "own"} for name in TAXONOMY.categories},
    "flagged": {"threshold_from": "own"},
}
GOOD_THRESHOLDS = [
    Thresholds.default(TAXONOMY).to_dict(TAXONOMY),
    Thresholds(
        (0.4, 0.5),
        (1.0, 1.0),
        0.3,
        "calibrated",
        (Calibrator("platt", 0.5, 1.0), Calibrator("isotonic", knots=((0.0, 0.5, 1.0), (0.1, 0.1, 0.9)))),
        RiskModel((0.1, 0.0), -1.0),
        "test",
        _FIT,
    ).to_dict(TAXONOMY),
]
GOOD_METADATA = [
    ModelMetadata(TAXONOMY, 64, "qlora", "adapter", "base", quantization=Quantization()).to_dict(),
    ModelMetadata(Taxonomy(), 512, "full", "full", "a/b", "main", "<pad>", training={"pairs": 3}).to_dict(),
]


def _list_places(value: Any, place: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [place, *(each for key, one in inner for each in _list_places(one, (*place, key)))]


@st.composite
def damaged(draw: st.DrawFn, good: list[dict[str, Any]]) -> Any:
    """Draw a good file of which a value or two are others, or gone."""
    value = copy.deepcopy(draw(st.sampled_from(good)))
    for _ in range(draw(st.integers(0, 2))):
        place = draw(st.sampled_from(_list_places(value)[1:] or [()]))
        inner = value
        for key in place[:-1]:
            inner = inner[key]
        if not place:
            value = draw(JSON_VALUES)
        elif draw(st.booleans()):
            inner[place[-1]] = draw(JSON_VALUES | st.sampled_from([0, 1, 0.5, True, "max", "calibrated"]))
        else:
            del inner[place[-1]]
    return value


def _write(name: str, value: Any) -> None:
    content = value if isinstance(value, bytes) else json.dumps(value).encode("utf-8", "surrogatepass")
    (folder() / name).write_bytes(content)


def check_thresholds(value: Any) -> None:
    """Any content of `thresholds.json` judges, and reads back equal, or is refused."""
    _write(THRESHOLDS_FILE, value)
    try:
        found = load_thresholds(folder(), TAXONOMY)
    except ModerationError as error:
        check_told(error)
        return
    with np.errstate(over="ignore"):
        judged = found.judge(np.array([[0.0, 1.0], [0.5, 0.5]]))
        assert ((judged.probabilities >= 0) & (judged.probabilities <= 1)).all() and (
            (judged.risk >= 0) & (judged.risk <= 1)
        ).all()
    assert all(0 <= number <= 1 for number in (*found.per_category, found.flagged_threshold))
    rule = Rule.of(found, TAXONOMY)
    assert json.dumps(rule.shown, allow_nan=False).encode()
    found.save(folder(), TAXONOMY)
    assert Rule.of(load_thresholds(folder(), TAXONOMY), TAXONOMY).version == rule.version


def check_metadata(value: Any) -> None:
    """Any content of `moderation_config.json` is metadata of the right types that reads back equal, or is refused."""
    _write(METADATA_FILE, value)
    try:
        found = load_metadata(folder())
    except ModerationError as error:
        check_told(error)
        return
    assert found is not None
    assert isinstance(found.max_length, int) and found.max_length > 0 and isinstance(found.base_name, str)
    assert found.method in ("lora", "qlora", "full") and found.kind in ("adapter", "full", "merged")
    assert found.long_text in ("window", "truncate") and isinstance(found.training, dict)
    assert isinstance(found.base_revision, str | None) and isinstance(found.pad_token, str | None)
    assert found.quantization is None or isinstance(found.quantization.double_quant, bool)
    found.save(folder())
    again = load_metadata(folder())
    assert again is not None and json.dumps(again.to_dict()) == json.dumps(found.to_dict())


_BYTES = st.binary(max_size=8) | st.sampled_from([b"[" * 100_000, b'{"a":' * 100_000, b"9" * 5000])
_BEYOND_ONE = copy.deepcopy(GOOD_THRESHOLDS[0])
_BEYOND_ONE["categories"]["a"]["raw"] = 7
_KNOWN_METADATA = (
    b"[" * 100_000,
    *(
        {**GOOD_METADATA[0], name: value}
        for name, value in (("max_length", 0), ("method", 0), ("base_model", "\ud800"))
    ),
)
PROPERTIES = {
    "thresholds": Property(damaged(GOOD_THRESHOLDS) | JSON_VALUES | _BYTES, check_thresholds, (_BEYOND_ONE,)),
    "metadata": Property(damaged(GOOD_METADATA) | JSON_VALUES | _BYTES, check_metadata, _KNOWN_METADATA),
}
