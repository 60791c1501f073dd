"""JSON Lines and JSON arrays of objects.

In: a file. Out: its rows, and their texts with new columns. An array is taken apart by its brackets as it streams in.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

from qlora_moderation.blocks import Row
from qlora_moderation.errors import DataError
from qlora_moderation.rows import parse_json
from qlora_moderation.text_tables import LONGEST_ROW, Stored, TextTable
from qlora_moderation.verdicts import RAW

_BOM = b"\xef\xbb\xbf"
_CHUNK = 2**20  # bytes


class JsonLines(TextTable):
    """One object a line."""

    format = "jsonl"
    opening, line_end = b"", b"\n"

    def begin(self) -> bytes:
        """See `TextTable`."""
        return self.opening

    def find_begin(self, path: Path) -> int:
        """See `TextTable`."""
        return len(self.opening)

    def scan(self, path: Path, start: Stored | None = None) -> Iterator[Stored]:
        """See `TextTable`."""
        offset, line = (0, 1) if start is None else start[:2]
        with path.open("rb") as file:
            file.seek(offset)
            for raw in file:
                text = (raw.removeprefix(_BOM) if not offset else raw).strip()
                if text:
                    yield Stored(offset, line, text)
                offset, line = offset + len(raw), line + 1

    def parse(self, raw: bytes) -> Row:
        """See `TextTable`."""
        try:
            return parse_json(raw.decode("utf-8"))
        except UnicodeDecodeError as error:
            return f"is not valid UTF-8 at byte {error.start} of the row"

    def extend(self, raw: bytes, row: Row, new: dict[str, Any]) -> bytes:
        """See `TextTable`; `error` stands only where there is one, and what cannot be read becomes the text `raw`."""
        named = {self.prefix + name: value for name, value in new.items() if name != "error" or value is not None}
        if isinstance(row, str):
            named[self.prefix + RAW] = raw.decode("utf-8", "backslashreplace")
            return _dump(named) + self.line_end
        comma = b", " if row else b""
        return raw[:-1].rstrip() + comma + _dump(named)[1:] + self.line_end


class JsonArray(JsonLines):
    """An array of objects, which may stand on several lines each."""

    format = "json"
    opening, separator, closing, line_end = b"[\n", b",\n", b"\n]\n", b""

    def scan(self, path: Path, start: Stored | None = None) -> Iterator[Stored]:
        """See `TextTable`."""
        with path.open("rb") as file:
            yield from _ArrayScanner(file, str(path), start).scan()


def _dump(values: Any) -> bytes:
    # a lone surrogate becomes \udXXX, which is what JSON calls it
    return json.dumps(values, ensure_ascii=False).encode("utf-8", "backslashreplace")


_SPACE = re.compile(rb"[\s,]*")
_BRACKETS = re.compile(rb'"(?:[^"\\]|\\.)*+("?)|[{}\[\]]', re.DOTALL)
_SCALAR = re.compile(rb"[^\s,\]\[{}\"]+|.", re.DOTALL)


class _ArrayScanner:
    """Finds the elements of a JSON array in a stream, by their brackets."""

    def __init__(self, file: BinaryIO, name: str, start: Stored | None) -> None:
        self._file, self._name = file, name
        self._base, self._line = (0, 1) if start is None else start[:2]
        file.seek(self._base)
        self._buffer, self._position, self._ended = b"", 0, False
        if start is None:
            self._more()
            self._skip(len(_BOM) if self._buffer.startswith(_BOM) else 0)
            self._find_content()
            self._skip(1)

    def scan(self) -> Iterator[Stored]:
        while self._find_content():
            first = self._buffer[self._position : self._position + 1]
            if first == b"]":
                self._skip(1)
                if self._find_content():
                    raise DataError(
                        f"{self._name}, line {self._line}: more text stands behind the array's end; remove it"
                    )
                return
            end = self._find_end(first)
            yield Stored(self._base + self._position, self._line, self._buffer[self._position : end])
            self._skip(end - self._position)
        raise DataError(f"{self._name}, line {self._line}: is not valid JSON (the array does not end)")

    def _find_content(self) -> bool:
        """Go to the next byte that is neither space nor comma; say whether there is one."""
        while True:
            end = _SPACE.match(self._buffer, self._position).end()  # type: ignore[union-attr]  # `*` always matches
            self._skip(end - self._position)
            if self._position < len(self._buffer):
                return True
            if not self._more():
                return False

    def _find_end(self, first: bytes) -> int:
        while True:
            end = self._match_brackets() if first in (b"{", b"[", b'"') else self._match_scalar()
            if end is not None:
                return end
            longest = len(self._buffer) - self._position > LONGEST_ROW
            if longest or not self._more(len(self._buffer) - self._position):
                raise DataError(
                    f"{self._name}, line {self._line}: is not valid JSON (what begins here does not end"
                    f"{f' within {LONGEST_ROW >> 20} MiB' if longest else ''}); mend the file from there on"
                )

    def _match_brackets(self) -> int | None:
        depth = 0
        for token in _BRACKETS.finditer(self._buffer, self._position):
            character = token[0][:1]
            if character == b'"':
                if not token[1]:
                    return None  # the string goes on behind the buffer
            else:
                depth += 1 if character in b"{[" else -1
            if depth <= 0:
                return token.end()
        return None

    def _match_scalar(self) -> int | None:
        end = _SCALAR.match(self._buffer, self._position).end()  # type: ignore[union-attr]  # there is a byte
        return None if end == len(self._buffer) and not self._ended else end

    def _skip(self, count: int) -> None:
        self._line += self._buffer.count(b"\n", self._position, self._position + count)
        self._position += count

    def _more(self, size: int = 0) -> bool:
        self._buffer, self._base = self._buffer[self._position :], self._base + self._position
        self._position = 0
        read = self._file.read(max(size, _CHUNK))
        self._ended = not read
        self._buffer += read
        return bool(read)
