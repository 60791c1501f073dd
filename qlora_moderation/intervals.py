"""Intervals and paired tests: how far a figure would move with other prompts.

In: rows grouped by prompt, and metrics as functions of weightings. Out: intervals, p-values, exact binomial bounds.

Answers to one prompt resemble each other, so whole prompts are drawn, not rows (the cluster bootstrap; Davison and Hinkley
1997, section 3.8). A share of which every draw gives the same value gets the exact binomial interval of its prompts instead.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence

import numpy as np
from scipy.stats import beta

Measure = Callable[[np.ndarray], Mapping[str, np.ndarray]]
"""Gives metric -> [B] for weightings [B, rows]."""

_CHUNK_NUMBERS = 4_000_000
_MOST_UNDEFINED = 0.1


@dataclasses.dataclass(frozen=True)
class Bootstrap:
    """Draws of prompts with replacement, the same ones for every metric and every model.

    Attributes:
        prompts: [N] index of each row's prompt, from 0.
        replicates: B.
        seed: of the draws.
        level: of the intervals.
    """

    prompts: np.ndarray
    replicates: int = 1000
    seed: int = 0
    level: float = 0.95

    @classmethod
    def of(cls, prompts: Sequence[str], replicates: int = 1000, seed: int = 0, level: float = 0.95) -> Bootstrap:
        """Group rows by their prompts' texts, in order of appearance."""
        index = {text: i for i, text in enumerate(dict.fromkeys(prompts))}
        return cls(np.array([index[text] for text in prompts], dtype=np.int64), replicates, seed, level)

    def take(self, rows: np.ndarray) -> Bootstrap:
        """Return the draws for some of the rows alone."""
        _, index = np.unique(self.prompts[rows], return_inverse=True)
        return dataclasses.replace(self, prompts=index)

    def weightings(self) -> Iterator[np.ndarray]:
        """Yield [b, N]: how often each row was drawn, until all replicates are told."""
        rng = np.random.default_rng(self.seed)
        count = int(self.prompts.max()) + 1
        left, step = self.replicates, max(1, _CHUNK_NUMBERS // max(1, len(self.prompts)))
        while left:
            drawn = min(step, left)
            draws = np.stack([np.bincount(rng.integers(0, count, count), minlength=count) for _ in range(drawn)])
            yield draws[:, self.prompts].astype(float)
            left -= drawn

    def draw(self, measure: Measure) -> dict[str, np.ndarray]:
        """Return metric -> [B] over all draws."""
        parts = [measure(weights) for weights in self.weightings()]
        return {key: np.concatenate([part[key] for part in parts]) for key in parts[0]} if parts else {}

    def interval(self, draws: np.ndarray) -> list[float] | None:
        """Return [low, high], the percentiles; None where more than a tenth of the draws are undefined."""
        return percentile_interval(draws, self.level)

    def intervals(
        self, measure: Measure, shares: Mapping[str, np.ndarray] | None = None
    ) -> dict[str, list[float] | None]:
        """Return metric -> [low, high].

        Args:
            measure: of weightings.
            shares: metric -> [N] bool, the rows over which that metric is a share. Where all draws agree, as with no case among
                few prompts, or too many are undefined, it gets the exact interval of as many independent trials as there are
                such prompts; any other metric on which all draws agree gets none. Without `shares` nothing of this is done.
        """
        if not self.replicates:
            return {}
        whole = {key: float(value[0]) for key, value in measure(np.ones((1, len(self.prompts)))).items()}
        found: dict[str, list[float] | None] = {}
        for key, draws in self.draw(measure).items():
            found[key] = edges = self.interval(draws)
            if shares is None or (edges is not None and edges[0] < edges[1]):
                continue
            found[key] = None
            trials = len(np.unique(self.prompts[shares[key]])) if key in shares else 0
            if trials and not np.isnan(whole[key]):
                found[key] = clopper_pearson(round(whole[key] * trials), trials, self.level)
        return found


def percentile_interval(draws: np.ndarray, level: float = 0.95) -> list[float] | None:
    """Return [low, high] of the draws [B]; None where more than a tenth of them are undefined."""
    defined = draws[~np.isnan(draws)]
    if not len(defined) or len(defined) < (1 - _MOST_UNDEFINED) * len(draws):
        return None
    tail = 100 * (1 - level) / 2
    return [float(edge) for edge in np.percentile(defined, [tail, 100 - tail])]


def clopper_pearson(successes: int, trials: int, level: float = 0.95) -> list[float]:
    """Return the exact two-sided binomial interval (Clopper and Pearson 1934)."""
    tail = (1 - level) / 2
    low = 0.0 if successes == 0 else float(beta.ppf(tail, successes, trials - successes + 1))
    high = 1.0 if successes == trials else float(beta.ppf(1 - tail, successes + 1, trials - successes))
    return [low, high]


def upper_bound(successes: int, trials: int, confidence: float) -> float:
    """Return the exact one-sided upper binomial bound."""
    return 1.0 if successes >= trials else float(beta.ppf(confidence, successes + 1, trials - successes))


def draw_harmful_rows(harmful: np.ndarray, prompts: Sequence[str] | np.ndarray, seed: int) -> np.ndarray:
    """Return one row for each prompt that has harmful ones: independent trials.

    Args:
        harmful: [N] bool.
        prompts: [N] texts.
        seed: of the draw.
    """
    rng = np.random.default_rng(seed)
    rows: dict[str, list[int]] = {}
    for row in np.flatnonzero(harmful):
        rows.setdefault(str(prompts[int(row)]), []).append(int(row))
    return np.array([members[rng.integers(len(members))] for _, members in sorted(rows.items())], dtype=np.int64)


def compare_by_exchange(
    prompts: np.ndarray,
    first: Callable[[np.ndarray], np.ndarray],
    second: Callable[[np.ndarray], np.ndarray],
    difference: Callable[[np.ndarray, np.ndarray], np.ndarray],
    draws: int = 1000,
    seed: int = 0,
) -> float:
    """Return a two-sided p-value for two judges of the same rows, by exchanging them prompt by prompt.

    If they are equally good, who said what is a coin's throw for each prompt (approximate randomisation; Noreen 1989).

    NaN where the difference itself is undefined.

    Args:
        prompts: [N] index of each row's prompt.
        first, second: give sums [b, K] over rows for weightings [b, N]; the metric is a function of such sums.
        difference: of two such sums [b, K], [b].
        draws: number of exchanges.
        seed: of the exchanges.
    """
    rng = np.random.default_rng(seed)
    count = int(prompts.max()) + 1
    whole = np.ones((1, len(prompts)))
    seen = abs(float(difference(first(whole), second(whole))[0]))
    if np.isnan(seen):
        return float("nan")
    reached, left, step = 0, draws, max(1, _CHUNK_NUMBERS // max(1, len(prompts)))
    while left:
        drawn = min(step, left)
        kept = rng.integers(0, 2, (drawn, count))[:, prompts].astype(float)
        one = first(kept) + second(1 - kept)
        other = second(kept) + first(1 - kept)
        with np.errstate(invalid="ignore"):
            reached += int((np.abs(np.nan_to_num(difference(one, other))) >= seen - 1e-12).sum())
        left -= drawn
    return (reached + 1) / (draws + 1)
