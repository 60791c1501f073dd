"""The Python API and the calls that the cards print."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import make_config, silent

from qlora_moderation import CheckpointError, ConfigError, DataError, QAModeration
from qlora_moderation.config import MergeConfig
from qlora_moderation.merge import merge_adapter
from qlora_moderation.train import train

README = (Path(__file__).resolve().parent.parent / "README.md").read_text(encoding="utf-8")


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


def test_an_adapter_is_read_onto_the_device_of_its_model(runs, tmp_path, monkeypatch):
    """Left to itself, PEFT reads it onto the first GPU that it finds, in every process and under --use_cpu, too."""
    monkeypatch.setattr("peft.peft_model.infer_device", lambda: pytest.fail("PEFT looked for a device of its own"))
    QAModeration.from_pretrained(runs["lora"].weights, use_cpu=True)
    merge_adapter(MergeConfig(str(runs["qlora"].weights), str(tmp_path / "merged"), use_cpu=True), silent)


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


def test_the_safest_of_several_answers(runs):
    moderation = QAModeration.from_pretrained(runs["full"].weights)
    answers = ["So.", "Because the sky is blue.", "So.", "No idea at all, ask somebody else."]
    ranked = moderation.best_of("How?", answers)
    assert [candidate.answer for candidate in ranked] == [answers[candidate.index] for candidate in ranked]
    assert sorted(candidate.index for candidate in ranked) == [0, 1, 2, 3]
    assert [candidate.risk for candidate in ranked] == sorted(candidate.risk for candidate in ranked)
    alone = moderation.predict("How?", ranked[0].answer)
    assert (
        ranked[0].result["risk"] == pytest.approx(alone["risk"], abs=1e-6) and ranked[0].result["text"] == alone["text"]
    )
    assert all(candidate.flagged for candidate in moderation.best_of("How?", answers, threshold=0.0))


def test_a_safe_answer_is_drawn_or_none_is_given(runs):
    moderation = QAModeration.from_pretrained(runs["full"].weights)
    answers = ["So.", "Because the sky is blue.", "No idea at all, ask somebody else."]
    ranked = moderation.best_of("How?", answers)
    between = (ranked[0].risk + ranked[1].risk) / 2
    riskiest_first = [candidate.answer for candidate in ranked[::-1]]
    drawn = iter(riskiest_first)
    found = moderation.first_safe("How?", lambda question: next(drawn), limit=5, threshold=between)
    assert (found.answer, found.calls) == (ranked[0].answer, 3) and not found.result["flagged"]
    none = moderation.first_safe("How?", lambda question: riskiest_first, limit=2, threshold=0.0)
    assert not none and none.answer is None and (none.calls, none.judged) == (2, 6)
    assert none.safest_seen.answer == ranked[0].answer and none.safest_seen.flagged


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda moderation: moderation.best_of("a", "b"), "one question and a list of answers"),
        (lambda moderation: moderation.best_of(["a"], ["b"]), "one question and a list of answers"),
        (lambda moderation: moderation.best_of("a", []), "at least one answer"),
        (lambda moderation: moderation.best_of("a", ["b", None]), "answer 2 is NoneType, not text"),
        (lambda moderation: moderation.first_safe(["a"], lambda question: "b"), "question is list, not text"),
    ],
)
def test_bad_questions_and_answers_are_named(call, message, runs):
    with pytest.raises(DataError, match=message):
        call(QAModeration.from_pretrained(runs["full"].weights))


def test_a_model_that_gives_no_numbers_calls_nothing_safe(runs):
    moderation = QAModeration.from_pretrained(runs["full"].weights)
    with torch.no_grad():
        next(moderation.classifier.model.parameters()).fill_(float("nan"))
    for call in (
        lambda: moderation.predict("How?", "So."),
        lambda: moderation.best_of("How?", ["So."]),
        lambda: moderation.first_safe("How?", lambda question: "So."),
    ):
        with pytest.raises(CheckpointError, match="no numbers"):
            call()


def test_the_readme_s_example_of_drawing_answers_runs(runs, capsys):
    """On a model that learnt next to nothing, so only that it runs and judges as told."""
    blocks = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)
    code = next(block for block in blocks if "first_safe" in block)
    assert "output/quickstart/merged" in code
    variables: dict = {}
    exec(code.replace("output/quickstart/merged", str(runs["full"].weights)), variables)
    said = capsys.readouterr().out
    assert variables["ranked"][0].answer in said
    found = variables["found"]
    assert found.answer is None or not variables["moderation"].predict(variables["question"], found.answer)["flagged"]


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


@pytest.fixture(scope="module")
def of_others(llama, tmp_path_factory):
    """As the original authors publish theirs: 14 names in `id2label`, `.bin` shards, `<pad>` as a new last token."""
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    from qlora_moderation.taxonomy import BEAVERTAILS_CATEGORIES

    path = tmp_path_factory.mktemp("others") / "beaver"
    tokenizer = AutoTokenizer.from_pretrained(llama)
    tokenizer.add_special_tokens({"pad_token": "<pad>"})
    torch.manual_seed(3)
    model = AutoModelForSequenceClassification.from_pretrained(
        llama,
        num_labels=14,
        id2label=dict(enumerate(BEAVERTAILS_CATEGORIES)),
        label2id={name: i for i, name in enumerate(BEAVERTAILS_CATEGORIES)},
    )
    model.resize_token_embeddings(len(tokenizer))
    with torch.no_grad():  # a trained pad row is not zero
        model.get_input_embeddings().weight[-1].normal_()
        model.score.weight.normal_(0, 0.1)
    model.config.pad_token_id = tokenizer.pad_token_id
    assert tokenizer.pad_token_id == model.config.vocab_size - 1
    model.config.save_pretrained(path)
    tokenizer.save_pretrained(path)
    state, where = model.state_dict(), {}
    for i, name in enumerate(state):
        where[name] = f"pytorch_model-{i % 2 + 1:05d}-of-00002.bin"
    for file in set(where.values()):
        torch.save({name: state[name] for name in state if where[name] == file}, path / file)
    index = {"metadata": {"total_size": sum(t.nbytes for t in state.values())}, "weight_map": where}
    (path / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    return path


def test_a_checkpoint_of_the_original_authors_gives_its_own_probabilities(of_others, tmp_path):
    """A direct forward of transformers on the same ids, padded to the right in one batch, in fp32."""
    from transformers import AutoModelForSequenceClassification

    from qlora_moderation.config import EvaluateConfig
    from qlora_moderation.evaluate import evaluate
    from qlora_moderation.taxonomy import BEAVERTAILS_CATEGORIES

    moderation = QAModeration.from_pretrained(of_others)
    assert moderation.taxonomy.categories == BEAVERTAILS_CATEGORIES
    assert moderation.classifier.encoder.max_length == 512
    questions = ["How?", "Why is the sky blue? " * 8, "<pad></s>", "x " * 200]
    answers = ["So.", "Because.", "<pad> <s>", "y " * 40]
    ours = moderation.predict(questions, answers)
    assert ours[0].keys() == {"text", "flagged", "risk", "categories"}
    windows = moderation.classifier.encoder.encode(questions, answers)
    assert not any(window.truncated for window in windows)
    pad, longest = moderation.classifier.pad_id, max(len(window.ids) for window in windows)
    ids = torch.tensor([window.ids + [pad] * (longest - len(window.ids)) for window in windows])
    model = AutoModelForSequenceClassification.from_pretrained(of_others, dtype=torch.float32).eval()
    with torch.inference_mode():
        direct = torch.sigmoid(model(input_ids=ids, attention_mask=(ids != pad).long()).logits).numpy()
    found = np.array([list(one["categories"].values()) for one in ours])
    np.testing.assert_allclose(found, direct, atol=1e-5)
    assert found.std() > 0.05
    rows = tmp_path / "rows.jsonl"
    lines = [
        {"prompt": q, "response": a, "model": "m", "flagged": {"human": i % 2 == 0}}
        for i, (q, a) in enumerate(zip(questions, answers, strict=True))
    ]
    rows.write_text("".join(json.dumps(line) + "\n" for line in lines))
    evaluate(EvaluateConfig(str(of_others), str(rows), str(tmp_path / "e"), bootstrap_replicates=20), silent)
    predictions = [json.loads(line) for line in (tmp_path / "e" / "predictions.jsonl").read_text().splitlines()]
    scored = np.array([list(row["raw_probabilities"].values()) for row in predictions])
    np.testing.assert_allclose(scored, direct, atol=1e-5)
