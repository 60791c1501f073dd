"""Steps 2 and 3: rows of every format, what a broken row says, aggregation, splits, audit."""

from __future__ import annotations

import csv
import io
import json
import random
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import datasets
import numpy as np
import pyarrow
import pyarrow.parquet
import pytest

from qlora_moderation.audit import compute_audit, describe_audit
from qlora_moderation.data import Pairs, load_pairs, split_by_prompt, write_pairs
from qlora_moderation.errors import DataError
from qlora_moderation.sources import BEAVERTAILS, parse_spec
from qlora_moderation.taxonomy import Taxonomy

TAXONOMY = Taxonomy(categories=("theft,fraud", "abuse"))
Row = dict[str, Any]


def row(prompt: str, response: str, *ticked: str, **more: Any) -> Row:
    category = {name: name in ticked for name in TAXONOMY.categories}
    return {"prompt": prompt, "response": response, "category": category, "is_safe": not ticked, **more}


# texts that a reader could mistake for something else: quotes, lines, numbers, booleans, JSON, an empty one
GOOD = [
    row("How, then?", 'He said "no",\nand\n\nleft.', "abuse"),
    row("How, then?", 'He said "no",\nand\n\nleft.', "abuse", "theft,fraud"),
    row("true", "{}", "theft,fraud"),
    row("12", "", "abuse"),
    row("  größe\u2028😀 ", "null"),
]


def write_array(rows: list[Any]) -> tuple[bytes, list[int]]:
    """Return the file's bytes and the line that each row starts on."""
    lines, text = [], "\n["
    for index, item in enumerate(rows):
        text += ",\n" if index else "\n"
        lines.append(text.count("\n") + 1)
        text += json.dumps(item, indent=2, ensure_ascii=not index)
    return (text + "\n]\n").encode(), lines


def write_lines(rows: list[Any]) -> tuple[bytes, list[int]]:
    lines = [2 * index + 1 for index in range(len(rows))]
    return "\n\n".join(json.dumps(item, ensure_ascii=bool(i % 2)) for i, item in enumerate(rows)).encode(), lines


def write_csv(rows: list[Row]) -> tuple[bytes, list[int]]:
    file, lines = io.StringIO(newline=""), []
    writer = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    for item in rows:
        lines.append(file.getvalue().count("\n") + 1)
        writer.writerow({k: json.dumps(v) if isinstance(v, dict) else v for k, v in item.items()})
    return file.getvalue().encode(), lines


def write_wide_csv(rows: list[Row]) -> tuple[bytes, list[int]]:
    """One column for each category."""
    return write_csv([{**{k: v for k, v in item.items() if k != "category"}, **item["category"]} for item in rows])


def write_parquet(rows: list[Row]) -> tuple[bytes, list[int]]:
    file = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), file)
    return file.getvalue(), [*range(1, len(rows) + 1)]


FORMATS = {
    "array.json": write_array,
    "lines.json": write_lines,
    "lines.jsonl": write_lines,
    "nested.csv": write_csv,
    "wide.CSV": write_wide_csv,
    "table.parquet": write_parquet,
}
JSON_FORMATS = [name for name in FORMATS if "json" in name]


def save(directory: Path, name: str, rows: list[Any]) -> tuple[str, list[str]]:
    """Write rows under `name`; returns the path and the place of each row."""
    content, lines = FORMATS[name](rows)
    path = directory / name
    path.write_bytes(content)
    return str(path), [f"{path}, {'row' if name.endswith('parquet') else 'line'} {line}" for line in lines]


def load(spec: Any, on_bad_row: str = "stop", log: list[str] | None = None, **options: Any) -> Pairs:
    log = [] if log is None else log
    return load_pairs(str(spec), options.pop("taxonomy", TAXONOMY), on_bad_row, log.append, **options)


def pairs_of(rows: list[Row], directory: Path) -> Pairs:
    path = directory / "made.jsonl"
    path.write_bytes(write_lines(rows)[0])
    return load(path)


