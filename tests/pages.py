"""Evaluations made up for the report: hostile texts, and as many rows as a test split has."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from qlora_moderation.analysis import analyse
from qlora_moderation.metadata import write_json
from qlora_moderation.predictions import Predictions, write_predictions
from qlora_moderation.report import write_report
from qlora_moderation.taxonomy import Taxonomy
from qlora_moderation.thresholds import Thresholds

HOSTILE = [
    "<script>window.hacked = 1</script>",
    "</script><script>window.hacked = 2</script>",
    "<img src=x onerror='window.hacked = 3'>",
    "<svg/onload=window.hacked=4>",
    "{{7*7}} ${7*7} <%= 7*7 %> {% raw %}",
    "@@DATA@@ @@BODY@@ @@SCRIPT@@",
    "<!-- <script> -->",
    "a\u2028b\u2029c\x00d\u202eabc",
    "'\"><b onmouseover=window.hacked=5>bold</b>",
    "</textarea></style></title><plaintext>",
    "javascript:window.hacked=6",
    "&lt;script&gt; &amp; &#60;",
    "]]><script>window.hacked = 7</script>",
    "\\u003cscript\\u003ewindow.hacked = 8\\u003c/script\\u003e",
]


def make_evaluation(directory: Path, size: int, replicates: int = 20, hostile: bool = True) -> Predictions:
    """Write an evaluation with its report; every text, model and moderator is hostile."""
    taxonomy = Taxonomy()
    rng = np.random.default_rng(0)
    count = len(taxonomy.categories)
    texts = HOSTILE if hostile else [f"an answer about the matter at hand, number {i}" for i in range(97)]
    votes = (rng.random((size, count)) < 0.08).astype(float)
    raw = np.clip(np.where(votes > 0, 0.6, 0.15) + rng.normal(0, 0.2, (size, count)), 0.001, 0.999)
    thresholds = Thresholds.uniform(0.5, count)
    judgement = thresholds.judge(raw)
    predictions = Predictions(
        prompts=[f"{i // 3}: {texts[i % len(texts)]}" for i in range(size)],
        responses=[texts[(i * 5) % len(texts)] for i in range(size)],
        models=[("<b>one</b>", "two & three", "$x_1$")[i % 3] for i in range(size)],
        judgement=judgement,
        first_window=judgement,
        windows=np.ones(size, dtype=np.int64),
        truncated=np.zeros(size, dtype=bool),
        votes=votes,
        flagged_vote=votes.max(axis=1),
        annotations=np.ones(size, dtype=np.int64),
        verdicts={"<i>human</i>": np.where(rng.random(size) < 0.1, np.nan, votes.max(axis=1))},
        known_prompt=rng.random(size) < 0.2,
        known_pair=np.zeros(size, dtype=bool),
    )
    directory.mkdir(parents=True, exist_ok=True)
    result = {
        "data": {
            "name": "<script>window.hacked=9</script>.jsonl",
            "rows": size,
            "pairs": size,
            "skipped_rows": 0,
            "pairs_in_several_windows": 0,
            "truncated_pairs": 0,
        },
        "model": {"kind": "merged", "method": "qlora", "base_model": "<b>base</b>", "warnings": ["<u>careful</u>"]},
        "settings": {"thresholds": thresholds.to_dict(taxonomy), "max_length": 512, "long_text": "window"},
        **analyse(predictions, thresholds, taxonomy.categories, replicates, 0),
        "baselines": {},
    }
    write_predictions(directory / "predictions.jsonl", predictions, taxonomy.categories)
    write_json(directory / "metrics.json", result)
    write_report(directory)
    return predictions
