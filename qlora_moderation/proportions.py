"""Flagged proportions of a stream of judged rows, with intervals, in constant memory.

In: rows with the new columns, some at a time. Out: shares of flagged rows and of categories, overall and for each value of some
columns.

Answers to one prompt resemble each other, so the intervals draw whole prompts, as those of an evaluation do. A stream is drawn
by Poisson weights instead of a list of prompts (Chamandy et al. 2012, "Estimating uncertainty for massive data streams"):
how often a prompt is drawn is a function of its text and the number of the draw, the same wherever the prompt turns up.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from qlora_moderation.intervals import clopper_pearson, percentile_interval
from qlora_moderation.pair_columns import find_value

LEVEL = 0.95
MOST_GROUPS = 256
"""Values of one column beyond which its table is given up."""

MISSING = "(missing)"
_SKETCH = 4096
_GOLDEN = np.uint64(0x9E3779B97F4A7C15)


class Proportions:
    """Counts rows as they pass.

    Args:
        prompt_column: the rows' questions, by which rows are drawn.
        group_by: columns; each gets a table of its values.
        prefix: of the new columns.
        replicates: B draws for the intervals; 0: none.
    """

    def __init__(self, prompt_column: str, group_by: Sequence[str], prefix: str = "", replicates: int = 1000) -> None:
        self.prompt_column, self.prefix, self.replicates = prompt_column, prefix, replicates
        self.names: tuple[str, ...] = ()
        self.all = _Tally(replicates)
        self.groups: dict[str, dict[str, _Tally] | None] = {column: {} for column in group_by}
        self.rows = self.bad_rows = self.windows = self.rows_in_windows = self.truncated = 0

    @property
    def columns(self) -> list[str]:
        """What is read of a row beside the new columns."""
        return [self.prompt_column, *self.groups]

    def add(self, rows: Sequence[Mapping[str, Any]]) -> None:
        """Count rows."""
        self.rows += len(rows)
        judged = [row for row in rows if row.get(f"{self.prefix}error") is None]
        self.bad_rows += len(rows) - len(judged)
        if not judged:
            return
        if not self.names:
            self.names = tuple(judged[0][f"{self.prefix}categories"])
        windows = [row[f"{self.prefix}windows"] for row in judged]
        self.windows += sum(windows)
        self.rows_in_windows += sum(count > 1 for count in windows)
        self.truncated += sum(row[f"{self.prefix}truncated"] for row in judged)
        facts = np.empty((len(judged), 2 + len(self.names)), dtype=np.float32)
        facts[:, 0] = 1
        facts[:, 1] = [row[f"{self.prefix}flagged"] for row in judged]
        facts[:, 2:] = [list(row[f"{self.prefix}categories"].values()) for row in judged]
        hashes = _hash_texts([find_value(row, self.prompt_column) for row in judged])
        weights = draw_poisson(hashes, self.replicates)
        self.all.add(facts, hashes, weights)
        for column, tallies in self.groups.items():
            if tallies is None:
                continue
            members: dict[str, list[int]] = {}
            for position, row in enumerate(judged):
                members.setdefault(_name_value(find_value(row, column)), []).append(position)
            if len(tallies.keys() | members.keys()) > MOST_GROUPS:
                self.groups[column] = None
                continue
            for value, positions in members.items():
                tally = tallies.setdefault(value, _Tally(self.replicates))
                tally.add(facts[positions], hashes[positions], weights[positions])

    def to_dict(self) -> dict[str, Any]:
        """Return the content of `summary.json` that tells of rows; groups are sorted by their shares, the highest first."""
        return {
            "rows": self.rows,
            "bad_rows": self.bad_rows,
            "windows": self.windows,
            "rows_in_several_windows": self.rows_in_windows,
            "truncated_rows": self.truncated,
            **self.all.describe(self.names),
            "groups": {
                column: None
                if tallies is None
                else {
                    value: tally.describe(self.names)
                    for value, tally in sorted(tallies.items(), key=lambda item: (-item[1].share, item[0]))
                }
                for column, tallies in self.groups.items()
            },
        }


class _Tally:
    """Sums over some rows, as they are and in every draw."""

    def __init__(self, replicates: int) -> None:
        self._sums = np.zeros(0)
        self._drawn = np.zeros((replicates, 0))
        self._smallest = np.zeros(0, dtype=np.uint64)  # hashes of distinct prompts

    def add(self, facts: np.ndarray, hashes: np.ndarray, weights: np.ndarray) -> None:
        """Add rows: facts [N, K] whose first is 1 and second `flagged`, hashes [N] of prompts, weights [N, B]."""
        if not len(self._sums):
            self._sums = np.zeros(facts.shape[1])
            self._drawn = np.zeros((weights.shape[1], facts.shape[1]))
        self._sums += facts.sum(axis=0, dtype=np.float64)
        # whole numbers far below 2^24: exact in fp32, in whatever order
        self._drawn += weights.astype(np.float32).T @ facts
        self._smallest = np.unique(np.concatenate([self._smallest, hashes]))[:_SKETCH]

    @property
    def share(self) -> float:
        """Of flagged rows."""
        return float(self._sums[1] / self._sums[0]) if len(self._sums) else math.nan

    @property
    def prompts(self) -> int:
        """Number of distinct prompts; beyond 4,096 an estimate, by the smallest hashes, that is within a few percent."""
        if len(self._smallest) < _SKETCH:
            return len(self._smallest)
        return round((_SKETCH - 1) / (float(self._smallest[-1]) / 2**64))

    def describe(self, names: Sequence[str]) -> dict[str, Any]:
        """Return numbers, shares and intervals."""
        if not len(self._sums):
            return {"judged": 0, "prompts": 0, "flagged": None, "categories": {}}
        return {
            "judged": int(self._sums[0]),
            "prompts": self.prompts,
            "flagged": self._describe(1),
            "categories": {name: self._describe(2 + c) for c, name in enumerate(names)},
        }

    def _describe(self, column: int) -> dict[str, Any]:
        share = float(self._sums[column] / self._sums[0])
        return {"rows": int(self._sums[column]), "share": share, "interval": self._find_interval(share, column)}

    def _find_interval(self, share: float, column: int) -> list[float] | None:
        if not len(self._drawn):
            return None
        with np.errstate(invalid="ignore"):
            draws = self._drawn[:, column] / self._drawn[:, 0]
        edges = percentile_interval(draws, LEVEL)
        if edges is not None and edges[0] < edges[1]:
            return edges
        # no draw differs, as where nothing is flagged: as many independent trials as there are prompts
        return clopper_pearson(round(share * self.prompts), self.prompts, LEVEL)


def _name_value(value: Any) -> str:
    if value is None or value == "":
        return MISSING
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)


def _hash_texts(texts: Sequence[Any]) -> np.ndarray:
    digests = [hashlib.blake2b(str(text).encode("utf-8", "surrogatepass"), digest_size=8).digest() for text in texts]
    return np.frombuffer(b"".join(digests), dtype="<u8").astype(np.uint64)


def _tabulate_poisson() -> np.ndarray:
    """Return the draw from Poisson(1) for each of 65,536 equally likely numbers."""
    shares = np.cumsum([math.exp(-1) / math.factorial(k) for k in range(12)])
    return np.searchsorted(shares, (np.arange(65536) + 0.5) / 65536).astype(np.uint8)


_POISSON = _tabulate_poisson()


def draw_poisson(hashes: np.ndarray, replicates: int) -> np.ndarray:
    """Return [N, B] numbers that look drawn from Poisson(1) and are a function of hash [N] and draw (splitmix64)."""
    steps = np.arange(1, -(-replicates // 4) + 1, dtype=np.uint64) * _GOLDEN
    mixed = hashes[:, None] + steps
    mixed ^= mixed >> np.uint64(30)
    mixed *= np.uint64(0xBF58476D1CE4E5B9)
    mixed ^= mixed >> np.uint64(27)
    mixed *= np.uint64(0x94D049BB133111EB)
    mixed ^= mixed >> np.uint64(31)
    return _POISSON[mixed.view("<u2").reshape(len(hashes), 4 * len(steps))[:, :replicates]]