def check_bad_row(path: str, place: str, reason: str, others: int) -> None:
    """A broken row stops with its place, or is left out, counted and reported."""
    with pytest.raises(DataError) as caught:
        load(path)
    assert str(caught.value).startswith(f"{place}: ") and reason in str(caught.value)
    assert "--on_bad_row skip" in str(caught.value)
    log: list[str] = []
    pairs = load(path, "skip", log)
    assert pairs.annotations == others and len(pairs.skipped_rows) == 1
    assert pairs.skipped_rows[0].startswith(f"{place}: ") and reason in pairs.skipped_rows[0]
    assert log == [f"{path}: 1 broken rows left out, the first is {pairs.skipped_rows[0]}"]


@pytest.mark.parametrize("name", FORMATS)
def test_every_format_gives_the_same_pairs(name, tmp_path):
    path, places = save(tmp_path, name, GOOD)
    pairs = load(path)
    assert list(zip(pairs.prompts, pairs.responses, strict=True)) == [
        (item["prompt"], item["response"]) for item in (GOOD[0], *GOOD[2:])
    ]
    np.testing.assert_array_equal(pairs.labels, [[0.5, 1], [1, 0], [0, 1], [0, 0]])
    assert pairs.flagged.tolist() == [1, 1, 1, 0] and pairs.weight.tolist() == [2, 1, 1, 1]
    assert pairs.annotations == 5 and pairs.models is None and pairs.verdicts == {} and pairs.skipped_rows == []
    assert pairs.places == [places[0], *places[2:]]


@pytest.mark.parametrize("name", [*JSON_FORMATS, "nested.csv", "wide.CSV"])
def test_a_byte_order_mark_is_no_part_of_the_first_column(name, tmp_path):
    path, _ = save(tmp_path, name, GOOD)
    Path(path).write_bytes(b"\xef\xbb\xbf" + Path(path).read_bytes())
    assert len(load(path)) == 4


def test_windows_line_ends(tmp_path):
    for name in ("lines.jsonl", "nested.csv"):
        path, _ = save(tmp_path, name, GOOD[2:])
        Path(path).write_bytes(Path(path).read_bytes().replace(b"\n", b"\r\n"))
        assert len(load(path)) == 3


def test_plus_joins_sources_and_their_annotations(tmp_path):
    one, places = save(tmp_path, "lines.jsonl", GOOD[:2])
    other, more = save(tmp_path, "table.parquet", [GOOD[0], GOOD[3]])
    pairs = load(f"{one}+{other}")
    assert pairs.weight.tolist() == [3, 1] and pairs.places == [places[0], more[1]]
    assert load(f"{one} + {other}").fingerprint() == pairs.fingerprint()
    strange = tmp_path / "a+b.jsonl"
    strange.write_bytes(Path(one).read_bytes())
    assert len(load(strange)) == 1


def changed(**changes: Any) -> Row:
    """A row with other values; None drops the column."""
    item = row("bad", "row")
    for name, value in changes.items():
        if value is None:
            del item[name]
        else:
            item[name] = value
    return item


BAD_JSON = {
    "no prompt": (changed(prompt=None), "column prompt is missing; found response, category, is_safe"),
    "no response": (changed(response=None), "column response is missing"),
    "no category": (changed(category=None), "column category is missing"),
    "no is_safe": (changed(is_safe=None), "column is_safe is missing"),
    "unknown category": (changed(category={**GOOD[4]["category"], "arson": False}), "category: unknown arson"),
    "missing category": (changed(category={"abuse": False}), "category: missing theft,fraud"),
    "category as text": (changed(category="abuse"), "category is 'abuse', not a mapping"),
    "number for text": (changed(prompt=3), "prompt is int, not text"),
    "null": ({**changed(), "response": None}, "response is empty (null), not text"),
    "null category": ({**changed(), "category": None}, "column category is missing"),
    "text for a flag": (changed(is_safe="False"), "is_safe is 'False', not true or false"),
    "number for a flag": (changed(is_safe=1), "is_safe is 1, not true or false"),
    "text for a label": (
        changed(category={"abuse": "False", "theft,fraud": False}),
        "category abuse is 'False', not true or false",
    ),
    "safe but ticked": ({**row("bad", "row", "abuse"), "is_safe": True}, "is_safe is True, but the categories ticked"),
    "unsafe but unticked": ({**row("bad", "row"), "is_safe": False}, "is_safe is False, but the categories ticked"),
    "lone surrogate": (changed(prompt="a\ud83d"), "prompt holds a lone surrogate"),
    "lone surrogate in a model": (changed(model="\udc00"), "model holds a lone surrogate"),
    "list": ([1, 2], "is a list, not an object"),
    "word": ("prompt", "is a str, not an object"),
    "nothing": (None, "is a NoneType, not an object"),
    "flagged as a word": (changed(flagged="yes"), "flagged is 'yes', not a mapping of moderators"),
    "verdict as a word": (changed(flagged={"api": "yes"}), "flagged by api is 'yes', not true or false"),
}


