"""Serving by others: what vLLM's `/classify` is sent, and what its answer means.

In: the directory of a plain classifier, pairs, and the JSON that a server answered. Out: the JSON to post, and what
`QAModeration.predict` says. Nothing here opens a connection: addresses, keys and retries are the caller's.

Token ids are sent instead of text, so that nothing depends on how the server tokenises: special strings in user text stay text,
begin and end tokens stand where training had them, and a long text goes out in windows.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from qlora_moderation.classifier import OpenedModel, open_model
from qlora_moderation.errors import CheckpointError, DataError
from qlora_moderation.results import Result, describe_pairs

MULTI_LABEL = "multi_label_classification"
_SOFTMAX_NOISE = 1e-5


@dataclasses.dataclass(frozen=True)
class ClassifyRequest:
    """What one call sends, and what is needed to read its answer.

    Attributes:
        body: to be posted as JSON: `input`, a list of lists of token ids, and `model` where a name was given.
        questions, answers: N texts each.
        texts: index of the pair that each of the windows in `input` belongs to.
    """

    body: dict[str, Any]
    questions: tuple[str, ...]
    answers: tuple[str, ...]
    texts: tuple[int, ...]


class ClassifyProtocol:
    """Speaks to a server of a full or merged model, from that model's directory and without its weights."""

    def __init__(self, opened: OpenedModel) -> None:
        self._opened = opened

    @classmethod
    def from_pretrained(cls, path: str | Path) -> ClassifyProtocol:
        """Read tokenizer, template, length and thresholds of a full or merged directory.

        Raises:
            ModerationError: the directory cannot be used, is an adapter's, or does not say that its labels are no alternatives.
        """
        opened = open_model(path)
        if opened.is_adapter:
            raise CheckpointError(f"{path}: is an adapter; merge it, and serve and name the merged directory")
        found = getattr(opened.spec.config, "problem_type", None)
        if found != MULTI_LABEL:
            raise CheckpointError(
                f"{path}: config.json has problem_type {found}, so a server would make the categories compete (softmax); set "
                f"it to {MULTI_LABEL}"
            )
        return cls(opened)

    @property
    def max_length(self) -> int:
        """Longest window in tokens; the server's `--max-model-len` must not be below it."""
        return self._opened.encoder.max_length

    def build_request(
        self, questions: Sequence[str], answers: Sequence[str], model: str | None = None
    ) -> ClassifyRequest:
        """Return what to post to `/classify` for N pairs.

        Args:
            questions, answers: N texts each, at least one.
            model: the served model's name; a server of one model needs none.

        Raises:
            DataError: lists of different lengths, none, or something that is not text.
        """
        if isinstance(questions, str) or isinstance(answers, str) or len(questions) != len(answers) or not questions:
            raise DataError("give a list of questions and a list with one answer for each")
        if not all(isinstance(text, str) for text in (*questions, *answers)):
            raise DataError("a question or an answer is not text")
        encoder = self._opened.encoder
        split = self._opened.metadata.long_text == "window"
        windows = encoder.windows(questions, answers) if split else encoder.encode(questions, answers)
        body: dict[str, Any] = {} if model is None else {"model": model}
        body["input"] = [window.ids for window in windows]
        return ClassifyRequest(body, tuple(questions), tuple(answers), tuple(window.text for window in windows))

    def read_response(
        self, request: ClassifyRequest, response: Mapping[str, Any], return_bool: bool = False
    ) -> list[Result]:
        """Return what `QAModeration.predict` says of the N pairs of a request.

        Flags come from the model's thresholds. The server's own `label` is the likeliest category, whether likely or not, and
        is not looked at.

        Args:
            request: what was sent.
            response: the server's JSON.
            return_bool: as in `QAModeration.predict`.

        Raises:
            DataError: the answer does not fit the request, or the server did not give each category a probability of its own.
        """
        raw = np.zeros((len(request.questions), len(self._opened.taxonomy.categories)))
        np.maximum.at(raw, np.array(request.texts), self._read_probabilities(request, response))
        taxonomy, thresholds = self._opened.taxonomy, self._opened.thresholds
        return describe_pairs(taxonomy, thresholds, request.questions, request.answers, raw, return_bool)

    def _read_probabilities(self, request: ClassifyRequest, response: Mapping[str, Any]) -> np.ndarray:
        """Return [windows, C] in the order of the request."""
        count, categories = len(request.texts), len(self._opened.taxonomy.categories)
        data = response.get("data") if isinstance(response, Mapping) else None
        if not isinstance(data, list):
            raise DataError(f"the server's answer holds no data: {str(response)[:200]}")
        try:
            found = {int(item["index"]): np.asarray(item["probs"], dtype=np.float64) for item in data}
        except (KeyError, TypeError, ValueError) as error:
            raise DataError(f"the server's answer has items without index or probs ({error})") from None
        if sorted(found) != list(range(count)) or len(data) != count:
            raise DataError(f"the server answered {len(data)} of {count} texts; each must be answered once")
        probabilities = [found[index] for index in range(count)]
        if any(each.shape != (categories,) for each in probabilities):
            raise DataError(f"the server does not give {categories} probabilities for each text; is it another model?")
        table = np.stack(probabilities)
        if not np.isfinite(table).all() or table.min() < 0 or table.max() > 1:
            raise DataError("the server gives values that are no probabilities; do not send use_activation false")
        # one text's probabilities may sum to 1 by chance, those of several cannot
        if categories > 1 and count > 1 and bool((np.abs(table.sum(axis=1) - 1) < _SOFTMAX_NOISE).all()):
            raise DataError(
                "the probabilities of every text sum to 1: the server makes the categories compete (softmax); serve a "
                f"directory whose config.json has problem_type {MULTI_LABEL}"
            )
        return table
