"""What is loaded, frozen, quantised; and how micro-batches are laid out."""

from __future__ import annotations

import subprocess
import sys
import warnings

import bitsandbytes
import pytest
import torch
from conftest import make_config
from torch import nn
from transformers import AutoConfig, GPT2Config, GPT2ForSequenceClassification, LlamaConfig

from qlora_moderation import attention
from qlora_moderation.adapter import add_lora, find_head
from qlora_moderation.backbone import BackboneSpec, choose_dtype, choose_layout, inspect_backbone
from qlora_moderation.classifier import check_max_length
from qlora_moderation.errors import CheckpointError, ConfigError
from qlora_moderation.layout import build_micro_batch
from qlora_moderation.memory import count_weights

CPU = torch.device("cpu")


def test_a_packed_row_has_restarting_positions_and_borders():
    batch = build_micro_batch([[5, 6, 7], [8], [9, 9]], "packed", 0, CPU)
    assert batch.input_ids.tolist() == [[5, 6, 7, 8, 9, 9]]
    assert batch.position_ids.tolist() == [[0, 1, 2, 0, 0, 1]]
    assert batch.last.tolist() == [2, 3, 5] and batch.attention_mask is None
    assert batch.segments.lengths == (3, 1, 2) and batch.segments.borders.tolist() == [0, 3, 4, 6]
    padded = build_micro_batch([[5, 6, 7], [8]], "padded", 1, CPU)
    assert padded.input_ids.tolist() == [[5, 6, 7], [8, 1, 1]] and padded.last.tolist() == [2, 0]
    assert padded.attention_mask.tolist() == [[1, 1, 1], [1, 0, 0]]


@pytest.mark.parametrize("method", ["lora", "qlora", "full"])
def test_what_is_quantised_frozen_and_trained(method, llama, build):
    classifier = build(llama, method=method, dtype="bfloat16")
    model = classifier.model
    quantized = [m for m in model.modules() if isinstance(m, bitsandbytes.nn.Linear4bit)]
    assert len(quantized) == (14 if method == "qlora" else 0)
    # a type whose copies keep every bit on CUDA, whatever else fsdp gathers together with it
    assert {layer.weight.dtype for layer in quantized} <= {torch.float32}
    head = find_head(model.classifier)[2]
    assert type(head) is nn.Linear and head.weight.dtype == torch.float32 and head.weight.requires_grad
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    if method == "full":
        assert len(trained) == len(list(model.parameters()))
    else:
        assert all("lora_" in name or "score.modules_to_save" in name for name in trained)
        assert sum("lora_A" in name for name in trained) == 14
    config = model.classifier.config
    assert config.problem_type == "multi_label_classification" and config.pad_token_id == 0
    assert config.id2label[13] == "violence,aiding_and_abetting,incitement" and len(config.label2id) == 14
    trainable, everything = count_weights(model)
    assert trainable == sum(p.numel() for p in model.parameters() if p.requires_grad)
    # the embedding (599 or fewer rows), the linear layers of two decoder layers, norms, head and adapters
    assert everything - (trainable if method != "full" else 0) > 100_000


@pytest.mark.parametrize("method", ["lora", "qlora", "full"])
def test_attention_gets_the_type_that_products_have(method, llama, build, monkeypatch):
    """`full` has fp32 weights, positions turn its queries and keys in fp32, and CUDA's kernel takes half precision alone."""
    seen, attend = [], attention._attend_by_text

    def watch(query, key, value, *others):
        seen.extend(tensor.dtype for tensor in (query, key, value))
        return attend(query, key, value, *others)

    monkeypatch.setattr(attention, "_attend_by_text", watch)
    model = build(llama, method=method, dtype="bfloat16").model
    model(build_micro_batch([[5, 6, 7], [8, 9]], "packed", 0, CPU)).sum().backward()
    assert seen and set(seen) == {torch.bfloat16}


def test_the_backbone_s_dropout_is_off_unless_asked_for(bert, build):
    def rates(classifier):
        return {module.p for module in classifier.model.modules() if isinstance(module, nn.Dropout)}

    assert AutoConfig.from_pretrained(bert).hidden_dropout_prob == 0.1
    assert rates(build(bert, method="full")) == {0.0}
    assert rates(build(bert, method="full", backbone_dropout=0.2)) == {0.2}


