"""Token ids of N texts in one array, so that a large set costs four bytes a token and no Python object a text.

In: an array of all ids and where each text lies in it. Out: views, text by text. Step 4.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from typing import overload

import numpy as np


@dataclasses.dataclass(frozen=True, eq=False)
class TokenIds(Sequence[np.ndarray]):
    """The ids of N texts, each a view into one array.

    Attributes:
        values: [T] int32 ids of all texts, and perhaps of others.
        starts: [N] int64 position of each text's first id.
        lengths: [N] int64 tokens of each text.
    """

    values: np.ndarray
    starts: np.ndarray
    lengths: np.ndarray

    @classmethod
    def of(cls, values: np.ndarray, lengths: np.ndarray) -> TokenIds:
        """Return texts that lie in `values` one behind the other."""
        return cls(values, np.cumsum(lengths) - lengths, lengths)

    def __len__(self) -> int:
        return len(self.starts)

    @overload
    def __getitem__(self, index: int) -> np.ndarray: ...

    @overload
    def __getitem__(self, index: slice) -> TokenIds: ...

    def __getitem__(self, index: int | slice) -> np.ndarray | TokenIds:
        if isinstance(index, slice):
            return TokenIds(self.values, self.starts[index], self.lengths[index])
        start = self.starts[index]
        return self.values[start : start + self.lengths[index]]

    def __iter__(self) -> Iterator[np.ndarray]:
        for start, length in zip(self.starts.tolist(), self.lengths.tolist(), strict=True):
            yield self.values[start : start + length]

    def take(self, indices: Sequence[int]) -> TokenIds:
        """Return the texts at `indices`, in that order, without copying an id."""
        rows = np.asarray(indices, dtype=np.int64)
        return TokenIds(self.values, self.starts[rows], self.lengths[rows])
