"""Formats block by block: what goes in comes out, with verdicts behind it."""

from __future__ import annotations

import csv
import io
import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from qlora_moderation import DataError, json_tables
from qlora_moderation.blocks import Block, check_columns, count_blocks
from qlora_moderation.sources import Source
from qlora_moderation.tables import find_sources, open_table
from qlora_moderation.verdicts import NEW_COLUMNS, Verdicts

NAMES = ("a", "b,c")
ROWS = [{"prompt": f"q{i}", "response": f'"ä", {{[ {i}\n\\', "doc": {"x": [i, None]}} for i in range(7)]
LINES = "".join(json.dumps(row)[:-1] + ', "n": 1.00, "e": "\\u00e4\\ud800"}\n' for row in ROWS)
CELLS = [f'q{i},"""so"", {i}\r\nline",1.00' for i in range(7)]
FILES = {
    "lines.jsonl": ("\ufeff" + LINES.replace("\n", "\r\n", 2).replace("}\n", "}\n\n  \n", 1)).rstrip("\n"),
    "lines.json": LINES,
    "array.json": "\ufeff [" + " ,\n".join(json.dumps(row, indent=1, ensure_ascii=False) for row in ROWS) + "\n] \n",
    "flat.json": json.dumps(ROWS),
    "empty.jsonl": "",
    "empty.json": " [ ] ",
    "table.csv": "prompt,response,n\r\n" + "\r\n".join(CELLS),
    "bom.csv": "\ufeff" + '"prompt",response,n\n' + "\n\n".join(CELLS) + "\n",
    "header.csv": "prompt,response\n",
    "empty.csv": "",
}


def judge(block: Block) -> Verdicts:
    """Made-up verdicts that depend on the row alone; what cannot be read is an error."""
    errors = [row if isinstance(row, str) else None if "prompt" in row else "no prompt" for row in block.rows]
    texts = ["q0" if error else row["prompt"] for row, error in zip(block.rows, errors, strict=True)]
    number = np.array([int(text[1:]) for text in texts], dtype=np.int64)
    risk = number / 7
    table = np.stack([risk, risk / 2], axis=1).reshape(-1, 2)
    return Verdicts(NAMES, errors, risk > 0.5, risk, table, table > 0.4, number + 1, number > 5)


def score(path: Path, folder: Path, block_size: int, alone: bool = False) -> bytes:
    """Write parts, one after another or, from behind, each by a reader of its own, and join them."""
    count = count_blocks(open_table(Source(str(path)), "").survey(block_size).rows, block_size)
    parts = [folder / f"part-{number}" for number in range(count)]
    for numbers in [[number] for number in range(count)][::-1] if alone else [range(count)]:
        table = open_table(Source(str(path)), "")
        for block in table.read(table.survey(block_size), block_size, numbers, ["prompt"]):
            with parts[block.number].open("wb") as file:
                table.write_part(file, block, judge(block))
    joined = io.BytesIO()
    table.join(parts, joined)
    return joined.getvalue()


@pytest.mark.parametrize("chunk", [5, 2**20])
@pytest.mark.parametrize("name", FILES)
def test_an_output_does_not_depend_on_its_blocks_and_holds_the_very_texts(name, chunk, tmp_path, monkeypatch):
    monkeypatch.setattr(json_tables, "_CHUNK", chunk)
    path = tmp_path / name
    path.write_bytes(FILES[name].encode("utf-8"))
    whole = score(path, tmp_path, 100)
    assert whole == score(path, tmp_path, 3) == score(path, tmp_path, 2, alone=True) == score(path, tmp_path, 1)
    text = whole.decode("utf-8")
    if name == "empty.csv":
        assert not whole
    elif name.endswith(".csv"):
        rows = list(csv.DictReader(io.StringIO(text.removeprefix("\ufeff"), newline=""), strict=True))
        assert len(rows) == (0 if name == "header.csv" else 7) and text.startswith(FILES[name][:14])
        assert all(
            f'{cells},{"true" if i > 3 else "false"},{i / 7},"{{' in text for i, cells in enumerate(CELLS[: len(rows)])
        )
        assert [json.loads(row["probabilities"])["b,c"] for row in rows] == [i / 14 for i in range(len(rows))]
        assert ("\r\n" in text.splitlines(keepends=True)[0]) == (name == "table.csv")
    else:
        rows = (
            json.loads(text)
            if name in ("array.json", "flat.json", "empty.json")
            else list(map(json.loads, text.splitlines()))
        )
        assert len(rows) == (0 if "empty" in name else 7)
        for i, row in enumerate(rows):
            assert {key: row[key] for key in ROWS[i]} == ROWS[i] and row["windows"] == i + 1 and "error" not in row
            assert row["categories"] == {"a": i / 7 > 0.4, "b,c": i / 14 > 0.4}
        if name.startswith("lines"):
            assert text.count('"n": 1.00, "e": "\\u00e4\\ud800", "flagged"') == 7