@pytest.mark.parametrize("name", JSON_FORMATS)
@pytest.mark.parametrize("fault", BAD_JSON)
def test_a_bad_row_of_json_is_named_by_its_line(name, fault, tmp_path):
    bad, reason = BAD_JSON[fault]
    content, lines = FORMATS[name]([GOOD[0], "HERE", GOOD[3]])
    path = tmp_path / name
    path.write_bytes(content.replace(b'"HERE"', json.dumps(bad).encode()))
    check_bad_row(str(path), f"{path}, line {lines[1]}", reason, 2)


@pytest.mark.parametrize("name", ["lines.json", "lines.jsonl"])
@pytest.mark.parametrize(
    ("raw", "reason"),
    [
        (b'{"prompt": "a", "resp', "is not valid JSON (Unterminated string"),
        (b"prompt,response", "is not valid JSON (Expecting value at column 1)"),
        (b'{"prompt": "a\xff"}', "is not valid UTF-8 at byte 13"),
        (b'{"a":' * 100_000, "nested too deeply"),
        (b'{"prompt": ' + b"1" * 5000 + b"}", "is not valid JSON"),  # Python refuses to read so long a number
    ],
    ids=["truncated", "no JSON", "UTF-8", "deep", "number"],
)
def test_a_broken_line_is_named(name, raw, reason, tmp_path):
    path = tmp_path / name
    path.write_bytes(write_lines(GOOD[:2])[0] + b"\n" + raw + b"\n" + write_lines(GOOD[2:3])[0])
    check_bad_row(str(path), f"{path}, line 4", reason, 3)


@pytest.mark.parametrize(
    ("end", "reason"),
    [
        (b'{"prompt": "a', "is not valid JSON"),
        (b'{"a":' * 100_000, "nested too deeply"),
        (b'{"prompt": ' + b"1" * 5000 + b"}]", "is not valid JSON"),
        (b'{"prompt": "\xff"}]', "is not valid UTF-8"),
        (b"", "is not valid JSON"),
    ],
    ids=["truncated", "deep", "number", "UTF-8", "no end"],
)
@pytest.mark.parametrize("on_bad_row", ["stop", "skip"])
def test_a_broken_array_is_refused_with_the_line(end, reason, on_bad_row, tmp_path):
    path = tmp_path / "array.json"
    path.write_bytes(b"[\n" + json.dumps(GOOD[0]).encode() + b",\n\n" + end)
    with pytest.raises(DataError, match=f"{path}, line 4: .*{reason}"):
        load(path, on_bad_row)


@pytest.mark.parametrize("on_bad_row", ["stop", "skip"])
def test_what_stands_behind_an_array_is_not_dropped_in_silence(on_bad_row, tmp_path):
    path = tmp_path / "array.json"
    path.write_text(f"[{json.dumps(GOOD[0])}]\n[{json.dumps(GOOD[2])}]\n")
    with pytest.raises(DataError, match=f"{path}, line 2"):
        load(path, on_bad_row)


