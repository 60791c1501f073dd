"""Rendered pairs as token ids, with user text as data.

In: questions and answers. Out: lists of ids. Step 4 of the straight line.

The tokenizer's backend is copied without its added tokens, so no string inside a question or an answer can become a
special or added token; the begin and end ids are put on by us. The check at load sends every special string through.
"""

from __future__ import annotations

import dataclasses
import json
from array import array
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from tokenizers import Tokenizer

from qlora_moderation.errors import CheckpointError, ConfigError, DataError
from qlora_moderation.taxonomy import Taxonomy
from qlora_moderation.token_ids import TokenIds
from qlora_moderation.windows import WindowCutter

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

ADDED_PAD_TOKEN = "<pad>"
_MIN_TEXT_TOKENS = 8
_CHUNK = 4096  # texts handed to the backend at a time, so that memory does not grow with the data set


def choose_pad_token(tokenizer: PreTrainedTokenizerBase) -> str:
    """Return the pad token; it may be new to the vocabulary.

    The pad token is never the end token: stock pooling looks for the last token that is not padding. A usable pad is the
    tokenizer's own, or else its unknown token (LLaMA: `<unk>`); only without either does the vocabulary grow.
    """
    end = {tokenizer.eos_token, tokenizer.sep_token}
    for token in (tokenizer.pad_token, tokenizer.unk_token):
        if token is not None and token not in end:
            return token
    return ADDED_PAD_TOKEN


def _build_text_backend(tokenizer: PreTrainedTokenizerBase) -> Tokenizer:
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise CheckpointError(
            f"{tokenizer.name_or_path}: its tokenizer has no `tokenizers` backend (tokenizer.json); convert it first"
        )
    state = json.loads(backend.to_str())
    drop_control_merges(state)
    state["added_tokens"] = []
    state["post_processor"] = state["padding"] = state["truncation"] = None
    return Tokenizer.from_str(json.dumps(state))


def drop_control_merges(state: dict[str, Any]) -> None:
    """Keep a vocabulary that lists `</s>` from reaching it by merging `</` and `s>`."""
    control = {token["content"] for token in state["added_tokens"]}
    merges = state["model"].get("merges") or []
    kept = [merge for merge in merges if "".join(merge if isinstance(merge, list) else merge.split(" ")) not in control]
    if len(kept) < len(merges):
        state["model"]["merges"] = kept


@dataclasses.dataclass(frozen=True)
class Window:
    """A stretch of one text that fits the model: `ids`, the index of its text, and whether anything was cut away."""

    ids: list[int]
    text: int
    truncated: bool = False


