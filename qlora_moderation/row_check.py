"""Finds what is wrong with rows before a model is loaded for them.

In: a workload and the blocks that are to be scored. Out: nothing, or one error with the places of the first bad rows.
"""

from __future__ import annotations

from collections.abc import Sequence

from qlora_moderation.annotation import BadRow
from qlora_moderation.blocks import Block, refuse_new_columns
from qlora_moderation.errors import DataError
from qlora_moderation.pair_columns import PairColumns
from qlora_moderation.verdicts import NEW_COLUMNS
from qlora_moderation.workload import BlockId, Workload

_NAMED = 5


def check_blocks(work: Workload, todo: Sequence[BlockId]) -> None:
    """Look through all rows of some blocks.

    Raises:
        DataError: rows are bad, or hold a new column already.
    """
    bad: list[str] = []
    count = 0
    for _, block in work.read(todo):
        check_new_columns(block, work.prefix)
        found = find_bad_rows(block, work.columns)
        count += len(found)
        bad += found[: _NAMED - len(bad)]
    if count:
        more = [f"and {count - len(bad):,} more bad rows"] if count > len(bad) else []
        remedy = (
            "mend such rows, keep them, with the reason in an error column, by --on_bad_row keep, or say with --prompt_column "
            "and --response_column where the texts stand"
        )
        raise DataError("\n".join([*bad, *more, remedy]))


def check_new_columns(block: Block, prefix: str) -> None:
    """Refuse a row that holds a new column already.

    Raises:
        DataError: names it.
    """
    new = {prefix + name for name in NEW_COLUMNS}
    for row, place in zip(block.rows, block.places, strict=True):
        if not isinstance(row, str) and not new.isdisjoint(row):
            refuse_new_columns(place, row, prefix)


def find_bad_rows(block: Block, columns: PairColumns) -> list[str]:
    """Return place and reason of every row without texts."""
    found = []
    for row, place in zip(block.rows, block.places, strict=True):
        try:
            columns.read(row)
        except BadRow as error:
            found.append(f"{place}: {error}")
    return found
