"""A text that is too long for the model as overlapping windows, each with the whole template.

In: question and answer. Out: lists of ids, without begin and end. Step 4 of the straight line.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from tokenizers import Tokenizer

from qlora_moderation.taxonomy import Taxonomy

_NEUTRAL = ("a", "0", "z", "_", "中")
"""Texts that the template's parts are looked at beside; one of them merges with none of its borders."""


class WindowCutter:
    """Cuts long pairs.

    Args:
        backend: turns text into ids and knows nothing of special or added tokens.
        taxonomy: holds the template.
    """

    def __init__(self, backend: Tokenizer, taxonomy: Taxonomy) -> None:
        self._backend, self._taxonomy = backend, taxonomy
        self._plain = self._find_plain_parts()

    def cut(self, question: str, answer: str, most: int) -> list[list[int]]:
        """Return windows of at most `most` ids that together hold every token of the pair.

        The question keeps half of the room, or more where the answer leaves it. A token that crosses a border holds the end of
        the one and the start of the other (`:N` of `ASSISTANT:No`) and belongs to the text; in windows without it the template
        has its own token there, so that no text chooses what the model reads for the template.
        """
        (before, question_ids, between, answer_ids, after), _ = self._cut_by_part(question, answer)
        own = before, between, after
        plain = [part or mine for part, mine in zip(self._plain, own, strict=True)]
        room = most - sum(max(map(len, both)) for both in zip(own, plain, strict=True))
        question_room = min(len(question_ids), max(room // 2, room - len(answer_ids)))
        questions = _stretches(question_ids, question_room)
        answers = _stretches(answer_ids, room - question_room)
        windows = []
        for q, a in [(0, a) for a in range(len(answers))] + [(q, 0) for q in range(1, len(questions))]:
            whole = (True, q == 0), (q == len(questions) - 1, a == 0), (a == len(answers) - 1, True)
            before, between, after = map(_complete, own, plain, whole)
            windows.append([*before, *questions[q], *between, *answers[a], *after])
        return windows

    def _cut_by_part(self, question: str, answer: str) -> tuple[list[list[int]], list[list[tuple[int, int]]]]:
        """Cut ids and character offsets of a rendered text into before, question, between, answer, after."""
        encoding = self._backend.encode(self._taxonomy.render(question, answer), add_special_tokens=False)
        ids, offsets = encoding.ids, encoding.offsets
        before, between, _ = self._taxonomy.template_parts
        question_end = len(before) + len(question)
        answer_start = question_end + len(between)
        # a token that crosses a border belongs to the user's text, so that no character of it is lost
        cuts = [
            _first(offsets, lambda start, end: end > len(before)),
            _first(offsets, lambda start, end: start >= question_end),
            _first(offsets, lambda start, end: end > answer_start),
            _first(offsets, lambda start, end: start >= answer_start + len(answer)),
        ]
        for i in range(1, len(cuts)):
            cuts[i] = max(cuts[i], cuts[i - 1])
        spans = list(zip([0, *cuts], [*cuts, len(ids)], strict=True))
        return [ids[start:end] for start, end in spans], [offsets[start:end] for start, end in spans]

    def _find_plain_parts(self) -> list[list[int]]:
        """Return the ids of before, between, after beside a text that takes no character of them; no ids without such a text.

        A space before a text may be missing: words bring theirs along.
        """
        found: list[list[int]] = [[], [], []]
        for text in _NEUTRAL:
            ids, offsets = self._cut_by_part(text, text)
            place = 0
            for index, part in enumerate(self._taxonomy.template_parts):
                mine = offsets[2 * index]
                end = place + len(part) - (index < 2 and part.endswith(" "))
                if not found[index] and mine and (mine[0][0], mine[-1][1]) == (place, end):
                    found[index] = ids[2 * index]
                place += len(part) + len(text)
        return found


def _complete(own: list[int], plain: list[int], whole: tuple[bool, bool]) -> list[int]:
    """Return a part of the template as this text has it, with what a border's token took where that token is not there.

    Args:
        own, plain: ids, the one as it stands in this text, the other beside texts that take nothing of it.
        whole: whether the stretch before this part has its last token, the one behind it its first.
    """
    if all(whole):
        return own
    for start in range(len(plain) - len(own) + 1) if own else ():
        stop = start + len(own)
        if plain[start:stop] == own:
            return plain[start if whole[0] else 0 : stop if whole[1] else None]
    return plain


def _first(offsets: Sequence[tuple[int, int]], holds: Callable[[int, int], bool]) -> int:
    return next((i for i, (start, end) in enumerate(offsets) if holds(start, end)), len(offsets))


def _stretches(ids: list[int], size: int) -> list[list[int]]:
    """Cut ids into stretches of `size` that overlap by a quarter; the last one ends with the last id.

    They overlap by three tokens at least, where they have four: a character of four tokens then lies in one of them whole.
    """
    if len(ids) <= size:
        return [ids]
    step = max(1, size - max(size // 4, 3))
    starts = [*range(0, len(ids) - size, step), len(ids) - size]
    return [ids[start : start + size] for start in starts]
