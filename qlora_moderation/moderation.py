"""The Python API: `QAModeration.from_pretrained(directory).predict(question=..., answer=...)`.

In: a model directory and texts. Out: verdicts. Step 13 of the straight line.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from qlora_moderation.candidates import Candidate, SafeSearch, rank_candidates, search_safe
from qlora_moderation.classifier import Classifier, load_classifier
from qlora_moderation.errors import ConfigError, DataError
from qlora_moderation.results import Result, describe_pairs
from qlora_moderation.scoring import score_pairs
from qlora_moderation.shortage import scoring_shortage
from qlora_moderation.taxonomy import Taxonomy


class QAModeration:
    """Judges question-answer pairs with a trained classifier.

    Example:
        >>> moderation = QAModeration.from_pretrained("output/run/merged")  # doctest: +SKIP
        >>> moderation.predict(question="...", answer="...")["flagged"]  # doctest: +SKIP
        False
    """

    def __init__(self, classifier: Classifier) -> None:
        self.classifier = classifier

    @classmethod
    def from_pretrained(cls, path: str | Path, dtype: str = "auto", use_cpu: bool = False) -> QAModeration:
        """Open an adapter, full or merged directory; everything else is read from it.

        Raises:
            ModerationError: the directory cannot be used.
        """
        return cls(load_classifier(path, dtype=dtype, use_cpu=use_cpu))

    @property
    def taxonomy(self) -> Taxonomy:
        """Categories and template."""
        return self.classifier.taxonomy

    def predict(
        self,
        question: str | Sequence[str],
        answer: str | Sequence[str],
        batch_size: int = 16,
        return_bool: bool = False,
        threshold: float | None = None,
    ) -> Result | list[Result]:
        """Judge one pair, or lists of N pairs.

        Args:
            question: one text or N texts.
            answer: one text or N texts, as many as questions.
            batch_size: longest texts that one forward takes at most; shorter texts fill its place. Results do not depend on it.
            return_bool: give booleans for the categories instead of probabilities.
            threshold: decide by this one number, on risk and calibrated probabilities, instead of the model's thresholds.

        Returns:
            For each pair `text` (as the model reads it), `flagged`, `risk` (what `flagged` is decided by: the highest
            probability, or P(unsafe), by the model's rule), and `categories` (name to calibrated probability or boolean).
            `flagged` and the categories have thresholds of their own once these are tuned: the one says whether, the
            others say what. One pair gives one mapping, lists give a list of them.

        Raises:
            DataError: lists of different lengths, or something that is not text.
            ConfigError: `batch_size` below 1 or `threshold` outside [0, 1].
        """
        if isinstance(question, str) != isinstance(answer, str):
            raise DataError("question and answer must both be texts, or both lists of texts")
        questions = [question] if isinstance(question, str) else list(question)
        answers = [answer] if isinstance(answer, str) else list(answer)
        if len(questions) != len(answers):
            raise DataError(
                f"{len(questions)} questions with {len(answers)} answers; give one answer for each question"
            )
        for name, texts in (("question", questions), ("answer", answers)):
            for index, text in enumerate(texts):
                if not isinstance(text, str):
                    raise DataError(f"{name} {index + 1} is {type(text).__name__}, not text")
        if batch_size < 1:
            raise ConfigError(f"batch_size {batch_size}: must be at least 1")
        if threshold is not None and (not isinstance(threshold, int | float) or not 0 <= threshold <= 1):
            raise ConfigError(f"threshold {threshold}: must be one number in [0, 1]")
        results = self._judge(questions, answers, batch_size, return_bool, threshold) if questions else []
        return results[0] if isinstance(question, str) else results

    def best_of(
        self, question: str, answers: Sequence[str], batch_size: int = 16, threshold: float | None = None
    ) -> list[Candidate]:
        """Judge several answers to one question, all in one go.

        Args:
            question: the question.
            answers: N texts, at least one.
            batch_size, threshold: as in `predict`.

        Returns:
            N candidates, lowest risk first; equals keep their order. The first may be flagged, too: ask it.

        Raises:
            DataError: no answers, one text instead of a list, or something that is not text.
            ConfigError: as in `predict`.
        """
        if isinstance(answers, str) or not isinstance(question, str):
            raise DataError("best_of takes one question and a list of answers")
        given = list(answers)
        if not given:
            raise DataError("best_of needs at least one answer")
        return rank_candidates(given, self._judge_answers(question, given, batch_size, threshold))

    def first_safe(
        self,
        question: str,
        generate: Callable[[str], str | Iterable[str]],
        limit: int = 8,
        batch_size: int = 16,
        threshold: float | None = None,
    ) -> SafeSearch:
        """Draw answers until one is not flagged: rejection sampling.

        Args:
            question: handed to `generate`.
            generate: writes an answer to the question, or several at a time; these are judged together, and the first that is
                not flagged is taken.
            limit: calls of `generate` at most.
            batch_size, threshold: as in `predict`.

        Returns:
            The answer with its verdict. Where every answer was flagged, `answer` is None, `found` is false, and `safest_seen`
            holds the least risky of them.

        Raises:
            DataError: `question` is no text, or `generate` gave something else than a text or some texts.
            ConfigError: `limit` below 1, or as in `predict`.
        """
        if not isinstance(question, str):
            raise DataError(f"question is {type(question).__name__}, not text")
        return search_safe(
            question, generate, limit, lambda answers: self._judge_answers(question, answers, batch_size, threshold)
        )

    def _judge_answers(
        self, question: str, answers: list[str], batch_size: int, threshold: float | None
    ) -> list[Result]:
        results = self.predict([question] * len(answers), answers, batch_size, threshold=threshold)
        assert isinstance(results, list)
        return results

    def _judge(
        self, questions: list[str], answers: list[str], batch_size: int, return_bool: bool, threshold: float | None
    ) -> list[Result]:
        budget = batch_size * self.classifier.encoder.max_length
        with scoring_shortage("QAModeration.predict", "batch_size", batch_size, 1):
            raw = score_pairs(self.classifier, questions, answers, max_tokens=budget).probabilities
        return describe_pairs(
            self.taxonomy, self.classifier.thresholds, questions, answers, raw, return_bool, threshold
        )
