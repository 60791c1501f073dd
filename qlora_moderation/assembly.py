"""A trainable classifier, assembled from a backbone and shared between the ranks.

In: a training configuration. Out: a `Classifier`, on every rank its part. Before step 6.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from transformers import PreTrainedTokenizerBase

from qlora_moderation import backbone as bb
from qlora_moderation.adapter import find_head
from qlora_moderation.batching import Layout
from qlora_moderation.blueprint import Blueprint
from qlora_moderation.capacity import choose_capacity
from qlora_moderation.classifier import Classifier, autocast_dtype, check_max_length, open_tokenizer
from qlora_moderation.config import TrainConfig
from qlora_moderation.distributed import on_main, world_size
from qlora_moderation.errors import CheckpointError
from qlora_moderation.estimate import MemoryEstimate
from qlora_moderation.metadata import ModelMetadata, Quantization
from qlora_moderation.model import ModerationModel
from qlora_moderation.recomputation import recompute_layers
from qlora_moderation.scoring import default_token_budget
from qlora_moderation.sharding import choose_sharding, distribute_model
from qlora_moderation.shortage import training_shortage
from qlora_moderation.taxonomy import Taxonomy
from qlora_moderation.thresholds import Thresholds
from qlora_moderation.tokenization import TextEncoder


@dataclasses.dataclass(frozen=True)
class _Opened:
    """What rank 0 has read of a backbone besides its weights; the other ranks need no file of it."""

    spec: bb.BackboneSpec
    compute_dtype: torch.dtype
    layout: Layout
    layout_reason: str
    tokenizer: PreTrainedTokenizerBase
    encoder: TextEncoder
    quantization: Quantization | None


def build_classifier(
    config: TrainConfig, taxonomy: Taxonomy, device: torch.device, log: Callable[[str], None] = print
) -> Classifier:
    """Open the backbone that a training run starts from, make it trainable by its method, and share it between the ranks.

    Raises:
        ModerationError: backbone, tokenizer and options do not go together.
    """
    opened = on_main(lambda: _open_backbone(config, taxonomy, device))
    blueprint, budget = _draw(config, opened, taxonomy), _budget(config, device)
    capacity = on_main(lambda: choose_capacity(config, blueprint, device, budget))
    built: list[tuple[Any, int | None, list[int]]] = []
    with training_shortage(config, capacity, loading=True):
        if world_size() > 1:
            built.append(blueprint.build(torch.device("meta")))
            # NF4 is made where it is used; other weights pass through the memory of rank 0's host once
            place = device if config.method == "qlora" else torch.device("cpu")
            on_main(lambda: built.append(blueprint.build(place, log)))
        else:
            built.append(blueprint.build(device, log))
    network, rows, new_rows = built[-1]
    recompute_layers(network, capacity.recomputation)
    metadata = on_main(lambda: _describe_model(config, taxonomy, opened))
    if isinstance(network, PeftModel):
        settings = network.peft_config["default"]
        settings.base_model_name_or_path, settings.revision = metadata.base_model, metadata.base_revision
    model = ModerationModel(network, opened.spec.kind == "encoder", device, autocast_dtype(opened.compute_dtype))
    base_fingerprint = on_main(lambda: _fingerprint_base(network))
    with training_shortage(config, capacity, loading=True):
        sharding = distribute_model(model, choose_sharding(capacity), config, opened.compute_dtype)
    return Classifier(
        model=model,
        tokenizer=opened.tokenizer,
        encoder=opened.encoder,
        metadata=metadata,
        thresholds=Thresholds.default(taxonomy),
        layout=opened.layout,
        layout_reason=opened.layout_reason,
        grown_embedding_rows=rows,
        new_head_rows=tuple(new_rows),
        sharding=sharding,
        base_fingerprint=base_fingerprint,
        capacity=capacity,
    )


def estimate_memory(
    config: TrainConfig, taxonomy: Taxonomy, device: torch.device, tokens: int | None = None
) -> MemoryEstimate:
    """Return what each process of this run would hold, without reading a weight.

    Args:
        config: of the run; what it leaves open is decided as in the run itself.
        taxonomy: its categories count.
        device: of this process.
        tokens: T of the largest micro-batch, where it is known; default: the budget, or a whole step of the longest texts.

    Raises:
        ModerationError: backbone, tokenizer and options do not go together, or the activations cannot be foreseen.
    """
    blueprint = _draw(config, _open_backbone(config, taxonomy, device), taxonomy)
    capacity = choose_capacity(config, blueprint, device, _budget(config, device))
    return capacity.estimate(tokens=tokens or capacity.setting.tokens)


def _budget(config: TrainConfig, device: torch.device) -> int:
    return config.max_tokens_per_micro_batch or default_token_budget(device, config.max_length)


def _draw(config: TrainConfig, opened: _Opened, taxonomy: Taxonomy) -> Blueprint:
    return Blueprint(
        config=config,
        spec=opened.spec,
        compute_dtype=opened.compute_dtype,
        layout=opened.layout,
        quantization=opened.quantization,
        categories=tuple(taxonomy.categories),
        pad_id=int(opened.tokenizer.pad_token_id),
        pad_token=str(opened.tokenizer.pad_token),
    )


def _fingerprint_base(network: Any) -> str:
    """Return a SHA-256 over a sample of the weights beside adapters, head and NF4 payloads: another base shows in it."""
    digest = hashlib.sha256()
    head = find_head(network.get_base_model() if isinstance(network, PeftModel) else network)[2]
    own = {id(parameter) for parameter in head.parameters()}
    for name, parameter in network.named_parameters():
        if "lora_" not in name and id(parameter) not in own and not hasattr(parameter, "quant_state"):
            sample = parameter.detach().reshape(-1)[:: max(1, parameter.numel() // 256)].float().cpu()
            digest.update(name.encode() + sample.numpy().tobytes())
    return digest.hexdigest()


def _open_backbone(config: TrainConfig, taxonomy: Taxonomy, device: torch.device) -> _Opened:
    spec = bb.inspect_backbone(config.model_name_or_path, config.model_revision)
    if spec.kind == "encoder" and config.method == "qlora":
        raise CheckpointError(f"{spec.name}: is an encoder; --method qlora is for decoders, use lora or full")
    check_max_length(spec, config.max_length)
    dtype = bb.choose_dtype(config.dtype, device)
    layout, reason = bb.choose_layout(spec, config.layout, config.max_length, config.backbone_dropout)
    tokenizer, encoder = open_tokenizer(config.model_name_or_path, config.model_revision, taxonomy, config.max_length)
    quantization = None
    if config.method == "qlora":
        name: Any = str(dtype).removeprefix("torch.")
        quantization = Quantization(config.bnb_4bit_use_double_quant, name)
    return _Opened(spec, dtype, layout, reason, tokenizer, encoder, quantization)


def _describe_model(config: TrainConfig, taxonomy: Taxonomy, opened: _Opened) -> ModelMetadata:
    return ModelMetadata(
        taxonomy=taxonomy,
        max_length=config.max_length,
        method=config.method,
        kind="full" if config.method == "full" else "adapter",
        base_model=_resolve_name(config.model_name_or_path),
        base_revision=getattr(opened.spec.config, "_commit_hash", None) or config.model_revision,
        pad_token=opened.tokenizer.pad_token,
        quantization=opened.quantization,
        long_text=config.long_text,
    )


def _resolve_name(name: str) -> str:
    """Make the path of a local base absolute, so that its adapter finds it from anywhere."""
    return str(Path(name).resolve()) if Path(name).is_dir() else name
