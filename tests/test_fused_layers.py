"""Fused parts of a decoder layer give the logits and gradients of the stock ones."""

from __future__ import annotations

import types
from typing import Any

import pytest
import torch
from conftest import logits_of
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import (
    AttentionInterface,
    LlamaConfig,
    LlamaForSequenceClassification,
    MistralConfig,
    MistralForSequenceClassification,
    Qwen2Config,
    Qwen2ForSequenceClassification,
)

from qlora_moderation.attention import PACKED_ATTENTION, packed_attention
from qlora_moderation.backbone import inspect_backbone, load_backbone
from qlora_moderation.fused_layers import fuse_layers
from qlora_moderation.layout import build_micro_batch
from qlora_moderation.metadata import Quantization
from qlora_moderation.model import ModerationModel

SHAPE = {
    "vocab_size": 50,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "pad_token_id": 0,
    "num_labels": 3,
    "attn_implementation": PACKED_ATTENTION,
}
CPU = torch.device("cpu")


def build_model(family: str = "llama", **lora: Any) -> ModerationModel:
    """A random decoder with random norms and biases, adapted with B other than zero."""
    torch.manual_seed(0)
    classes = {
        "llama": (LlamaConfig, LlamaForSequenceClassification),
        "mistral": (MistralConfig, MistralForSequenceClassification),
        "qwen2": (Qwen2Config, Qwen2ForSequenceClassification),
    }
    config_class, model_class = classes[family]
    network: Any = model_class(config_class(**SHAPE))
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            if "norm" in name or name.endswith("bias"):
                parameter.normal_(1.0, 0.3)
    if lora:
        network = get_peft_model(network, LoraConfig(task_type="SEQ_CLS", r=4, lora_alpha=12, **lora))
        with torch.no_grad():
            for name, parameter in network.named_parameters():
                if "lora_B" in name:
                    parameter.normal_(0, 0.2)
    else:
        network.requires_grad_(False)
    return ModerationModel(network, False, CPU)