def test_the_layout_is_chosen_with_a_reason(decoders, bert):
    assert choose_layout(inspect_backbone(str(decoders["mistral"])), "auto", 512)[0] == "packed"
    layout, reason = choose_layout(inspect_backbone(str(decoders["windowed"])), "auto", 512)
    assert layout == "padded" and "sliding window of 16" in reason
    assert choose_layout(inspect_backbone(str(decoders["windowed"])), "auto", 16)[0] == "packed"
    assert choose_layout(inspect_backbone(str(bert)), "auto", 512)[0] == "padded"
    assert choose_layout(inspect_backbone(str(decoders["llama"])), "auto", 512, dropout=0.1)[0] == "padded"
    with pytest.raises(ConfigError, match="--layout packed: the sliding window"):
        choose_layout(inspect_backbone(str(decoders["windowed"])), "packed", 512)


def test_bfloat16_is_refused_where_the_device_lacks_it(monkeypatch):
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: False)
    with pytest.raises(ConfigError, match="--dtype bfloat16: this cpu device has no bfloat16 units"):
        choose_dtype("bfloat16", CPU)
    assert choose_dtype("auto", CPU) == torch.float32
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: True)
    assert choose_dtype("bfloat16", CPU) == torch.bfloat16


def test_architectures_that_cannot_run_are_refused(tmp_path):
    from transformers import CLIPConfig, LlamaConfig

    CLIPConfig().save_pretrained(tmp_path / "clip")
    with pytest.raises(CheckpointError, match="model type clip is neither a decoder"):
        inspect_backbone(str(tmp_path / "clip"))
    LlamaConfig(quantization_config={"quant_method": "bitsandbytes", "load_in_4bit": True}).save_pretrained(
        tmp_path / "q"
    )
    with pytest.raises(CheckpointError, match="already quantised"):
        inspect_backbone(str(tmp_path / "q"))


def test_weights_that_are_missing_or_not_finite_are_named(llama, build, tmp_path):
    import shutil

    from safetensors.torch import load_file, save_file

    state = load_file(llama / "model.safetensors")
    key = "model.layers.1.mlp.up_proj.weight"
    for name, message in (
        ("missing", f"1 weights are missing, the first is {key}"),
        ("nan", f"weight {key} is not finite"),
    ):
        shutil.copytree(llama, tmp_path / name)
        changed = {k: v.clone() for k, v in state.items()}
        if name == "nan":
            changed[key][0, 0] = float("nan")
        else:
            del changed[key]
        save_file(changed, tmp_path / name / "model.safetensors", metadata={"format": "pt"})
        with pytest.raises(CheckpointError, match=message):
            build(tmp_path / name)


@pytest.mark.parametrize(("target", "layers"), [("c_attn", 2), ("all-linear", 8)])
def test_the_linear_layers_of_gpt2_can_be_named_too(target, layers):
    network = GPT2ForSequenceClassification(GPT2Config(vocab_size=50, n_embd=64, n_layer=2, n_head=4, pad_token_id=0))
    spec = BackboneSpec("gpt2", None, network.config, "decoder")

    def adapt(name: str) -> nn.Module:
        return add_lora(network, spec, make_config("gpt2", "rows.jsonl", "unused", target_modules=(name,)))

    with pytest.raises(ConfigError, match="names no linear layer; there are c_attn, c_fc, c_proj"):
        adapt("q_proj")
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        assert sum("lora_A" in name for name, _ in adapt(target).named_parameters()) == layers


def test_the_first_vector_functions_of_a_process_are_called_from_one_thread():
    program = "\n".join(
        [
            "import torch",
            "seen = []",
            "for name in ('cos', 'sin'):",
            "    plain = getattr(torch.Tensor, name)",
            "    setattr(torch.Tensor, name, lambda x, name=name, plain=plain: (seen.append((name, x.numel())), plain(x))[1])",
            "from qlora_moderation.classifier import load_classifier",
            "from qlora_moderation.model import ModerationModel",
            "ModerationModel(torch.nn.Identity(), False, torch.device('cpu'))",
            "assert dict(reversed(seen)) == {'cos': 16, 'sin': 16}, seen",
        ]
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr


def test_lengths_at_which_neighbours_would_turn_positions_are_refused():
    """Long RoPE takes other factors for all texts of a forward as soon as one is longer than the original length."""
    factors = {"short_factor": [1.0] * 8, "long_factor": [4.0] * 8, "original_max_position_embeddings": 256}
    rope = {"rope_type": "longrope", "rope_theta": 10000.0, **factors}
    config = LlamaConfig(hidden_size=64, num_attention_heads=4, max_position_embeddings=1024, rope_parameters=rope)
    spec = BackboneSpec("long", None, config, "decoder")
    check_max_length(spec, 256)
    with pytest.raises(CheckpointError, match="long: reads at most 256 tokens; lower --max_length 257"):
        check_max_length(spec, 257)
