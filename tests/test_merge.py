"""Merging: the trained function, proven, or nothing at all."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from conftest import make_config, silent
from safetensors.torch import load_file, save_file
from transformers import AutoModelForSequenceClassification, pipeline

from qlora_moderation.classifier import load_classifier
from qlora_moderation.config import MergeConfig
from qlora_moderation.errors import CheckpointError, ConfigError
from qlora_moderation.merge import merge_adapter
from qlora_moderation.merged_weights import LoraUpdate
from qlora_moderation.metadata import read_json
from qlora_moderation.proof import MergeError
from qlora_moderation.scoring import score_pairs
from qlora_moderation.train import train

REPORT_OF_EQUALS = {"compared": 1, "of": 1, "elements": 1, "different_elements": 0, "largest_excess": 0.0}
QUESTIONS = [f"question {i} " * (i + 1) for i in range(8)]
ANSWERS = ["an answer", "</s> <unk> <s>", "a\x00b", "ünï", "", "x " * 20, "Sure.", "{answer}"]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_types_are_gated_and_reported(dtype, runs, tmp_path):
    merge_adapter(MergeConfig(str(runs["qlora"].weights), str(tmp_path / "m"), dtype=dtype), silent)
    report = read_json(tmp_path / "m" / "merge_report.json")
    assert report["base"] == "dequantized" and report["gated"] and report["dtype"] == dtype
    assert report["largest_logit_difference"] < (1e-4 if dtype == "float32" else 0.1)
    state = load_file(tmp_path / "m" / "model.safetensors")
    assert state["score.weight"].dtype == torch.float32
    assert state["model.layers.0.mlp.up_proj.weight"].dtype == getattr(torch, dtype)
    assert not any("lm_head" in key or "lora" in key for key in state)
    config = read_json(tmp_path / "m" / "config.json")
    assert config["problem_type"] == "multi_label_classification" and config["pad_token_id"] == 0
    assert len(config["id2label"]) == 14 and "quantization_config" not in config
    written = load_classifier(tmp_path / "m", "float32")
    assert torch.equal(written.model.classifier.score.weight, state["score.weight"])


def test_merging_into_the_original_weights_is_reported_and_not_gated(runs, tmp_path):
    log: list[str] = []
    config = MergeConfig(str(runs["qlora"].weights), str(tmp_path / "m"), base="original")
    merge_adapter(config, log.append)
    report = read_json(tmp_path / "m" / "merge_report.json")
    assert not report["gated"] and report["largest_logit_difference"] > 1e-3
    assert any(line.startswith("warning: merged into the original weights") for line in log)


def test_a_wrong_merge_fails_and_leaves_nothing(runs, tmp_path, monkeypatch):
    """The proof on texts and the proof on tensors each notice it alone."""
    import qlora_moderation.proof as proof

    whole = LoraUpdate.apply
    monkeypatch.setattr(LoraUpdate, "apply", lambda update, *rows: 20 * whole(update, *rows))
    for tensors, message in ((True, "differ from those merged in memory"), (False, "is not the trained one")):
        if not tensors:
            monkeypatch.setattr(proof, "_compare_tensors", lambda *_: {**REPORT_OF_EQUALS})
        for dtype in ("float32", "bfloat16"):
            with pytest.raises(MergeError, match=message):
                merge_adapter(MergeConfig(str(runs["qlora"].weights), str(tmp_path / "m"), dtype=dtype), silent)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("method", "options"),
    [
        ("lora", {"use_dora": True}),
        ("qlora", {"use_rslora": True}),
        ("qlora", {"target_modules": ("q_proj", "down_proj")}),
    ],
)
def test_variants_of_lora_merge(method, options, llama, rows_file, tmp_path):
    weights = train(make_config(llama, rows_file, tmp_path / "run", method=method, **options), silent)
    before = score_pairs(load_classifier(weights), QUESTIONS, ANSWERS).logits
    merge_adapter(MergeConfig(str(weights), str(tmp_path / "m")), silent)
    np.testing.assert_allclose(
        score_pairs(load_classifier(tmp_path / "m"), QUESTIONS, ANSWERS).logits, before, atol=1e-4
    )


@pytest.mark.parametrize("method", ["lora", "qlora", "full"])
def test_a_new_pad_token_survives_save_merge_and_reload(method, decoders, rows_file, tmp_path):
    """The byte-level tokenizer has neither a pad nor an unknown token, as Llama 3's."""
    log: list[str] = []
    weights = train(make_config(decoders["llama3"], rows_file, tmp_path / "run", method=method), log.append)
    assert any("pad token: <pad> is new" in line for line in log)
    first = load_classifier(weights)
    rows = first.model.classifier.get_input_embeddings().weight
    assert first.pad_id == rows.shape[0] - 1 and not rows[first.pad_id].any()
    if method != "full":
        merge_adapter(MergeConfig(str(weights), str(tmp_path / "m")), silent)
        second = load_classifier(tmp_path / "m")
        rows = second.model.classifier.get_input_embeddings().weight
        assert second.pad_id == rows.shape[0] - 1 and not rows[second.pad_id].any()
        before, after = (score_pairs(one, QUESTIONS, ANSWERS).logits for one in (first, second))
        np.testing.assert_allclose(after, before, atol=1e-4)


