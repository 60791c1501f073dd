"""The pair that a chat ends with.

In: a list of messages in OpenAI's form. Out: question and answer. A classifier of pairs judges one exchange; the turns before
it are not read.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from qlora_moderation.serving.faults import invalid

ROLES = ("system", "developer", "user", "assistant", "tool", "function")
TEXT_PARTS = ("text", "input_text", "output_text", "refusal")


def find_last_turn(messages: Any) -> tuple[str, str]:
    """Return the texts of the last user turn and of the assistant's answer to it.

    A turn is all that one side says until the other speaks again, so that a text cut into two messages is judged whole;
    messages of system and tools end no turn. Without a user turn before the answer the question is empty.

    Raises:
        RequestError: not a list of messages, or one that does not end with the assistant's turn.
    """
    if not isinstance(messages, list) or not messages:
        raise invalid("messages", "must be a list of at least one message")
    spoken = [(role, text) for role, text in map(_read_message, range(len(messages)), messages) if role is not None]
    if not any(role == "assistant" for role, _ in spoken):
        raise invalid("messages", "hold no assistant turn, so there is no answer to judge")
    if spoken[-1][0] == "user":
        raise invalid(
            "messages", "end with a user turn, which has no answer yet; add the assistant's, or send the text as input"
        )
    answer = _pop_turn(spoken, "assistant")
    return _pop_turn(spoken, "user"), answer


def _pop_turn(spoken: list[tuple[str, str]], role: str) -> str:
    texts = []
    while spoken and spoken[-1][0] == role:
        texts.append(spoken.pop()[1])
    return "\n".join(text for text in reversed(texts) if text)


def _read_message(index: int, message: Any) -> tuple[str | None, str]:
    """Return the role, None where it is neither of the two sides, and the text of a message."""
    place = f"messages[{index}]"
    if not isinstance(message, Mapping):
        raise invalid(place, "must be an object with role and content")
    role = message.get("role")
    if role not in ROLES:
        raise invalid(f"{place}.role", f"must be one of {', '.join(ROLES)}")
    if role not in ("user", "assistant"):
        return None, ""
    content = message.get("content")
    if content is None and role == "assistant":  # it called a tool, or refused in a field of its own
        content = "" if message.get("refusal") is None else message["refusal"]
    return role, read_content(content, f"{place}.content")


def read_content(content: Any, place: str) -> str:
    """Return the text of a string or of OpenAI's list of text parts.

    Raises:
        RequestError: anything else, such as an image.
    """
    if isinstance(content, str):
        return content
    if not isinstance(content, Sequence) or not content:
        raise invalid(place, "must be text, or a list of text parts")
    return "\n".join(_read_part(part, f"{place}[{index}]") for index, part in enumerate(content))


def _read_part(part: Any, place: str) -> str:
    if not isinstance(part, Mapping) or not isinstance(part.get("type"), str):
        raise invalid(place, "must be an object with type and text")
    if part["type"] not in TEXT_PARTS:
        raise invalid(f"{place}.type", "only text can be judged; this classifier reads no images, audio or files")
    text = part.get("refusal" if part["type"] == "refusal" else "text")
    if not isinstance(text, str):
        raise invalid(f"{place}.text", "must be text")
    return text
