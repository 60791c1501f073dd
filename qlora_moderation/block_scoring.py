"""Scores a block of rows by itself: rows in, columns out, no file in sight.

In: a classifier and rows as mappings. Out: `Verdicts`. A block's verdicts depend on the block alone, so it does not matter
which process scores it, or when.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from qlora_moderation.annotation import BadRow
from qlora_moderation.classifier import Classifier
from qlora_moderation.errors import CheckpointError
from qlora_moderation.pair_columns import PairColumns
from qlora_moderation.scoring import score_pairs
from qlora_moderation.verdicts import Verdicts


class BlockScorer:
    """Judges the rows of a block.

    Args:
        classifier: the model.
        columns: where the texts stand.
        long_text: `window` or `truncate`; None: the model's own choice.
        max_tokens: token budget of one forward; None: by the device.
    """

    def __init__(
        self,
        classifier: Classifier,
        columns: PairColumns = PairColumns(),  # noqa: B008 - frozen
        long_text: str | None = None,
        max_tokens: int | None = None,
    ) -> None:
        self.classifier, self.columns = classifier, columns
        self.long_text, self.max_tokens = long_text, max_tokens

    def score(self, rows: Sequence[Mapping[str, Any] | str], progress: Callable[[int], None] | None = None) -> Verdicts:
        """Judge N rows; a reason in the place of a row, or a row without texts, becomes an error.

        Equal pairs are scored once.

        Args:
            rows: mappings, or reasons why there is none.
            progress: called with the number of windows done since the last call; may raise to stop.

        Raises:
            CheckpointError: the model gave a logit that is not finite.
        """
        errors: list[str | None] = []
        index: dict[tuple[str, str], int] = {}
        pairs = np.zeros(len(rows), dtype=np.int64)
        for position, row in enumerate(rows):
            try:
                pairs[position] = index.setdefault(self.columns.read(row), len(index))
                errors.append(None)
            except BadRow as error:
                errors.append(str(error))
        names = self.classifier.taxonomy.categories
        if not index:
            none, table = np.zeros(len(rows)), np.zeros((len(rows), len(names)))
            whole, bits = none.astype(np.int64), none.astype(bool)
            return Verdicts(names, errors, bits, none, table, table.astype(bool), whole, bits)
        prompts, responses = zip(*index, strict=True)
        scores = score_pairs(self.classifier, prompts, responses, self.long_text, self.max_tokens, progress)
        broken = ~np.isfinite(scores.logits).all(axis=1)
        if broken.any():
            first = next(i for i, error in enumerate(errors) if error is None and broken[pairs[i]])
            raise NotFiniteError(int(broken.sum()), first)
        judged = self.classifier.thresholds.judge(scores.probabilities)
        return Verdicts(
            names=names,
            errors=errors,
            flagged=judged.flagged[pairs],
            risk=judged.risk[pairs],
            probabilities=judged.probabilities[pairs],
            categories=judged.categories[pairs],
            windows=scores.windows[pairs],
            truncated=scores.truncated[pairs],
            tokens=scores.tokens,
        )


class NotFiniteError(CheckpointError):
    """A model gave NaN or infinity: no verdict at all, least of all "not flagged".

    Attributes:
        row: the first such row of the block, from 0.
    """

    def __init__(self, pairs: int, row: int) -> None:
        super().__init__(
            f"the model's logits are not finite for {pairs} pair{'s' if pairs > 1 else ''} of one block, first for row "
            f"{row + 1}; use --dtype float32, or another model"
        )
        self.row = row
