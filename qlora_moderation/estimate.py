"""The whole memory of one process before anything is loaded: static part, activations, buffers, for one way to train.

In: a blueprint and a `Setting`. Out: a `MemoryEstimate`. Everything is computed on the meta device, in seconds for LLaMA-7B.

Not counted, and left to `reserve`: the CUDA context, workspaces of cuBLAS and NCCL, fragmentation of the allocator, and what
kernels allocate for themselves beside the attention's fp32 sums.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import Any, Literal

import torch
from torch import nn

from qlora_moderation.activations import Activations, compute_activations
from qlora_moderation.adapter import find_head
from qlora_moderation.blueprint import Blueprint
from qlora_moderation.distributed import BUCKET_BYTES
from qlora_moderation.memory import compute_static_memory, describe_parts, list_held
from qlora_moderation.recomputation import Recomputation, find_layer_list

Kind = Literal["none", "ddp", "fsdp"]
HELD_SHARE = 0.125
"""Of a device's memory that whole gradients may take which fsdp holds back for the last micro-batch of a step."""

CONTEXT_BYTES = 768 * 2**20  # CUDA context, cuBLAS and NCCL: an assumption, not measured
_FRAGMENTED_SHARE = 0.05  # of a card that the allocator cannot use: an assumption, not measured
_HOST_BYTES = 2**30  # interpreter, libraries and data of a process on the CPU


@dataclasses.dataclass(frozen=True)
class Setting:
    """One way to train.

    Attributes:
        sharding: how the processes share the model.
        processes: W.
        recomputation: which layers recompute their activations.
        tokens: T of the largest micro-batch, padding included.
    """

    sharding: Kind
    processes: int
    recomputation: Recomputation
    tokens: int

    def describe(self) -> str:
        """Return the setting in words."""
        shared = "one process" if self.sharding == "none" else f"{self.sharding} over {self.processes}"
        return f"{shared}, checkpointing {self.recomputation}, {self.tokens} tokens a micro-batch"


@dataclasses.dataclass(frozen=True)
class MemoryEstimate:
    """Bytes of one process, the one that holds most.

    Attributes:
        setting: the way to train.
        weights: frozen ones, or all where all are trained.
        constants: of NF4.
        adapters: trained weights beside frozen ones, the head included.
        gradients: of all trained weights, held through the backward pass.
        optimizer: both moments.
        activations: the peak of a micro-batch, temporaries of the backward pass included.
        buffers: unpacked NF4 weights; layers that fsdp has gathered, and their gradients on the way to their owners.
        update: beyond the static part when activations are gone: gradients on the wire, temporaries of the optimiser.
    """

    setting: Setting
    weights: int
    constants: int
    adapters: int
    gradients: int
    optimizer: int
    activations: int
    buffers: int
    update: int

    @property
    def static(self) -> int:
        """Bytes that stay from step to step."""
        return self.weights + self.constants + self.adapters + self.gradients + self.optimizer

    @property
    def total(self) -> int:
        """Bytes at the worst moment of a step, which is either the backward pass or the update."""
        return self.static + max(self.activations + self.buffers, self.update)

    def fits(self, memory: int, device_type: str = "cuda") -> bool:
        """Say whether estimate and reserve go into a device's memory, in bytes."""
        return self.total + reserve(memory, device_type) <= memory

    def describe(self) -> str:
        """Return the whole and its parts in GiB."""
        names = ("weights", "constants", "adapters", "gradients", "optimizer", "activations", "buffers")
        parts = describe_parts({name: getattr(self, name) for name in names})
        return f"{self.total / 2**30:.3f} GiB ({parts}; {self.setting.describe()})"


def reserve(memory: int, device_type: str = "cuda") -> int:
    """Return the bytes of a device that an estimate must leave free: assumptions, not measured."""
    return int(CONTEXT_BYTES + _FRAGMENTED_SHARE * memory) if device_type == "cuda" else _HOST_BYTES


