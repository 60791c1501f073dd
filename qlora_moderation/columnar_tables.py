"""Parquet files and hub sets, block by block in constant memory; columns keep their types.

In: a file or a split of a hub set. Out: blocks, and Parquet with the new columns, whose mappings are structs.
"""

from __future__ import annotations

import abc
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import pyarrow as pa
import pyarrow.parquet as pq

from qlora_moderation.blocks import Block, Survey, Table, count_blocks
from qlora_moderation.errors import DataError
from qlora_moderation.rows import batch_rows
from qlora_moderation.sources import Source
from qlora_moderation.verdicts import NEW_COLUMNS, Verdicts

_BATCH = 4096
_GROUP_ROWS = 65536  # of the row groups that are written
_FEATURES = b"huggingface"  # `datasets` keeps a list of the columns here, which would no longer be true


class ColumnarTable(Table):
    """A table that Arrow reads."""

    format = "parquet"

    def read(self, survey: Survey, block_size: int, numbers: Sequence[int], columns: Sequence[str]) -> Iterator[Block]:
        """See `Table`."""
        borders = [(n * block_size, min(survey.rows, (n + 1) * block_size)) for n in numbers]
        for number, (low, _), table in zip(numbers, borders, self._slices(borders), strict=True):
            places = [f"{self.source}, row {row}" for row in range(low + 1, low + table.num_rows + 1)]
            rows: Any = batch_rows(table.select(_roots(table.schema.names, columns)))
            yield Block(number, rows, places, table)

    @abc.abstractmethod
    def _slices(self, borders: Sequence[tuple[int, int]]) -> Iterator[pa.Table]:
        """Yield the rows between the borders, which rise."""

    def write_part(self, file: BinaryIO, block: Block, verdicts: Verdicts) -> None:
        """See `Table`."""
        table: pa.Table = block.stored
        for name, values in _to_arrays(verdicts).items():
            table = table.append_column(self.prefix + name, values)
        metadata = {key: value for key, value in (table.schema.metadata or {}).items() if key != _FEATURES}
        pq.write_table(table.replace_schema_metadata(metadata or None), file)

    def join(self, parts: Iterable[Path], file: BinaryIO) -> None:
        """See `Table`."""
        writer: pq.ParquetWriter | None = None
        gathered: list[pa.Table] = []
        for part in parts:
            gathered.append(pq.read_table(part, partitioning=None, memory_map=False))
            if writer is None:
                writer = pq.ParquetWriter(file, gathered[0].schema)
            if sum(table.num_rows for table in gathered) >= _GROUP_ROWS:
                writer.write_table(pa.concat_tables(gathered))
                gathered = []
        assert writer is not None
        if gathered:
            writer.write_table(pa.concat_tables(gathered))
        writer.close()

    def read_output(self, path: Path, columns: Sequence[str]) -> Iterator[list[dict[str, Any]]]:
        """See `Table`."""
        try:
            with pq.ParquetFile(path) as file:
                names = file.schema_arrow.names
                wanted = _roots(names, [*columns, *(self.prefix + name for name in NEW_COLUMNS)])
                for batch in file.iter_batches(batch_size=_BATCH, columns=wanted):
                    rows = batch_rows(batch)
                    yield [{f"{self.prefix}error": row} if isinstance(row, str) else row for row in rows]
        except (pa.ArrowException, OSError) as error:
            raise DataError(f"{path}: is damaged ({str(error).splitlines()[0]})") from None


class ParquetTable(ColumnarTable):
    """A Parquet file."""

    def survey(self, block_size: int) -> Survey:
        """See `Table`."""
        with self._open() as file:
            rows, names = file.metadata.num_rows, tuple(file.schema_arrow.names)
        _refuse_repeated(self.source, names)
        return Survey(rows, (None,) * count_blocks(rows, block_size), names)

    def _open(self) -> pq.ParquetFile:
        try:
            return pq.ParquetFile(self.source)
        except (pa.ArrowException, OSError) as error:
            raise DataError(f"{self.source}: is not readable as Parquet ({str(error).splitlines()[0]})") from None

    def _slices(self, borders: Sequence[tuple[int, int]]) -> Iterator[pa.Table]:
        with self._open() as file:
            ends = [0]
            for group in range(file.metadata.num_row_groups):
                ends.append(ends[-1] + file.metadata.row_group(group).num_rows)
            rest, position = file.schema_arrow.empty_table(), 0
            batches: Iterator[Any] = iter(())
            for index, (low, high) in enumerate(borders):
                group = max((g for g, begin in enumerate(ends[:-1]) if begin <= low), default=0)
                if index == 0 or ends[group] > position + rest.num_rows:  # row groups in between need not be read
                    rest, position = rest.slice(0, 0), ends[group]
                    batches = file.iter_batches(batch_size=_BATCH, row_groups=range(group, len(ends) - 1))
                while position + rest.num_rows < high:
                    try:
                        rest = pa.concat_tables([rest, pa.Table.from_batches([next(batches)])])
                    except pa.ArrowException as error:
                        reason = str(error).splitlines()[0]
                        raise DataError(f"{self.source}: is not readable as Parquet ({reason})") from None
                    if position + rest.num_rows <= low:
                        position, rest = position + rest.num_rows, rest.slice(0, 0)
                yield rest.slice(low - position, high - low)
                rest, position = rest.slice(high - position), high


class HubTable(ColumnarTable):
    """A split of a hub set, which `datasets` maps into memory."""

    def __init__(self, source: Source, prefix: str = "") -> None:
        super().__init__(str(source), prefix)
        self._hub = source

    def survey(self, block_size: int) -> Survey:
        """See `Table`."""
        rows, names = len(self._hub.hub_set), tuple(self._hub.hub_set.column_names)
        return Survey(rows, (None,) * count_blocks(rows, block_size), names)

    def _slices(self, borders: Sequence[tuple[int, int]]) -> Iterator[pa.Table]:
        arrow = self._hub.hub_set.with_format("arrow")
        for low, high in borders:
            yield arrow[low:high]


def _roots(names: Sequence[str], columns: Sequence[str]) -> list[str]:
    """Return the columns of a table that hold the ones asked for, nested or not."""
    found = [column if column in names else column.partition(".")[0] for column in columns]
    return [name for name in dict.fromkeys(found) if name in names]


def _refuse_repeated(source: str, names: Sequence[str]) -> None:
    repeated = sorted({name for name in names if list(names).count(name) > 1})
    if repeated:
        raise DataError(f"{source}: has several columns {repeated[0]}; rename all but one")


def _to_arrays(verdicts: Verdicts) -> dict[str, pa.Array]:
    rows = verdicts.to_rows()
    types = {
        "flagged": pa.bool_(),
        "risk": pa.float64(),
        "probabilities": pa.struct([(name, pa.float64()) for name in verdicts.names]),
        "categories": pa.struct([(name, pa.bool_()) for name in verdicts.names]),
        "windows": pa.int32(),
        "truncated": pa.bool_(),
        "error": pa.string(),
    }
    return {name: pa.array([row[name] for row in rows], type=types[name]) for name in NEW_COLUMNS}
