"""Files whose rows are stretches of text, block by block in constant memory; rows keep their very spelling.

In: a file. Out: blocks, and files in which each row's own text is followed by the new columns. Numbers, escapes, quoting and
unknown columns come out as they went in, because they are never written anew. JSON and CSV have modules of their own.
"""

from __future__ import annotations

import abc
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from qlora_moderation.blocks import Block, Row, Survey, Table
from qlora_moderation.errors import DataError
from qlora_moderation.sources import unreadable
from qlora_moderation.verdicts import Verdicts

LONGEST_ROW = 2**26
"""Bytes of a row beyond which a bracket or quote is taken for unbalanced."""

_BATCH = 4096


class Stored(NamedTuple):
    """A row as it stands in its file: byte offset, line (from 1), text."""

    offset: int
    line: int
    raw: bytes


class TextTable(Table):
    """A file whose rows are stretches of text."""

    separator = closing = b""

    @abc.abstractmethod
    def begin(self) -> bytes:
        """Return what stands before the first row of an output."""

    @abc.abstractmethod
    def find_begin(self, path: Path) -> int:
        """Return the length in bytes of what stands there in a written output."""

    @abc.abstractmethod
    def scan(self, path: Path, start: Stored | None = None) -> Iterator[Stored]:
        """Yield the rows of a file, all or from one on; only where they begin and end is looked at."""

    @abc.abstractmethod
    def parse(self, raw: bytes) -> Row:
        """Return a row, or why there is none."""

    @abc.abstractmethod
    def extend(self, raw: bytes, row: Row, new: dict[str, Any]) -> bytes:
        """Return the text of a row with the new columns."""

    @property
    def columns(self) -> tuple[str, ...] | None:
        """Names of the columns, known once the file was scanned; None where each row has its own."""
        return None

    def survey(self, block_size: int) -> Survey:
        """See `Table`."""
        count, starts, first = 0, list[Stored](), None
        for count, stored in enumerate(self._scan_source(), start=1):
            if count % block_size == 1 or block_size == 1:
                starts.append(stored._replace(raw=b""))
            if count == 1:
                row = self.parse(stored.raw)
                first = None if isinstance(row, str) else row
        return Survey(count, tuple(starts) or (None,), self.columns, first)

    def read(self, survey: Survey, block_size: int, numbers: Sequence[int], columns: Sequence[str]) -> Iterator[Block]:
        """See `Table`."""
        rows: Iterator[Stored] = iter(())
        position = -1
        for number in numbers:
            if number != position:
                rows = self._scan_source(survey.starts[number])
            stored = [
                row for _, row in zip(range(min(block_size, survey.rows - number * block_size)), rows, strict=False)
            ]
            position = number + 1
            places = [f"{self.source}, line {row.line}" for row in stored]
            yield Block(number, [self.parse(row.raw) for row in stored], places, [row.raw for row in stored])

    def _scan_source(self, start: Stored | None = None) -> Iterator[Stored]:
        try:
            yield from self.scan(Path(self.source), start)
        except OSError as error:
            raise unreadable(self.source, error) from None

    def write_part(self, file: BinaryIO, block: Block, verdicts: Verdicts) -> None:
        """See `Table`."""
        file.write(self.begin())
        for i, new in enumerate(verdicts.to_rows()):
            text = self.extend(block.stored[i], block.rows[i], new)
            file.write(self.separator + text if i else text)
        file.write(self.closing)

    def join(self, parts: Iterable[Path], file: BinaryIO) -> None:
        """See `Table`."""
        for number, part in enumerate(parts):
            content, begin = part.read_bytes(), self.find_begin(part)
            if number and len(content) > begin + len(self.closing):
                file.write(self.separator)
            file.write(content[begin if number else 0 : len(content) - len(self.closing)])
        file.write(self.closing)

    def read_output(self, path: Path, columns: Sequence[str]) -> Iterator[list[dict[str, Any]]]:
        """See `Table`."""
        batch: list[dict[str, Any]] = []
        output = type(self)(str(path), self.prefix)
        for stored in output.scan(path):
            row = output.parse(stored.raw)
            if isinstance(row, str):
                raise DataError(f"{path}, line {stored.line}: {row}; the file is damaged")
            batch.append(row)
            if len(batch) == _BATCH:
                yield batch
                batch = []
        yield batch
