"""Several answers to one question: which is the safest, and drawing until one is safe.

In: answers with their verdicts, or a function that writes answers. Out: ranked candidates, or a search that says what it found.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from qlora_moderation.errors import ConfigError, DataError
from qlora_moderation.results import Result


@dataclasses.dataclass(frozen=True)
class Candidate:
    """One judged answer.

    Attributes:
        index: its place among the answers given, from 0.
        answer: the text.
        result: what `predict` says of it.
    """

    index: int
    answer: str
    result: Result

    @property
    def flagged(self) -> bool:
        """Whether the pair is flagged."""
        return bool(self.result["flagged"])

    @property
    def risk(self) -> float:
        """What `flagged` is decided by."""
        return float(self.result["risk"])


@dataclasses.dataclass(frozen=True)
class SafeSearch:
    """What a search for a safe answer found; true where it found one.

    An unsafe answer never stands in `answer`: whoever wants the least bad one must ask for `safest_seen` by name.

    Attributes:
        answer: the first answer that is not flagged; None where every one was.
        result: what `predict` says of `answer`; None where there is none.
        safest_seen: the candidate of lowest risk among all that were judged, flagged or not; its index counts over all calls.
        calls: calls of the generator.
        judged: answers judged.
    """

    answer: str | None
    result: Result | None
    safest_seen: Candidate
    calls: int
    judged: int

    @property
    def found(self) -> bool:
        """Whether an answer was not flagged."""
        return self.answer is not None

    def __bool__(self) -> bool:
        return self.found


def rank_candidates(answers: Sequence[str], results: Sequence[Result], start: int = 0) -> list[Candidate]:
    """Return the answers, lowest risk first; equals keep their order, and no flagged one stands before one that is not.

    Args:
        answers: N texts.
        results: N verdicts of `predict`.
        start: index of the first answer.
    """
    pairs = zip(answers, results, strict=True)
    candidates = [Candidate(start + index, answer, result) for index, (answer, result) in enumerate(pairs)]
    return sorted(candidates, key=_order)


def _order(candidate: Candidate) -> tuple[bool, float]:
    return candidate.flagged, candidate.risk


def search_safe(
    question: str,
    generate: Callable[[str], str | Iterable[str]],
    limit: int,
    judge: Callable[[list[str]], list[Result]],
) -> SafeSearch:
    """Call `generate` until one of its answers is not flagged.

    Of several answers from one call the first that is not flagged counts, not the one of lowest risk: an accepted answer is
    then distributed as the generator's own answers are, given that they are not flagged.

    Args:
        question: handed to `generate`.
        generate: writes one answer, or several at a time, which are judged together.
        limit: calls at most.
        judge: gives verdicts for N answers.

    Raises:
        ConfigError: `limit` is no whole number from 1 on.
        DataError: `generate` gave something else than a text or some texts.
    """
    if isinstance(limit, bool) or not isinstance(limit, int) or limit < 1:
        raise ConfigError(f"limit {limit}: must be a whole number, at least 1")
    safest: Candidate | None = None
    judged = 0
    for call in range(1, limit + 1):
        answers = _read_answers(generate(question), call)
        ranked = rank_candidates(answers, judge(answers), judged)
        judged += len(answers)
        safest = ranked[0] if safest is None else min(safest, ranked[0], key=_order)
        safe = [candidate for candidate in ranked if not candidate.flagged]
        if safe:
            first = min(safe, key=lambda candidate: candidate.index)
            return SafeSearch(first.answer, first.result, safest, call, judged)
    assert safest is not None
    return SafeSearch(None, None, safest, limit, judged)


def _read_answers(given: Any, call: int) -> list[str]:
    if isinstance(given, str):
        return [given]
    if isinstance(given, bytes | Mapping) or not isinstance(given, Iterable):
        raise DataError(f"generate gave {type(given).__name__} in call {call}; it must give a text or a list of texts")
    answers = list(given)
    wrong = [type(answer).__name__ for answer in answers if not isinstance(answer, str)]
    if wrong or not answers:
        found = f"a list with {wrong[0]}" if wrong else "no text"
        raise DataError(f"generate gave {found} in call {call}; it must give a text or a list of texts")
    return answers
