"""A table that is scored block by block: what every format can do.

In: a file or hub set. Out: blocks of rows, and the same rows with more columns in the same format. A part, the output of one
block, is itself a small file of that format.
"""

from __future__ import annotations

import abc
import dataclasses
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO

from qlora_moderation.errors import DataError
from qlora_moderation.options import nearest
from qlora_moderation.verdicts import NEW_COLUMNS, Verdicts

Row = dict[str, Any] | str
"""A row as a mapping, or the reason why there is none."""


@dataclasses.dataclass(frozen=True)
class Survey:
    """What one pass over a table finds.

    Attributes:
        rows: of the whole table.
        starts: where each block starts, in whatever way the format finds it again.
        columns: names; None where each row has its own.
        first: the first row, where there is one that can be read.
    """

    rows: int
    starts: tuple[Any, ...]
    columns: tuple[str, ...] | None
    first: Mapping[str, Any] | None = None


@dataclasses.dataclass(frozen=True)
class Block:
    """Consecutive rows of a table.

    A scorer needs `rows` alone; where and how they are kept is the table's business.

    Attributes:
        number: of the block in its table, from 0.
        rows: each with at least the columns that were asked for, or the reason why it cannot be read.
        places: file and line of each.
        stored: the rows as the format keeps them.
    """

    number: int
    rows: list[Row]
    places: list[str]
    stored: Any


class Table(abc.ABC):
    """A file or hub set of rows.

    Args:
        source: path of the file, or the hub set's name; messages name it so.
        prefix: of the new columns.
    """

    format: str

    def __init__(self, source: str, prefix: str = "") -> None:
        self.source = source
        self.prefix = prefix

    @abc.abstractmethod
    def survey(self, block_size: int) -> Survey:
        """Read the table once and find where blocks start; a table without rows has one block.

        Raises:
            DataError: it cannot be read as a whole.
        """

    @abc.abstractmethod
    def read(self, survey: Survey, block_size: int, numbers: Sequence[int], columns: Sequence[str]) -> Iterator[Block]:
        """Yield the blocks with these numbers, which rise; rows hold at least `columns`."""

    @abc.abstractmethod
    def write_part(self, file: BinaryIO, block: Block, verdicts: Verdicts) -> None:
        """Write the rows of a block with the new columns."""

    @abc.abstractmethod
    def join(self, parts: Iterable[Path], file: BinaryIO) -> None:
        """Put parts, of which there is at least one, together to one file."""

    @abc.abstractmethod
    def read_output(self, path: Path, columns: Sequence[str]) -> Iterator[list[dict[str, Any]]]:
        """Yield the rows of an output, whole or part, in lists; they hold at least `columns`, mappings as mappings.

        Raises:
            DataError: it is damaged.
        """


def count_blocks(rows: int, block_size: int) -> int:
    """Return how many blocks a table has; one without rows has one, which carries header or schema."""
    return max(1, -(-rows // block_size))


def check_columns(source: str, survey: Survey, needed: Iterable[tuple[str, str]], prefix: str) -> None:
    """Check what can be known of a table's columns before anything is scored.

    Args:
        source: as messages name it.
        survey: of the table.
        needed: (option, column) pairs.
        prefix: of the new columns.

    Raises:
        DataError: a needed column is missing everywhere, or a new column is there already.
    """
    names = survey.columns if survey.columns is not None else tuple(map(str, survey.first or ()))
    refuse_new_columns(source, names, prefix)
    for option, column in needed if survey.columns else ():
        if column not in names and column.partition(".")[0] not in names:
            joined = next((mark for mark in (";", "\t", "|") if len(names) == 1 and mark in names[0]), None)
            hint = f"; its columns must be parted by commas, not by {joined!r}" if joined else ""
            raise DataError(
                f"{source}: has no column {column}{nearest(column, names)}, as --{option} says; it has {', '.join(names)}{hint}"
            )


def refuse_new_columns(place: str, names: Iterable[str], prefix: str) -> None:
    """Refuse rows that have a column of the name of a new one.

    Raises:
        DataError: names it, and the option to use.
    """
    taken = [name for name in NEW_COLUMNS if prefix + name in set(names)]
    if taken:
        raise DataError(
            f"{place}: has a column {prefix}{taken[0]} already, which would be overwritten; name the new columns otherwise, "
            f"as with --prefix {'judged_' if prefix != 'judged_' else 'new_'}"
        )
