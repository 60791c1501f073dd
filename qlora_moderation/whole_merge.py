"""The merge in memory, by transformers, bitsandbytes and PEFT alone: the independent route that the streamed one is held to.

In: an adapter directory and its base. Out: the plain fp32 classifier, or single merged weights of a model that is too large
for memory. It also merges what only those libraries can read. Part of step 11.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model, set_peft_model_state_dict
from safetensors import safe_open
from torch import nn

from qlora_moderation import backbone as bb
from qlora_moderation.adapter import PEFT_PREFIX, fit_vocabulary, read_adapter_tensors, set_label_names
from qlora_moderation.classifier import OpenedModel
from qlora_moderation.merged_weights import Recipe, read_lora_settings
from qlora_moderation.nf4 import round_with_bitsandbytes


def merge_in_memory(opened: OpenedModel, dequantize: bool, device: torch.device) -> Any:
    """Return the plain fp32 classifier with the adapter's product added and its head in place."""
    count = len(opened.taxonomy.categories)
    quantization = opened.metadata.quantization if dequantize else None
    plain: Any = bb.load_backbone(opened.spec, count, torch.float32, device, "padded", quantization).model
    if dequantize:
        _unpack_nf4(plain)
    plain.float()
    bb.fit_pad_token(plain, opened.pad_id)
    fit_vocabulary(plain, opened.directory)
    set_label_names(plain.config, opened.taxonomy.categories)
    adapted: Any = PeftModel.from_pretrained(plain, str(opened.directory), torch_device=str(plain.device))
    merged: Any = adapted.merge_and_unload(safe_merge=True)
    if hasattr(merged.config, "quantization_config"):
        del merged.config.quantization_config
    return merged


def _unpack_nf4(model: nn.Module) -> None:
    """Replace each NF4 layer by a plain one that holds the rounded weights in fp32."""
    import bitsandbytes

    for name, module in list(model.named_modules()):
        if isinstance(module, bitsandbytes.nn.Linear4bit):
            plain = nn.Linear(module.in_features, module.out_features, bias=module.bias is not None, device="meta")
            weight = bitsandbytes.functional.dequantize_4bit(module.weight.data, module.weight.quant_state)
            plain.weight = nn.Parameter(weight.float(), requires_grad=False)
            if module.bias is not None:
                plain.bias = nn.Parameter(module.bias.data.float(), requires_grad=False)
            parent, _, attribute = name.rpartition(".")
            setattr(model.get_submodule(parent), attribute, plain)
    for attribute in ("is_loaded_in_4bit", "is_quantized", "hf_quantizer", "quantization_method"):
        if hasattr(model, attribute):
            delattr(model, attribute) if attribute in vars(model) else None


def merge_single_weights(
    adapter_path: Path, recipes: dict[str, Recipe], names: Sequence[str]
) -> dict[str, torch.Tensor]:
    """Return some merged weights in fp32: safetensors' or torch's own reader, bitsandbytes' rounding, PEFT's merge.

    Args:
        adapter_path: the adapter.
        recipes: say where the base tensors lie and whether they are rounded.
        names: weights [R, K] of linear layers, without an own tensor in the adapter.
    """
    settings, tensors = read_lora_settings(adapter_path), read_adapter_tensors(adapter_path)
    return {name: _merge_single(name, recipes[name], settings, tensors) for name in names}


def _merge_single(name: str, recipe: Recipe, settings: LoraConfig, tensors: dict[str, torch.Tensor]) -> torch.Tensor:
    assert recipe.base is not None
    if recipe.base.path.suffix == ".safetensors":
        with safe_open(recipe.base.path, framework="pt") as file:
            keys = set(file.keys())
            weight = file.get_tensor(name if name in keys else name.partition(".")[2])
    else:
        state = torch.load(recipe.base.path, weights_only=True, mmap=True)
        weight = state[name if name in state else name.partition(".")[2]].clone()
        del state
    if recipe.read_as is not None:
        weight = weight.to(recipe.read_as)
    weight = weight.float() if recipe.nf4 is None else round_with_bitsandbytes(weight, recipe.nf4)
    layer = name.removesuffix(".weight")
    own = {f"{PEFT_PREFIX}{key}": value for key, value in tensors.items() if key.startswith(f"{layer}.")}
    if not own:
        return weight
    *path, leaf = layer.split(".")
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    linear.weight = nn.Parameter(weight, requires_grad=False)
    root = parent = nn.Module()
    for part in path:
        parent.add_module(part, nn.Module())
        parent = parent.get_submodule(part)
    parent.add_module(leaf, linear)
    alone = copy.deepcopy(settings)
    alone.base_model_name_or_path = None
    alone.task_type, alone.modules_to_save, alone.exclude_modules, alone.target_modules = None, None, None, {layer}
    network: Any = get_peft_model(root, alone)
    set_peft_model_state_dict(network, own)
    return network.merge_and_unload().get_submodule(layer).weight.detach()
