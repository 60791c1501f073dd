"""The last layer on last tokens alone gives the logits and gradients of the whole one, and computes less."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from test_fused_layers import build_model, is_fused, run
from torch.utils.flop_counter import FlopCounterMode
from transformers import GemmaConfig, GemmaForSequenceClassification

from qlora_moderation.attention import PACKED_ATTENTION
from qlora_moderation.fused_layers import fuse_layers
from qlora_moderation.layout import build_micro_batch
from qlora_moderation.model import ModerationModel

CPU = torch.device("cpu")


def build_whole(family: str, **lora: Any) -> ModerationModel:
    """The same model, whose last layer runs on every token."""
    model = build_model(family, **lora)
    layers = model.classifier.model.layers
    assert is_fused(layers[-1]) and not is_fused(layers[0])
    del layers[-1].forward, layers[-1].self_attn.forward
    return model


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2"])
def test_last_tokens_alone_equal_all_tokens(family, fused):
    whole, short = (build(family, target_modules="all-linear") for build in (build_whole, build_model))
    for model in (whole, short) if fused else ():
        fuse_layers(model.network)
    (expected, gradients), (logits, found) = run(whole), run(short)
    torch.testing.assert_close(logits, expected, atol=1e-5, rtol=1e-5)
    assert found.keys() == gradients.keys()
    for name, gradient in gradients.items():
        torch.testing.assert_close(found[name], gradient, atol=1e-4, rtol=1e-3, msg=name)


def test_trainable_weights_get_their_gradients():
    whole, short = build_whole("qwen2"), build_model("qwen2")
    for model in (whole, short):
        model.network.requires_grad_(True)
    (_, gradients), (_, found) = run(whole), run(short)
    assert found.keys() == gradients.keys()
    for name, gradient in gradients.items():
        torch.testing.assert_close(found[name], gradient, atol=1e-4, rtol=1e-3, msg=name)


def test_only_keys_and_values_of_the_last_layer_read_every_token():
    counts = []
    for build in (build_whole, build_model):
        model = build("llama")
        with FlopCounterMode(display=False) as counter:
            model(build_micro_batch([[5] * 40, [7] * 24], "packed", 0, CPU))
        counts.append(counter.get_flop_counts()["Global"][torch.ops.aten.mm])
    hidden, inner, spared = 64, 128, 64 - 2
    assert counts[0] - counts[1] == 2 * spared * (2 * hidden * hidden + 3 * hidden * inner)  # q, o; gate, up, down


def test_texts_of_one_token_and_padded_rows():
    whole, short = build_whole("llama"), build_model("llama")
    for ids, layout in (([[5], [9], [3]], "packed"), ([[5, 2]], "packed"), ([[5, 9], [3], [8, 8, 1]], "padded")):
        batch = build_micro_batch(ids, layout, 0, CPU)
        for model in (whole, short):
            model.classifier.set_attn_implementation(PACKED_ATTENTION if layout == "packed" else "sdpa")
        torch.testing.assert_close(short(batch), whole(batch), atol=1e-5, rtol=1e-5)


def test_other_decoders_run_as_they_stand():
    config = GemmaConfig(
        vocab_size=50, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=16, pad_token_id=0, num_labels=3, attn_implementation=PACKED_ATTENTION,
    )  # fmt: skip
    model = ModerationModel(GemmaForSequenceClassification(config).eval(), False, CPU)
    assert not is_fused(model.classifier.model.layers[-1])
    ids = [[5, 9, 2, 7, 1], [3, 1]]
    together = model(build_micro_batch(ids, "packed", 0, CPU))
    apart = torch.cat([model(build_micro_batch([text], "packed", 0, CPU)) for text in ids])
    torch.testing.assert_close(together, apart, atol=1e-5, rtol=1e-5)


def test_hooks_on_the_attention_of_the_last_layer_fire():
    model, seen = build_model("llama"), []
    for layer in model.classifier.model.layers:
        layer.self_attn.register_forward_hook(lambda module, *_: seen.append(module.layer_idx))
    model(build_micro_batch([[5, 9], [3]], "packed", 0, CPU))
    assert seen == [0, 1]


@pytest.mark.parametrize("ids", [[[5, 9, 2], [3, 1]], [[5, 9, 2]]])
def test_an_attention_that_was_replaced_since_runs_as_it_stands(ids):
    model, batch = build_model("llama"), build_micro_batch(ids, "packed", 0, CPU)
    expected = model(batch)
    layer = model.classifier.model.layers[-1]

    class Around(torch.nn.Module):
        def __init__(self, inner):
            super().__init__()
            self.inner = inner

        def forward(self, **keywords):
            return self.inner(**keywords)

    layer.self_attn = Around(layer.self_attn)
    torch.testing.assert_close(model(batch), expected, atol=1e-5, rtol=1e-5)
