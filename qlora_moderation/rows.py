"""Raw rows of a data set, each with the place it stands at.

In: a source. Out: an iterator over (place, mapping or the reason why there is none). First half of step 2.

Hub sets go through `datasets`, Parquet through pyarrow. JSON and CSV are read with the standard library: a broken row
must be named by its line, and reading must be able to go on behind it; pyarrow's readers do neither.
"""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from qlora_moderation.errors import DataError, brief, show
from qlora_moderation.sources import Source, refuse_packed, stamp, unreadable

_NO_PYTHON_VALUE = (ValueError, OverflowError, LookupError, TypeError, NotImplementedError)
"""What Arrow raises at a value that Python has not: text that is no UTF-8, the year 300000, a time zone nobody knows."""


def read_rows(source: Source) -> Iterator[tuple[str, dict[str, Any] | str]]:
    """Yield (place, row); where a row cannot be read, (place, reason) stands for it.

    Raises:
        DataError: the whole source cannot be read.
    """
    if source.split is not None:
        yield from _read_hub(source)
        return
    path = Path(source.name)
    reader = {".json": _read_json, ".jsonl": _read_jsonl, ".csv": _read_csv, ".parquet": _read_parquet}
    try:
        refuse_packed(path)
        before = stamp(path)
        yield from reader[path.suffix.lower()](path)
        changed = stamp(path) != before
    except OSError as error:
        raise unreadable(path, error) from None
    if changed:
        raise DataError(f"{path}: changed while it was read; give the same command again when it is written")


def _as_row(value: Any) -> dict[str, Any] | str:
    return value if isinstance(value, dict) else f"is a {type(value).__name__}, not an object with columns"


def parse_json(text: str) -> dict[str, Any] | str:
    """Return the object that a text holds, or why there is none."""
    try:
        return _as_row(json.loads(text))
    except (ValueError, RecursionError) as error:
        return f"is not valid JSON ({_reason(error)})"


def _reason(error: Exception) -> str:
    if isinstance(error, json.JSONDecodeError):
        return f"{error.msg} at column {error.colno}"
    return "nested too deeply" if isinstance(error, RecursionError) else str(error).split(";")[0]


def _read_jsonl(path: Path) -> Iterator[tuple[str, dict[str, Any] | str]]:
    name = str(path)
    with path.open("rb") as file:
        for number, raw in enumerate(file, start=1):
            place = f"{name}, line {number}"
            try:
                line = raw.decode("utf-8-sig" if number == 1 else "utf-8").strip()
            except UnicodeDecodeError as error:
                yield place, f"is not valid UTF-8 at byte {error.start} of the line"
                continue
            if line:
                yield place, parse_json(line)


def _read_json(path: Path) -> Iterator[tuple[str, dict[str, Any] | str]]:
    """Read an array of objects, or JSON Lines under this ending; a place is the line that an object starts on."""
    raw = path.read_bytes()
    if not raw.removeprefix(b"\xef\xbb\xbf").lstrip().startswith(b"["):
        yield from _read_jsonl(path)
        return
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        raise DataError(f"{path}, line {line}: is not valid UTF-8; save the file as UTF-8") from None
    decoder, separator = json.JSONDecoder(), re.compile(r"[\s,]*")
    position, line, counted = text.index("[") + 1, 1, 0
    while True:
        position = separator.match(text, position).end()  # type: ignore[union-attr]  # `*` always matches
        line, counted = line + text.count("\n", counted, position), position
        if text[position : position + 1] == "]":
            rest = text[position + 1 :]
            if rest.strip():
                line += rest.count("\n", 0, len(rest) - len(rest.lstrip()))
                raise DataError(f"{path}, line {line}: more text stands behind the array's end; remove it")
            return
        try:
            value, position = decoder.raw_decode(text, position)
        except (ValueError, RecursionError) as error:
            reason = getattr(error, "msg", _reason(error))
            raise DataError(f"{path}, line {line}: is not valid JSON ({reason}); mend the file from there on") from None
        yield f"{path}, line {line}", _as_row(value)


def _read_csv(path: Path) -> Iterator[tuple[str, dict[str, Any] | str]]:
    """Read a header and rows; `category` is a column of JSON objects, or each category has a column of its own."""
    csv.field_size_limit(2**31 - 1)
    with path.open(encoding="utf-8-sig", errors="surrogateescape", newline="") as file:
        reader = csv.reader(file, strict=True)
        header: list[str] | None = None
        while True:
            place = f"{path}, line {reader.line_num + 1}"
            try:
                cells = next(reader)
            except StopIteration:
                return
            except csv.Error as error:
                yield place, f"is not valid CSV ({error})"
                continue
            if not cells:
                continue
            if header is None:
                refuse_repeated(f"{path}, line 1", cells)
                header = cells
            elif any("\udc80" <= character <= "\udcff" for cell in cells for character in cell):
                yield place, "is not valid UTF-8"
            elif len(cells) != len(header):
                yield place, f"has another number of columns than the header ({', '.join(header)}): {len(cells)}"
            else:
                yield place, {name: _from_cell(name, cell) for name, cell in zip(header, cells, strict=True)}


def refuse_repeated(place: str, columns: Sequence[str]) -> None:
    """Refuse a table in which one column would hide another.

    Raises:
        DataError: names it.
    """
    repeated = next((name for index, name in enumerate(columns) if name in columns[:index]), None)
    if repeated is not None:
        raise DataError(f"{place}: names the column {show(repeated)} twice; rename one of them")


def _from_cell(name: str, value: str) -> Any:
    if name in ("category", "flagged") and value.lstrip().startswith("{"):
        row = parse_json(value)
        return value if isinstance(row, str) else row
    if name not in ("prompt", "response", "model"):
        return {"true": True, "false": False}.get(value.strip().lower(), value)
    return value


def _read_parquet(path: Path) -> Iterator[tuple[str, dict[str, Any] | str]]:
    import pyarrow
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            refuse_repeated(str(path), file.schema_arrow.names)
            number = 0
            for batch in file.iter_batches(batch_size=4096):
                for row in batch_rows(batch):
                    number += 1
                    yield f"{path}, row {number}", row
    except pyarrow.ArrowException as error:
        raise DataError(f"{path}: is not readable as Parquet ({str(error).splitlines()[0]})") from None


def batch_rows(batch: Any) -> list[dict[str, Any] | str]:
    """Return the rows of an Arrow table or batch; where one cannot be read, the reason stands for it."""
    try:
        return batch.to_pylist()
    except _NO_PYTHON_VALUE:
        rows: list[dict[str, Any] | str] = []
        for index in range(batch.num_rows):
            try:
                rows += batch.slice(index, 1).to_pylist()
            except UnicodeDecodeError:
                rows.append("is not valid UTF-8")
            except _NO_PYTHON_VALUE as error:
                rows.append(f"cannot be read ({brief(error)})")
        return rows


def _read_hub(source: Source) -> Iterator[tuple[str, dict[str, Any] | str]]:
    for number, row in enumerate(source.hub_set, start=1):
        yield f"{source}, row {number}", row