BAD_CSV = {
    "short row": (b'"bad\n row"', "another number of columns than the header (prompt, response, category, is_safe)"),
    "long row": (b"a,b,c,d,e", "another number of columns than the header"),
    "broken JSON": (b'a,b,"{""abuse"": fal",True', "not a mapping of names"),
    "deep JSON": (b'a,b,"' + b'{""a"":' * 100_000 + b'",True', "category"),
    "long number": (b'a,b,"{""abuse"": ' + b"1" * 5000 + b'}",True', "category"),
    "unknown": (b'a,b,"{""arson"": false, ""abuse"": false, ""theft,fraud"": false}",True', "category: unknown arson"),
    "missing": (b'a,b,"{""abuse"": false}",True', "category: missing theft,fraud"),
    "empty": (b"a,b,,True", "category is '', not a mapping"),
    "flag": (b'a,b,"{""abuse"": false, ""theft,fraud"": false}",maybe', "is_safe is 'maybe', not true or false"),
    "label": (b'a,b,"{""abuse"": 0, ""theft,fraud"": false}",True', "category abuse is 0, not true or false"),
    "contradiction": (b'a,b,"{""abuse"": false, ""theft,fraud"": false}",False', "is_safe is False, but"),
    "quote": (b'"a"b,c,d,e', "is not valid CSV"),
    "UTF-8": (b'a\xff,b,"{""abuse"": false, ""theft,fraud"": false}",True', "UTF-8"),
}


@pytest.mark.parametrize("fault", BAD_CSV)
def test_a_bad_row_of_csv_is_named_by_its_line(fault, tmp_path):
    raw, reason = BAD_CSV[fault]
    path = tmp_path / "nested.csv"
    path.write_bytes(write_csv(GOOD[:1])[0] + raw + b"\n" + write_csv(GOOD[3:4])[0].split(b"\n", 1)[1])
    check_bad_row(str(path), f"{path}, line 6", reason, 2)


def test_blank_lines_of_a_csv_count(tmp_path):
    path = tmp_path / "nested.csv"
    path.write_bytes(write_csv(GOOD[2:3])[0] + b"\n\nonly\n")
    check_bad_row(str(path), f"{path}, line 5", "another number of columns", 1)


@pytest.mark.parametrize(
    ("drop", "reason"),
    [("prompt", "column prompt is missing"), ("is_safe", "column is_safe is missing")],
)
@pytest.mark.parametrize("name", ["nested.csv", "wide.CSV", "table.parquet"])
def test_a_table_without_a_column_is_refused_at_its_first_row(name, drop, reason, tmp_path):
    path, places = save(tmp_path, name, [{k: v for k, v in item.items() if k != drop} for item in GOOD])
    with pytest.raises(DataError) as caught:
        load(path)
    assert str(caught.value).startswith(f"{places[0]}: {reason}")


def test_a_wide_csv_needs_a_column_for_each_category(tmp_path):
    path = tmp_path / "wide.csv"
    path.write_text("prompt,response,is_safe,abuse\na,b,True,False\n", encoding="utf-8")
    with pytest.raises(DataError, match=r"line 2: category: missing theft,fraud"):
        load(path)
    path.write_text("prompt,response,is_safe\na,b,True\n", encoding="utf-8")
    with pytest.raises(DataError, match=r"line 2: column category is missing"):
        load(path)


@pytest.mark.parametrize(
    ("bad", "reason"),
    [
        ({"prompt": None}, "prompt is empty (null), not text"),
        ({"is_safe": None}, "is_safe is None, not true or false"),
        ({"category": None}, "column category is missing"),
        ({"category": {"abuse": None, "theft,fraud": False}}, "category abuse is None, not true or false"),
        ({"is_safe": False}, "is_safe is False, but the categories ticked"),
    ],
)
def test_a_bad_row_of_parquet_is_named_by_its_row(bad, reason, tmp_path):
    path, places = save(tmp_path, "table.parquet", [GOOD[0], {**row("bad", "row"), **bad}, GOOD[3]])
    check_bad_row(path, places[1], reason, 2)


def test_parquet_numbers_are_no_texts(tmp_path):
    path, _ = save(tmp_path, "table.parquet", [{**row("a", "b"), "prompt": 1}])
    with pytest.raises(DataError, match="row 1: prompt is int, not text"):
        load(path)


def test_invalid_utf8_in_parquet_is_named_by_its_row(tmp_path):
    path, places = save(tmp_path, "table.parquet", [GOOD[0], row("BAD!", "row"), GOOD[3]])
    table = pyarrow.parquet.read_table(path)
    prompts = table.column("prompt").combine_chunks().cast(pyarrow.binary()).to_pylist()
    raw = pyarrow.array([b"a\xff" if text == b"BAD!" else text for text in prompts], pyarrow.binary())
    invalid = pyarrow.StringArray.from_buffers(len(raw), raw.buffers()[1], raw.buffers()[2])
    pyarrow.parquet.write_table(table.set_column(0, "prompt", invalid), path)
    check_bad_row(path, places[1], "UTF-8", 2)


