"""What each tensor of a merged classifier is made of: base, NF4 rounding, LoRA product, or the adapter's own weights.

In: an adapter directory and its base's files. Out: a recipe for each tensor, and the tensor itself, piece by piece. Step 11.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftConfig, get_peft_model
from peft.utils.other import get_pattern_key
from torch import nn

from qlora_moderation import backbone as bb
from qlora_moderation.adapter import check_adapter, find_head, fit_vocabulary, read_adapter_tensors, set_label_names
from qlora_moderation.errors import CheckpointError, brief
from qlora_moderation.metadata import ModelMetadata
from qlora_moderation.nf4 import RoundedWeight, pieces_of
from qlora_moderation.tensor_files import OnlyWholeError, StoredTensor, find_tensors

_ENDS = {".lora_A.weight": "a", ".lora_B.weight": "b", ".lora_magnitude_vector": "magnitude"}


@dataclasses.dataclass(frozen=True)
class LoraUpdate:
    """The update of one weight: W + scaling B A, with DoRA scaled to the norms in `magnitude`.

    Hu et al. 2021 (arXiv:2106.09685); DoRA: Liu et al. 2024 (arXiv:2402.09353); rsLoRA's scaling is alpha / sqrt(r)
    (Kalajdzievski 2023, arXiv:2312.03732).

    Attributes:
        left, right: [R, r] and [r, K] in fp32, so that their product has the shape of the stored weight.
        scaling: alpha / r or alpha / sqrt(r).
        magnitude: [R] norms of the rows (DoRA), or None.
    """

    left: torch.Tensor
    right: torch.Tensor
    scaling: float
    magnitude: torch.Tensor | None = None

    def apply(self, weight: torch.Tensor, start: int, stop: int) -> torch.Tensor:
        """Return rows `start` to `stop` of the updated weight, given the same rows of the weight in fp32."""
        updated = torch.addmm(weight, self.left[start:stop], self.right, alpha=self.scaling)
        if self.magnitude is None:
            return updated
        return updated * (self.magnitude[start:stop] / updated.norm(dim=1)).unsqueeze(1)


@dataclasses.dataclass(frozen=True)
class Recipe:
    """How one tensor of the merged classifier comes about.

    Attributes:
        shape: of the result; its rows may be more than the base's: the vocabulary has grown, by rows of zeros.
        base: its place in the base checkpoint, or None.
        own: the adapter's own tensor, which takes the base's place, or None.
        read_as: type to which the base is cast first, as training did; None: its own.
        nf4: whether the weight is rounded through NF4; the value says whether with double quantisation.
        update: the LoRA product to add, or None.
        is_head: belongs to the head, which is kept in fp32.
    """

    shape: tuple[int, ...]
    base: StoredTensor | None = None
    own: torch.Tensor | None = None
    read_as: torch.dtype | None = None
    nf4: bool | None = None
    update: LoraUpdate | None = None
    is_head: bool = False

    def read(self) -> torch.Tensor:
        """Return the tensor before NF4 rounding and update."""
        tensor = self.own
        if tensor is None:
            assert self.base is not None
            tensor = self.base.read()
            if self.read_as is not None and tensor.is_floating_point():
                tensor = tensor.to(self.read_as)
        if tensor.shape != self.shape:
            tensor = torch.cat([tensor, tensor.new_zeros(self.shape[0] - len(tensor), *self.shape[1:])])
        return tensor

    def pieces(self, threads: int | None = None) -> Iterator[tuple[int, torch.Tensor]]:
        """Yield (first element, values): fp32 where something is computed, else the tensor as it was read.

        Args:
            threads: see `RoundedWeight`.
        """
        tensor = self.read()
        if self.nf4 is None and self.update is None:
            yield 0, tensor
            return
        rounded = None if self.nf4 is None else RoundedWeight(tensor, self.nf4, threads)
        if rounded is not None and not rounded.is_finite:
            place = "the adapter" if self.base is None else str(self.base.path)
            raise CheckpointError(
                f"{place}: a weight of shape {list(self.shape)} is not finite; download the checkpoint again"
            )
        for start, stop in pieces_of(self.shape):
            rows = tensor[start:stop].float() if rounded is None else rounded.rows(start, stop)
            yield start * self.shape[1], rows if self.update is None else self.update.apply(rows, start, stop)

    def compute(self) -> torch.Tensor:
        """Return the whole tensor in fp32 (integers as they are)."""
        if self.nf4 is None and self.update is None:
            whole = self.read()
            return whole.float() if whole.is_floating_point() else whole
        whole = torch.empty(self.shape)
        for start, values in self.pieces():
            whole.view(-1)[start : start + values.numel()] = values.reshape(-1)
        return whole


@dataclasses.dataclass(frozen=True)
class MergePlan:
    """The merged classifier before any weight is read.

    Attributes:
        skeleton: the stock classifier on the meta device, with its final configuration.
        recipes: name -> recipe, in the order of the skeleton.
        dropped: tensors of the base that the classifier has no place for, such as `lm_head.weight`; what the adapter replaces
            is none of them.
    """

    skeleton: Any
    recipes: dict[str, Recipe]
    dropped: tuple[str, ...]


def plan_merge(
    adapter_path: Path, metadata: ModelMetadata, spec: bb.BackboneSpec, pad_id: int, dequantize: bool
) -> MergePlan:
    """Find out what every tensor of the merged classifier is made of.

    Raises:
        CheckpointError: adapter and base do not fit, or files are damaged.
        OnlyWholeError: base or adapter hold something that only transformers and PEFT can put together in memory.
    """
    quantization = metadata.quantization
    count, device = len(metadata.taxonomy.categories), torch.device("meta")
    skeleton: Any = bb.load_backbone(spec, count, torch.float32, device, "padded", empty=True).model
    rounded: set[str] = set()
    if dequantize:
        assert quantization is not None
        nf4 = bb.load_backbone(spec, count, torch.float32, device, "padded", quantization, empty=True).model
        rounded = {f"{name}.weight" for name, module in nf4.named_modules() if type(module).__name__ == "Linear4bit"}
    _check_whole(adapter_path, spec, count)
    updates, own = _read_adapter(adapter_path, skeleton)
    bb.fit_pad_token(skeleton, pad_id)
    fit_vocabulary(skeleton, adapter_path)
    set_label_names(skeleton.config, metadata.taxonomy.categories)
    read_as = getattr(torch, quantization.weights_dtype) if dequantize and quantization is not None else None
    base = find_tensors(spec.name, spec.revision)
    head = find_head(skeleton)[2]
    head_names = {name for name, value in skeleton.named_parameters() if any(value is one for one in head.parameters())}
    recipes: dict[str, Recipe] = {}
    used = set()
    for name, expected in skeleton.state_dict().items():
        shape = tuple(expected.shape)
        is_head = name in head_names
        found = name if name in base else name.removeprefix(f"{skeleton.base_model_prefix}.")
        if name in own:
            if own[name].shape != shape:
                raise CheckpointError(
                    f"{adapter_path}: its {name} is {list(own[name].shape)}, its base has {list(shape)}; they do not fit"
                )
            recipes[name] = Recipe(shape, own=own[name], is_head=is_head)
            used.add(found)
            continue
        if found not in base or is_head:
            raise OnlyWholeError(f"{name} is not in the base under that name")
        stored = base[found]
        grown = len(shape) == 2 and len(stored.shape) == 2 and stored.shape[1] == shape[1] and name not in updates
        if stored.shape != shape and not (grown and stored.shape[0] < shape[0]):
            raise CheckpointError(
                f"{stored.path}: {name} is {list(stored.shape)}, its config.json says {list(shape)}; download the "
                "checkpoint again"
            )
        if expected.is_floating_point() and not stored.dtype.is_floating_point:
            raise CheckpointError(
                f"{stored.path}: {name} is {stored.dtype}, not a floating-point type; take the plain weights"
            )
        used.add(found)
        recipes[name] = Recipe(
            shape,
            stored,
            read_as=read_as,
            nf4=quantization.double_quant if quantization is not None and name in rounded else None,
            update=updates.pop(name, None),
        )
    if updates:
        raise OnlyWholeError(f"the adapter changes {next(iter(updates))}, which it also replaces")
    return MergePlan(skeleton, recipes, tuple(sorted(set(base) - used)))


def _check_whole(adapter_path: Path, spec: bb.BackboneSpec, count: int) -> None:
    settings = read_lora_settings(adapter_path)
    settings.base_model_name_or_path = None  # PEFT would warn that it is another name
    bare: Any = bb.load_backbone(spec, count, torch.float32, torch.device("meta"), "padded", empty=True).model
    try:
        network: Any = get_peft_model(bare, settings, low_cpu_mem_usage=True)
    except Exception as error:  # PEFT's own checks, and whatever odd settings make of them
        raise CheckpointError(f"{adapter_path}: its settings do not fit its base ({brief(error)})") from None
    check_adapter(adapter_path, set(read_adapter_tensors(adapter_path)), network)


def read_lora_settings(adapter_path: Path) -> LoraConfig:
    """Read an adapter's settings.

    Raises:
        CheckpointError: it is no LoRA adapter.
    """
    try:
        settings = PeftConfig.from_pretrained(str(adapter_path))
    except Exception as error:  # unknown kinds, odd values
        raise CheckpointError(f"{adapter_path}: its adapter_config.json cannot be used ({brief(error)})") from None
    if not isinstance(settings, LoraConfig):
        raise CheckpointError(f"{adapter_path}: is a {settings.peft_type} adapter; only LoRA adapters can be merged")
    return settings


def _read_adapter(adapter_path: Path, skeleton: Any) -> tuple[dict[str, LoraUpdate], dict[str, torch.Tensor]]:
    """Return (updates by weight, tensors that replace the base's)."""
    settings = read_lora_settings(adapter_path)
    names = set(skeleton.state_dict())
    parts: dict[str, dict[str, torch.Tensor]] = {}
    own: dict[str, torch.Tensor] = {}
    for name, tensor in read_adapter_tensors(adapter_path).items():
        for end, part in _ENDS.items():
            if name.endswith(end):
                parts.setdefault(name.removesuffix(end), {})[part] = tensor.float()
                break
        else:
            if name not in names:
                raise OnlyWholeError(f"the adapter holds {name}, which is neither a LoRA factor nor a whole weight")
            own[name] = tensor
    return {f"{layer}.weight": _build_update(layer, each, settings, skeleton) for layer, each in parts.items()}, own


def _build_update(layer: str, parts: dict[str, torch.Tensor], settings: LoraConfig, skeleton: Any) -> LoraUpdate:
    try:
        module = skeleton.get_submodule(layer)
    except AttributeError:
        raise CheckpointError(f"the adapter changes {layer}, which its base does not have; they do not fit") from None
    transposed = type(module).__name__ == "Conv1D"  # GPT-2 stores [in, out]
    if {"a", "b"} - parts.keys() or not (isinstance(module, nn.Linear) or transposed):
        raise OnlyWholeError(f"the adapter of {layer} is no plain pair of factors on a linear layer")
    if transposed and "magnitude" in parts:
        raise OnlyWholeError(f"{layer} stores its weight transposed, and DoRA scales the other side of it")
    a, b = parts["a"], parts["b"]
    shape = tuple(module.weight.shape)
    left, right = (a.T.contiguous(), b.T.contiguous()) if transposed else (b, a)
    if (left.shape[0], right.shape[1]) != shape or left.shape[1] != right.shape[0]:
        raise CheckpointError(
            f"the adapter's factors of {layer} give {[left.shape[0], right.shape[1]]}, its base has {list(shape)}; they do "
            "not fit"
        )
    patterns = settings.alpha_pattern or {}
    alpha = patterns.get(get_pattern_key(patterns.keys(), layer), settings.lora_alpha)
    rank = a.shape[0]
    return LoraUpdate(left, right, alpha / (math.sqrt(rank) if settings.use_rslora else rank), parts.get("magnitude"))
