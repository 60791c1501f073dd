"""Whatever stands in a data file is pairs, or a line that says why not; what `predict` carries through comes out unchanged."""

from __future__ import annotations

import csv
import functools
import io
import json
import math
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from fuzz import Property
from fuzz_config import ODD, check_told, folder
from hypothesis import strategies as st

from qlora_moderation.audit import compute_audit
from qlora_moderation.blocks import Block, check_columns, count_blocks
from qlora_moderation.data import aggregate_rows, load_pairs
from qlora_moderation.errors import DataError
from qlora_moderation.pair_columns import PairColumns
from qlora_moderation.row_check import check_new_columns, find_bad_rows
from qlora_moderation.rows import read_rows
from qlora_moderation.sources import Source, parse_spec
from qlora_moderation.tables import find_sources, open_table
from qlora_moderation.taxonomy import Taxonomy
from qlora_moderation.verdicts import NEW_COLUMNS, RAW, Verdicts

TAXONOMY = Taxonomy(categories=("a", "b,c"))
TEXTS = st.text(st.characters(), max_size=6) | st.sampled_from(ODD)
JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | TEXTS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXTS, inner, max_size=3),
    max_leaves=6,
)
_CATEGORY = st.fixed_dictionaries({"a": st.booleans(), "b,c": st.booleans()})
GOOD_ROWS = st.builds(
    lambda prompt, response, category, more: {
        "prompt": prompt,
        "response": response,
        "category": category,
        "is_safe": not any(category.values()),
        **more,
    },
    st.sampled_from(["", "p", "q\r\n", '"', "é,"]),
    st.sampled_from(["", "r", "s"]),
    _CATEGORY,
    st.fixed_dictionaries(
        {}, optional={"model": st.none() | st.sampled_from("mn"), "flagged": st.dictionaries(st.text(), st.booleans())}
    ),
)
ODD_ROWS = st.one_of(
    JSON_VALUES,
    st.dictionaries(
        st.sampled_from(["prompt", "response", "category", "is_safe", "model", "flagged", "error"]), JSON_VALUES
    ),
    st.builds(lambda row, key, value: {**row, key: value}, GOOD_ROWS, TEXTS | st.just("is_safe"), JSON_VALUES),
)
ROWS = st.lists(GOOD_ROWS, max_size=8) | st.lists(GOOD_ROWS | ODD_ROWS, max_size=5)
ENDINGS = st.sampled_from(["json", "jsonl", "csv"])
PIECES = [
    '{"prompt": "a", "response": "b"}',
    "[",
    "]",
    "{",
    "}",
    '"',
    ",",
    ":",
    "\n",
    "\r",
    "\\",
    "prompt,response",
    "\0",
]
PIECES += ["prompt", "1", "null", "NaN", "\ufeff", "is_safe", "true", "\u2028", "\x85", "\x1f", "'", " "]
RAW_FILES = st.one_of(
    st.binary(max_size=24),
    st.lists(st.sampled_from(PIECES), max_size=14).map(lambda pieces: "".join(pieces).encode()),
    st.lists(st.sampled_from(PIECES).map(str.encode) | st.binary(max_size=2), max_size=12).map(b"".join),
)


def _write(content: bytes, ending: str) -> Source:
    path = folder() / f"drawn.{ending}"
    path.write_bytes(content)
    return Source(str(path))


def _dump(rows: list[Any], ending: str, is_ascii: bool) -> bytes:
    """Return rows as a file; in CSV mappings are JSON in a cell."""
    if ending == "csv":
        names = list(dict.fromkeys(name for row in rows if isinstance(row, dict) for name in row))
        out = io.StringIO()
        writer = csv.writer(out)
        for row in [dict(zip(names, names, strict=True)), *rows]:
            cells = [row.get(name, "") for name in names] if isinstance(row, dict) else [row]
            writer.writerow([cell if isinstance(cell, str) else json.dumps(cell) for cell in cells])
        return out.getvalue().encode("utf-8", "surrogatepass")
    texts = [json.dumps(row, ensure_ascii=is_ascii).encode("utf-8", "surrogatepass") for row in rows]
    return b"[" + b",\n".join(texts) + b"]" if ending == "json" else b"\n".join(texts)


@functools.singledispatch
def _same(one: Any, other: Any) -> bool:
    return one == other


@_same.register
def _(one: float, other: Any) -> bool:
    return one == other or (math.isnan(one) and isinstance(other, float) and math.isnan(other))


@_same.register
def _(one: dict, other: Any) -> bool:  # type: ignore[type-arg]
    return isinstance(other, dict) and [*one] == [*other] and all(_same(one[key], other[key]) for key in one)


@_same.register
def _(one: list, other: Any) -> bool:  # type: ignore[type-arg]
    return isinstance(other, list) and len(one) == len(other) and all(map(_same, one, other))


