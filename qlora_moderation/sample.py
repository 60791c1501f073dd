"""The embedded sample: the pair decides, not the utterance.

In: the hand-written questions and answers of `sample.yaml`. Out: rows in BeaverTails' layout,
so that the rest of the line (step 2 onwards) treats them like any data set.

Every answer wording stands under risky and under harmless questions, and every question is
answered by wordings that go along and by wordings that neutralise. A pair is harmful only when
its question is risky and its answer goes along, which neither side shows alone.
"""

from __future__ import annotations

import json
import os
import random
from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from qlora_moderation.metadata import write_text
from qlora_moderation.taxonomy import BEAVERTAILS_CATEGORIES

Row = dict[str, Any]

SPLITS = ("train", "combinations", "unseen")
ANSWERS_PER_KIND = 3
"""Wordings of each kind that a question meets in training; one more of each is held out."""
DISAGREEMENT = 0.1
"""Share of the pairs that three annotators judged, not unanimously."""


class _Question(NamedTuple):
    text: str
    category: str
    also: str | None
    risky: bool


@cache
def _load_text() -> dict[str, Any]:
    source = resources.files(__package__).joinpath("sample.yaml")
    return yaml.safe_load(source.read_text(encoding="utf-8"))


def build_sample(seed: int = 0) -> dict[str, list[Row]]:
    """Build the three splits.

    The two questions of a minimal pair meet the same answers in the same split, so an answer
    says nothing about the kind of question that it stands under.

    Args:
        seed: Chooses which combinations are held out, which pairs have several annotators, and
            the order of the rows.

    Returns:
        "train"; "combinations" of questions and answers that both occur in train, but never
        together; and "unseen", whose questions and answer wordings train has not. A row is one
        annotation: `{"prompt", "response", "category": {name: bool}, "is_safe"}`. Annotations
        of one pair by several annotators are consecutive rows.
    """
    text = _load_text()
    rng = random.Random(seed)
    pairs: dict[str, list[tuple[_Question, str, bool]]] = {split: [] for split in SPLITS}
    for couple in _iterate_couples(text["questions"]):
        for kind, wordings in text["answers"].items():
            chosen = rng.sample(wordings, ANSWERS_PER_KIND + 1)
            for index, answer in enumerate(chosen):
                split = "train" if index < ANSWERS_PER_KIND else "combinations"
                pairs[split] += [(q, answer, kind == "goes_along") for q in couple]
    for couple in _iterate_couples(text["held_back_questions"]):
        for kind, wordings in text["held_back_answers"].items():
            for answer in rng.sample(wordings, 2):
                pairs["unseen"] += [(q, answer, kind == "goes_along") for q in couple]
    rows: dict[str, list[Row]] = {}
    for split in SPLITS:
        rng.shuffle(pairs[split])
        rows[split] = [
            _build_row(question.text, answer, ticked)
            for question, answer, goes_along in pairs[split]
            for ticked in _annotate(question, goes_along, text["near"], rng)
        ]
    return rows


def build_minimal_pair(seed: int = 0, category: str = "privacy_violation") -> dict[str, str]:
    """Build an example of what the classifier must see: the same words, harmful only together.

    Args:
        seed: As in `build_sample`; both answers come from its split "combinations".
        category: Category of the risky question.

    Returns:
        "prompt", a risky question; "harmful" and "safe", two answers to it; and "harmless_prompt", a question of nearly
        the same words, under which both answers are safe. Training saw none of the four pairs.
    """
    couple = _load_text()["questions"][category][0]
    answers = {
        "safe" if row["response"] in _load_text()["answers"]["neutralises"] else "harmful": row["response"]
        for row in build_sample(seed)["combinations"]
        if row["prompt"] == couple["risky"]
    }
    return {"prompt": couple["risky"], **answers, "harmless_prompt": couple["harmless"]}


def _iterate_couples(
    questions: Mapping[str, Sequence[Mapping[str, str]]],
) -> Iterator[tuple[_Question, _Question]]:
    for category, couples in questions.items():
        for couple in couples:
            also = couple.get("also")
            yield (
                _Question(couple["risky"], category, also, risky=True),
                _Question(couple["harmless"], category, also, risky=False),
            )


def _annotate(question: _Question, goes_along: bool, near: Mapping[str, str], rng: random.Random) -> list[set[str]]:
    """Return the categories that each annotator of a pair ticks: one annotator, or three who disagree.

    The dissenter makes a human mistake: judges the question alone, the answer alone, overlooks
    the harm, or files it under a near category. The majority is always right.
    """
    harmful = question.risky and goes_along
    truth: set[str] = set()
    if harmful:
        truth = {question.category} if question.also is None else {question.category, question.also}
    mistakes: list[set[str]] = []
    if harmful:
        mistakes = [set(), {near[question.category]}]
    elif question.risky:
        mistakes = [{question.category}]
    elif goes_along:
        mistakes = [{"non_violent_unethical_behavior"}]
    # Nobody takes a harmless question with a refusal for harmful, hence the share's correction.
    if not mistakes or rng.random() >= DISAGREEMENT * 4 / 3:
        return [truth]
    votes = [truth, truth, rng.choice(mistakes)]
    rng.shuffle(votes)
    return votes


def _build_row(prompt: str, response: str, ticked: set[str]) -> Row:
    return {
        "prompt": prompt,
        "response": response,
        "category": {name: name in ticked for name in BEAVERTAILS_CATEGORIES},
        "is_safe": not ticked,
    }


def shuffle_labels(rows: Sequence[Row], seed: int = 0) -> list[Row]:
    """Deal the labels of the pairs out again at random: the control that cannot learn.

    Pairs with equally many annotations exchange all of them, so the share of each category and
    the disagreement between annotators stay as they were.

    Args:
        rows: Annotations; they are not changed.
        seed: Seed of the permutation.

    Returns:
        New rows, in the same order, with another pair's "category" and "is_safe".
    """
    places: dict[tuple[str, str], list[int]] = {}
    for index, row in enumerate(rows):
        places.setdefault((row["prompt"], row["response"]), []).append(index)
    by_votes: dict[int, list[list[int]]] = {}
    for indices in places.values():
        by_votes.setdefault(len(indices), []).append(indices)
    rng = random.Random(seed)
    shuffled: list[Row] = [dict(row) for row in rows]
    for targets in by_votes.values():
        sources = rng.sample(targets, len(targets))
        for target, source in zip(targets, sources, strict=True):
            for to, taken in zip(target, source, strict=True):
                shuffled[to]["category"] = dict(rows[taken]["category"])
                shuffled[to]["is_safe"] = rows[taken]["is_safe"]
    return shuffled


def write_sample(directory: str | os.PathLike[str], seed: int = 0) -> dict[str, Path]:
    """Write `train.jsonl`, `combinations.jsonl` and `unseen.jsonl`.

    Args:
        directory: Made when missing.
        seed: As in `build_sample`.

    Returns:
        The file of each split.
    """
    directory = Path(directory)
    paths = {}
    for split, rows in build_sample(seed).items():
        path = paths[split] = directory / f"{split}.jsonl"
        write_text(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    return paths
