"""What the model says of a block of rows, as columns.

In: judgements of the rows that can be judged, reasons for the others. Out: the values of the new columns, row by row. Files and
torch are unknown here.
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # the command line looks up inputs by way of this module, and shall not wait for numpy
    import numpy as np

NEW_COLUMNS = ("flagged", "risk", "probabilities", "categories", "windows", "truncated", "error")
RAW = "raw"
"""Holds a JSON row that could not be read, as it stands."""


@dataclasses.dataclass(frozen=True)
class Verdicts:
    """Verdicts on N rows; where `errors` has a reason, the other columns hold nothing of meaning.

    Attributes:
        names: of the C categories.
        errors: N reasons why a row was not judged; None where it was.
        flagged: [N] bool.
        risk: [N] what `flagged` is decided by.
        probabilities: [N, C] calibrated.
        categories: [N, C] bool, the decisions.
        windows: [N] windows scored.
        truncated: [N] bool, whether tokens were left unread.
        tokens: read by the model, each distinct pair counted once.
    """

    names: tuple[str, ...]
    errors: list[str | None]
    flagged: np.ndarray
    risk: np.ndarray
    probabilities: np.ndarray
    categories: np.ndarray
    windows: np.ndarray
    truncated: np.ndarray
    tokens: int = 0

    def __len__(self) -> int:
        return len(self.errors)

    def to_rows(self) -> list[dict[str, Any]]:
        """Return the new columns of each row, in the order of `NEW_COLUMNS`; all but `error` are None where it is not."""
        columns = zip(
            self.errors,
            self.flagged.tolist(),
            self.risk.tolist(),
            self.probabilities.tolist(),
            self.categories.tolist(),
            self.windows.tolist(),
            self.truncated.tolist(),
            strict=True,
        )
        found: list[dict[str, Any]] = []
        for error, flagged, risk, probabilities, categories, windows, truncated in columns:
            if error is not None:
                found.append({**dict.fromkeys(NEW_COLUMNS), "error": error})
                continue
            found.append(
                {
                    "flagged": flagged,
                    "risk": risk,
                    "probabilities": dict(zip(self.names, probabilities, strict=True)),
                    "categories": dict(zip(self.names, categories, strict=True)),
                    "windows": windows,
                    "truncated": truncated,
                    "error": None,
                }
            )
        return found
