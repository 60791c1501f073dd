"""What is trained on top of a backbone: the head, and LoRA adapters.

In: a stock sequence classifier. Out: the same with a fresh fp32 head, and PEFT's wrapper around it. Step 6.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from peft.tuners.lora.dora import DoraLinearLayer
from safetensors import safe_open
from safetensors.torch import load_file
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from qlora_moderation.backbone import BackboneSpec, quiet
from qlora_moderation.config import TrainConfig
from qlora_moderation.errors import CheckpointError, ConfigError, brief
from qlora_moderation.memory import is_shortage

ADAPTER_WEIGHTS = "adapter_model.safetensors"
"""PEFT's name of the file with an adapter's tensors."""

PEFT_PREFIX = "base_model.model."
"""What PEFT puts before the names of tensors."""


def find_head(model: PreTrainedModel) -> tuple[nn.Module, str, nn.Linear]:
    """Return (parent, attribute, layer) of the last linear layer outside the backbone, the one with C outputs."""
    found: tuple[nn.Module, str, nn.Linear] | None = None
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and not name.startswith(f"{model.base_model_prefix}."):
            parent, _, attribute = name.rpartition(".")
            found = model.get_submodule(parent), attribute, module
    if found is None:
        raise CheckpointError(f"{type(model).__name__} has no linear head that could be trained")
    return found


def replace_head(model: PreTrainedModel, categories: Sequence[str], seed: int) -> tuple[list[int], list[str]]:
    """Put an fp32 head with C rows on the model: rows of a category that the old head knew are kept, others are new.

    Returns:
        The new rows, and lines for the log: which rows were kept, moved, new.
    """
    parent, attribute, old = find_head(model)
    architectures = model.config.architectures or []
    trained = any("ForSequenceClassification" in name for name in architectures)
    old_names = [model.config.id2label.get(i) for i in range(old.out_features)] if trained else []
    spread = getattr(model.config, "initializer_range", 0.02)
    with torch.no_grad(), torch.device("meta" if old.weight.is_meta else "cpu"):
        head = nn.Linear(old.in_features, len(categories), bias=old.bias is not None)
        if not old.weight.is_meta:
            head.weight.normal_(0.0, spread, generator=torch.Generator().manual_seed(seed))
        if head.bias is not None:
            head.bias.zero_()
        for row, name in enumerate(categories):
            if name in old_names:
                source = old_names.index(name)
                head.weight[row] = old.weight[source].float()
                if head.bias is not None:
                    head.bias[row] = old.bias[source].float()
    setattr(parent, attribute, head.to(old.weight.device))
    model.num_labels = model.config.num_labels = len(categories)
    set_label_names(model.config, categories)
    new_rows = [row for row, name in enumerate(categories) if name not in old_names]
    if not trained:
        return new_rows, []
    kept = [name for i, name in enumerate(categories) if name in old_names and old_names.index(name) == i]
    moved = [name for i, name in enumerate(categories) if name in old_names and old_names.index(name) != i]
    new = [categories[row] for row in new_rows]
    parts = [("kept", kept), ("reordered", moved), ("new", new)]
    return new_rows, [
        "head rows of the existing classifier: " + "; ".join(f"{w} {', '.join(n) or 'none'}" for w, n in parts)
    ]


def set_label_names(config: PreTrainedConfig, categories: Sequence[str]) -> None:
    """Write what the outputs mean into a stock configuration, so that stock loaders and servers apply a sigmoid."""
    config.id2label = dict(enumerate(categories))
    config.label2id = {name: index for index, name in enumerate(categories)}
    config.problem_type = "multi_label_classification"


def add_lora(model: PreTrainedModel, spec: BackboneSpec, config: TrainConfig) -> PeftModel:
    """Wrap a classifier with LoRA adapters; the head, and what lies between encoder and head, is trained in full.

    Raises:
        ConfigError: `target_modules` names no layer.
    """
    targets = list(config.target_modules)
    # what lies between an encoder and its head was not trained for this, and may be missing from its checkpoint
    between = {"pooler", "pre_classifier"} & {name.rpartition(".")[2] for name, _ in model.named_modules()}
    if spec.kind == "decoder":
        between = set()
    settings = LoraConfig(
        task_type="SEQ_CLS",
        r=config.lora_r,
        lora_alpha=config.lora_alpha,
        lora_dropout=config.lora_dropout,
        target_modules="all-linear" if targets == ["all-linear"] else targets,
        use_rslora=config.use_rslora,
        use_dora=config.use_dora,
        init_lora_weights="gaussian" if str(config.init_lora_weights).lower() == "gaussian" else True,
        modules_to_save=sorted(between) or None,
        exclude_modules=rf"(.*\.)?({'|'.join(sorted(between))})(\..*)?" if between else None,
    )
    linear = {name for name, module in model.named_modules() if isinstance(module, nn.Linear | Conv1D)}
    for target in targets:
        if target != "all-linear" and not any(name == target or name.endswith(f".{target}") for name in linear):
            known = sorted(
                {name.rpartition(".")[2] for name in linear if name.startswith(f"{model.base_model_prefix}.")}
            )
            raise ConfigError(f"--target_modules {target}: names no linear layer; there are {', '.join(known)}")
    torch.manual_seed(config.seed)
    try:
        with _magnitudes_without_weights(), _quiet_peft():
            return get_peft_model(model, settings)
    except ValueError as error:
        raise ConfigError(f"--target_modules {' '.join(targets)}: {brief(error)}") from None


@contextlib.contextmanager
def _quiet_peft() -> Iterator[None]:
    """Silence what PEFT sets right by itself, what it asks by an older name, and keys that `check_adapter` names."""
    with warnings.catch_warnings():
        for start in (
            "fan_in_fan_out is set to",
            "`is_gradient_checkpointing` is deprecated",
            "Found missing adapter keys",
        ):
            warnings.filterwarnings("ignore", message=start)
        yield


@contextlib.contextmanager
def _magnitudes_without_weights() -> Iterator[None]:
    """Let DoRA's magnitudes have a shape alone where an NF4 layer has one alone: PEFT would unpack it to compute them."""
    compute = DoraLinearLayer.update_layer

    def lay_out(self: Any, *, base_layer: Any, lora_A: torch.Tensor, **others: Any) -> None:
        if base_layer.weight.is_meta and hasattr(base_layer, "quant_state"):
            self.weight = nn.Parameter(torch.empty(base_layer.out_features, dtype=lora_A.dtype, device="meta"))
        else:
            compute(self, base_layer=base_layer, lora_A=lora_A, **others)

    DoraLinearLayer.update_layer = lay_out
    try:
        yield
    finally:
        DoraLinearLayer.update_layer = compute


