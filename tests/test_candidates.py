"""Several answers to one question: their order, and rejection sampling that never passes an unsafe answer off as safe."""

from __future__ import annotations

import dataclasses

import pytest

from qlora_moderation.candidates import rank_candidates, search_safe
from qlora_moderation.errors import ConfigError, DataError

RISKS = {"mild": 0.2, "fine": 0.1, "also fine": 0.1, "bad": 0.8, "worse": 0.9, "edge": 0.4}


def judge(answers):
    """Flag above 0.4; a text stands for its own risk."""
    return [{"flagged": RISKS[answer] > 0.4, "risk": RISKS[answer], "text": answer} for answer in answers]


def search(*batches, limit=8):
    """Return what is found when the generator gives these batches, one a call, and the questions that it was asked."""
    asked = []

    def generate(question):
        asked.append(question)
        return batches[len(asked) - 1]

    return search_safe("why?", generate, limit, judge), asked


def test_the_lowest_risk_stands_first_and_equals_keep_their_order():
    answers = ["bad", "also fine", "worse", "fine", "mild"]
    ranked = rank_candidates(answers, judge(answers))
    assert [candidate.answer for candidate in ranked] == ["also fine", "fine", "mild", "bad", "worse"]
    assert [candidate.index for candidate in ranked] == [1, 3, 4, 0, 2]
    assert [candidate.flagged for candidate in ranked] == [False, False, False, True, True]
    assert all(
        candidate.result["text"] == candidate.answer and candidate.risk == RISKS[candidate.answer]
        for candidate in ranked
    )


def test_a_flagged_answer_never_stands_before_one_that_is_not():
    # rule `max` decides on raw probabilities, so that risks at the very threshold may tie or cross by rounding
    results = [{"flagged": True, "risk": 0.4}, {"flagged": False, "risk": 0.4000000001}]
    assert [candidate.index for candidate in rank_candidates(["a", "b"], results)] == [1, 0]


def test_the_first_answer_that_is_not_flagged_ends_the_search():
    found, asked = search("worse", "mild", "fine")
    assert found and found.found and (found.answer, found.calls, found.judged) == ("mild", 2, 2)
    assert found.result["risk"] == 0.2 and asked == ["why?"] * 2
    assert (found.safest_seen.answer, found.safest_seen.index) == ("mild", 1)


def test_of_a_batch_the_first_safe_one_is_taken_not_the_safest():
    found, _ = search(["bad", "worse"], ["bad", "mild", "fine"])
    assert (found.answer, found.calls, found.judged) == ("mild", 2, 5)
    assert (found.safest_seen.answer, found.safest_seen.index) == ("fine", 4)


def test_an_unsafe_answer_is_never_returned_as_the_answer():
    found, asked = search("worse", ["worse", "bad"], "worse", limit=3)
    assert not found and not found.found and found.answer is None and found.result is None
    assert (found.calls, found.judged, len(asked)) == (3, 4, 3)
    assert found.safest_seen.flagged and (found.safest_seen.answer, found.safest_seen.index) == ("bad", 2)
    with pytest.raises(dataclasses.FrozenInstanceError):
        found.answer = found.safest_seen.answer


def test_the_generator_is_called_at_most_as_often_as_allowed():
    found, asked = search("bad", "fine", limit=1)
    assert not found and len(asked) == 1


def test_any_iterable_of_texts_will_do():
    assert search(("bad", "fine"))[0].answer == "fine"
    assert search(text for text in ("worse", "mild"))[0].answer == "mild"


@pytest.mark.parametrize("given", [[], None, 3, b"fine", {"fine": 1}, ["fine", None], iter(())])
def test_what_is_no_text_is_named_with_its_call(given):
    with pytest.raises(DataError, match=r"generate gave .* in call 2; it must give a text"):
        search("bad", given)


@pytest.mark.parametrize("limit", [0, -1, 2.0, True])
def test_a_limit_is_a_whole_number(limit):
    with pytest.raises(ConfigError, match="at least 1"):
        search("fine", limit=limit)