def check_readers(source: Source) -> None:
    """A file is rows and pairs, or a fault; what is skipped is counted."""
    try:
        rows = list(read_rows(source))
        assert all(place.startswith(source.name) and isinstance(row, dict | str) for place, row in rows)
    except DataError as error:
        check_told(error)
        rows = []
    for on_bad_row in ("stop", "skip"):
        try:
            pairs = load_pairs(source.name, TAXONOMY, on_bad_row, lambda line: None)
        except DataError as error:
            check_told(error)
            continue
        assert pairs.annotations + len(pairs.skipped_rows) == len(rows)
        assert all(line.isprintable() for line in pairs.skipped_rows)
        compute_audit(pairs, TAXONOMY, None, 512)


def check_file(draw: tuple[bytes, str]) -> None:
    """Any bytes under any ending are read, or refused, by all readers."""
    source = _write(*draw)
    check_readers(source)
    check_carried(source)


def check_rows(draw: tuple[list[Any], str, bool]) -> None:
    """Any JSON values as rows are counted as a naive count counts them, and come out of `predict`'s tables unchanged."""
    rows, ending, is_ascii = draw
    source = _write(_dump(rows, ending, is_ascii), ending)
    check_readers(source)
    check_carried(source, None if ending == "csv" else rows)


def check_votes(draw: tuple[list[dict[str, Any]], str]) -> None:
    """Votes of good rows are those of a naive count."""
    rows, ending = draw
    counted: dict[Any, list[dict[str, Any]]] = defaultdict(list)
    for row in rows:
        counted[row["prompt"], row["response"], row.get("model") or None].append(row)
    pairs = aggregate_rows([_write(_dump(rows, ending, True), ending)], TAXONOMY)
    models = pairs.models or [""] * len(pairs)
    assert [*zip(pairs.prompts, pairs.responses, [model or None for model in models], strict=True)] == [*counted]
    for i, votes in enumerate(counted.values()):
        assert pairs.weight[i] == len(votes)
        for c, name in enumerate(TAXONOMY.categories):
            assert pairs.labels[i, c] == sum(row["category"][name] for row in votes) / len(votes)
        assert pairs.flagged[i] == sum(not row["is_safe"] for row in votes) / len(votes)


def _judge(block: Block) -> Verdicts:
    bad = dict.fromkeys(range(len(block.rows)))
    for i, row in enumerate(block.rows):
        one = Block(block.number, [row], [block.places[i]], None)
        bad[i] = (find_bad_rows(one, PairColumns()) or [None])[0]
    count = len(block.rows)
    risk = np.arange(count) / max(1, count)
    table = np.stack([risk, risk / 2], axis=1).reshape(-1, 2)
    return Verdicts(
        TAXONOMY.categories, [*bad.values()], risk > 0.5, risk, table, table > 0.4, risk.astype(int) + 1, risk > 2
    )


def check_carried(source: Source, wanted: list[Any] | None = None) -> Path | None:
    """Rows of a table come out as they went in, with verdicts, whatever the size of the blocks; or a fault is told.

    Returns:
        The output, where there is one.
    """
    path = folder() / "carried"
    for block_size in (1, 2, 100):
        try:
            table = open_table(source, "new_")
            survey = table.survey(block_size)
            check_columns(str(source), survey, [("prompt_column", "prompt")], "new_")
            blocks = list(
                table.read(survey, block_size, range(count_blocks(survey.rows, block_size)), ["prompt", "response"])
            )
            for block in blocks:
                check_new_columns(block, "new_")
        except DataError as error:
            check_told(error)
            return None
        assert sum(len(block.rows) for block in blocks) == survey.rows
        parts = [folder() / f"part-{block.number}" for block in blocks]
        verdicts = list(map(_judge, blocks))
        for part, block, judged in zip(parts, blocks, verdicts, strict=True):
            with part.open("wb") as file:
                table.write_part(file, block, judged)
        with path.open("wb") as file:
            table.join(parts, file)
        rows = [row for batch in table.read_output(path, ["prompt", "response"]) for row in batch]
        before = [row for block in blocks for row in block.rows]
        errors = [error for judged in verdicts for error in judged.errors]
        _compare(rows, before, errors, table.format)
        if wanted is not None and not isinstance(survey.first, type(None)):
            assert len(before) == len(wanted)
            read = [(one, row) for one, row in zip(wanted, before, strict=True) if isinstance(row, dict)]
            assert all(_same(_as_json(row), _as_json(one)) for one, row in read)
    return path


def _as_json(value: Any) -> Any:
    return json.loads(json.dumps(value))


def _compare(rows: list[Any], before: list[Any], errors: list[str | None], kind: str) -> None:
    assert len(rows) == len(before)
    for row, old, error in zip(rows, before, errors, strict=True):
        assert (row.get("new_error") is None) == (error is None)
        if error is not None:
            assert row["new_error"].startswith(error) or kind == "parquet"
        if isinstance(old, dict):
            kept = {name: value for name, value in row.items() if not name.startswith("new_")}
            assert _same(old, {name: kept[name] for name in old}), (old, kept)
        elif kind in ("json", "jsonl"):
            assert f"new_{RAW}" in row
        assert error is not None or {f"new_{name}" for name in NEW_COLUMNS[:-1]} <= set(row)