def test_a_broken_parquet_file_is_refused(tmp_path):
    path, _ = save(tmp_path, "table.parquet", GOOD)
    Path(path).write_bytes(Path(path).read_bytes()[:-9])
    with pytest.raises(DataError, match=r"table\.parquet: is not readable as Parquet"):
        load(path)


@pytest.mark.parametrize("where", ["moderator", "category"])
def test_a_message_about_a_lone_surrogate_can_be_printed(where, tmp_path):
    more = {"flagged": {"\ud800": True}} if where == "moderator" else {"category": {"\ud800": True}}
    path = tmp_path / "lines.jsonl"
    path.write_text("\n".join(json.dumps(item) for item in (row("a", "b"), {**row("c", "d"), **more})))
    log: list[str] = []
    assert len(load(path, "skip", log)) == 1
    "\n".join(log).encode()


def test_many_broken_rows_are_counted_and_a_file_without_a_good_one_is_refused(tmp_path):
    path = tmp_path / "lines.jsonl"
    path.write_bytes(b"[]\n" * 7 + write_lines(GOOD)[0])
    log: list[str] = []
    assert len(load(path, "skip", log).skipped_rows) == 7 and "7 broken rows left out" in log[0]
    path.write_bytes(b"[]\n" * 7)
    with pytest.raises(DataError, match=r"holds no usable row; the first fault: .*line 1: is a list"):
        load(path, "skip")


@pytest.mark.parametrize("name", ["empty.json", "empty.jsonl", "empty.csv", "array.json"])
def test_nothing_usable_is_refused(name, tmp_path):
    (tmp_path / name).write_bytes(b"[ ]" if name == "array.json" else b"\n")
    with pytest.raises(DataError, match="holds no usable row"):
        load(tmp_path / name)


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        ("nowhere.jsonl", "no such file"),
        ("", "(nothing): is neither a file ending in .json, .jsonl, .csv, .parquet nor `hub/name:split[@revision]`"),
        (BEAVERTAILS, f"for example {BEAVERTAILS}:330k_train"),
        (f"{BEAVERTAILS}@main", "is neither"),
        (f"{BEAVERTAILS}:", "is neither"),
        (f"{BEAVERTAILS}:30k_test+", "(nothing): is neither"),
        ("rows.txt", "is neither"),
        ("../a/b:train", "is neither"),
    ],
)
def test_a_wrong_spec_says_what_is_allowed(spec, words):
    with pytest.raises(DataError) as caught:
        parse_spec(spec)
    assert words in str(caught.value)


def test_directories_are_refused(tmp_path):
    (tmp_path / "rows.jsonl").mkdir()
    with pytest.raises(DataError, match="is a directory"):
        load(tmp_path / "rows.jsonl")
    with pytest.raises(DataError, match="is neither"):
        load(tmp_path)


@pytest.fixture
def hub(monkeypatch):
    """Stands in for the hub: `calls` records, `answer` is what a call gives or raises."""

    hub = SimpleNamespace(calls=[], answer=datasets.Dataset.from_list(GOOD))

    def load_dataset(*args, **kwargs):
        hub.calls.append((args, kwargs))
        if isinstance(hub.answer, Exception):
            raise hub.answer
        return hub.answer

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    return hub


@pytest.mark.parametrize(
    ("spec", "split", "revision"),
    [
        (f"{BEAVERTAILS}:train", "30k_train", None),
        (f"{BEAVERTAILS}:test", "30k_test", None),
        (f"{BEAVERTAILS}:test@abc", "30k_test", "abc"),
        (f"{BEAVERTAILS}:330k_train", "330k_train", None),
        (f"{BEAVERTAILS}:30k_test@refs/pr/2", "30k_test", "refs/pr/2"),
        ("other/BeaverTails:train", "train", None),
        ("squad:train[:10%]", "train[:10%]", None),
    ],
)
def test_a_hub_set_is_loaded_with_split_and_revision(spec, split, revision, hub):
    log: list[str] = []
    pairs = load(spec, log=log)
    name = spec.split(":")[0]
    assert hub.calls == [((name,), {"split": split, "revision": revision})]
    renamed = name == BEAVERTAILS and split.startswith("30k") and ":30k" not in spec
    assert [split in line and BEAVERTAILS in line for line in log] == [True] * renamed
    assert len(pairs) == 4 and pairs.places[0] == f"{name}:{split}, row 1"


