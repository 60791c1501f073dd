"""Whatever a question and an answer hold: no token of control from them, no character lost, the end token last and once."""

from __future__ import annotations

import functools
import json
from collections.abc import Iterator
from typing import Any

import numpy as np
from conftest import llama3_tokenizer
from fuzz import Property
from hostile_texts import CONTROL_TOKENS, list_texts
from hypothesis import strategies as st
from test_hostile_text import load_with
from tokenizers import Tokenizer, decoders

from qlora_moderation.embedded import build_tokenizer, render_texts
from qlora_moderation.sample import build_sample
from qlora_moderation.taxonomy import Taxonomy
from qlora_moderation.tokenization import TextEncoder

KINDS = ("sentencepiece-like", "byte-level")
TEMPLATES = (
    Taxonomy().template,
    "#{question}{answer}",
    "Q: {question}\nA: {answer}\nIs it harmful?",
    "a{question}b{answer}c",
)
UNCUT = 10**6


@functools.cache
def tokenizer(kind: str) -> Any:
    """Return a lossless tokenizer that knows the control tokens of many families."""
    texts = render_texts(build_sample(seed=0)["train"][:300])
    if kind == "sentencepiece-like":
        return load_with(build_tokenizer(texts, 600))
    made = llama3_tokenizer(texts)
    made.backend_tokenizer.decoder = decoders.ByteLevel()
    return load_with(made)


@functools.cache
def encoder(kind: str, template: str, room: int) -> TextEncoder:
    """Return an encoder that has so many tokens beside the template, and up to three for its borders with the texts."""
    whole = TextEncoder(tokenizer(kind), Taxonomy(template=template), UNCUT)
    (fixed,) = whole.count_tokens([""], [""])
    return whole if room == UNCUT else TextEncoder(tokenizer(kind), Taxonomy(template=template), fixed + 3 + room)


@functools.cache
def backend(kind: str) -> Tokenizer:
    """Return the tokenizer by itself, without what it would find in a text."""
    made = Tokenizer.from_str(json.dumps(json.loads(tokenizer(kind).backend_tokenizer.to_str()) | {"added_tokens": []}))
    made.no_padding()
    made.no_truncation()
    return made


_TOKENS = [token for family in CONTROL_TOKENS.values() for token in family]
_PIECES = st.one_of(
    st.text(st.characters(exclude_categories=["Cs"]), max_size=8),
    st.sampled_from(_TOKENS),
    st.sampled_from(
        ["</", "s>", "<", ">", "|", "{question}", "{answer}", "USER:", " ASSISTANT:", "\n", "▁", "Ġ", "  "]
    ),
    st.sampled_from(["word ", "how ", "\u0301", "👩‍👩‍👧", "ﷺ", "\0", "\u202e", "ß", "한", "\U000e0041"]),
    st.sampled_from(list_texts()),
)
TEXTS = st.lists(st.tuples(_PIECES, st.sampled_from([1, 1, 1, 2, 3, 30])), max_size=6).map(
    lambda parts: "".join(piece * times for piece, times in parts)[:3000]
)


def check_text(draw: tuple[str, str, int, list[tuple[str, str]]]) -> None:
    """Texts are cut into windows that hold every one of their tokens, and nothing but text between begin and end."""
    kind, template, room, pairs = draw
    short, whole = encoder(kind, template, room), encoder(kind, template, UNCUT)
    max_length = short.max_length
    questions, answers = [question for question, _ in pairs], [answer for _, answer in pairs]
    counts, windows = short.count_tokens(questions, answers), short.windows(questions, answers)
    first = [next(window for window in windows if window.text == i) for i in range(len(pairs))]
    uncut = whole.encode(questions, answers)
    assert short.encode(questions, answers) == first and counts == [len(window.ids) for window in uncut]
    ids, lengths = short.encode_all(questions, answers)
    assert [one.tolist() for one in ids] == [window.ids for window in first] and np.array_equal(lengths, counts)
    control = {*tokenizer(kind).all_special_ids, *tokenizer(kind).added_tokens_decoder} - {tokenizer(kind).unk_token_id}
    begin, end = short.begin_ids, short.end_ids
    assert len(end) == 1
    for window in windows:
        inner = window.ids[len(begin) : -len(end)]
        assert len(window.ids) <= max_length and window.ids == begin + inner + end
        assert not control.intersection(inner)
    for i, (question, answer) in enumerate(pairs):
        text = short.taxonomy.render(question, answer)
        tokens = uncut[i].ids[len(begin) : -len(end)]
        same = text.replace("▁", " ") if kind == "sentencepiece-like" else text  # LLaMA's vocabulary writes a space so
        assert backend(kind).decode(tokens, skip_special_tokens=False) == same
        mine = [window.ids[len(begin) : -len(end)] for window in windows if window.text == i]
        if counts[i] <= max_length:
            assert mine == [tokens] and not first[i].truncated
        else:
            assert all(window.truncated for window in windows if window.text == i)
            _check_cover(tokens, mine, {token for one in ("a", "0") for token in whole.encode([one], [one])[0].ids})


def _check_cover(tokens: list[int], windows: list[list[int]], template: set[int]) -> None:
    """Check that each window holds tokens of the text in their order, and that together they hold all and tear no character.

    A character is at most four tokens, one for each of its bytes. Tokens of the template stand anew in a window that lacks the
    token in which template and text had merged.
    """
    text = [token for token in tokens if token not in template]
    for window in windows:
        position = 0
        for token in window:
            if token not in template:
                position = text.index(token, position) + 1
    assert {run for window in windows for run in _runs(window)} >= {*_runs(tokens)}


def _runs(ids: list[int]) -> Iterator[tuple[int, ...]]:
    return zip(*(ids[start:] for start in range(4)), strict=False)


PROPERTIES = {
    "texts and windows": Property(
        st.tuples(
            st.sampled_from(KINDS),
            st.sampled_from(TEMPLATES),
            st.integers(8, 60),
            st.lists(st.tuples(TEXTS, TEXTS), min_size=1, max_size=3),
        ),
        check_text,
        (("sentencepiece-like", TEMPLATES[3], 8, [("\x80\U00010000", "0000")]),),
        weight=2,
    )
}