def _arrow(kind: Any, values: st.SearchStrategy[Any]) -> st.SearchStrategy[pa.Array]:
    return st.lists(st.none() | values, min_size=3, max_size=3).map(lambda drawn: pa.array(drawn, type=kind))


_INTEGERS = st.integers(-(2**63), 2**63 - 1)
_UTF8 = st.text(max_size=4)
ARRAYS = st.one_of(
    _arrow(pa.string(), _UTF8),
    _arrow(pa.large_string(), _UTF8),
    _arrow(pa.string_view(), _UTF8),
    _arrow(pa.binary(), st.binary(max_size=4)),
    _arrow(pa.binary(), st.binary(max_size=4)).map(
        lambda array: pa.Array.from_buffers(pa.string(), 3, array.buffers())
    ),
    _arrow(pa.bool_(), st.booleans()),
    _arrow(pa.int64(), _INTEGERS),
    _arrow(pa.float32(), st.floats(width=32, allow_nan=False)),
    _arrow(pa.timestamp("us"), _INTEGERS),
    _arrow(pa.timestamp("ns"), _INTEGERS),
    _arrow(pa.timestamp("s", "Europe/Zurich"), st.integers(-(2**53), 2**53)),
    _arrow(pa.timestamp("s", "Mars/North"), st.integers(0, 9)),
    _arrow(pa.date32(), st.integers(-(2**31), 2**31 - 1)),
    _arrow(pa.duration("us"), _INTEGERS),
    _arrow(pa.time64("us"), st.integers(0, 86_399_999_999)),
    _arrow(pa.decimal128(5, 2), st.decimals(-999, 999, places=2)),
    _arrow(pa.list_(pa.int8()), st.lists(st.integers(0, 9), max_size=2)),
    _arrow(
        pa.map_(pa.string(), pa.bool_()), st.dictionaries(_UTF8, st.booleans(), max_size=2).map(lambda d: [*d.items()])
    ),
    _arrow(pa.struct([("a", pa.bool_()), ("b,c", pa.bool_())]), _CATEGORY),
    _arrow(pa.struct([("a", pa.bool_()), ("a", pa.bool_())]), st.just((True, False))),
    _arrow(pa.dictionary(pa.int8(), pa.string()), _UTF8),
    _arrow(pa.null(), st.none()),
)
NAMES = st.sampled_from(
    ["prompt", "response", "category", "is_safe", "model", "flagged", "doc", "new_error", "", "a\nb", "é"]
)


def check_parquet(draw: list[tuple[str, pa.Array]]) -> None:
    """Any columns of any type are read, or refused, and carried through with their types."""
    path = folder() / "drawn.parquet"
    pq.write_table(pa.table([array for _, array in draw], names=[name for name, _ in draw]), path)
    check_readers(Source(str(path)))
    carried = check_carried(Source(str(path)))
    if carried is not None:
        table = pq.read_table(path)
        assert pq.read_table(carried).select(table.schema.names).equals(table)


SPECS = st.lists(
    st.sampled_from(
        ["a/b", ":", "train", "@", "+", "x.jsonl", "drawn.csv", " ", "*", "**", "[", "]", "?", "a" * 300, "a" * 5000]
    )
    | st.text(max_size=4),
    max_size=6,
).map(lambda parts: "".join(parts).replace("/..", "").lstrip("/."))


def check_spec(spec: str) -> None:
    """Any text names sources, or none."""
    try:
        assert parse_spec(spec)
    except DataError as error:
        check_told(error)
    (folder() / "specs").mkdir(exist_ok=True)
    try:
        find_sources([f"{folder()}/specs/{spec}"], str(folder() / "out"))
    except DataError as error:
        check_told(error)


_GOOD = {"prompt": "", "response": "", "category": {"a": False, "b,c": False}, "is_safe": True}
_TWICE = pa.array([None, None, (True, False)], type=pa.struct([("a", pa.bool_()), ("a", pa.bool_())]))
_FAR = pa.array([None, 2**62, 0], type=pa.timestamp("us"))
_LONG = "a" * 300
_ANY_ENDING = st.sampled_from(["json", "jsonl", "csv", "parquet"])
PROPERTIES = {
    "any bytes as a file": Property(
        st.tuples(RAW_FILES, _ANY_ENDING), check_file, ((b"PK\x03\x04", "json"),), weight=2
    ),
    "any values as rows": Property(
        st.tuples(ROWS, ENDINGS, st.booleans()),
        check_rows,
        (([None, {**_GOOD, "\U00018cd6\n": None}], "csv", False),),
        weight=2,
    ),
    "votes": Property(st.tuples(st.lists(GOOD_ROWS, max_size=10), st.sampled_from(["json", "jsonl"])), check_votes),
    "columns of Parquet": Property(
        st.lists(st.tuples(NAMES, ARRAYS), max_size=5), check_parquet, ([("prompt", _TWICE)], [("prompt", _FAR)])
    ),
    "data specs": Property(SPECS, check_spec, (_LONG, "+".join([_LONG] * 20), "a/b**", f"{_LONG}/b*"), weight=0.5),
}
