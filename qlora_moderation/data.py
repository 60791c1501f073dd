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
from array import array
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from qlora_moderation.annotation import Annotation, BadRow, read_annotation
from qlora_moderation.errors import DataError
from qlora_moderation.metadata import written_whole
from qlora_moderation.rows import read_rows
from qlora_moderation.sources import Source, parse_spec
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
        for votes in (self.labels, self.flagged, self.weight):
            digest.update(b"" if votes is None else np.ascontiguousarray(votes, dtype=np.float64).tobytes())
        return digest.hexdigest()


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
    sources = parse_spec(spec)
    tell_renamed(sources, log)
    pairs = aggregate_rows(sources, taxonomy, on_bad_row)
    check_usable(spec, pairs, log, need_labels)
    return pairs


def tell_renamed(sources: Iterable[Source], log: Callable[[str], None]) -> None:
    """Log which splits stand for others."""
    for source in sources:
        if source.note:
            log(source.note)


def check_usable(spec: str, pairs: Pairs, log: Callable[[str], None], need_labels: bool) -> None:
    """Log how many rows were left out, and refuse pairs that cannot serve.

    Raises:
        DataError: no row is left, or labels are needed and there are none.
    """
    skipped = pairs.skipped_rows
    if skipped:
        log(f"{spec}: {len(skipped)} broken rows left out, the first is {skipped[0]}")
    if not len(pairs):
        raise DataError(f"{spec}: holds no usable row" + (f"; the first fault: {skipped[0]}" if skipped else ""))
    if need_labels and pairs.labels is None:
        raise DataError(f"{spec}: holds moderators' verdicts only; labelled rows have the columns category and is_safe")


def aggregate_rows(sources: Iterable[Source], taxonomy: Taxonomy, on_bad_row: str = "stop") -> Pairs:
    """Read all rows once and count the votes of each distinct pair; memory grows with pairs, not with annotations.

    Args:
        sources: of the rows, in their order.
        taxonomy: names and order of the labels.
        on_bad_row: `stop` at the first broken row, or `skip` and keep its place and reason.

    Raises:
        DataError: a source cannot be read, or a row is broken and stops.
    """
    votes, skipped = _Votes(len(taxonomy.categories)), list[str]()
    for source in sources:
        for place, row in read_rows(source):
            try:
                if isinstance(row, str):
                    raise BadRow(row)
                votes.add(read_annotation(row, taxonomy, place))
            except BadRow as error:
                if on_bad_row == "stop":
                    raise DataError(
                        f"{place}: {error}; mend it, or leave such rows out with --on_bad_row skip"
                    ) from None
                skipped.append(f"{place}: {error}")
    return votes.to_pairs(skipped)


class _Votes:
    """Votes counted pair by pair."""

    def __init__(self, categories: int) -> None:
        self._index: dict[tuple[str, str, str | None], int] = {}
        self._none = array("i", bytes(4 * categories))
        self._ticks = array("i")  # N x C, row after row
        self._flags, self._weight = array("i"), array("q")
        self._places: list[str] = []
        self._verdicts: dict[str, dict[int, tuple[int, int]]] = {}  # moderator -> pair -> (yes, all)
        self._labelled: bool | None = None

    def add(self, annotation: Annotation) -> None:
        """Count one annotation.

        Raises:
            BadRow: the others have labels and this one has none, or the other way round.
        """
        labels = annotation.labels
        if self._labelled is None:
            self._labelled = labels is not None
        if self._labelled != (labels is not None):
            raise BadRow("labelled rows and rows with verdicts only do not mix in one data set")
        pair = self._index.setdefault((annotation.prompt, annotation.response, annotation.model), len(self._places))
        if pair == len(self._places):
            self._places.append(annotation.place)
            self._ticks.extend(self._none)
            self._flags.append(0)
            self._weight.append(0)
        self._weight[pair] += 1
        if annotation.flagged:
            self._flags[pair] += 1
            for index, ticked in enumerate(labels or (), start=pair * len(self._none)):
                self._ticks[index] += ticked
        for name, verdict in annotation.verdicts.items():
            given = self._verdicts.setdefault(name, {})
            yes, every = given.get(pair, (0, 0))
            given[pair] = yes + verdict, every + 1

    def to_pairs(self, skipped: list[str]) -> Pairs:
        """Return the pairs in the order of their first annotations."""
        pairs, labelled = len(self._places), bool(self._labelled)
        weight = np.array(self._weight, dtype=np.int64)
        ticks = np.array(self._ticks, dtype=np.int32).reshape(pairs, len(self._none))
        verdicts = {name: np.full(pairs, np.nan) for name in sorted(self._verdicts)}
        for name, mean in verdicts.items():
            for pair, (yes, every) in self._verdicts[name].items():
                mean[pair] = yes / every
        named = any(model is not None for _, _, model in self._index)
        return Pairs(
            prompts=[prompt for prompt, _, _ in self._index],
            responses=[response for _, response, _ in self._index],
            labels=ticks / weight[:, None] if labelled else None,
            flagged=np.array(self._flags, dtype=np.int32) / weight if labelled else None,
            weight=weight,
            places=self._places,
            models=[model or "" for _, _, model in self._index] if named else None,
            verdicts=verdicts,
            annotations=int(weight.sum()),
            skipped_rows=skipped,
        )


def split_by_prompt(pairs: Pairs, fraction: float, seed: int) -> tuple[Pairs, Pairs]:
    """Hold whole prompts out, until they carry at least `fraction` of the pairs.

    Returns:
        (kept, held out); no prompt stands in both.

    Raises:
        DataError: fewer than two prompts, or nothing would be left to train on.
    """
    kept, held_out = choose_held_out(pairs, fraction, seed)
    training = pairs.take(kept)
    training.skipped_rows = pairs.skipped_rows
    return training, pairs.take(held_out)


def choose_held_out(pairs: Pairs, fraction: float, seed: int) -> tuple[list[int], list[int]]:
    """Return the indices of `split_by_prompt`: (kept, held out), both ascending.

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
    return [index for index in range(len(pairs)) if index not in held_out], sorted(held_out)


def write_pairs(path: Path, pairs: Pairs, taxonomy: Taxonomy) -> None:
    """Write labelled pairs as rows that aggregate to the same votes when they are loaded again.

    Who ticked what together is not kept by `Pairs`; the votes are dealt to the annotators in turn.
    """
    assert pairs.labels is not None and pairs.flagged is not None
    with written_whole(path) as file:
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
                line = json.dumps({**row, "is_safe": not names}, ensure_ascii=False) + "\n"
                file.write(line.encode("utf-8"))
