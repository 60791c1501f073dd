"""A model together with everything needed to use it: tokenizer, taxonomy, thresholds, layout.

In: a training configuration, or a directory that training or merging wrote. Out: a `Classifier`. Steps 6, 10 and 11.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from peft import PeftConfig
from transformers import PreTrainedTokenizerBase

from qlora_moderation import backbone as bb
from qlora_moderation.adapter import ADAPTER_WEIGHTS, load_adapter, set_label_names
from qlora_moderation.batching import Layout
from qlora_moderation.capacity import Capacity
from qlora_moderation.distributed import current_device, is_main
from qlora_moderation.errors import CheckpointError, brief, show
from qlora_moderation.export import write_weights
from qlora_moderation.fused_layers import fuse_layers
from qlora_moderation.metadata import ModelMetadata, load_metadata, read_json
from qlora_moderation.model import ModerationModel
from qlora_moderation.sharding import Sharding
from qlora_moderation.shortage import loading_shortage
from qlora_moderation.staging import replaced_whole
from qlora_moderation.stock_tokenizer import prepare_for_stock_use, save_stock_tokenizer
from qlora_moderation.taxonomy import Taxonomy
from qlora_moderation.tensor_files import OnlyWholeError, find_tensors
from qlora_moderation.thresholds import Thresholds, load_thresholds
from qlora_moderation.tokenization import TextEncoder, choose_pad_token

ADAPTER_FILE = "adapter_config.json"
DEFAULT_MAX_LENGTH = 512


@dataclasses.dataclass
class Classifier:
    """A moderation classifier, ready to be trained, scored or saved.

    Attributes:
        model: the module with the one forward.
        tokenizer: the stock tokenizer, with its pad token set.
        encoder: turns pairs into ids.
        metadata: what the outputs mean and where the model comes from.
        thresholds: the one threshold truth.
        layout: how micro-batches are laid out.
        layout_reason: why.
        grown_embedding_rows: rows of the embedding where it had to grow for the pad token.
        new_head_rows: rows of the head that no training has seen yet.
        sharding: how the ranks share the model.
        base_fingerprint: of the weights that training started from.
        capacity: what was decided from the memory of the device; None for a model that is not trained.
    """

    model: ModerationModel
    tokenizer: PreTrainedTokenizerBase
    encoder: TextEncoder
    metadata: ModelMetadata
    thresholds: Thresholds
    layout: Layout
    layout_reason: str = ""
    grown_embedding_rows: int | None = None
    new_head_rows: tuple[int, ...] = ()
    sharding: Sharding = dataclasses.field(default_factory=lambda: Sharding("none", "one process"))
    base_fingerprint: str = ""
    capacity: Capacity | None = None

    @property
    def pad_id(self) -> int:
        """Id that fills padded rows."""
        return int(self.tokenizer.pad_token_id)

    @property
    def taxonomy(self) -> Taxonomy:
        """Categories and template."""
        return self.metadata.taxonomy

    def save(self, directory: Path, metadata: ModelMetadata, write_more: Callable[[Path], None] | None = None) -> None:
        """Write adapter or full model with tokenizer, thresholds and metadata; the directory appears whole or not at all.

        All ranks take part.

        Args:
            directory: replaced where it exists.
            metadata: written beside the weights.
            write_more: called with the unfinished directory, to add files such as the card.
        """
        with replaced_whole(directory) as unfinished:
            write_weights(self.model, unfinished)
            if is_main():
                save_stock_tokenizer(self.tokenizer, unfinished)
                metadata.save(unfinished)
                self.thresholds.save(unfinished, self.taxonomy)
                if write_more is not None:
                    write_more(unfinished)


def open_tokenizer(
    name: str, revision: str | None, taxonomy: Taxonomy, max_length: int
) -> tuple[PreTrainedTokenizerBase, TextEncoder]:
    """Return the tokenizer of a model, with a pad token, and the encoder around it."""
    tokenizer = bb.load_tokenizer(name, revision)
    if not isinstance(tokenizer.model_max_length, int | float):
        raise CheckpointError(
            f"{name}: model_max_length in tokenizer_config.json is {show(tokenizer.model_max_length)}, no number; copy the "
            "file again"
        )
    tokenizer.add_special_tokens({"pad_token": choose_pad_token(tokenizer)})  # grows the vocabulary where it is new
    encoder = TextEncoder(tokenizer, taxonomy, max_length)
    prepare_for_stock_use(tokenizer, encoder)
    return tokenizer, encoder


def check_max_length(spec: bb.BackboneSpec, max_length: int) -> None:
    """Refuse a length that the backbone has no positions for.

    Raises:
        CheckpointError: it names the longest one.
    """
    limit = getattr(spec.config, "max_position_embeddings", None)
    if limit is not None and spec.config.model_type in ("roberta", "xlm-roberta", "camembert"):
        limit -= 2  # positions start behind the padding index
    rope = getattr(spec.config, "rope_parameters", None) or {}
    if limit is not None and rope.get("rope_type") == "longrope":
        # beyond, the longest text decides how the positions of all texts beside it are turned
        original = rope.get("original_max_position_embeddings") or spec.config.original_max_position_embeddings
        limit = min(limit, original)
    if limit is not None and max_length > limit:
        raise CheckpointError(f"{spec.name}: reads at most {limit} tokens; lower --max_length {max_length}")


def autocast_dtype(compute_dtype: torch.dtype) -> torch.dtype | None:
    """Return the type of products under autocast; None: no autocast."""
    return None if compute_dtype == torch.float32 else compute_dtype


@dataclasses.dataclass(frozen=True)
class OpenedModel:
    """Everything of a model directory but its weights.

    Attributes:
        directory: the directory.
        metadata: what the outputs mean.
        spec: the backbone: an adapter's base, or the directory itself.
        is_adapter: whether the weights are an adapter's.
        tokenizer: the stock tokenizer, with its pad token set.
        encoder: turns pairs into ids.
        thresholds: stored with the model.
    """

    directory: Path
    metadata: ModelMetadata
    spec: bb.BackboneSpec
    is_adapter: bool
    tokenizer: PreTrainedTokenizerBase
    encoder: TextEncoder
    thresholds: Thresholds

    @property
    def taxonomy(self) -> Taxonomy:
        """Categories and template."""
        return self.metadata.taxonomy

    @property
    def pad_id(self) -> int:
        """Id that fills padded rows."""
        return int(self.tokenizer.pad_token_id)


def open_model(path: str | Path, max_length: int | None = None, base_model: str | None = None) -> OpenedModel:
    """Read everything of an adapter, full or merged directory but its weights.

    Raises:
        ModerationError: no such model, or its files do not go together.
    """
    directory = Path(path)
    if not directory.is_dir():
        raise CheckpointError(f"{path}: no such directory; give an adapter, full or merged model directory")
    inner = [name for name in ("merged", "adapter", "model") if (directory / name).is_dir()]
    if inner and not (directory / "config.json").is_file() and not (directory / ADAPTER_FILE).is_file():
        raise CheckpointError(f"{path}: is a run directory; give {directory / inner[0]}")
    metadata = load_metadata(directory)
    is_adapter = (directory / ADAPTER_FILE).is_file()
    if is_adapter:
        if metadata is None:
            raise CheckpointError(f"{path}: an adapter without moderation_config.json; its meaning is unknown")
        spec = _inspect_base(directory, base_model)
    else:
        spec = bb.inspect_backbone(str(directory))
        if metadata is None:
            metadata = _guess_metadata(spec)
    taxonomy = metadata.taxonomy
    length = max_length or metadata.max_length
    check_max_length(spec, length)
    tokenizer, encoder = open_tokenizer(str(directory), None, taxonomy, length)
    stored = len(taxonomy.categories)
    if not is_adapter and len(spec.config.id2label) != stored:
        raise CheckpointError(f"{path}: its config.json has {len(spec.config.id2label)} labels, its taxonomy {stored}")
    named = list(taxonomy.categories) if is_adapter else [spec.config.id2label.get(i) for i in range(stored)]
    if named != list(taxonomy.categories):
        first = next(i for i in range(stored) if named[i] != taxonomy.categories[i])
        raise CheckpointError(
            f"{path}: output {first} is {named[first]!r} in config.json and {taxonomy.categories[first]!r} in "
            "moderation_config.json; copy both files again"
        )
    return OpenedModel(directory, metadata, spec, is_adapter, tokenizer, encoder, load_thresholds(directory, taxonomy))


def _inspect_base(directory: Path, base_model: str | None) -> bb.BackboneSpec:
    stored_settings = read_json(directory / ADAPTER_FILE)
    if not isinstance(stored_settings, dict) or not stored_settings.get("base_model_name_or_path"):
        raise CheckpointError(f"{directory / ADAPTER_FILE}: names no base model; copy the adapter again")
    if not (directory / ADAPTER_WEIGHTS).is_file():
        raise CheckpointError(f"{directory}: {ADAPTER_WEIGHTS} is missing; copy the adapter again")
    try:
        settings = PeftConfig.from_pretrained(str(directory))
    except Exception as error:  # unknown kinds, odd values
        raise CheckpointError(f"{directory / ADAPTER_FILE}: cannot be used ({brief(error)})") from None
    name = base_model or str(settings.base_model_name_or_path)
    if Path(name).is_absolute() and not Path(name).is_dir():
        raise CheckpointError(f"{directory}: its base model {name} is gone; name where it lies now")
    return bb.inspect_backbone(name, settings.revision)


def load_classifier(
    path: str | Path,
    dtype: str = "auto",
    use_cpu: bool = False,
    layout: str = "auto",
    max_length: int | None = None,
    base_model: str | None = None,
) -> Classifier:
    """Open an adapter, full or merged directory for scoring; everything else is read from the directory.

    Args:
        path: the directory.
        dtype: compute type: auto, float32 or bfloat16.
        use_cpu: stay on the CPU.
        layout: auto, packed or padded.
        max_length: longest text in tokens, when it shall differ from the model's own.
        base_model: where an adapter's base lies now, when it has moved.

    Raises:
        ModerationError: no such model, or its files do not go together.
    """
    device = current_device(use_cpu)
    compute_dtype = bb.choose_dtype(dtype, device)
    opened = open_model(path, max_length, base_model)
    chosen, reason = bb.choose_layout(opened.spec, layout, opened.encoder.max_length)
    count = len(opened.taxonomy.categories)
    quantization = opened.metadata.quantization if opened.is_adapter else None
    with loading_shortage(str(path), device):
        loaded = bb.load_backbone(opened.spec, count, compute_dtype, device, chosen, quantization)
        network: Any = loaded.model
        if not opened.is_adapter and loaded.new_modules:
            raise CheckpointError(f"{path}: holds no trained head ({', '.join(loaded.new_modules)} missing)")
        rows = bb.fit_pad_token(network, opened.pad_id)
        if opened.is_adapter:
            set_label_names(network.config, opened.taxonomy.categories)
            network = load_adapter(network, opened.directory)
        elif opened.spec.kind == "decoder":
            _restore_head(network, opened.directory)
    network.requires_grad_(False)
    fuse_layers(network)
    is_encoder = opened.spec.kind == "encoder"
    model = ModerationModel(network, is_encoder, device, autocast_dtype(compute_dtype)).eval()
    return Classifier(model, opened.tokenizer, opened.encoder, opened.metadata, opened.thresholds, chosen, reason, rows)


def _guess_metadata(spec: bb.BackboneSpec) -> ModelMetadata:
    """Take categories from `id2label`, and template and length from the original recipe."""
    names = tuple(spec.config.id2label[i] for i in range(len(spec.config.id2label)))
    labels_from: Any = "is_safe" if len(names) == 1 else "category"
    taxonomy = Taxonomy(categories=names, labels_from=labels_from)
    return ModelMetadata(taxonomy, DEFAULT_MAX_LENGTH, "full", "full", spec.name)


def _restore_head(model: Any, directory: Path) -> None:
    """Read the head again in fp32: a stock load rounds it to the type of the backbone."""
    model.score.float()
    with contextlib.suppress(OnlyWholeError), torch.no_grad():
        model.score.weight.copy_(find_tensors(str(directory))["score.weight"].read())