def test_hub_and_file_join(hub, tmp_path):
    path, _ = save(tmp_path, "lines.jsonl", GOOD)
    assert load(f"a/b:train+{path}+a/b:test").weight.tolist() == [6, 3, 3, 3]
    assert [call[1]["split"] for call in hub.calls] == ["train", "test"]


@pytest.mark.parametrize(
    "error", [ConnectionError("no network"), ValueError('Unknown split "x".\nShould be one of ["train"].')]
)
def test_a_failure_of_the_hub_names_the_remedy(error, hub):
    hub.answer = error
    with pytest.raises(DataError) as caught:
        load("a/b:x")
    message = str(caught.value)
    assert message.startswith("a/b:x: cannot be loaded") and type(error).__name__ in message
    assert " ".join(str(error).split()) in message and "\n" not in message
    assert "check name, split and network, or download the file and give its path" in message


def test_a_bad_row_of_the_hub_is_named(hub):
    hub.answer = datasets.Dataset.from_list([GOOD[0], {**GOOD[3], "is_safe": True}])
    with pytest.raises(DataError, match="a/b:train, row 2: is_safe is True"):
        load("a/b:train")


def test_annotations_become_mean_labels_a_flagged_vote_and_a_weight(tmp_path):
    taxonomy = Taxonomy(categories=("a", "b", "c"))
    votes = ["a", "b", "c", "", "", "ab"]
    pair_of = [0, 0, 0, 1, 2, 2]
    rows = [
        {
            "prompt": f"q{pair}",
            "response": "r",
            "category": {name: name in vote for name in "cba"},  # another order than the taxonomy's
            "is_safe": not vote,
        }
        for pair, vote in zip(pair_of, votes, strict=True)
    ]
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    pairs = load(path, taxonomy=taxonomy)
    np.testing.assert_allclose(pairs.labels, [[1 / 3, 1 / 3, 1 / 3], [0, 0, 0], [0.5, 0.5, 0]])
    # each of the three annotators ticks another category, and all of them say unsafe
    assert pairs.flagged.tolist() == [1, 0, 0.5] and pairs.weight.tolist() == [3, 1, 2] and pairs.annotations == 6
    random.Random(0).shuffle(rows)
    path.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    again = load(path, taxonomy=taxonomy)
    order = [again.prompts.index(prompt) for prompt in pairs.prompts]
    np.testing.assert_allclose(again.labels[order], pairs.labels)


def test_labels_from_is_safe_alone(tmp_path):
    path, _ = save(tmp_path, "lines.jsonl", GOOD)
    pairs = load(path, taxonomy=Taxonomy(categories=("unsafe",), labels_from="is_safe"))
    assert pairs.labels.tolist() == [[1], [1], [1], [0]] and pairs.flagged.tolist() == [1, 1, 1, 0]


def judged(prompt: str, model: str, **flagged: bool | None) -> Row:
    return {"prompt": prompt, "response": "r", "model": model, "flagged": flagged, "category": "a topic"}


JUDGED = [
    judged("q", "alpaca", human=True, api=False),
    judged("q", "alpaca", human=False, api=False),
    judged("q", "vicuna", human=True, api=None),
]


@pytest.mark.parametrize("name", ["array.json", "lines.jsonl", "nested.csv", "table.parquet"])
def test_the_evaluation_layout(name, tmp_path):
    pairs = load(save(tmp_path, name, JUDGED)[0])
    assert pairs.labels is None and pairs.flagged is None and pairs.weight.tolist() == [2, 1]
    assert pairs.models == ["alpaca", "vicuna"] and sorted(pairs.verdicts) == ["api", "human"]
    np.testing.assert_array_equal(pairs.verdicts["human"], [0.5, 1])
    np.testing.assert_array_equal(pairs.verdicts["api"], [0, np.nan])
    taken = pairs.take([1])
    assert taken.models == ["vicuna"] and taken.verdicts["human"].tolist() == [1] and taken.annotations == 1


