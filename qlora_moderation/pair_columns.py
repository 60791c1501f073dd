"""Where the two texts of a row stand.

In: a row as a mapping, of any shape. Out: question and answer, or why there are none.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from qlora_moderation.annotation import BadRow, check_text

_MISSING = object()


@dataclasses.dataclass(frozen=True)
class PairColumns:
    """Names of the columns; `doc.prompt` stands for `prompt` inside `doc`, unless there is a column of that very name."""

    prompt: str = "prompt"
    response: str = "response"

    def read(self, row: Mapping[str, Any] | str) -> tuple[str, str]:
        """Return question and answer.

        Args:
            row: a mapping, or the reason why there is none.

        Raises:
            BadRow: a column is missing or holds no text.
        """
        if isinstance(row, str):
            raise BadRow(row)
        return _read_text(row, self.prompt), _read_text(row, self.response)


def _read_text(row: Mapping[str, Any], column: str) -> str:
    value = find_value(row, column, _MISSING)
    if value is _MISSING:
        raise BadRow(f"column {column} is missing; found {', '.join(map(str, row)) or 'none'}")
    return check_text(value, column)


def find_value(row: Mapping[str, Any], column: str, default: Any = None) -> Any:
    """Return the value of a column, or what stands inside one."""
    if column in row:
        return row[column]
    value: Any = row
    for key in column.split("."):
        value = value.get(key, _MISSING) if isinstance(value, Mapping) else _MISSING
        if value is _MISSING:
            return default
    return value