def read_adapter_tensors(directory: Path) -> dict[str, torch.Tensor]:
    """Read an adapter's tensors under their stored names, less PEFT's prefix.

    Raises:
        CheckpointError: the file is damaged, or a tensor is not finite.
    """
    file = directory / ADAPTER_WEIGHTS
    try:
        tensors = {_without_prefix(name): tensor for name, tensor in load_file(file).items()}
    except Exception as error:  # safetensors' own kinds
        raise CheckpointError(f"{file}: cannot be read ({brief(error)}); copy the adapter again") from None
    for name, tensor in tensors.items():
        if not bool(torch.isfinite(tensor.float()).all()):
            raise CheckpointError(f"{file}: {name} is not finite; take an earlier adapter")
    return tensors


def _without_prefix(name: str) -> str:
    return name.removeprefix(PEFT_PREFIX)


def check_adapter(directory: Path, found: set[str], network: PeftModel) -> None:
    """Compare the tensors of an adapter's file with those that its settings ask for; what the base has, too, may be added.

    Args:
        directory: of the adapter.
        found: the names of its tensors, less PEFT's prefix.
        network: what the settings ask for.

    Raises:
        CheckpointError: one is missing, or cannot be placed.
    """
    file = directory / ADAPTER_WEIGHTS
    wanted = set(map(_without_prefix, get_peft_model_state_dict(network, save_embedding_layers=False)))
    missing = sorted(wanted - found)
    if missing:
        raise CheckpointError(
            f"{file}: lacks {len(missing)} tensors, the first is {PEFT_PREFIX}{missing[0]}; copy the adapter again"
        )
    base = {_without_prefix(name).replace(".base_layer", "") for name in network.state_dict()}
    strangers = sorted(name for name in found - wanted if name.replace(".base_layer", "") not in base)
    if strangers:
        raise CheckpointError(
            f"{file}: holds {PEFT_PREFIX}{strangers[0]}, which adapter_config.json does not explain; copy both again"
        )


def fit_vocabulary(model: PreTrainedModel, directory: Path) -> None:
    """Give a classifier's embedding as many rows as the one that an adapter brings, where it brings one."""
    embedding = model.get_input_embeddings()
    name = next(name for name, module in model.named_modules() if module is embedding)
    with safe_open(directory / ADAPTER_WEIGHTS, framework="pt") as file:
        key = f"{PEFT_PREFIX}{name}.weight"
        rows = file.get_slice(key).get_shape()[0] if key in file.keys() else embedding.num_embeddings  # noqa: SIM118 - no mapping
    if rows != embedding.num_embeddings:
        with quiet():
            model.resize_token_embeddings(rows, mean_resizing=False)


def load_adapter(model: PreTrainedModel, directory: Path) -> PeftModel:
    """Put a saved adapter and its head on a classifier, frozen.

    Raises:
        CheckpointError: the adapter is damaged, or does not fit this classifier.
    """
    find_head(model)[2].float()
    found = read_adapter_tensors(directory).keys()
    try:
        fit_vocabulary(model, directory)
        with _quiet_peft():
            # PEFT would read it onto the first GPU, in every process
            network = PeftModel.from_pretrained(model, str(directory), torch_device=str(model.device))
    except Exception as error:  # size mismatches, PEFT's own checks
        if is_shortage(error):
            raise
        raise CheckpointError(f"{directory}: the adapter does not fit its base ({brief(error)})") from None
    check_adapter(directory, set(found), network)
    return network