def test_labelled_rows_may_carry_verdicts(tmp_path):
    pairs = load(save(tmp_path, "lines.jsonl", [row("q", "r", "abuse", flagged={"api": True})])[0])
    assert pairs.labels.tolist() == [[0, 1]] and pairs.verdicts["api"].tolist() == [1]


def test_verdicts_do_not_mix_with_labels_or_stand_for_them(tmp_path):
    path, places = save(tmp_path, "lines.jsonl", [*JUDGED, GOOD[0]])
    check_bad_row(path, places[3], "do not mix", 3)
    path, _ = save(tmp_path, "lines.jsonl", JUDGED)
    with pytest.raises(DataError, match="verdicts only; labelled rows have the columns category and is_safe"):
        load(path, need_labels=True)


@pytest.fixture
def many(tmp_path) -> Pairs:
    """200 pairs of 60 prompts, one of which has 50 answers."""
    rng = random.Random(1)
    rows = [row("frequent", f"answer {i}") for i in range(50)]
    rows += [row(f"prompt {rng.randrange(59)}", f"answer {i}", "abuse") for i in range(150)]
    rng.shuffle(rows)
    return pairs_of(rows, tmp_path)


@pytest.mark.parametrize("fraction", [0.001, 0.05, 0.3, 0.5])
@pytest.mark.parametrize("seed", range(5))
def test_a_split_never_parts_a_prompt_and_reaches_the_fraction(fraction, seed, many):
    kept, held_out = split_by_prompt(many, fraction, seed)
    assert not set(kept.prompts) & set(held_out.prompts)
    assert len(held_out) >= fraction * len(many)
    largest = max(map(held_out.prompts.count, held_out.prompts))
    assert len(held_out) < fraction * len(many) + largest
    both = [*zip(kept.prompts, kept.responses, strict=True), *zip(held_out.prompts, held_out.responses, strict=True)]
    assert sorted(both) == sorted(zip(many.prompts, many.responses, strict=True))
    assert kept.annotations + held_out.annotations == many.annotations
    again = split_by_prompt(many, fraction, seed)
    assert [part.fingerprint() for part in again] == [kept.fingerprint(), held_out.fingerprint()]


def test_a_split_depends_on_the_seed_and_not_on_the_order_of_rows(many):
    splits = [set(split_by_prompt(many, 0.1, seed)[1].prompts) for seed in range(5)]
    assert len(set(map(frozenset, splits))) > 1
    turned = many.take(range(len(many) - 1, -1, -1))
    assert set(split_by_prompt(turned, 0.1, 3)[1].prompts) == splits[3]


def test_a_split_that_leaves_nothing_is_refused(tmp_path):
    with pytest.raises(DataError, match="--eval_data_name_or_path"):
        split_by_prompt(pairs_of(GOOD[:2], tmp_path), 0.1, 0)


def test_a_split_still_tells_of_rows_left_out(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b"[]\n" + write_lines(GOOD)[0])
    pairs = load(path, "skip")
    kept, _ = split_by_prompt(pairs, 0.1, 0)
    audit = compute_audit(kept, TAXONOMY, np.ones(len(kept)), 10)
    assert audit["skipped_rows"] == 1


@pytest.mark.parametrize("labels_from", ["category", "is_safe"])
@pytest.mark.parametrize("models", [False, True])
def test_written_pairs_aggregate_to_the_same_votes(labels_from, models, tmp_path):
    rng = random.Random(2)
    categories = ("unsafe",) if labels_from == "is_safe" else ("a", "b", "c")
    taxonomy = Taxonomy(categories, labels_from=labels_from)
    rows = []
    for _ in range(300):
        category = {name: rng.random() < 0.3 for name in categories}
        item = {"prompt": f"q\n{rng.randrange(9)}", "response": f"ü{rng.randrange(5)}", "category": category}
        more = {"model": rng.choice(["alpaca", "vicuna"])} if models else {}
        rows.append({**item, **more, "is_safe": not any(category.values())})
    pairs = load(save(tmp_path, "lines.jsonl", rows)[0], taxonomy=taxonomy)
    write_pairs(tmp_path / "written.jsonl", pairs, taxonomy)
    again = load(tmp_path / "written.jsonl", taxonomy=taxonomy)
    assert again.prompts == pairs.prompts and again.responses == pairs.responses
    np.testing.assert_allclose(again.labels, pairs.labels, atol=1e-12)
    np.testing.assert_allclose(again.flagged, pairs.flagged, atol=1e-12)
    assert again.weight.tolist() == pairs.weight.tolist() and max(pairs.weight) > 5


