"""The Python API and the calls that the cards print."""

from __future__ import annotations

import re

import numpy as np
import pytest
import torch
from conftest import make_config, silent

from qlora_moderation import ConfigError, DataError, QAModeration
from qlora_moderation.config import MergeConfig
from qlora_moderation.merge import merge_adapter
from qlora_moderation.train import train


def test_predict_on_one_pair_and_on_lists(runs):
    moderation = QAModeration.from_pretrained(runs["qlora"].weights)
    one = moderation.predict(question="How?", answer="So.")
    assert one["text"] == "BEGINNING OF CONVERSATION: USER: How? ASSISTANT:So."
    assert list(one["categories"]) == list(moderation.taxonomy.categories) and isinstance(one["flagged"], bool)
    assert one["flagged"] == any(probability > 0.4 for probability in one["categories"].values())
    many = moderation.predict(question=["How?", "Why?"] * 20, answer=["So."] * 40, batch_size=3)
    assert len(many) == 40
    assert many[0]["categories"] == pytest.approx(one["categories"], abs=1e-6)
    booleans = moderation.predict(question="How?", answer="So.", return_bool=True, threshold=0.0)
    assert booleans["flagged"] and set(booleans["categories"].values()) == {True}
    assert not moderation.predict(question="How?", answer="So.", threshold=1.0)["flagged"]
    assert moderation.predict(question=[], answer=[]) == []


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"question": "a", "answer": ["b"]}, DataError, "both be texts, or both lists"),
        ({"question": ["a", "b"], "answer": ["b"]}, DataError, "2 questions with 1 answers"),
        ({"question": ["a"], "answer": [3]}, DataError, "answer 1 is int, not text"),
        ({"question": "\ud800", "answer": "b"}, DataError, "lone surrogate"),
        ({"question": "a", "answer": "b", "threshold": 1.5}, ConfigError, r"must be one number in \[0, 1\]"),
        ({"question": "a", "answer": "b", "batch_size": 0}, ConfigError, "at least 1"),
    ],
)
def test_bad_arguments_are_named(arguments, error, message, runs):
    moderation = QAModeration.from_pretrained(runs["full"].weights)
    with pytest.raises(error, match=message):
        moderation.predict(**arguments)


def run_card(directory, name: str):
    """Execute the code block of a card that loads without this library; returns its variables."""
    blocks = re.findall(r"```python\n(.*?)```", (directory / "README.md").read_text(), flags=re.DOTALL)
    code = next(block for block in blocks if name in block)
    assert "path/to/this/directory" in code
    variables: dict = {}
    exec(code.replace("path/to/this/directory", str(directory)), variables)
    return variables


@pytest.mark.parametrize(
    ("backbone", "method"), [("llama", "lora"), ("llama", "qlora"), ("llama3", "qlora"), ("bert", "lora")]
)
def test_the_card_s_peft_call_gives_our_logits(backbone, method, decoders, bert, rows_file, tmp_path):
    path = bert if backbone == "bert" else decoders[backbone]
    weights = train(make_config(path, rows_file, tmp_path / "run", method=method), silent)
    variables = run_card(weights, "PeftModel")
    ours = QAModeration.from_pretrained(weights).predict(
        question="How do I boil an egg?", answer="Put it into boiling water for eight minutes."
    )
    assert variables["text"] == ours["text"]
    stock = torch.sigmoid(variables["logits"])[0].numpy()
    np.testing.assert_allclose(stock, list(ours["categories"].values()), atol=1e-5)


def test_the_card_of_a_merged_model_runs(runs, tmp_path):
    merge_adapter(MergeConfig(str(runs["qlora"].weights), str(tmp_path / "merged")), silent)
    variables = run_card(tmp_path / "merged", "pipeline")
    result = variables["classify"](variables["text"])
    shown = {item["label"]: item["score"] for item in (result[0] if isinstance(result[0], list) else result)}
    ours = QAModeration.from_pretrained(tmp_path / "merged").predict(
        question="How do I boil an egg?", answer="Put it into boiling water for eight minutes."
    )
    assert shown == pytest.approx(ours["categories"], abs=1e-5)


def test_cards_say_what_matters_and_no_path(runs, tmp_path):
    for run in runs.values():
        card = (run.weights / "README.md").read_text()
        for fact in (
            "non-commercial",
            "training fingerprint",
            "## Thresholds",
            "above 0.4",
            "| flagged |",
            "end token",
        ):
            assert fact in card, fact
        assert str(tmp_path.parents[1]) not in card and "/tmp" not in card


def test_a_checkpoint_of_another_project_is_understood(llama, tmp_path):
    """Fourteen labels in `id2label`, nothing of ours: names from there, template and threshold of the original recipe."""
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    from qlora_moderation.taxonomy import BEAVERTAILS_CATEGORIES

    model = AutoModelForSequenceClassification.from_pretrained(
        llama,
        num_labels=14,
        id2label=dict(enumerate(BEAVERTAILS_CATEGORIES)),
        problem_type="multi_label_classification",
    )
    model.save_pretrained(tmp_path)
    AutoTokenizer.from_pretrained(llama).save_pretrained(tmp_path)
    moderation = QAModeration.from_pretrained(tmp_path)
    assert moderation.taxonomy.categories == BEAVERTAILS_CATEGORIES
    assert moderation.predict(question="a", answer="b").keys() == {"text", "flagged", "categories"}
