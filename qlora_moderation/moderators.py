"""Verdicts of other moderators, joined to the rows of an evaluation by their texts.

In: `NAME=FILE` with rows of prompt, response and a verdict. Out: a column of verdicts. Part of step 12.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from qlora_moderation.data import Pairs
from qlora_moderation.errors import ConfigError, DataError
from qlora_moderation.rows import read_rows
from qlora_moderation.sources import parse_spec

VERDICT_COLUMNS = ("flagged", "verdict", "score")


def add_moderators(
    pairs: Pairs, specs: Sequence[str], score_threshold: float, reserved: Sequence[str], log: Callable[[str], None]
) -> tuple[Pairs, dict[str, Any]]:
    """Return the pairs with a column of verdicts for each `NAME=FILE`, and what was matched.

    A row may name the answering model; it is then joined to that model's answer alone. Several verdicts on one pair become
    their mean.

    Args:
        pairs: of the evaluation.
        specs: `NAME=FILE` each.
        score_threshold: a score above it flags.
        reserved: names that are taken.
        log: receives a line for each moderator with unmatched rows.

    Raises:
        ConfigError: a spec without a name, or a name that is taken.
        DataError: a row without texts or with a verdict that cannot be read, or no row that fits.
    """
    by_texts: dict[tuple[str, str], list[int]] = {}
    for index, key in enumerate(zip(pairs.prompts, pairs.responses, strict=True)):
        by_texts.setdefault(key, []).append(index)
    verdicts, matched = dict(pairs.verdicts), {}
    for spec in specs:
        name, equals, file = spec.partition("=")
        name = name.strip()
        if not equals or not name or not file:
            raise ConfigError(f"--moderator {spec}: must be NAME=FILE, for example llama_guard=verdicts.jsonl")
        if any("\ud800" <= character <= "\udfff" for character in name):
            raise ConfigError("--moderator: its name is not UTF-8; choose another")
        if name in verdicts or name in reserved:
            raise ConfigError(f"--moderator {spec}: the name {name} is taken; choose another")
        votes: list[list[bool]] = [[] for _ in range(len(pairs))]
        strangers: list[str] = []
        for source in parse_spec(file):
            for place, row in read_rows(source):
                if isinstance(row, str):
                    raise DataError(f"{place}: {row}; mend it")
                members, vote = _read_row(row, place, by_texts, pairs, score_threshold)
                for member in members:
                    votes[member].append(vote)
                if not members:
                    strangers.append(place)
        column = np.array([np.mean(each) if each else np.nan for each in votes])
        missing = np.flatnonzero(np.isnan(column))
        if len(missing) == len(pairs):
            raise DataError(f"--moderator {spec}: no row has the prompt and response of a row that is evaluated")
        matched[name] = {
            "matched": len(pairs) - len(missing),
            "rows_without_a_pair": len(strangers),
            "first_row_without_a_pair": strangers[0] if strangers else None,
            "pairs_without_a_verdict": len(missing),
            "first_pair_without_a_verdict": pairs.places[missing[0]] if len(missing) else None,
        }
        if strangers:
            log(f"moderator {name}: {len(strangers)} of its rows have no pair here, the first is {strangers[0]}")
        if len(missing):
            log(f"moderator {name}: {len(missing)} pairs have no verdict, the first is {pairs.places[missing[0]]}")
        verdicts[name] = column
    return dataclasses.replace(pairs, verdicts=verdicts), matched


def _read_row(
    row: dict[str, Any],
    place: str,
    by_texts: dict[tuple[str, str], list[int]],
    pairs: Pairs,
    score_threshold: float,
) -> tuple[list[int], bool]:
    """Return (pairs that the row judges, its verdict)."""
    prompt, response = row.get("prompt"), row.get("response")
    if not isinstance(prompt, str) or not isinstance(response, str):
        raise DataError(f"{place}: needs the columns prompt and response, both text; found {', '.join(map(str, row))}")
    columns = [column for column in VERDICT_COLUMNS if row.get(column) not in (None, "")]
    if len(columns) != 1:
        raise DataError(f"{place}: needs one verdict in the column {', '.join(VERDICT_COLUMNS)}; found {len(columns)}")
    vote = read_verdict(row[columns[0]], score_threshold)
    if vote is None:
        shown = repr(row[columns[0]])[:80]
        raise DataError(
            f"{place}: {columns[0]} is {shown}; a verdict is true or false, a score from 0 to 1, `safe`, or `unsafe` with "
            "categories in the next line"
        )
    members = by_texts.get((prompt, response), [])
    model = row.get("model")
    if model is not None and pairs.models is not None:
        members = [member for member in members if pairs.models[member] == model]
    return members, vote


def read_verdict(value: Any, score_threshold: float) -> bool | None:
    """Read a verdict: a boolean, a score, or Llama Guard's answer (`safe`, or `unsafe` and a line such as `S1,S10`).

    Returns:
        None where it is none of them.
    """
    if isinstance(value, bool | np.bool_):
        return bool(value)
    if isinstance(value, str) and re.fullmatch(r"\s*\d*\.?\d+([eE][-+]?\d+)?\s*", value):
        value = float(value)  # CSV knows no numbers
    if isinstance(value, int | float):
        return bool(value > score_threshold) if 0 <= value <= 1 else None
    if isinstance(value, str):
        found = re.fullmatch(r"\s*(safe|unsafe(\s*\n\s*\w+(\s*,\s*\w+)*)?)\s*", value, flags=re.IGNORECASE)
        return None if found is None else found[1].lower() != "safe"
    return None