class MemoryEstimator:
    """Estimates many settings of one network; what two settings share is computed once.

    Args:
        blueprint: the network.
        device_type: `cuda` or `cpu`.
        between: token budgets (low, high) that are really run; those between them are interpolated. None: each is run.
        seen: activations that another estimator has computed of the same network, NF4 or not; filled here.
    """

    def __init__(
        self,
        blueprint: Blueprint,
        device_type: str,
        between: tuple[int, int] | None = None,
        seen: dict[tuple[Any, ...], Activations] | None = None,
    ) -> None:
        self.blueprint, self.device_type, self.between = blueprint, device_type, between
        self._seen = {} if seen is None else seen
        self._parts: dict[int, dict[str, int]] = {}

    def estimate(self, setting: Setting, memory: int | None = None) -> MemoryEstimate:
        """Return the estimate of one setting.

        Args:
            setting: the way to train.
            memory: of the device, which decides whether fsdp holds gradients back; None: it does.
        """
        without = self.estimate_without_activations(setting, memory)
        return dataclasses.replace(without, activations=self._activations_of(setting))

    def estimate_without_activations(self, setting: Setting, memory: int | None = None) -> MemoryEstimate:
        """Return the same with 0 bytes of activations, which is quicker."""
        config, network = self.blueprint.config, self._network
        sharded = setting.sharding == "fsdp"
        slices = setting.processes if sharded else 1
        if slices not in self._parts:
            self._parts[slices] = compute_static_memory(network, config.optim, slices)
        parts = self._parts[slices]
        if sharded and config.offloads and self.device_type == "cuda":
            parts = parts | dict.fromkeys(("weights", "adapters", "gradients", "optimizer"), 0)
        buffers = self._unpacked
        if sharded:
            buffers += self._gathered
            if memory is None or self.holds_back(memory):
                buffers += sum(self._trained)
        largest = max(self._trained)
        update = 2 * math.ceil(largest / slices) if config.optim == "adamw_torch" else 0
        if setting.sharding == "ddp":
            update = max(update, min(sum(self._trained), BUCKET_BYTES + largest))
        return MemoryEstimate(setting, **parts, activations=0, buffers=buffers, update=update)

    def holds_back(self, memory: int) -> bool:
        """Say whether fsdp holds gradients back until the last micro-batch of a step on a device of so many bytes."""
        return sum(self._trained) <= HELD_SHARE * memory

    @functools.cached_property
    def _network(self) -> Any:
        return self.blueprint.build(torch.device("meta"))[0]

    @functools.cached_property
    def _trained(self) -> list[int]:
        return [part.held_bytes for part in list_held(self._network) if part.trainable]

    @functools.cached_property
    def _unpacked(self) -> int:
        """The largest NF4 weight in the compute type, with its magnitudes in fp32."""
        size = max((part.weights for part in list_held(self._network) if part.constants), default=0)
        return size * self.blueprint.compute_dtype.itemsize + 4 * math.ceil(size / 64)

    @functools.cached_property
    def _gathered(self) -> int:
        """What fsdp holds beside its slices: the root and two layers gathered, one layer's gradients on their way."""
        config, network = self.blueprint.config, self._network
        classifier = network if config.method == "full" else network.get_base_model()
        layers, head = find_layer_list(classifier), find_head(classifier)[2]
        casts = config.method == "full"
        each = [self._whole_bytes(layer, casts) for layer in layers]
        everything = self._whole_bytes(network, casts)
        root = everything - sum(each) + self._whole_bytes(head, False) - self._whole_bytes(head, casts)
        trained = max(sum(p.numel() for p in layer.parameters() if p.requires_grad) for layer in layers)
        kept = config.fsdp is not None and "shard_grad_op" in config.fsdp.split()
        gathered = sum(each) if kept else sum(sorted(each)[-2:])
        # gradients leave the backward pass in the type of the gathered weights and travel in fp32
        on_their_way = trained * ((self.blueprint.compute_dtype.itemsize if casts else 4) + 4)
        return root + gathered + on_their_way

    def _whole_bytes(self, module: nn.Module, casts: bool) -> int:
        held = list(list_held(module))
        if casts:
            return sum(part.weights for part in held) * self.blueprint.compute_dtype.itemsize
        return sum(part.held_bytes for part in held)

    def _activations_of(self, setting: Setting) -> int:
        full = self.blueprint.config.method == "full"
        gathered = full and setting.sharding == "fsdp"

        def run(tokens: int) -> int:
            key = (full, gathered, setting.recomputation, tokens)
            if key not in self._seen:
                self._seen[key] = compute_activations(
                    self.blueprint, setting.recomputation, tokens, self.device_type, gathered
                )
            return self._seen[key].peak

        if self.between is None or not self.between[0] < setting.tokens < self.between[1]:
            return run(setting.tokens)
        # the peak is the highest of lines over T, so that a chord lies on it or above it
        low, high = self.between
        share = (setting.tokens - low) / (high - low)
        return math.ceil((1 - share) * run(low) + share * run(high))
