"""Annotations of question-answer pairs, aggregated into distinct pairs.

In: raw rows. Out: `Pairs`. Steps 2 and 3 of the straight line.

Binary cross-entropy is linear in its target, so the k annotations of one pair cost one forward pass with the mean label
and weight k, and give the gradient of k passes. The share of annotators who ticked anything (`flagged`) is kept beside
the labels because it cannot be recovered from them.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import random
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from qlora_moderation.errors import DataError
from qlora_moderation.rows import parse_spec, read_rows
from qlora_moderation.taxonomy import Taxonomy


@dataclasses.dataclass
class Pairs:
    """N distinct pairs; in the evaluation layout the answering model is part of what makes a pair distinct.

    Attributes:
        prompts, responses: N texts each.
        labels: [N, C] mean votes in [0, 1], or None where rows carry only moderators' verdicts.
        flagged: [N] share of annotators who ticked any category, or None.
        weight: [N] number of annotations.
        models: N names of the answering models, or None.
        verdicts: moderator -> [N] mean verdict in [0, 1]; NaN where the moderator gave none.
        places: N places of the first annotation, file and line.
        annotations, skipped_rows: rows aggregated, broken rows left out.
    """

    prompts: list[str]
    responses: list[str]
    labels: np.ndarray | None
    flagged: np.ndarray | None
    weight: np.ndarray
    places: list[str]
    models: list[str] | None = None
    verdicts: dict[str, np.ndarray] = dataclasses.field(default_factory=dict)
    annotations: int = 0
    skipped_rows: list[str] = dataclasses.field(default_factory=list)

    def __len__(self) -> int:
        return len(self.prompts)

    def take(self, indices: Sequence[int]) -> Pairs:
        """Return the pairs at `indices`, in that order."""
        rows = np.asarray(indices, dtype=np.int64)
        return Pairs(
            prompts=[self.prompts[i] for i in rows],
            responses=[self.responses[i] for i in rows],
            labels=None if self.labels is None else self.labels[rows],
            flagged=None if self.flagged is None else self.flagged[rows],
            weight=self.weight[rows],
            places=[self.places[i] for i in rows],
            models=None if self.models is None else [self.models[i] for i in rows],
            verdicts={name: votes[rows] for name, votes in self.verdicts.items()},
            annotations=int(self.weight[rows].sum()),
        )

    def fingerprint(self) -> str:
        """Return a SHA-256 over texts, labels and weights in their order."""
        digest = hashlib.sha256()
        for prompt, response in zip(self.prompts, self.responses, strict=True):
            for text in (prompt, response):
                raw = text.encode()
                digest.update(len(raw).to_bytes(8, "little") + raw)
        for array in (self.labels, self.flagged, self.weight):
            digest.update(b"" if array is None else np.ascontiguousarray(array, dtype=np.float64).tobytes())
        return digest.hexdigest()


@dataclasses.dataclass(frozen=True)
class _Annotation:
    prompt: str
    response: str
    labels: tuple[bool, ...] | None
    flagged: bool | None
    model: str | None
    verdicts: dict[str, bool]
    place: str


class _BadRow(Exception):
    """Why a row cannot be used; texts that a user wrote are shown short and printable."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason.encode("utf-8", "backslashreplace").decode())


def _show(value: Any) -> str:
    shown = repr(value)
    return shown if len(shown) <= 80 else shown[:77] + "..."


def _has_lone_surrogate(text: str) -> bool:
    return any("\ud800" <= character <= "\udfff" for character in text)


def _read_text(row: dict[str, Any], column: str) -> str:
    if column not in row:
        raise _BadRow(f"column {column} is missing; found {', '.join(map(str, row)) or 'none'}")
    text = row[column]
    if not isinstance(text, str):
        raise _BadRow(f"{column} is {'empty (null)' if text is None else type(text).__name__}, not text")
    if _has_lone_surrogate(text):
        raise _BadRow(f"{column} holds a lone surrogate, which is no character")
    return text


def _read_flag(value: Any, column: str) -> bool:
    if not isinstance(value, bool | np.bool_):
        raise _BadRow(f"{column} is {_show(value)}, not true or false")
    return bool(value)


