"""The laws of the house; each of these has been seen to fail on a deliberately broken line."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from conftest import logits_of, make_config

from qlora_moderation.batching import micro_batches
from qlora_moderation.classifier import load_classifier
from qlora_moderation.config import MergeConfig
from qlora_moderation.data import Pairs, load_pairs
from qlora_moderation.layout import build_micro_batch
from qlora_moderation.loss import compute_loss
from qlora_moderation.merge import merge_adapter
from qlora_moderation.metadata import load_metadata
from qlora_moderation.scoring import score_pairs
from qlora_moderation.taxonomy import Taxonomy
from qlora_moderation.thresholds import load_thresholds
from qlora_moderation.train import train


def step_gradient(
    classifier, pairs: Pairs, budget: int, row_wise: bool = False
) -> tuple[float, dict[str, torch.Tensor]]:
    """Loss and gradients of one step over all pairs, cut under a token budget."""
    model = classifier.model
    model.zero_grad()
    model.train()
    ids = [window.ids for window in classifier.encoder.encode(pairs.prompts, pairs.responses)]
    labels = torch.tensor(pairs.labels, dtype=torch.float32)
    weight = torch.tensor(pairs.weight, dtype=torch.float32)
    total = 0.0
    for members in micro_batches([len(text) for text in ids], budget, classifier.layout)[0]:
        batch = build_micro_batch([ids[i] for i in members], classifier.layout, classifier.pad_id, torch.device("cpu"))
        loss = compute_loss(model(batch), labels[members], weight[members], float(weight.sum()))
        loss.backward()
        total += float(loss.detach())
    return total, {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_same_gradient(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> None:
    assert one.keys() == other.keys()
    largest = max(float(gradient.abs().max()) for gradient in one.values())
    for name in one:
        torch.testing.assert_close(one[name], other[name], rtol=1e-4, atol=1e-5 * largest, msg=name)


@pytest.mark.parametrize("method", ["lora", "qlora", "full"])
def test_law_1_a_step_does_not_depend_on_how_it_is_cut(method, llama, build, rows_file):
    pairs = load_pairs(str(rows_file), Taxonomy()).take(range(24))
    variants = [
        {"layout": layout, "gradient_checkpointing": checkpointing}
        for layout, checkpointing in (("packed", "none"), ("padded", "selective"), ("packed", "all"))
    ]
    results = []
    for variant in variants:
        classifier = build(llama, method=method, **variant)
        with torch.no_grad():  # a fresh adapter has B = 0, which would leave half of its gradients at zero
            for name, parameter in classifier.model.named_parameters():
                if "lora_B" in name:
                    parameter.normal_(0, 0.05, generator=torch.Generator().manual_seed(len(name)))
        for budget in (128, 512, 100_000):
            results.append(step_gradient(classifier, pairs, budget))
    for loss, gradient in results[1:]:
        assert loss == pytest.approx(results[0][0], rel=1e-5)
        assert_same_gradient(results[0][1], gradient)


def test_law_1_the_token_budget_does_not_change_a_run(llama, rows_file, tmp_path):
    logits = []
    for budget in (128, 2048):
        config = make_config(llama, rows_file, tmp_path / str(budget), max_tokens_per_micro_batch=budget, max_steps=6)
        classifier = load_classifier(train(config, lambda line: None))
        logits.append(score_pairs(classifier, ["How?"] * 3, ["So.", "Never do that.", "Like this."]).logits)
    np.testing.assert_allclose(logits[0], logits[1], atol=1e-4)


def test_aggregated_annotations_give_the_gradient_of_all_rows(llama, build):
    labels = np.zeros((5, 14))
    labels[0, 2] = labels[1, 2] = labels[1, 5] = labels[3, 0] = 1
    prompts, responses = ["same"] * 3 + ["other"] * 2, ["answer"] * 3 + ["words"] * 2
    flagged = labels.max(axis=1)
    row_wise = Pairs(prompts, responses, labels, flagged, np.ones(5, dtype=np.int64), [""] * 5)
    aggregated = Pairs(
        ["same", "other"],
        ["answer", "words"],
        np.stack([labels[:3].mean(axis=0), labels[3:].mean(axis=0)]),
        np.array([2 / 3, 1 / 2]),
        np.array([3, 2]),
        ["", ""],
    )
    classifier = build(llama, method="full")
    rows, pairs = step_gradient(classifier, row_wise, 10_000), step_gradient(classifier, aggregated, 10_000)
    assert pairs[0] == pytest.approx(rows[0], rel=1e-5)
    assert_same_gradient(rows[1], pairs[1])


@pytest.mark.parametrize("name", ["llama", "llama3", "mistral", "qwen2", "windowed"])
def test_law_2_logits_do_not_depend_on_neighbours(name, decoders, build, texts):
    backbone = decoders[name]
    packed = build(backbone, layout="auto")
    assert packed.layout == ("padded" if name == "windowed" else "packed")
    padded = build(backbone, layout="padded")
    ids = [window.ids for window in packed.encoder.encode(texts[:12], [f"answer {i} " * i for i in range(12)])]
    alone = torch.cat([logits_of(padded, [text]) for text in ids])
    for classifier, order in itertools.product((packed, padded), ([*range(12)], [*reversed(range(12))], [3, 1, 7])):
        together = logits_of(classifier, [ids[i] for i in order])
        torch.testing.assert_close(together, alone[order], atol=1e-5, rtol=0)


def test_law_2_packed_logits_are_those_of_the_stock_forward(llama, build, texts):
    classifier = build(llama, method="full")
    ids = [window.ids for window in classifier.encoder.encode(texts[:6], texts[6:12])]
    packed = logits_of(classifier, ids)
    stock = build(llama, method="full", layout="padded").model.classifier
    with torch.no_grad():
        for row, text in enumerate(ids):
            torch.testing.assert_close(stock(torch.tensor([text])).logits[0], packed[row], atol=1e-5, rtol=0)


def test_law_2_training_time_evaluation_equals_evaluate(runs):
    from qlora_moderation.data import split_by_prompt
    from qlora_moderation.metadata import read_json
    from qlora_moderation.metrics import compute_metrics

    for run in runs.values():
        config_seed = 42
        classifier = load_classifier(run.weights)
        rows = next(line for line in (run.directory / "config.yaml").read_text().splitlines() if "train_data" in line)
        _, held_out = split_by_prompt(load_pairs(rows.split(": ")[1], classifier.taxonomy), 0.1, config_seed)
        scores = score_pairs(classifier, held_out.prompts, held_out.responses)
        metrics = compute_metrics(
            held_out.labels,
            held_out.flagged,
            classifier.thresholds.judge(scores.probabilities),
            classifier.taxonomy.categories,
        )
        stored = read_json(run.weights / "validation_metrics.json")
        assert metrics == pytest.approx(stored, abs=1e-6)


@pytest.mark.parametrize("method", ["lora", "qlora"])
def test_law_3_merged_equals_trained(method, runs, tmp_path):
    adapter = load_classifier(runs[method].weights)
    log: list[str] = []
    merge_adapter(MergeConfig(str(runs[method].weights), str(tmp_path / "merged")), log.append)
    merged = load_classifier(tmp_path / "merged")
    questions, answers = [f"question {i} " * (i + 1) for i in range(20)], [f"answer {i}" for i in range(20)]
    before, after = (score_pairs(classifier, questions, answers) for classifier in (adapter, merged))
    np.testing.assert_allclose(after.logits, before.logits, atol=1e-5)
    assert float(np.abs(before.logits).max()) > 0.01


def test_law_4_truncation_is_counted_and_windows_are_scored(llama, rows_file, build):
    classifier = build(llama, max_length=64)
    long_answer = "some words of an answer " * 60
    windows = classifier.encoder.windows(["Why?"], [long_answer])
    assert len(windows) > 3 and all(len(window.ids) <= 64 for window in windows)
    assert all(window.ids[-1] == classifier.tokenizer.eos_token_id for window in windows)
    cut = score_pairs(classifier, ["Why?", "Why?"], [long_answer, "no"], "truncate")
    whole = score_pairs(classifier, ["Why?", "Why?"], [long_answer, "no"], "window")
    assert cut.truncated.tolist() == [True, False] and whole.truncated.tolist() == [False, False]
    assert whole.windows.tolist() == [len(windows), 1]
    each = logits_of(classifier, [window.ids for window in windows])
    np.testing.assert_allclose(whole.logits[0], each.max(dim=0).values.numpy(), atol=1e-5)
    np.testing.assert_allclose(cut.logits[0], each[0].numpy(), atol=1e-5)


HOSTILE = [
    "</s>", "<s>", "<unk>", "<pad>", "[PAD]", "[SEP]", "[CLS]", "[MASK]", "<|begin_of_text|>", "<|end_of_text|>",
    "<|im_start|>system", "<|im_end|>", "<tool_call>", "<0x41>", "ASSISTANT:", "USER:", "BEGINNING OF CONVERSATION:",
    "\x00", "\x1b[0m", "\u202e", "\u200b", "{question}", "{answer}", "{}", "\r\n", "\ufeff", "▁", "</", "s>",
]  # fmt: skip


@pytest.mark.parametrize("name", ["llama", "llama3", "qwen2", "bert"])
@pytest.mark.parametrize("glue", ["{}", "a{}b", " {} ", "{}{}"])
def test_law_5_user_text_never_becomes_a_special_token(name, glue, decoders, bert, build):
    classifier = build(bert if name == "bert" else decoders[name], method="lora")
    encoder, tokenizer = classifier.encoder, classifier.tokenizer
    special = set(tokenizer.all_special_ids) | set(tokenizer.added_tokens_decoder)
    special.discard(tokenizer.unk_token_id)
    for text in HOSTILE:
        hostile = glue.format(text, text)
        for question, answer in ((hostile, "fine"), ("fine", hostile)):
            ids = encoder.encode([question], [answer])[0].ids
            inner = ids[len(encoder.begin_ids) : -len(encoder.end_ids)]
            assert not special.intersection(inner), (hostile, inner)
            assert ids[-len(encoder.end_ids) :] == encoder.end_ids
            if name == "llama":
                assert tokenizer.unk_token_id not in inner, hostile


def test_law_5_borders_do_not_move(llama, build):
    classifier = build(llama, max_length=64)
    backend = classifier.tokenizer
    for text in HOSTILE:
        question, answer = f"why {text} ", f"because {text} " * 30
        for window in classifier.encoder.windows([question], [answer]):
            shown = backend.decode(window.ids[1:-1])
            assert shown.startswith("BEGINNING OF CONVERSATION: USER: why"), shown
            assert " ASSISTANT:" in shown


def test_law_7_a_model_carries_its_meaning(runs, tmp_path):
    for method, run in runs.items():
        directories = [run.weights]
        if method != "full":
            merge_adapter(MergeConfig(str(run.weights), str(tmp_path / method)), lambda line: None)
            directories.append(tmp_path / method)
        for directory in directories:
            metadata = load_metadata(directory)
            assert metadata.taxonomy == Taxonomy() and metadata.max_length == 128
            assert load_thresholds(directory, metadata.taxonomy).per_category == (0.4,) * 14
            assert metadata.base_model and len(metadata.training["training_fingerprint"]) == 64
        assert (load_metadata(run.weights).quantization is not None) == (method == "qlora")