def test_a_place_is_the_line_that_a_row_begins_on(tmp_path):
    for name, lines in (("table.csv", [2, 4, 6, 8]), ("array.json", [1, 11, 21, 31]), ("lines.jsonl", [1, 2, 3, 6])):
        path = tmp_path / name
        path.write_bytes(FILES[name].encode("utf-8"))
        table = open_table(Source(str(path)), "")
        survey = table.survey(2)
        places = [place for block in table.read(survey, 2, [0, 1], ["prompt"]) for place in block.places]
        assert places == [f"{path}, line {line}" for line in lines]
        assert next(table.read(survey, 2, [1], ["prompt"])).places == places[2:]


@pytest.mark.parametrize("name", [name for name in FILES if "empty" not in name])
def test_what_was_written_is_read_again(name, tmp_path):
    path, output = tmp_path / name, tmp_path / ("out" + Path(name).suffix)
    path.write_bytes(FILES[name].encode("utf-8"))
    output.write_bytes(score(path, tmp_path, 3))
    rows = [row for batch in open_table(Source(str(path)), "").read_output(output, ["prompt"]) for row in batch]
    assert [row["risk"] for row in rows] == [i / 7 for i in range(len(rows))]
    assert all(row["categories"] == {"a": row["risk"] > 0.4, "b,c": row["risk"] > 0.8} for row in rows)
    assert all(row["flagged"] is (row["risk"] > 0.5) and row.get("error") is None for row in rows)


BROKEN = {
    "broken.jsonl": (b'{"prompt": "q1"}\n{"prompt": \n[1]\n\xff{}\n{}\n', [2, 3, 4]),
    "broken.json": (
        b'[{"prompt": "q1"}, {"prompt": q}, 5, "]",\n [[{}]], {"\xff": 1}, {"prompt": "q2"}]',
        [1, 1, 1, 2, 2],
    ),
    "broken.csv": (b'prompt,n\nq1,1\nq2\nq3,"a"b\nq4,\xff\nq5,5\n', [3, 4, 5]),
}


@pytest.mark.parametrize("name", BROKEN)
def test_rows_that_cannot_be_read_are_carried_with_reason_place_and_text(name, tmp_path):
    content, lines = BROKEN[name]
    path = tmp_path / name
    path.write_bytes(content)
    table = open_table(Source(str(path)), "")
    survey = table.survey(100)
    (block,) = table.read(survey, 100, [0], ["prompt"])
    broken = [place for row, place in zip(block.rows, block.places, strict=True) if isinstance(row, str)]
    assert broken == [f"{path}, line {line}" for line in lines] and len(block.rows) == len(lines) + 2
    output = tmp_path / f"out{path.suffix}"
    output.write_bytes(score(path, tmp_path, 2))
    rows = [row for batch in table.read_output(output, ["prompt"]) for row in batch]
    assert [bool(row.get("error")) for row in rows] == [isinstance(row, str) or not row for row in block.rows]
    assert all(row[column] is None for row in rows if row.get("error") for column in NEW_COLUMNS[:-1])
    text = output.read_text(encoding="utf-8")
    kept = {
        "broken.jsonl": ['"raw": "[1]"', r'"raw": "\\xff{}"'],
        "broken.json": [r'"raw": "{\"prompt\": q}"', r'"raw": "\"]\""'],
        "broken.csv": ["it reads: q2", "it reads: q4,\\xff"],
    }
    assert all(words in text for words in kept[name])


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b'[{"a": 1}\n, {"a": [1, 2}', "line 2: is not valid JSON"),
        (b'[{"a": 1}, "b', "line 1: is not valid JSON"),
        (b'[{"a": 1},\n', "line 2: is not valid JSON (the array does not end)"),
        (b'[{"a": 1}]\n\n x', "line 3: more text stands behind the array's end"),
    ],
)
def test_an_array_that_does_not_end_is_named(content, words, tmp_path):
    path = tmp_path / "a.json"
    path.write_bytes(content)
    with pytest.raises(DataError) as caught:
        open_table(Source(str(path)), "").survey(10)
    assert words in str(caught.value)


def write_parquet(path: Path, group: int) -> pa.Table:
    table = pa.table(
        {
            "prompt": pa.array([f"q{i}" for i in range(7)]).dictionary_encode(),
            "doc": pa.array([{"x": [i, None], "response": "so"} for i in range(7)]),
            "n": pa.array(range(7), type=pa.decimal128(5, 2)),
        }
    ).replace_schema_metadata({"mine": "yes", "huggingface": "{}"})
    pq.write_table(table, path, row_group_size=group)
    return table


