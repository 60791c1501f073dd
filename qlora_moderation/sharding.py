"""Who holds which weights: one process, replicas (ddp), or slices (fsdp).

In: a model whose weights rank 0 holds. Out: the same model on every rank, filled and, for fsdp, cut layer by layer, so that
no rank but rank 0 ever holds more than its share and one layer. Around step 6.
"""

from __future__ import annotations

import dataclasses
import zlib
from collections.abc import Iterator
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, MixedPrecisionPolicy, OffloadPolicy, fully_shard

from qlora_moderation.adapter import find_head
from qlora_moderation.capacity import Capacity
from qlora_moderation.config import TrainConfig
from qlora_moderation.distributed import on_main, raise_together, sum_gradients, world_size
from qlora_moderation.errors import ConfigError
from qlora_moderation.model import ModerationModel
from qlora_moderation.options import nearest
from qlora_moderation.recomputation import find_layer_list


@dataclasses.dataclass(frozen=True)
class Sharding:
    """How the ranks share a model.

    Attributes:
        kind: `none`, `ddp` (every rank holds all weights), `fsdp` (every rank holds its slice of each layer).
        reason: why, for the log.
        checksums: CRC-32 of each NF4 payload as it was loaded, by module name; empty without fsdp.
        holds_gradients: whether fsdp reduces gradients once a step instead of once a micro-batch.
    """

    kind: Literal["none", "ddp", "fsdp"]
    reason: str
    checksums: dict[str, int] = dataclasses.field(default_factory=dict)
    holds_gradients: bool = True

    @property
    def needs_fillers(self) -> bool:
        """Say whether a rank without texts must still run the model, because the others wait for its slices."""
        return self.kind == "fsdp"

    def before_backward(self, model: nn.Module, last: bool) -> None:
        """Put off the reduction of gradients to the last micro-batch of a step where memory allows."""
        if isinstance(model, FSDPModule) and self.holds_gradients:
            model.set_requires_gradient_sync(last)
            model.set_is_last_backward(last)

    def reduce_gradients(self, parameters: list[nn.Parameter]) -> None:
        """Add up the gradients of a step over the ranks; with fsdp the backward pass has done so."""
        if self.kind == "ddp":
            sum_gradients(parameters)


def choose_sharding(capacity: Capacity) -> Sharding:
    """Share the model as was decided from the memory of the devices."""
    holds = capacity.sharding != "fsdp" or capacity.holds_back
    return Sharding(capacity.sharding, capacity.sharding_reason, holds_gradients=holds)


def find_layers(model: ModerationModel, class_name: str | None = None) -> list[nn.Module]:
    """Return the decoder or encoder layers, or the modules of the named class.

    Raises:
        ConfigError: no module is of that class, or there are no layers.
    """
    classifier = model.classifier
    layers = list(find_layer_list(classifier))
    if class_name is None:
        return layers
    chosen = [module for module in classifier.modules() if type(module).__name__ == class_name]
    if not chosen:
        known = {type(module).__name__ for module in classifier.modules()}
        hint = nearest(class_name, known) or f"; its layers are {type(layers[0]).__name__}"
        raise ConfigError(f"--fsdp_transformer_layer_cls_to_wrap {class_name}: the backbone has none{hint}")
    head, inner = find_head(classifier)[2], {part for module in chosen for part in list(module.modules())[1:]}
    if head in {*chosen, *inner} or inner & set(chosen) or isinstance(chosen[0], nn.ModuleList | nn.ModuleDict):
        raise ConfigError(
            f"--fsdp_transformer_layer_cls_to_wrap {class_name}: is no layer of the backbone; its layers are "
            f"{type(layers[0]).__name__}"
        )
    return chosen


def distribute_model(
    model: ModerationModel, sharding: Sharding, config: TrainConfig, compute_dtype: torch.dtype
) -> Sharding:
    """Give every rank its weights and return the sharding with what the guard needs.

    Args:
        model: with weights on rank 0, on the meta device elsewhere; all on `model.device` afterwards.
        sharding: from `choose_sharding`.
        config: names the layer class, offloading, and the method.
        compute_dtype: of `--method full` under fsdp; its master weights stay in fp32.
    """
    if sharding.kind == "none":
        return sharding
    if sharding.kind == "ddp":
        _fill(model, model.device, set(), guarded=False)
        return sharding
    mesh = init_device_mesh(model.device.type, (world_size(),))
    offload: OffloadPolicy = CPUOffloadPolicy() if config.offloads and mesh.device_type == "cuda" else OffloadPolicy()
    reshard = None if config.fsdp is None or "shard_grad_op" not in config.fsdp.split() else False
    # a frozen base lies in its compute type already and is never cast: casting rewrites NF4 payloads (bitsandbytes#1945)
    cast = MixedPrecisionPolicy()
    if config.method == "full" and compute_dtype != torch.float32:
        cast = MixedPrecisionPolicy(param_dtype=compute_dtype, reduce_dtype=torch.float32)
        model.autocast_dtype = None
    names = {module: name for name, module in model.named_modules()}
    layers, head = find_layers(model, config.fsdp_transformer_layer_cls_to_wrap), find_head(model.classifier)[2]
    checksums: dict[str, int] = {}
    filled: set[nn.Module] = set()
    for unit in [*layers, head, model]:
        found = _fill(unit, model.device, filled)
        checksums.update({names[module]: checksum for module, checksum in found.items()})
        policy = MixedPrecisionPolicy(param_dtype=torch.float32) if unit is head else cast  # its inputs are cast, too
        fully_shard(unit, mesh=mesh, mp_policy=policy, offload_policy=offload, reshard_after_forward=reshard)
    for module in model.modules():
        if isinstance(module, FSDPModule):
            # the loss is normalised over the global step already
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)
    return dataclasses.replace(sharding, checksums=checksums)


