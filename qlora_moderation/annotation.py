"""One row as one annotation, or why it is none.

In: a row as a mapping, and its place. Out: an `Annotation`. Middle of step 2.
"""

from __future__ import annotations

import re
from typing import Any, NamedTuple

import numpy as np

from qlora_moderation.errors import printable, show
from qlora_moderation.taxonomy import Taxonomy

_LONE_SURROGATE = re.compile("[\ud800-\udfff]")


class Annotation(NamedTuple):
    """What one annotator, or what moderators, said of one pair.

    Attributes:
        labels: one for each category, or None where the row carries moderators' verdicts only.
        flagged: whether any category is ticked; None where there are no labels.
        model: the answering model, where the row names one.
        verdicts: moderator -> verdict.
        place: file and line.
    """

    prompt: str
    response: str
    labels: tuple[bool, ...] | None
    flagged: bool | None
    model: str | None
    verdicts: dict[str, bool]
    place: str


class BadRow(Exception):
    """Why a row cannot be used; texts that a user wrote are shown short and printable."""

    def __init__(self, reason: str) -> None:
        super().__init__(printable(reason))


def read_annotation(row: dict[str, Any], taxonomy: Taxonomy, place: str) -> Annotation:
    """Check a row and return what it says.

    Raises:
        BadRow: a column is missing or holds something else than it should.
    """
    prompt, response = _read_text(row, "prompt"), _read_text(row, "response")
    model = _read_text(row, "model") if row.get("model") is not None else None
    votes = row.get("flagged")
    if votes is not None and not isinstance(votes, dict):
        raise BadRow(f"flagged is {show(votes)}, not a mapping of moderators to true or false")
    if any(_LONE_SURROGATE.search(str(name)) for name in votes or ()):
        raise BadRow("flagged names a moderator with a lone surrogate, which is no character")
    verdicts = {
        str(name): _read_flag(vote, f"flagged by {name}") for name, vote in (votes or {}).items() if vote is not None
    }
    if verdicts and "is_safe" not in row:  # `category` is then the question's topic in words, not labels
        return Annotation(prompt, response, None, None, model, verdicts, place)
    labels, flagged = _read_labels(row, taxonomy)
    return Annotation(prompt, response, labels, flagged, model, verdicts, place)


def _read_text(row: dict[str, Any], column: str) -> str:
    if column not in row:
        raise BadRow(f"column {column} is missing; found {', '.join(map(str, row)) or 'none'}")
    return check_text(row[column], column)


def check_text(text: Any, column: str) -> str:
    """Return the value of a column that must hold text.

    Raises:
        BadRow: it is something else, or holds what is no character.
    """
    if not isinstance(text, str):
        raise BadRow(f"{column} is {'empty (null)' if text is None else type(text).__name__}, not text")
    if not text.isascii() and _LONE_SURROGATE.search(text):
        raise BadRow(f"{column} holds a lone surrogate, which is no character")
    return text


def _read_flag(value: Any, column: str) -> bool:
    if not isinstance(value, bool | np.bool_):
        raise BadRow(f"{column} is {show(value)}, not true or false")
    return bool(value)


def _read_labels(row: dict[str, Any], taxonomy: Taxonomy) -> tuple[tuple[bool, ...], bool]:
    if "is_safe" not in row:
        raise BadRow("column is_safe is missing; it says whether no category applies")
    flagged = not _read_flag(row["is_safe"], "is_safe")
    if taxonomy.labels_from == "is_safe":
        return (flagged,), flagged
    # a CSV may hold one column for each category
    votes = row.get("category", {name: row[name] for name in taxonomy.categories if name in row} or None)
    if votes is None:
        raise BadRow(
            "column category is missing, which maps each category to true or false; rows with is_safe alone need a --taxonomy "
            "of one category with labels_from: is_safe"
        )
    if not isinstance(votes, dict):
        raise BadRow(f"category is {show(votes)}, not a mapping of names to true or false")
    if tuple(votes) != taxonomy.categories:  # the usual order needs no search
        _check_names(votes, taxonomy)
    labels = tuple(votes[name] for name in taxonomy.categories)
    if not all(label is True or label is False for label in labels):
        labels = tuple(_read_flag(votes[name], f"category {name}") for name in taxonomy.categories)
    if any(labels) != flagged:
        ticked = [name for name, label in zip(taxonomy.categories, labels, strict=True) if label]
        raise BadRow(f"is_safe is {not flagged}, but the categories ticked are: {', '.join(ticked) or 'none'}")
    return labels, flagged


def _check_names(votes: dict[Any, Any], taxonomy: Taxonomy) -> None:
    unknown = [str(name) for name in votes if name not in taxonomy.categories]
    missing = [name for name in taxonomy.categories if name not in votes]
    if unknown or missing:
        parts = [f"{what} {'; '.join(names)}" for what, names in (("unknown", unknown), ("missing", missing)) if names]
        raise BadRow(
            f"category: {', '.join(parts)}; give each of the {len(taxonomy.categories)} true or false, or name other "
            "categories with --taxonomy"
        )