@pytest.mark.parametrize("group", [1, 2, 5, 100])
def test_parquet_keeps_columns_types_and_order(group, tmp_path):
    path = tmp_path / "a.parquet"
    table = write_parquet(path, group)
    written = [score(path, tmp_path, size) for size in (100, 3, 1)]
    for content in written:
        found = pq.read_table(io.BytesIO(content))
        assert found.select(table.schema.names).cast(table.schema).equals(table)
        assert found.schema.names == [*table.schema.names, *NEW_COLUMNS]
        assert found["risk"].to_pylist() == [i / 7 for i in range(7)] and found["error"].null_count == 7
        assert found["probabilities"].to_pylist()[3] == {"a": 3 / 7, "b,c": 3 / 14}
        assert found.schema.metadata.get(b"mine") == b"yes" and b"huggingface" not in found.schema.metadata
    assert written[1] == score(path, tmp_path, 3, alone=True)
    reader = open_table(Source(str(path)), "")
    survey = reader.survey(2)
    blocks = list(reader.read(survey, 2, [1, 3], ["prompt", "doc.response"]))
    assert [[row["prompt"] for row in block.rows] for block in blocks] == [["q2", "q3"], ["q6"]]
    assert blocks[1].places == [f"{path}, row 7"] and blocks[0].rows[0]["doc"]["response"] == "so"


def test_a_parquet_without_rows_and_one_with_a_text_that_is_none(tmp_path):
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"prompt": pa.array([], type=pa.string())}), path)
    assert pq.read_table(io.BytesIO(score(path, tmp_path, 10))).schema.names == ["prompt", *NEW_COLUMNS]
    broken = pa.StringArray.from_buffers(
        2, pa.py_buffer(np.array([0, 2, 4], dtype=np.int32)), pa.py_buffer(b"q1\xff\xfe")
    )
    pq.write_table(pa.table({"prompt": broken}), path)
    found = pq.read_table(io.BytesIO(score(path, tmp_path, 10)))
    assert found["error"].to_pylist() == [None, "is not valid UTF-8"] and found["flagged"].to_pylist() == [False, None]


def test_new_columns_never_replace_old_ones(tmp_path):
    path = tmp_path / "a.csv"
    path.write_text("prompt,response,flagged\na,b,c\n")
    survey = open_table(Source(str(path)), "").survey(10)
    with pytest.raises(DataError, match=r"has a column flagged already.*--prefix judged_"):
        check_columns("a.csv", survey, [], "")
    check_columns("a.csv", survey, [("prompt_column", "prompt")], "judged_")
    with pytest.raises(DataError, match=r"has no column promt \(did you mean prompt\?\), as --prompt_column says"):
        check_columns("a.csv", survey, [("prompt_column", "promt")], "x")
    path.write_text("prompt;response\na;b\n")
    with pytest.raises(DataError, match=r"it has prompt;response; its columns must be parted by commas, not by ';'$"):
        check_columns("a.csv", open_table(Source(str(path)), "").survey(10), [("prompt_column", "prompt")], "")


def test_inputs_are_files_directories_and_globs_in_a_fixed_order(tmp_path):
    names = ["b.csv", "a.jsonl", "sub/a.jsonl", ".hidden.csv", ".git/a.csv", "notes.txt"]
    for name in names:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("")
    assert list(find_sources([str(tmp_path)])) == ["a.jsonl", "b.csv", "sub/a.jsonl"]
    assert list(find_sources([str(tmp_path / "b.csv"), "org/set:train[:5]@main"])) == ["b.csv", "set-train-5.parquet"]
    assert list(find_sources([str(tmp_path / "*")])) == ["a.jsonl", "b.csv"]
    for specs, output, words in (
        ([str(tmp_path / "**/*.jsonl")], None, "would both be written to a.jsonl"),
        ([str(tmp_path / "*.parquet")], None, "matches no file ending in"),
        ([str(tmp_path / ".git")], str(tmp_path / ".git" / "out"), "lies inside --input"),
        ([str(tmp_path / "a.jsonl")], str(tmp_path), "would replace"),
        ([str(tmp_path / "notes.txt")], None, "is neither a file ending in"),
        (["gone.csv"], None, "no such file"),
    ):
        with pytest.raises(DataError, match=words):
            find_sources(specs, output)
    (tmp_path / "summary.json").write_text("[]")
    with pytest.raises(DataError, match="is what the output directory itself holds"):
        find_sources([str(tmp_path / "summary.json")])
