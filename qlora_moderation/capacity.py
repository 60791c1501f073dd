"""What fits: how the model is shared and which activations are recomputed, decided from the memory estimate, with a reason.

In: options, a blueprint, the memory of a device. Out: a `Capacity`. Before step 6.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import os
from pathlib import Path

import torch

from qlora_moderation.activations import EstimateError
from qlora_moderation.blueprint import Blueprint
from qlora_moderation.config import TrainConfig
from qlora_moderation.distributed import world_size
from qlora_moderation.errors import ConfigError
from qlora_moderation.estimate import CONTEXT_BYTES, Kind, MemoryEstimate, MemoryEstimator, Setting, reserve
from qlora_moderation.recomputation import RECOMPUTATIONS, Recomputation


@dataclasses.dataclass(frozen=True)
class Capacity:
    """What was decided from the memory of a device.

    Attributes:
        sharding: how the processes share the model.
        sharding_reason: why, for the log.
        recomputation: which layers recompute their activations.
        recomputation_reason: why.
        memory: bytes that each process may count on.
        blueprint: the network.
        setting: what was decided, as the estimate takes it.
        device_type: `cuda` or `cpu`.
    """

    sharding: Kind
    sharding_reason: str
    recomputation: Recomputation
    recomputation_reason: str
    memory: int
    blueprint: Blueprint
    setting: Setting
    device_type: str

    def estimate(self, **changes: object) -> MemoryEstimate:
        """Return the estimate of what was decided, or of it with some fields of its setting changed."""
        setting = dataclasses.replace(self.setting, **changes)  # type: ignore[arg-type]  # fields of Setting
        return MemoryEstimator(self.blueprint, self.device_type).estimate(setting, self.memory)

    def describe(self) -> str:
        """Return the estimate in words, or why there is none."""
        try:
            return self.estimate().describe()
        except EstimateError as error:
            return f"none ({error})"

    @property
    def holds_back(self) -> bool:
        """Say whether fsdp reduces gradients once a step instead of once a micro-batch."""
        return MemoryEstimator(self.blueprint, self.device_type).holds_back(self.memory)


def device_memory(device: torch.device) -> int:
    """Return the bytes that one process may count on."""
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        # the reserve, which is taken off later, holds this process's own context
        return min(total, free + torch.cuda.memory_reserved(device) + CONTEXT_BYTES)
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    with contextlib.suppress(OSError, ValueError):  # no limit set, or no control groups here
        memory = min(memory, int(Path("/sys/fs/cgroup/memory.max").read_text()))
    return memory // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


def count_tokens(config: TrainConfig, budget: int) -> int:
    """Return the most tokens of a micro-batch: the budget, or all of a step where that is less."""
    step = config.per_device_train_batch_size * config.gradient_accumulation_steps * config.max_length
    return min(budget, step)


def choose_capacity(config: TrainConfig, blueprint: Blueprint, device: torch.device, budget: int) -> Capacity:
    """Decide what the options leave open.

    Candidates are tried from the fastest on: replicas before slices, then no recomputation before every second layer before
    all. The first one whose estimate fits wins, or the smallest where none does or where it cannot be estimated.

    Args:
        config: `sharding`, `fsdp` and `gradient_checkpointing` count.
        blueprint: the network.
        device: this rank's.
        budget: tokens of a micro-batch.

    Raises:
        ConfigError: `none` with several processes, or an optimiser that cannot work on slices.
    """
    processes, memory = world_size(), device_memory(device)
    kinds, why_sharding = _list_kinds(config, processes)
    modes, why_recomputing = _list_modes(config, device)
    settings = [
        Setting(kind, processes, mode, count_tokens(config, budget)) for kind, mode in itertools.product(kinds, modes)
    ]
    chosen = settings[0]
    if len(settings) > 1:
        chosen, reason = _choose(settings, MemoryEstimator(blueprint, device.type), memory, device.type)
        why_sharding, why_recomputing = why_sharding or reason, why_recomputing or reason
    if chosen.sharding == "fsdp" and not config.optim.startswith("adamw_torch"):
        raise ConfigError(
            f"--optim {config.optim} cannot work on slices; use --optim adamw_torch_fused, or --sharding ddp"
        )
    return Capacity(
        sharding=chosen.sharding,
        sharding_reason=why_sharding,
        recomputation=chosen.recomputation,
        recomputation_reason=why_recomputing,
        memory=memory,
        blueprint=blueprint,
        setting=chosen,
        device_type=device.type,
    )


def _list_kinds(config: TrainConfig, processes: int) -> tuple[list[Kind], str]:
    """Return what may be chosen, the fastest first, and the reason where there is no choice."""
    asked = config.resolved_sharding
    if asked == "none" and processes > 1:
        raise ConfigError(f"--sharding none means one process, and there are {processes}; use auto, ddp or fsdp")
    if processes == 1 and config.sharding != "fsdp":
        return ["none"], "one process"
    if asked == "auto":
        return ["ddp", "fsdp"], ""
    return ["ddp" if asked == "ddp" else "fsdp"], "asked for"


def _list_modes(config: TrainConfig, device: torch.device) -> tuple[list[Recomputation], str]:
    asked = config.recomputation
    if asked != "auto":
        return [asked], "asked for"
    if device.type != "cuda":
        return ["none"], "the CPU has memory enough, and recomputing costs time"
    return list(RECOMPUTATIONS), ""


def _choose(settings: list[Setting], estimator: MemoryEstimator, memory: int, device_type: str) -> tuple[Setting, str]:
    limit = f"{memory / 2**30:.1f} GiB of {device_type} memory for each process less {reserve(memory, device_type) / 2**30:.2f}"
    before = ""
    for setting in settings:
        try:
            estimate = estimator.estimate(setting, memory)
        except EstimateError as error:
            return settings[-1], f"the smallest, because there is no estimate: {error}"
        size = f"{estimate.total / 2**30:.2f} GiB"
        need = f"{setting.sharding} with checkpointing {setting.recomputation} needs an estimated {size}"
        if estimate.fits(memory, device_type):
            return setting, f"{need}, which fits the {limit}{f'; {before}' if before else ''}"
        before = f"{need}, which does not fit"
    return settings[-1], f"nothing fits the {limit}; even {need}"