@pytest.mark.parametrize("backbone", ["llama", "llama3"])
def test_a_stock_pipeline_gives_our_ids_and_probabilities(backbone, decoders, rows_file, tmp_path):
    weights = train(make_config(decoders[backbone], rows_file, tmp_path / "run", method="qlora"), silent)
    merge_adapter(MergeConfig(str(weights), str(tmp_path / "m")), silent)
    ours = load_classifier(tmp_path / "m")
    texts = [ours.taxonomy.render(*pair) for pair in zip(QUESTIONS, ANSWERS, strict=True)]
    classify = pipeline(
        "text-classification", model=str(tmp_path / "m"), top_k=None, function_to_apply="sigmoid", batch_size=4
    )
    windows = ours.encoder.encode(QUESTIONS, ANSWERS)
    assert [classify.tokenizer(text)["input_ids"] for text in texts] == [window.ids for window in windows]
    probabilities = score_pairs(ours, QUESTIONS, ANSWERS).probabilities
    for row, result in enumerate(classify(texts)):
        stock = {item["label"]: item["score"] for item in result}
        np.testing.assert_allclose([stock[name] for name in ours.taxonomy.categories], probabilities[row], atol=1e-5)


def test_the_merged_model_opens_without_this_library(runs, tmp_path):
    merge_adapter(MergeConfig(str(runs["lora"].weights), str(tmp_path / "m")), silent)
    model, report = AutoModelForSequenceClassification.from_pretrained(tmp_path / "m", output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"] and type(model).__name__.startswith("Llama")


def test_targets_and_adapters_that_do_not_fit_are_refused(runs, tmp_path):
    adapter = str(runs["lora"].weights)
    (tmp_path / "there").mkdir()
    (tmp_path / "there" / "file").write_text("kept")
    with pytest.raises(CheckpointError, match=r"exists; give another directory, or --overwrite"):
        merge_adapter(MergeConfig(adapter, str(tmp_path / "there")), silent)
    assert (tmp_path / "there" / "file").read_text() == "kept"
    with pytest.raises(ConfigError, match="was trained on plain weights"):
        merge_adapter(MergeConfig(adapter, str(tmp_path / "m"), base="dequantized"), silent)
    with pytest.raises(CheckpointError, match="holds no adapter_config"):
        merge_adapter(MergeConfig(str(tmp_path), str(tmp_path / "m")), silent)
    with pytest.raises(ConfigError, match="holds the adapter itself"):
        merge_adapter(MergeConfig(adapter, str(runs["lora"].directory), overwrite=True), silent)
    with pytest.raises(ConfigError, match="or lies in it"):
        merge_adapter(MergeConfig(adapter, f"{adapter}/merged", overwrite=True), silent)
    for target in (tmp_path / "there", tmp_path / "there" / "file"):
        with pytest.raises(CheckpointError, match="is no earlier merge"):
            merge_adapter(MergeConfig(adapter, str(target), overwrite=True), silent)
    assert (tmp_path / "there" / "file").read_text() == "kept"
    for _ in range(2):
        merge_adapter(MergeConfig(adapter, str(tmp_path / "m"), overwrite=True), silent)
    assert (tmp_path / "m" / "model.safetensors").is_file()


def test_a_damaged_adapter_is_named(runs, tmp_path):
    import shutil

    for number, text in enumerate(('{"base_model', "[]", "null", "{}", "")):
        adapter = tmp_path / str(number)
        shutil.copytree(runs["lora"].weights, adapter)
        (adapter / "adapter_config.json").write_text(text)
        with pytest.raises(CheckpointError, match=r"adapter_config\.json"):
            load_classifier(adapter)
    shutil.copytree(runs["lora"].weights, tmp_path / "empty")
    (tmp_path / "empty" / "adapter_model.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"adapter_model\.safetensors is missing"):
        load_classifier(tmp_path / "empty")
    with pytest.raises(CheckpointError, match=r"is a run directory; give .*adapter"):
        load_classifier(runs["lora"].directory)


def test_weights_that_the_type_cannot_hold_are_refused(llama, rows_file, tmp_path):
    weights = train(make_config(llama, rows_file, tmp_path / "run", max_steps=1), silent)
    state = load_file(weights / "adapter_model.safetensors")
    key = next(key for key in state if "lora_B" in key)
    state[key] = torch.full_like(state[key], 1e6)
    save_file(state, weights / "adapter_model.safetensors", metadata={"format": "pt"})
    with pytest.raises(MergeError, match="float16: cannot hold"):
        merge_adapter(MergeConfig(str(weights), str(tmp_path / "m"), dtype="float16"), silent)
    assert not (tmp_path / "m").exists()


def test_a_moved_or_truncated_base_is_named(runs, llama, tmp_path):
    import shutil

    adapter, base = tmp_path / "adapter", tmp_path / "base"
    shutil.copytree(runs["lora"].weights, adapter)
    shutil.copytree(llama, base)
    settings = json.loads((adapter / "adapter_config.json").read_text())
    settings["base_model_name_or_path"] = str(base)
    (adapter / "adapter_config.json").write_text(json.dumps(settings))
    load_classifier(adapter)
    weights = base / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:10_000])
    with pytest.raises(CheckpointError, match="its weights cannot be loaded"):
        load_classifier(adapter)
    shutil.rmtree(base)
    with pytest.raises(CheckpointError, match="is gone; name where it lies now"):
        load_classifier(adapter)
    assert load_classifier(adapter, base_model=str(llama)) is not None


@pytest.mark.parametrize("method", ["lora", "qlora"])
def test_a_bfloat16_run_is_merged_faithfully(method, llama, rows_file, tmp_path, monkeypatch):
    """As on CUDA: a bfloat16 base, fp32 adapters and head, NF4 rounded from bfloat16."""
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: True)
    options = {"method": method, "dtype": "bfloat16", "max_steps": 3}
    weights = train(make_config(llama, rows_file, tmp_path / "run", **options), silent)
    stored = load_file(weights / "adapter_model.safetensors")
    assert {value.dtype for value in stored.values()} == {torch.float32}
    for dtype in ("bfloat16", "float32"):
        network = load_classifier(weights, dtype).model.network
        assert network.base_model.model.score.modules_to_save["default"].weight.dtype == torch.float32
        assert network.get_base_model().model.norm.weight.dtype == getattr(torch, dtype)
        head = network.base_model.model.score.modules_to_save["default"].weight
        assert torch.equal(head, stored["base_model.model.score.weight"])
    merge_adapter(MergeConfig(str(weights), str(tmp_path / "m"), dtype="float32"), silent)
    report = read_json(tmp_path / "m" / "merge_report.json")
    assert report["gated"] and report["largest_logit_difference"] < 1e-5