def test_the_fingerprint_changes_with_anything_that_is_learnt(tmp_path):
    base = [row("ab", "c", "abuse"), row("d", "e")]
    variants = [
        base,
        [row("ab", "c", "theft,fraud"), base[1]],
        [row("ab", "c", "abuse", "theft,fraud"), base[1]],
        [row("a", "bc", "abuse"), base[1]],
        [*base, base[0]],
        base[::-1],
        base[:1],
    ]
    fingerprints = [pairs_of(rows, tmp_path).fingerprint() for rows in variants]
    assert len(set(fingerprints)) == len(variants) and all(len(text) == 64 for text in fingerprints)
    assert pairs_of(base, tmp_path).fingerprint() == fingerprints[0]


def test_the_audit_of_a_hand_made_set(tmp_path):
    rows = [
        row("p1", "r1", "abuse"),
        row("p1", "r1", "theft,fraud"),
        row("p1", "r1"),
        row("p1", "r2"),
        row("p2", "r1", "abuse"),
        row("p2", "r1", "abuse"),
    ]
    training = pairs_of(rows, tmp_path)
    validation = pairs_of([row("p1", "r1"), row("p1", "r1"), row("p1", "new"), row("p3", "r1")], tmp_path)
    audit = compute_audit(training, TAXONOMY, np.array([10, 20, 60]), 50, validation)
    assert audit.pop("tokens") == {
        "mean": 30,
        "median": 20,
        "p95": pytest.approx(56),
        "longest": 60,
        "max_length": 50,
        "truncated_pairs": 1,
        "truncated_share": pytest.approx(1 / 3),
    }
    assert audit == {
        "rows": 6,
        "skipped_rows": 0,
        "pairs": 3,
        "prompts": 2,
        "annotations_per_pair": {"1": 1, "2": 1, "3": 1},
        "pairs_with_several_annotations": 2,
        "pairs_with_disagreement_on_flagged": 1,
        "flagged_share": pytest.approx(4 / 6),
        "label_counts": {"theft,fraud": pytest.approx(1), "abuse": pytest.approx(3)},
        "validation": {
            "rows": 4,
            "pairs": 3,
            "prompts": 2,
            "pairs_with_a_training_prompt": 2,
            "pairs_also_in_training": 1,
        },
    }
    text = "\n".join(describe_audit(compute_audit(training, TAXONOMY, np.array([10, 20, 60]), 50, validation)))
    for words in (
        "6 rows, 3 distinct pairs, 2 prompts, 66.7% flagged, 0 broken rows",
        "2 pairs have several, 1 of them disagree",
        "longest 60; 1 (33.33%) are cut at 50",
        "2 have a prompt that is trained on, 1 are trained on themselves",
    ):
        assert words in text
    assert len(describe_audit(compute_audit(training, TAXONOMY, np.ones(3), 50))) == 3


def test_an_audit_of_judged_rows_counts_verdicts(tmp_path):
    path, _ = save(tmp_path, "lines.jsonl", JUDGED)
    pairs = load(path)
    audit = compute_audit(pairs, TAXONOMY, None, 50)
    assert "label_counts" not in audit and "tokens" not in audit and audit["pairs"] == len(pairs)
    assert audit["verdicts"].keys() == pairs.verdicts.keys()
    for name, votes in pairs.verdicts.items():
        assert audit["verdicts"][name]["pairs"] == (~np.isnan(votes)).sum()
        assert audit["verdicts"][name]["flagged_share"] == pytest.approx(np.nanmean(votes))