def run(model: ModerationModel) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Logits of one packed row of three texts, and the gradients of their weighted sum."""
    model.zero_grad()
    batch = build_micro_batch([[5, 9, 2, 7, 1], [3, 1], [8, 4, 6, 2, 9, 9, 1]], "packed", 0, CPU)
    logits = model(batch)
    if logits.requires_grad:
        (logits * torch.arange(1.0, 10.0).view(3, 3)).sum().backward()
    return logits.detach(), {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def is_fused(module: nn.Module) -> bool:
    return isinstance(vars(module).get("forward"), types.MethodType)


@pytest.mark.parametrize("family", ["llama", "qwen2"])
@pytest.mark.parametrize("targets", ["all-linear", ["q_proj", "v_proj", "down_proj"], ["up_proj"]])
def test_fused_equals_stock(family, targets):
    model = build_model(family, target_modules=targets)
    logits, gradients = run(model)
    assert fuse_layers(model.network) > 0
    fused_logits, fused_gradients = run(model)
    torch.testing.assert_close(fused_logits, logits, atol=1e-5, rtol=1e-5)
    assert fused_gradients.keys() == gradients.keys()
    for name, gradient in gradients.items():
        torch.testing.assert_close(fused_gradients[name], gradient, atol=1e-4, rtol=1e-3, msg=name)


def test_every_part_of_a_layer_is_fused():
    model = build_model(target_modules="all-linear")
    fuse_layers(model.network)
    layer = model.network.get_base_model().model.layers[0]
    parts = [layer.self_attn, layer.self_attn.o_proj, layer.mlp, layer.input_layernorm, layer.post_attention_layernorm]
    assert all(is_fused(part) for part in parts)


def test_a_frozen_model_without_adapters_keeps_its_logits():
    model = build_model()
    logits, _ = run(model)
    fuse_layers(model.network)
    torch.testing.assert_close(run(model)[0], logits, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("lora", [{"lora_dropout": 0.5}, {"use_dora": True}])
def test_what_is_more_than_plain_lora_runs_as_it_stands(lora):
    model = build_model(target_modules="all-linear", **lora)
    fuse_layers(model.network)
    layers = [module for name, module in model.named_modules() if name.endswith("_proj")]
    assert len(layers) == 14
    assert not any(is_fused(module) for module in layers)
    torch.manual_seed(1)
    fused = run(model)
    stock = build_model(target_modules="all-linear", **lora)
    torch.manual_seed(1)
    torch.testing.assert_close(fused[0], run(stock)[0], atol=1e-5, rtol=1e-5)


def test_trainable_weights_get_their_gradients():
    model = build_model(target_modules="all-linear")
    model.network.requires_grad_(True)
    _, gradients = run(model)
    fuse_layers(model.network)
    _, fused = run(model)
    assert fused.keys() == gradients.keys()
    for name, gradient in gradients.items():
        torch.testing.assert_close(fused[name], gradient, atol=1e-4, rtol=1e-3, msg=name)


def test_trainable_biases_get_their_gradients():
    model = build_model("qwen2", target_modules="all-linear", bias="all")
    _, gradients = run(model)
    fuse_layers(model.network)
    _, fused = run(model)
    assert fused.keys() == gradients.keys() and any("q_proj" in name and "bias" in name for name in fused)
    for name, gradient in gradients.items():
        torch.testing.assert_close(fused[name], gradient, atol=1e-4, rtol=1e-3, msg=name)


def test_an_adapter_that_comes_later_is_heeded():
    found = []
    for fuse in (fuse_layers, lambda network: 0):
        model = build_model(target_modules="all-linear")
        fuse(model.network)
        settings = LoraConfig(task_type="SEQ_CLS", r=4, target_modules="all-linear", init_lora_weights=False)
        torch.manual_seed(1)
        model.network.add_adapter("later", settings)
        model.network.set_adapter("later")
        found.append(run(model))
    torch.testing.assert_close(found[0][0], found[1][0], atol=1e-5, rtol=1e-5)
    assert found[0][1].keys() == found[1][1].keys()


def test_a_switched_off_or_merged_adapter_is_heeded():
    model = build_model(target_modules="all-linear")
    with torch.no_grad():
        adapted = run(model)[0]
        with model.network.disable_adapter():
            plain = run(model)[0]
        fuse_layers(model.network)
        with model.network.disable_adapter():
            torch.testing.assert_close(run(model)[0], plain, atol=1e-5, rtol=1e-5)
        model.network.merge_adapter()
        torch.testing.assert_close(run(model)[0], adapted, atol=1e-4, rtol=1e-4)
    assert float((adapted - plain).abs().max()) > 1e-2


def test_the_attention_is_the_one_that_the_configuration_names():
    calls = []

    def probe(*arguments, **keywords):
        calls.append(1)
        return packed_attention(*arguments, **keywords)

    AttentionInterface.register("qlora_moderation_probe", probe)
    model = build_model(target_modules="all-linear")
    fuse_layers(model.network)
    model.classifier.config._attn_implementation = "qlora_moderation_probe"
    run(model)
    assert len(calls) == 2


@pytest.mark.parametrize("method", ["lora", "qlora"])
def test_half_precision_stays_close_to_the_stock_layers(method, llama, build, monkeypatch):
    if not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        pytest.skip("this CPU has no bfloat16 units")
    fused = build(llama, method=method, dtype="bfloat16")
    monkeypatch.setattr("qlora_moderation.blueprint.fuse_layers", lambda network: 0)
    stock = build(llama, method=method, dtype="bfloat16")
    ids = [[1, 40, 50, 60, 2], [1, 70, 80, 2]]
    torch.testing.assert_close(logits_of(fused, ids), logits_of(stock, ids), atol=0.02, rtol=0.02)


@pytest.mark.parametrize(("trained", "scored"), [("bfloat16", "float32"), ("float32", "bfloat16")])
def test_biases_beside_nf4_weights_follow_the_compute_type(trained, scored, decoders):
    """A QLoRA model trained in one type on one device is scored in another type on the next."""
    spec, dtype = inspect_backbone(str(decoders["qwen2"])), getattr(torch, scored)
    logits = []
    for fuse in (lambda network: 0, fuse_layers):
        network: Any = load_backbone(spec, 3, dtype, CPU, "packed", Quantization(True, trained)).model
        network.score.float()
        with torch.no_grad():
            network.score.weight.fill_(0.1)
        network.requires_grad_(False)
        fuse(network)
        logits.append(run(ModerationModel(network, False, CPU))[0])
    torch.testing.assert_close(*logits, atol=0.02 if scored == "bfloat16" else 1e-5, rtol=0.02)


def test_nf4_weights_are_unpacked_once_a_pass(llama, build, monkeypatch):
    import bitsandbytes.functional

    classifier = build(llama, method="qlora")
    calls: list[int] = []
    original = bitsandbytes.functional.dequantize_4bit
    monkeypatch.setattr(
        bitsandbytes.functional, "dequantize_4bit", lambda *a, **k: calls.append(1) or original(*a, **k)
    )
    batch = build_micro_batch([[1, 40, 50, 2], [1, 60, 2]], "packed", classifier.pad_id, CPU)
    logits = classifier.model(batch)
    assert len(calls) == 14  # seven products in each of two layers
    logits.sum().backward()
    assert len(calls) == 28 - 3  # nothing lies before the first layer's queries, keys and values
