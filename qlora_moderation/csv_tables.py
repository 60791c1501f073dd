"""CSV: a header and records with commas.

In: a file. Out: its records, and their texts with new columns, whose mappings are JSON objects in a cell.
"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO

from qlora_moderation.blocks import Row
from qlora_moderation.errors import DataError
from qlora_moderation.rows import refuse_repeated
from qlora_moderation.text_tables import LONGEST_ROW, Stored, TextTable
from qlora_moderation.verdicts import NEW_COLUMNS


class Csv(TextTable):
    """A file with a header; `probabilities` and `categories` are JSON objects in a cell."""

    format = "csv"

    def __init__(self, source: str, prefix: str = "") -> None:
        super().__init__(source, prefix)
        self._header: tuple[str, ...] = ()
        self._raw_header = b""

    @property
    def columns(self) -> tuple[str, ...] | None:
        """See `TextTable`."""
        return self._header

    def begin(self) -> bytes:
        """See `TextTable`; a table without a header has no rows either, and its output is as empty."""
        return _append_cells(self._raw_header, [self.prefix + name for name in NEW_COLUMNS]) if self._header else b""

    def find_begin(self, path: Path) -> int:
        """See `TextTable`."""
        output = Csv(str(path))
        next(output.scan(path), None)
        return len(output._raw_header)

    def scan(self, path: Path, start: Stored | None = None) -> Iterator[Stored]:
        """See `TextTable`; the first record of a file is its header."""
        records = _scan_records(path, start)
        if start is None:
            for stored, cells in records:
                self._take_header(path, stored.raw, cells)
                break
        yield from (stored for stored, _ in records)

    def _take_header(self, path: Path, raw: bytes, cells: list[str] | str) -> None:
        if isinstance(cells, str):
            raise DataError(f"{path}, line 1: its header is not valid CSV ({cells}); mend it")
        try:
            raw.decode("utf-8")
        except UnicodeDecodeError:
            raise DataError(f"{path}, line 1: its header is not valid UTF-8; save the file as UTF-8") from None
        refuse_repeated(f"{path}, line 1", cells)
        self._raw_header, self._header = raw, tuple(cells)

    def parse(self, raw: bytes) -> Row:
        """See `TextTable`; cells are texts, but for the new columns of an output."""
        try:
            text = raw.decode("utf-8")
            cells = next(csv.reader(io.StringIO(text, newline=""), strict=True))
        except UnicodeDecodeError:
            return "is not valid UTF-8"
        except csv.Error as error:
            return f"is not valid CSV ({error})"
        if len(cells) != len(self._header):
            return f"has another number of columns than the header ({', '.join(self._header)}): {len(cells)}"
        return dict(zip(self._header, cells, strict=True))

    def extend(self, raw: bytes, row: Row, new: dict[str, Any]) -> bytes:
        """See `TextTable`; a record that cannot be read leaves its columns empty and stands behind its error."""
        if isinstance(row, str):
            new = {**new, "error": f"{new['error']}; it reads: {raw.decode('utf-8', 'backslashreplace').rstrip()}"}
            raw = b"," * (len(self._header) - 1)
        cells = [_to_cell(new[name]) for name in NEW_COLUMNS]
        return _append_cells(raw, cells, _line_end(self._raw_header))

    def read_output(self, path: Path, columns: Sequence[str]) -> Iterator[list[dict[str, Any]]]:
        """See `Table`."""
        for batch in super().read_output(path, columns):
            for row in batch:
                for name in NEW_COLUMNS:
                    row[self.prefix + name] = _from_cell(name, row.get(self.prefix + name, ""))
            yield batch


def _scan_records(path: Path, start: Stored | None) -> Iterator[tuple[Stored, list[str] | str]]:
    """Yield the records of a CSV file that are not empty, with their cells, or why there are none."""
    csv.field_size_limit(LONGEST_ROW)
    offset, line = (0, 1) if start is None else start[:2]
    first, taken = line, list[str]()
    with path.open("rb") as file:
        file.seek(offset)
        reader = csv.reader(_log_lines(file, taken), strict=True)
        while True:
            cells: list[str] | str | None
            try:
                cells = next(reader, None)
            except csv.Error as error:
                cells = str(error)
            raw = "".join(taken).encode("utf-8", "surrogateescape")
            taken.clear()
            if cells is None:
                return
            if cells:
                yield Stored(offset, line, raw), cells
            offset, line = offset + len(raw), first + reader.line_num


def _log_lines(file: BinaryIO, taken: list[str]) -> Iterator[str]:
    """Yield the lines of a file, the byte order mark left out, and note what was taken."""
    begins = file.tell() == 0
    for text in io.TextIOWrapper(file, encoding="utf-8", errors="surrogateescape", newline=""):
        taken.append(text)
        yield text.removeprefix("\ufeff") if begins else text
        begins = False


def _line_end(raw: bytes) -> bytes:
    return b"\r\n" if raw.endswith(b"\r\n") else b"\r" if raw.endswith(b"\r") else b"\n"


def _append_cells(raw: bytes, cells: list[str], line_end: bytes | None = None) -> bytes:
    """Return a record with more cells behind it; a record that ends with the file gets the line end given."""
    bare = raw.rstrip(b"\r\n")
    written = io.StringIO()
    csv.writer(written, lineterminator="").writerow(cells)
    end = _line_end(raw) if line_end is None or len(bare) < len(raw) else line_end
    return bare + b"," + written.getvalue().encode("utf-8", "backslashreplace") + end


def _to_cell(value: Any) -> str:
    if value is None:
        return ""
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _from_cell(name: str, text: str) -> Any:
    return None if not text else text if name == "error" else json.loads(text)
