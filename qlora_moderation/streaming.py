"""A classifier whose weights stay on disk: each layer is read at every forward and let go behind it.

In: a plan of the merged weights, or a written checkpoint. Out: a network with the memory of one layer. For the proof of a
merge that does not fit into memory. Part of step 11.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from typing import Any

import torch
from accelerate import init_empty_weights
from peft import LoraConfig, get_peft_model
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import ModulesToSaveWrapper
from torch import nn
from transformers import AutoModelForSequenceClassification, PreTrainedConfig

from qlora_moderation.backbone import quiet
from qlora_moderation.memory import return_free_memory
from qlora_moderation.merged_weights import Recipe

Source = Callable[[str], torch.Tensor]
"""Gives the tensor of a name of the stock classifier, in fp32."""


def stream_merged(config: PreTrainedConfig, source: Source, device: torch.device) -> nn.Module:
    """Return the stock classifier, reading its weights from `source`."""
    network = _build_empty(config)
    _read_at_forward(network, source, device)
    return network


def stream_adapted(
    config: PreTrainedConfig,
    recipes: Mapping[str, Recipe],
    settings: LoraConfig,
    tensors: Mapping[str, torch.Tensor],
    device: torch.device,
) -> nn.Module:
    """Return PEFT's own network of an adapter, whose base weights, rounded where they were, are read as they are needed.

    The LoRA paths run beside the base as they did in training; nothing is merged.

    Args:
        config: of the classifier.
        recipes: what the base weights are made of; updates and replacements are left out.
        settings: of the adapter.
        tensors: the adapter's, by stored name.
        device: where it computes.
    """
    settings = copy.deepcopy(settings)
    settings.base_model_name_or_path = None  # PEFT would warn that it is another name
    network = get_peft_model(_build_empty(config), settings, low_cpu_mem_usage=True)

    def read(name: str) -> torch.Tensor:
        stored = name.replace(".modules_to_save.default", "").replace(".default", "")
        for own in (stored, stored.removesuffix(".weight")):  # DoRA's magnitudes are stored without the ending
            if own in tensors:
                return tensors[own].float()
        recipe = recipes[stored.replace(".base_layer", "")]
        plain = Recipe(recipe.shape, recipe.base, None, recipe.read_as, recipe.nf4)
        return plain.compute()

    _read_at_forward(network.base_model.model, read, device)
    return network


def _build_empty(config: PreTrainedConfig) -> Any:
    with init_empty_weights(include_buffers=False), quiet():
        return AutoModelForSequenceClassification.from_config(config, dtype=torch.float32).eval()


def _read_at_forward(network: nn.Module, source: Source, device: torch.device) -> None:
    """Give every layer hooks that read its weights before, and drop them after, its forward."""
    network.requires_grad_(False)
    for buffer in network.buffers():
        buffer.data = buffer.data.to(device)
    taken: set[int] = set()
    for name, module in network.named_modules():
        if id(module) in taken:
            continue
        together = isinstance(module, BaseTunerLayer | ModulesToSaveWrapper)  # they look into their parts' weights
        inner = dict(module.named_modules()) if together else {"": module}
        taken |= {id(part) for part in inner.values()}
        places = [
            (part, key, ".".join(filter(None, (name, path, key))))
            for path, part in inner.items()
            if "original_module" not in path
            for key in part._parameters
            if part._parameters[key] is not None
        ]
        if not places:
            continue

        def bring(_module: nn.Module, _inputs: Any, places: list[Any] = places) -> None:
            for part, key, full in places:
                part._parameters[key] = nn.Parameter(source(full).to(device), requires_grad=False)

        def drop(_module: nn.Module, _inputs: Any, _output: Any, places: list[Any] = places) -> None:
            for part, key, _ in places:
                part._parameters[key] = nn.Parameter(part._parameters[key].to("meta"), requires_grad=False)
            return_free_memory()

        module.register_forward_pre_hook(bring)
        module.register_forward_hook(drop)