def _read_labels(row: dict[str, Any], taxonomy: Taxonomy) -> tuple[tuple[bool, ...], bool]:
    if "is_safe" not in row:
        raise _BadRow("column is_safe is missing")
    flagged = not _read_flag(row["is_safe"], "is_safe")
    if taxonomy.labels_from == "is_safe":
        return (flagged,), flagged
    # a CSV may hold one column for each category
    votes = row.get("category", {name: row[name] for name in taxonomy.categories if name in row} or None)
    if votes is None:
        raise _BadRow("column category is missing")
    if not isinstance(votes, dict):
        raise _BadRow(f"category is {_show(votes)}, not a mapping of names to true or false")
    unknown = [str(name) for name in votes if name not in taxonomy.categories]
    missing = [name for name in taxonomy.categories if name not in votes]
    if unknown or missing:
        parts = [f"{what} {', '.join(names)}" for what, names in (("unknown", unknown), ("missing", missing)) if names]
        raise _BadRow(f"category {' and '.join(parts)}; name the row's categories with --taxonomy")
    labels = tuple(_read_flag(votes[name], f"category {name}") for name in taxonomy.categories)
    if any(labels) != flagged:
        ticked = [name for name, label in zip(taxonomy.categories, labels, strict=True) if label]
        raise _BadRow(f"is_safe is {not flagged}, but the categories ticked are: {', '.join(ticked) or 'none'}")
    return labels, flagged


def _read_annotation(row: dict[str, Any], taxonomy: Taxonomy, place: str) -> _Annotation:
    prompt, response = _read_text(row, "prompt"), _read_text(row, "response")
    model = _read_text(row, "model") if row.get("model") is not None else None
    votes = row.get("flagged")
    if votes is not None and not isinstance(votes, dict):
        raise _BadRow(f"flagged is {_show(votes)}, not a mapping of moderators to true or false")
    if any(_has_lone_surrogate(str(name)) for name in votes or {}):
        raise _BadRow("flagged names a moderator with a lone surrogate, which is no character")
    verdicts = {
        str(name): _read_flag(vote, f"flagged by {name}") for name, vote in (votes or {}).items() if vote is not None
    }
    if verdicts and "is_safe" not in row:  # `category` is then the question's topic in words, not labels
        return _Annotation(prompt, response, None, None, model, verdicts, place)
    labels, flagged = _read_labels(row, taxonomy)
    return _Annotation(prompt, response, labels, flagged, model, verdicts, place)


def load_pairs(
    spec: str,
    taxonomy: Taxonomy,
    on_bad_row: str = "stop",
    log: Callable[[str], None] = print,
    need_labels: bool = False,
) -> Pairs:
    """Load a data spec and aggregate repeated annotations of a pair.

    Args:
        spec: see `rows.parse_spec`.
        taxonomy: names and order of the labels.
        on_bad_row: `stop` at the first broken row, or `skip`, count and report.
        log: receives a line on renamed splits and skipped rows.
        need_labels: refuse rows that carry moderators' verdicts only.

    Raises:
        DataError: a source cannot be read, a row is broken, or no row is left.
    """
    groups: dict[tuple[str, str, str | None], list[_Annotation]] = {}
    skipped: list[str] = []
    labelled: bool | None = None
    for source in parse_spec(spec):
        if source.note:
            log(source.note)
        for place, row in read_rows(source):
            try:
                if isinstance(row, str):
                    raise _BadRow(row)
                annotation = _read_annotation(row, taxonomy, place)
                if labelled is None:
                    labelled = annotation.labels is not None
                if labelled != (annotation.labels is not None):
                    raise _BadRow("labelled rows and rows with verdicts only do not mix in one data set")
            except _BadRow as error:
                if on_bad_row == "stop":
                    raise DataError(
                        f"{place}: {error}; mend it, or leave such rows out with --on_bad_row skip"
                    ) from None
                skipped.append(f"{place}: {error}")
                continue
            groups.setdefault((annotation.prompt, annotation.response, annotation.model), []).append(annotation)
    if skipped:
        log(f"{spec}: {len(skipped)} broken rows left out, the first is {skipped[0]}")
    if not groups:
        raise DataError(f"{spec}: holds no usable row" + (f"; the first fault: {skipped[0]}" if skipped else ""))
    if need_labels and not labelled:
        raise DataError(f"{spec}: holds moderators' verdicts only; labelled rows have the columns category and is_safe")
    return _aggregate(groups, bool(labelled), skipped)