def _fill(unit: nn.Module, device: torch.device, filled: set[nn.Module], guarded: bool = True) -> dict[nn.Module, int]:
    """Send the weights of a unit from rank 0 to all, one after another; returns checksums of its NF4 payloads, if guarded."""
    owners = [module for module in unit.modules() if module not in filled]
    filled.update(owners)
    slots = [
        (owner, table, name)
        for owner in owners
        for table in _tables(owner)
        for name, tensor in table.items()
        if tensor is not None
    ]
    described = on_main(lambda: [_describe(table[name], guarded) for _, table, name in slots])
    checksums = {}
    for (owner, table, name), (shape, dtype, statistics, checksum) in zip(slots, described, strict=True):
        old: Any = table[name]
        whole = _send(old, shape, dtype, device)
        if statistics:
            checksums.update({owner: checksum} if guarded else {})
            table[name] = _rebuild_nf4(old, whole, statistics, owner, device)
        elif isinstance(old, nn.Parameter):
            table[name] = nn.Parameter(whole, requires_grad=old.requires_grad)
        else:
            table[name] = whole
    return checksums


def _tables(module: nn.Module) -> tuple[dict[str, Any], dict[str, Any]]:
    return module._parameters, module._buffers


def _describe(tensor: Any, guarded: bool) -> tuple[torch.Size, torch.dtype, dict[str, Any], int]:
    state = getattr(tensor, "quant_state", None)
    if state is None:
        return tensor.shape, tensor.dtype, {}, 0
    # the constants are small beside their payload and travel with the description
    statistics = {key: value.cpu() for key, value in state.as_dict(packed=True).items()}
    return tensor.shape, tensor.dtype, statistics, checksum_bytes(tensor) if guarded else 0


def _send(tensor: torch.Tensor, shape: torch.Size, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    missing = tensor.is_meta
    whole = torch.empty(shape, dtype=dtype, device=device) if missing else tensor.detach().to(device).contiguous()
    if world_size() > 1:
        dist.broadcast(whole.reshape(-1).view(torch.uint8), src=0)
    return whole


def _rebuild_nf4(old: Any, payload: torch.Tensor, statistics: dict[str, Any], owner: Any, device: torch.device) -> Any:
    if not old.is_meta:
        return old.to(device)
    from bitsandbytes.nn import Params4bit

    return Params4bit.from_prequantized(payload, statistics, requires_grad=False, device=device, module=owner)


def checksum_bytes(tensor: torch.Tensor) -> int:
    """Return the CRC-32 of a tensor's bytes."""
    # a copy: lending gathered weights to numpy would keep fsdp from freeing them
    return zlib.crc32(tensor.detach().clone().reshape(-1).view(torch.uint8).cpu().numpy().tobytes())


def check_nf4_bytes(model: nn.Module, sharding: Sharding) -> int:
    """Gather every layer once and compare its NF4 bytes with those that were loaded; returns how many payloads there are.

    Raises:
        ConfigError: the bytes of a layer changed between the ranks.
    """
    changed: list[str] = []
    for unit in _sharded_units(model):
        unit.unshard()
        for name, module in model.named_modules():
            weight = getattr(module, "weight", None)
            if name in sharding.checksums and isinstance(weight, torch.Tensor) and not hasattr(weight, "device_mesh"):
                changed += [name] if checksum_bytes(weight) != sharding.checksums[name] else []
        unit.reshard()
    error = None
    if changed:
        error = ConfigError(
            f"the NF4 weights of {len(set(changed))} layers changed while the ranks put them together, the first is "
            f"{changed[0]}; use --sharding ddp"
        )
    raise_together(error)
    return len(sharding.checksums)


def _sharded_units(model: nn.Module) -> Iterator[FSDPModule]:
    for module in model.modules():
        if isinstance(module, FSDPModule):
            yield module


def reshard(model: nn.Module) -> None:
    """Let go of weights that a forward without a backward has left gathered."""
    for unit in _sharded_units(model):
        unit.reshard()
