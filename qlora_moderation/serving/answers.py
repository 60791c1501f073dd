"""Verdicts in the words of OpenAI's schema.

In: the scores of a request's pairs and the rule in use. Out: the JSON of the answer, and the counts of what was said.
"""

from __future__ import annotations

import secrets
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from qlora_moderation.serving.instruments import Instruments
from qlora_moderation.serving.requests import Pair
from qlora_moderation.serving.rule import Rule

if TYPE_CHECKING:
    from qlora_moderation.scoring import Scores

_OPENAI_NAMES = {
    "harassment_threatening": "harassment/threatening",
    "hate_threatening": "hate/threatening",
    "illicit_violent": "illicit/violent",
    "self_harm": "self-harm",
    "self_harm_instructions": "self-harm/instructions",
    "self_harm_intent": "self-harm/intent",
    "sexual_minors": "sexual/minors",
    "violence_graphic": "violence/graphic",
}


def build_answer(
    model: str, names: Sequence[str], rule: Rule, pairs: Sequence[Pair], scores: Scores, instruments: Instruments
) -> dict[str, Any]:
    """Return the answer to a request, and count its verdicts.

    Args:
        model: name of the model.
        names: the C categories.
        rule: what decides.
        pairs: N pairs.
        scores: of these pairs.
        instruments: where they are counted.
    """
    judged = rule.thresholds.judge(scores.probabilities)
    instruments.count_verdicts(names, judged, [pair.context for pair in pairs])
    instruments.count_long(scores.windows, scores.truncated)
    results = [
        {
            "flagged": bool(judged.flagged[i]),
            "categories": dict(zip(names, judged.categories[i].tolist(), strict=True)),
            "category_scores": dict(zip(names, judged.probabilities[i].tolist(), strict=True)),
            "category_applied_input_types": {name: ["text"] for name in names},
            "risk": float(judged.risk[i]),
            "windows": int(scores.windows[i]),
            "truncated": bool(scores.truncated[i]),
            "context_used": pair.context,
        }
        for i, pair in enumerate(pairs)
    ]
    return {"id": f"modr-{secrets.token_hex(12)}", "model": model, "results": results, "thresholds": rule.shown}


def add_openai_names(answer: dict[str, Any]) -> None:
    """Repeat categories under OpenAI's spelling where its Python client would drop ours.

    That client has attributes such as `self_harm`, which it fills from `self-harm` alone: a category that is called like the
    attribute itself is lost in it without a word.
    """
    for result in answer["results"]:
        for part in ("categories", "category_scores", "category_applied_input_types"):
            values = result[part]
            values.update({_OPENAI_NAMES[name]: values[name] for name in _OPENAI_NAMES.keys() & values})
