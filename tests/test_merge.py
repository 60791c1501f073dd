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


def adapt(base, target, **options):
    """Write an adapter as PEFT writes one, with factors that are not zero, and what this library adds."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoTokenizer

    from qlora_moderation.metadata import ModelMetadata, Quantization
    from qlora_moderation.taxonomy import Taxonomy
    from qlora_moderation.thresholds import Thresholds

    quantized, rows = options.pop("quantized", None), options.pop("rows", None)
    taxonomy = Taxonomy()
    torch.manual_seed(1)  # the head is drawn, too
    model = AutoModelForSequenceClassification.from_pretrained(base, num_labels=14)
    model.config.pad_token_id = 0
    if rows is not None:
        model.resize_token_embeddings(rows)
    network = get_peft_model(model, LoraConfig(task_type="SEQ_CLS", **options))
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            if "lora_B" in name or "lora_embedding_A" in name:
                parameter.normal_(0, 0.05)
    network.peft_config["default"].base_model_name_or_path = str(base)
    network.save_pretrained(target)
    tokenizer = AutoTokenizer.from_pretrained(base)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.unk_token or tokenizer.eos_token
    tokenizer.save_pretrained(target)
    quantization = Quantization(*quantized) if quantized else None
    method = "qlora" if quantized else "lora"
    ModelMetadata(taxonomy, 128, method, "adapter", str(base), quantization=quantization).save(target)
    Thresholds.default(taxonomy).save(target, taxonomy)
    return target


@pytest.mark.parametrize(
    "options",
    [
        {"r": 4, "target_modules": "all-linear", "rank_pattern": {"q_proj": 2}, "alpha_pattern": {"down_proj": 3}},
        {"r": 4, "target_modules": ["v_proj"], "use_rslora": True, "use_dora": True},
        {"r": 4, "target_modules": r".*layers\.1\..*(up|gate)_proj", "quantized": (False, "bfloat16")},
        {"r": 4, "target_modules": ["q_proj"], "modules_to_save": ["score", "embed_tokens", "norm"], "quantized": (True, "float32")},  # noqa: E501
    ],
    ids=["patterns", "dora and rslora", "nf4 without double quantisation", "saved modules"],
)  # fmt: skip
def test_adapters_as_others_write_them_are_merged_tensor_by_tensor(options, llama, tmp_path):
    adapter = adapt(llama, tmp_path / "adapter", **options)
    log: list[str] = []
    merge_adapter(MergeConfig(str(adapter), str(tmp_path / "m")), log.append)
    report = read_json(tmp_path / "m" / "merge_report.json")
    assert report["route"] == "tensor by tensor" and report["gated"] and report["left_out"] == ["lm_head.weight"]
    assert report["tensors"]["compared"] == report["tensors"]["of"] == 21
    assert any(line == "left out of the base: lm_head.weight" for line in log)


@pytest.mark.parametrize("whole_bytes", [2**31, 0], ids=["whole", "layer by layer"])
def test_a_vocabulary_that_the_adapter_resized_comes_along(whole_bytes, llama, tmp_path, monkeypatch):
    import qlora_moderation.proof as proof

    monkeypatch.setattr(proof, "WHOLE_BYTES", whole_bytes)
    adapter = adapt(
        llama, tmp_path / "adapter", r=4, target_modules="all-linear", rows=640, quantized=(True, "float32")
    )
    saved = load_file(adapter / "adapter_model.safetensors")["base_model.model.model.embed_tokens.weight"]
    assert len(saved) == 640 > json.loads((llama / "config.json").read_text())["vocab_size"]
    merge_adapter(MergeConfig(str(adapter), str(tmp_path / "m")), silent)
    merged = load_file(tmp_path / "m" / "model.safetensors")
    assert torch.equal(merged["model.embed_tokens.weight"], saved.to(merged["model.embed_tokens.weight"].dtype))
    assert json.loads((tmp_path / "m" / "config.json").read_text())["vocab_size"] == 640
    report = read_json(tmp_path / "m" / "merge_report.json")
    assert report["route"] == "tensor by tensor" and report["largest_logit_difference"] < 1e-4


def as_bins(base, target, shards):
    """Copy a checkpoint as `.bin` files, as those of 2023 come."""
    import shutil

    shutil.copytree(base, target)
    state = load_file(target / "model.safetensors")
    (target / "model.safetensors").unlink()
    if shards == 1:
        torch.save(state, target / "pytorch_model.bin")
        return target
    names = list(state)
    where = {name: f"pytorch_model-{i % shards + 1:05d}-of-{shards:05d}.bin" for i, name in enumerate(names)}
    for file in set(where.values()):
        torch.save({name: state[name] for name in names if where[name] == file}, target / file)
    index = {"metadata": {"total_size": 1}, "weight_map": where}
    (target / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    return target


@pytest.mark.parametrize("shards", [1, 3])
def test_a_base_of_pickled_shards_gives_the_same_files(shards, llama, tmp_path):
    base = as_bins(llama, tmp_path / "base", shards)
    results = []
    for name, path in (("plain", llama), ("bins", base)):
        adapter = adapt(
            path, tmp_path / f"{name}-adapter", r=4, target_modules="all-linear", quantized=(True, "float32")
        )
        merge_adapter(MergeConfig(str(adapter), str(tmp_path / name)), silent)
        results.append((tmp_path / name / "model.safetensors").read_bytes())
    assert results[0] == results[1]


def test_a_base_that_only_transformers_can_read_is_merged_in_memory(llama, tmp_path):
    base = as_bins(llama, tmp_path / "base", 1)
    torch.save(torch.load(base / "pytorch_model.bin"), base / "pytorch_model.bin", _use_new_zipfile_serialization=False)
    adapter = adapt(base, tmp_path / "adapter", r=4, target_modules="all-linear")
    log: list[str] = []
    merge_adapter(MergeConfig(str(adapter), str(tmp_path / "m")), log.append)
    assert any("merging in memory: pytorch_model.bin is in the format of torch before 1.6" in line for line in log)
    assert read_json(tmp_path / "m" / "merge_report.json")["route"] == "in memory"
    other = adapt(llama, tmp_path / "other", r=4, target_modules="all-linear")
    merge_adapter(MergeConfig(str(other), str(tmp_path / "streamed")), silent)
    one, two = (load_file(tmp_path / name / "model.safetensors") for name in ("m", "streamed"))
    assert set(one) == set(two)
    for name in one:
        torch.testing.assert_close(one[name], two[name], rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("kind", ["bert", "gpt2", "embeddings"])
def test_other_architectures_and_layers_are_merged(kind, bert, llama, rows_file, texts, tmp_path):
    """An encoder saved without its prefix; Conv1D, which stores weights transposed; an adapter on the embedding."""
    if kind == "bert":
        adapter = train(make_config(bert, rows_file, tmp_path / "run", method="lora"), silent)
    elif kind == "gpt2":
        from conftest import llama3_tokenizer
        from transformers import GPT2Config, GPT2LMHeadModel

        tokenizer = llama3_tokenizer(texts)
        config = GPT2Config(vocab_size=len(tokenizer), n_embd=64, n_layer=2, n_head=4, n_positions=256)
        GPT2LMHeadModel(config).save_pretrained(tmp_path / "base")
        tokenizer.save_pretrained(tmp_path / "base")
        adapter = adapt(
            tmp_path / "base", tmp_path / "adapter", r=4, target_modules=["c_attn", "c_proj"], fan_in_fan_out=True
        )
    else:
        adapter = adapt(llama, tmp_path / "adapter", r=4, target_modules=["embed_tokens", "q_proj"])
    log: list[str] = []
    merge_adapter(MergeConfig(str(adapter), str(tmp_path / "m")), log.append)
    report = read_json(tmp_path / "m" / "merge_report.json")
    assert report["route"] == ("in memory" if kind == "embeddings" else "tensor by tensor")
    assert report["largest_logit_difference"] < 1e-4 and report["gated"]


@pytest.mark.parametrize("options", [{}, {"use_dora": True}, {"modules_to_save": ["score", "norm"]}], ids=str)
def test_a_model_that_does_not_fit_is_proven_layer_by_layer(options, llama, tmp_path, monkeypatch):
    """The same figures as with the whole model in memory."""
    import qlora_moderation.proof as proof

    adapter = adapt(
        llama, tmp_path / "adapter", r=4, target_modules="all-linear", quantized=(True, "float32"), **options
    )
    monkeypatch.setattr(proof, "_PAIRS", proof._PAIRS_LAYER_BY_LAYER)
    merge_adapter(MergeConfig(str(adapter), str(tmp_path / "whole"), dtype="bfloat16"), silent)
    monkeypatch.setattr(proof, "WHOLE_BYTES", 0)
    merge_adapter(MergeConfig(str(adapter), str(tmp_path / "layers"), dtype="bfloat16"), silent)
    whole, layers = (read_json(tmp_path / name / "merge_report.json") for name in ("whole", "layers"))
    assert (whole["proof"], layers["proof"]) == ("whole model", "layer by layer")
    assert "stock_load" not in layers and layers["tensors"]["compared"] == 8
    for key in ("largest_logit_difference", "mean_logit_difference", "largest_probability_difference"):
        assert layers[key] == pytest.approx(whole[key], abs=2e-6) and layers[key] > 1e-5


def test_a_wrong_tensor_is_noticed_layer_by_layer(llama, tmp_path, monkeypatch):
    import qlora_moderation.nf4 as nf4
    import qlora_moderation.proof as proof

    monkeypatch.setattr(proof, "WHOLE_BYTES", 0)
    adapter = adapt(llama, tmp_path / "adapter", r=4, target_modules="all-linear", quantized=(True, "float32"))
    right = nf4._give_back
    monkeypatch.setattr(nf4, "_give_back", lambda scaled, magnitudes: right(scaled, magnitudes * 1.001))
    with pytest.raises(MergeError, match="differ from those merged in memory"):
        merge_adapter(MergeConfig(str(adapter), str(tmp_path / "m")), silent)
    assert not (tmp_path / "m").exists()


def test_several_files_open_as_one_model(runs, tmp_path, monkeypatch):
    import qlora_moderation.merge as merge

    monkeypatch.setattr(merge.write_merged, "__defaults__", (100_000,))
    merge_adapter(MergeConfig(str(runs["qlora"].weights), str(tmp_path / "m")), silent)
    files = sorted(path.name for path in (tmp_path / "m").glob("*.safetensors"))
    assert len([name for name in files if name.startswith("model-")]) > 3 and "model.safetensors" not in files
    report = read_json(tmp_path / "m" / "merge_report.json")
    assert report["stock_load"]["largest_logit_difference"] < 1e-4


def test_an_earlier_merge_that_the_adapter_stands_on_is_never_overwritten(runs, rows_file, tmp_path):
    merge_adapter(MergeConfig(str(runs["lora"].weights), str(tmp_path / "base")), silent)
    weights = train(make_config(tmp_path / "base", rows_file, tmp_path / "second", max_steps=1), silent)
    with pytest.raises(ConfigError, match="holds the adapter's base model"):
        merge_adapter(MergeConfig(str(weights), str(tmp_path / "base"), overwrite=True), silent)
    merge_adapter(MergeConfig(str(weights), str(tmp_path / "again")), silent)


def test_an_adapter_that_lost_something_is_named(llama, tmp_path):
    """Otherwise it would be merged, and proven, as if it had been trained that way."""
    adapter = adapt(llama, tmp_path / "adapter", r=4, target_modules="all-linear", use_dora=True)
    tensors = load_file(adapter / "adapter_model.safetensors")
    layer = "base_model.model.model.layers.1.mlp.up_proj."

    def attempt(changed, message):
        save_file(changed, adapter / "adapter_model.safetensors", metadata={"format": "pt"})
        with pytest.raises(CheckpointError, match=message):
            merge_adapter(MergeConfig(str(adapter), str(tmp_path / "m")), silent)
        with pytest.raises(CheckpointError):
            load_classifier(adapter)

    for lost in ("lora_B.weight", "lora_magnitude_vector"):
        attempt({name: t for name, t in tensors.items() if name != layer + lost}, f"lacks 1 tensors, .*up_proj.{lost}")
    attempt({name: t for name, t in tensors.items() if layer not in name}, "lacks 3 tensors")
    attempt({name: t for name, t in tensors.items() if "score" not in name}, "score")
    attempt({**tensors, "base_model.model.foo.bar": torch.ones(2)}, r"holds base_model\.model\.foo\.bar")
    save_file(tensors, adapter / "adapter_model.safetensors", metadata={"format": "pt"})
    settings = json.loads((adapter / "adapter_config.json").read_text())
    for key, value in (("peft_type", "FOO"), ("lora_alpha", "x"), ("peft_type", "IA3")):
        (adapter / "adapter_config.json").write_text(json.dumps({**settings, key: value}))
        with pytest.raises(CheckpointError, match=str(adapter)):
            merge_adapter(MergeConfig(str(adapter), str(tmp_path / "m")), silent)


def test_overwriting_keeps_what_is_no_merge(runs, tmp_path):
    config = MergeConfig(str(runs["lora"].weights), str(tmp_path / "m"), overwrite=True)
    merge_adapter(config, silent)
    for name in ("notes.txt", "thresholds.previous.json"):
        (tmp_path / "m" / name).write_text("{}")
        with pytest.raises(CheckpointError, match=f"holds {name} beside the earlier merge"):
            merge_adapter(config, silent)
        (tmp_path / "m" / name).unlink()
    merge_adapter(config, silent)


def test_faults_leave_no_half_written_model(runs, llama, tmp_path, monkeypatch):
    """A disk that fills up under way, a base that is not finite, an adapter for another base."""
    import os
    import shutil

    import qlora_moderation.tensor_files as files

    pwrite, written = os.pwrite, []

    def full(handle, view, offset):
        written.append(len(view))
        if len(written) > 5:
            raise OSError(28, "No space left on device")
        return pwrite(handle, view, offset)

    with monkeypatch.context() as patch:
        patch.setattr(files.os, "pwrite", full)
        with pytest.raises(CheckpointError, match="No space left on device"):
            merge_adapter(MergeConfig(str(runs["lora"].weights), str(tmp_path / "m")), silent)
    base = tmp_path / "base"
    shutil.copytree(llama, base)
    adapter = adapt(base, tmp_path / "adapter", r=4, target_modules=["q_proj"])
    state = load_file(base / "model.safetensors")
    state["model.layers.1.mlp.up_proj.weight"][3, 3] = float("nan")
    save_file(state, base / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=r"weight model\.layers\.1\.mlp\.up_proj\.weight is not finite"):
        merge_adapter(MergeConfig(str(adapter), str(tmp_path / "m")), silent)
    tensors = load_file(adapter / "adapter_model.safetensors")
    wide = {name: torch.cat([t, t], dim=1) if "lora_A" in name else t for name, t in tensors.items()}
    save_file(wide, adapter / "adapter_model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match="they do not fit"):
        merge_adapter(MergeConfig(str(adapter), str(tmp_path / "m")), silent)
    tensors[next(iter(tensors))][0] = float("inf")
    save_file(tensors, adapter / "adapter_model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match="is not finite; take an earlier adapter"):
        merge_adapter(MergeConfig(str(adapter), str(tmp_path / "m")), silent)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter", "base"]