def _aggregate(
    groups: dict[tuple[str, str, str | None], list[_Annotation]], labelled: bool, skipped: list[str]
) -> Pairs:
    moderators = sorted({name for group in groups.values() for annotation in group for name in annotation.verdicts})
    verdicts = {name: np.full(len(groups), np.nan) for name in moderators}
    for index, group in enumerate(groups.values()):
        for name in moderators:
            votes = [annotation.verdicts[name] for annotation in group if name in annotation.verdicts]
            if votes:
                verdicts[name][index] = np.mean(votes)
    models = [model or "" for _, _, model in groups] if any(model is not None for _, _, model in groups) else None
    return Pairs(
        prompts=[prompt for prompt, _, _ in groups],
        responses=[response for _, response, _ in groups],
        labels=np.array([np.mean([a.labels or () for a in group], axis=0) for group in groups.values()])
        if labelled
        else None,
        flagged=np.array([np.mean([a.flagged for a in group]) for group in groups.values()]) if labelled else None,
        weight=np.array([len(group) for group in groups.values()], dtype=np.int64),
        places=[group[0].place for group in groups.values()],
        models=models,
        verdicts=verdicts,
        annotations=sum(map(len, groups.values())),
        skipped_rows=skipped,
    )


def split_by_prompt(pairs: Pairs, fraction: float, seed: int) -> tuple[Pairs, Pairs]:
    """Hold whole prompts out, until they carry at least `fraction` of the pairs.

    Returns:
        (kept, held out); no prompt stands in both.

    Raises:
        DataError: fewer than two prompts, or nothing would be left to train on.
    """
    by_prompt: dict[str, list[int]] = {}
    for index, prompt in enumerate(pairs.prompts):
        by_prompt.setdefault(prompt, []).append(index)
    prompts = sorted(by_prompt)
    random.Random(f"validation {seed}").shuffle(prompts)
    held_out: set[int] = set()
    for prompt in prompts:
        if len(held_out) >= fraction * len(pairs):
            break
        held_out.update(by_prompt[prompt])
    if not held_out or len(held_out) == len(pairs):
        raise DataError(
            f"holding out {fraction:.0%} of {len(by_prompt)} prompts leaves no training or no validation pair; give "
            "--eval_data_name_or_path, or more training rows"
        )
    kept = [index for index in range(len(pairs)) if index not in held_out]
    training = pairs.take(kept)
    training.skipped_rows = pairs.skipped_rows
    return training, pairs.take(sorted(held_out))


def write_pairs(path: Path, pairs: Pairs, taxonomy: Taxonomy) -> None:
    """Write labelled pairs as rows that aggregate to the same votes when they are loaded again.

    Who ticked what together is not kept by `Pairs`; the votes are dealt to the annotators in turn.
    """
    assert pairs.labels is not None and pairs.flagged is not None
    with path.open("w", encoding="utf-8") as file:
        for i in range(len(pairs)):
            annotators = int(pairs.weight[i])
            flagging = round(float(pairs.flagged[i]) * annotators)
            ticked: list[set[str]] = [set() for _ in range(annotators)]
            turn = 0
            for name, vote in zip(taxonomy.categories, pairs.labels[i], strict=True):
                for _ in range(round(float(vote) * annotators)):
                    ticked[turn % flagging].add(name)
                    turn += 1
            for names in ticked:
                row: dict[str, Any] = {"prompt": pairs.prompts[i], "response": pairs.responses[i]}
                if pairs.models is not None and pairs.models[i]:
                    row["model"] = pairs.models[i]
                if taxonomy.labels_from == "category":
                    row["category"] = {name: name in names for name in taxonomy.categories}
                file.write(json.dumps({**row, "is_safe": not names}, ensure_ascii=False) + "\n")