class TextEncoder:
    """Turns pairs into ids of at most `max_length` tokens.

    Args:
        tokenizer: any tokenizer with a `tokenizers` backend.
        taxonomy: holds the template.
        max_length: longest result in tokens, begin and end included.

    Raises:
        CheckpointError: user text could become a special token with this tokenizer, or it has no end token.
        ConfigError: the template alone does not fit `max_length`.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, taxonomy: Taxonomy, max_length: int) -> None:
        self.taxonomy = taxonomy
        self.max_length = max_length
        self._backend = _build_text_backend(tokenizer)
        end_id = tokenizer.eos_token_id if tokenizer.eos_token_id is not None else tokenizer.sep_token_id
        if end_id is None:
            raise CheckpointError(f"{tokenizer.name_or_path}: its tokenizer has no end token; set eos_token")
        probe = "a"
        plain = tokenizer(probe, add_special_tokens=False)["input_ids"]
        full = tokenizer(probe)["input_ids"]
        start = next(i for i in range(len(full) + 1) if full[i : i + len(plain)] == plain)
        self.begin_ids: list[int] = full[:start]
        self.end_ids: list[int] = full[start + len(plain) :] or [end_id]
        self._control = set(tokenizer.all_special_ids) | set(tokenizer.added_tokens_decoder)
        self._control.discard(tokenizer.unk_token_id)  # what a vocabulary without byte fallback gives rare characters
        self._check_control_strings([str(token) for token in tokenizer.added_tokens_decoder.values()])
        self._cutter = WindowCutter(self._backend, taxonomy)
        fixed = len(self.begin_ids) + len(self.end_ids) + len(self._ids(["".join(taxonomy.template_parts)])[0])
        if fixed + _MIN_TEXT_TOKENS > max_length:
            raise ConfigError(
                f"--max_length {max_length}: the template alone takes {fixed} tokens; give at least {fixed + _MIN_TEXT_TOKENS}"
            )

    def _check_control_strings(self, strings: Iterable[str]) -> None:
        for string in strings:
            for text in (string, f"a{string}b", f" {string} "):
                caught = self._control.intersection(self._backend.encode(text, add_special_tokens=False).ids)
                if caught:
                    raise CheckpointError(
                        f"this tokenizer turns the text {string!r} into the control token {min(caught)} even without its "
                        "added tokens; user text could forge it, so the tokenizer cannot be used"
                    )

    def _ids(self, texts: Sequence[str]) -> list[list[int]]:
        try:
            return [encoding.ids for encoding in self._backend.encode_batch_fast(texts, add_special_tokens=False)]
        except (TypeError, UnicodeEncodeError):
            raise DataError(
                "a text holds a lone surrogate, which is no character; leave it out or replace it"
            ) from None

    def count_tokens(self, prompts: Sequence[str], responses: Sequence[str]) -> list[int]:
        """Return the N lengths before truncation, begin and end included."""
        fixed = len(self.begin_ids) + len(self.end_ids)
        return [len(ids) + fixed for _, ids in self._rendered(prompts, responses)]

    def encode(self, prompts: Sequence[str], responses: Sequence[str]) -> list[Window]:
        """Return one window for each of N pairs; a long text is cut by the rule of `windows`, to its first window."""
        return [self._split(text, ids)[0] for text, ids in self._numbered(prompts, responses)]

    def encode_all(self, prompts: Sequence[str], responses: Sequence[str]) -> tuple[TokenIds, np.ndarray]:
        """Return what `encode` and `count_tokens` say of N pairs, from one pass and in arrays.

        Returns:
            The ids of each pair, cut to its first window, and [N] int64 lengths before truncation.
        """
        flat, lengths, counts = array("i"), array("q"), array("q")
        fixed = len(self.begin_ids) + len(self.end_ids)
        for text, ids in self._numbered(prompts, responses):
            first = self._split(text, ids)[0].ids
            flat.extend(first)
            lengths.append(len(first))
            counts.append(len(ids) + fixed)
        found = TokenIds.of(np.frombuffer(flat, dtype=np.int32), np.frombuffer(lengths, dtype=np.int64))
        return found, np.frombuffer(counts, dtype=np.int64)

    @property
    def state(self) -> str:
        """Everything that the ids of a text depend on, as text."""
        facts = [self.taxonomy.template, self.max_length, self.begin_ids, self.end_ids, sorted(self._control)]
        return json.dumps([*facts, self._backend.to_str()])

    def windows(self, prompts: Sequence[str], responses: Sequence[str]) -> list[Window]:
        """Return overlapping windows that together hold every token of each of N pairs, each with the whole template.

        A text that fits is one window. In a long text the question keeps half of the room, or more where the answer
        leaves it; the answer's stretches each stand after the start of the question, and further stretches of a question
        that is itself too long each stand before the start of the answer. Stretches overlap by a quarter. Every window
        has the begin and the end token.
        """
        return [window for text, ids in self._numbered(prompts, responses) for window in self._split(text, ids)]

    def _rendered(self, prompts: Sequence[str], responses: Sequence[str]) -> Iterable[tuple[str, list[int]]]:
        for start in range(0, len(prompts), _CHUNK):
            pairs = zip(prompts[start : start + _CHUNK], responses[start : start + _CHUNK], strict=True)
            texts = [self.taxonomy.render(*pair) for pair in pairs]
            yield from zip(texts, self._ids(texts), strict=True)

    def _numbered(
        self, prompts: Sequence[str], responses: Sequence[str]
    ) -> Iterable[tuple[tuple[int, str, str], list[int]]]:
        for index, (_, ids) in enumerate(self._rendered(prompts, responses)):
            yield (index, prompts[index], responses[index]), ids

    def _split(self, text: tuple[int, str, str], ids: list[int]) -> list[Window]:
        index, question, answer = text
        if self._control.intersection(ids):
            raise DataError(f"text {index + 1} was turned into a control token; this is a fault of the tokenizer check")
        if len(self.begin_ids) + len(ids) + len(self.end_ids) <= self.max_length:
            return [Window(self.begin_ids + ids + self.end_ids, index)]
        inner = self._cutter.cut(question, answer, self.max_length - len(self.begin_ids) - len(self.end_ids))
        return [Window(self.begin_ids + stretch + self.end_ids, index, True) for stretch in inner]
