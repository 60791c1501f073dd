"""The Python API: `QAModeration.from_pretrained(directory).predict(question=..., answer=...)`.

In: a model directory and texts. Out: verdicts. Step 13 of the straight line.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from qlora_moderation.classifier import Classifier, load_classifier
from qlora_moderation.errors import ConfigError, DataError
from qlora_moderation.scoring import score_pairs
from qlora_moderation.shortage import scoring_shortage
from qlora_moderation.taxonomy import Taxonomy

Result = dict[str, Any]


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

    def _judge(
        self, questions: list[str], answers: list[str], batch_size: int, return_bool: bool, threshold: float | None
    ) -> list[Result]:
        budget = batch_size * self.classifier.encoder.max_length
        with scoring_shortage("QAModeration.predict", "batch_size", batch_size, 1):
            raw = score_pairs(self.classifier, questions, answers, max_tokens=budget).probabilities
        judged = self.classifier.thresholds.judge(raw)
        flagged, decided = judged.flagged, judged.categories
        if threshold is not None:
            decided = np.asarray(judged.probabilities > threshold)
            flagged = np.asarray(judged.risk > threshold)
        shown: np.ndarray = decided if return_bool else judged.probabilities
        return [
            {
                "text": self.taxonomy.render(questions[i], answers[i]),
                "flagged": bool(flagged[i]),
                "risk": float(judged.risk[i]),
                "categories": dict(zip(self.taxonomy.categories, shown[i].tolist(), strict=True)),
            }
            for i in range(len(questions))
        ]
