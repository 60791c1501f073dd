"""A moderation request, read and checked by hand.

In: the JSON of a body. Out: pairs to judge. The checks are written out because those of frameworks repeat the input in their
messages, and what a client sends to be judged must not appear anywhere else.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from typing import Any, Literal

from qlora_moderation.serving.config import ServeConfig
from qlora_moderation.serving.conversation import find_last_turn, read_content
from qlora_moderation.serving.faults import RequestError, invalid

Context = Literal["pair", "answer_only", "last_turn"]
CONTEXTS: tuple[Context, ...] = ("pair", "answer_only", "last_turn")
_FIELDS = {"input", "messages", "model"}


@dataclasses.dataclass(frozen=True, repr=False)
class Pair:
    """One thing to judge; it has no `repr`, so that no log can show it.

    Attributes:
        question, answer: the texts.
        context: what was known beside the answer.
    """

    question: str
    answer: str
    context: Context


def read_pairs(body: bytes, config: ServeConfig) -> list[Pair]:
    """Return what a request asks to be judged, one pair for each result.

    Raises:
        RequestError: 400 for what is no JSON, 422 for a wrong form or length.
    """
    try:
        request = json.loads(body)
    except (ValueError, RecursionError):
        raise RequestError(400, "invalid_json", "the body is not valid JSON in UTF-8") from None
    if not isinstance(request, dict):
        raise invalid(None, "the body must be a JSON object")
    if not _FIELDS.issuperset(request):
        raise invalid(None, f"the body has an unknown field; allowed: {', '.join(sorted(_FIELDS))}")
    if not isinstance(request.get("model"), str | None):
        raise invalid("model", "must be text; it may name any model, the answer says which one judged")
    if (request.get("input") is None) == (request.get("messages") is None):
        raise invalid("input", "give either input or messages")
    if request.get("messages") is not None:
        question, answer = find_last_turn(request["messages"])
        pairs = [Pair(question, answer, "last_turn" if question else "answer_only")]
        places = ["messages"]
    else:
        pairs, places = _read_input(request["input"], config.max_texts)
    for pair, place in zip(pairs, places, strict=True):
        for part, text in (("question", pair.question), ("answer", pair.answer)):
            _check_text(text, f"{place}.{part}" if pair.context == "pair" else place, config.max_text_length)
    return pairs


def _read_input(value: Any, most: int) -> tuple[list[Pair], list[str]]:
    if isinstance(value, str | Mapping):
        return [_read_item(value, "input")], ["input"]
    if not isinstance(value, list) or not value:
        raise invalid("input", "must be text, an object with question and answer, or a list of these that is not empty")
    if all(isinstance(item, Mapping) and "type" in item for item in value):
        # OpenAI's multi-modal form: the parts of one input, with one result
        return [Pair("", read_content(value, "input"), "answer_only")], ["input"]
    if len(value) > most:
        raise invalid("input", f"holds {len(value)} inputs; at most {most} are judged in one request, send several")
    places = [f"input[{index}]" for index in range(len(value))]
    return [_read_item(item, place) for item, place in zip(value, places, strict=True)], places


def _read_item(item: Any, place: str) -> Pair:
    if isinstance(item, str):
        return Pair("", item, "answer_only")
    if not isinstance(item, Mapping):
        raise invalid(place, "must be text, or an object with question and answer")
    if "type" in item:
        raise invalid(place, "is a part of a multi-modal input; such parts stand alone in a list, without other inputs")
    if set(item) != {"question", "answer"}:
        raise invalid(place, "must hold question and answer, and nothing else")
    for part in ("question", "answer"):
        if not isinstance(item[part], str):
            raise invalid(f"{place}.{part}", "must be text")
    return Pair(item["question"], item["answer"], "pair")


def _check_text(text: str, place: str, longest: int) -> None:
    if len(text) > longest:
        raise invalid(place, f"has {len(text)} characters; at most {longest} are read")
    try:
        text.encode()
    except UnicodeEncodeError:
        raise invalid(place, "holds a lone surrogate, which is no character; leave it out or replace it") from None
