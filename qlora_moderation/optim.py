"""Optimisers and schedules, under transformers' names.

In: a model and the configuration. Out: an optimiser and a scheduler. Part of step 8.
"""

from __future__ import annotations

import torch
from torch import nn
from transformers import get_scheduler

from qlora_moderation.config import TrainConfig
from qlora_moderation.errors import ConfigError


def build_optimizer(model: nn.Module, config: TrainConfig) -> torch.optim.Optimizer:
    """Return AdamW over the trainable parameters; weight decay acts on matrices only, not on norms and biases.

    Raises:
        ConfigError: the optimiser needs bitsandbytes and it is not installed.
    """
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    groups = [
        {"params": [p for p in trainable if p.ndim > 1], "weight_decay": config.weight_decay},
        {"params": [p for p in trainable if p.ndim <= 1], "weight_decay": 0.0},
    ]
    groups = [group for group in groups if group["params"]]
    settings = {
        "lr": config.resolved_learning_rate,
        "betas": (config.adam_beta1, config.adam_beta2),
        "eps": config.adam_epsilon,
    }
    if config.optim.startswith("adamw_torch"):
        return torch.optim.AdamW(groups, fused=config.optim == "adamw_torch_fused", **settings)  # type: ignore[arg-type]  # mixed values
    try:
        import bitsandbytes
    except ImportError:
        raise ConfigError(f"--optim {config.optim} needs bitsandbytes: pip install bitsandbytes") from None
    kinds = {
        "adamw_8bit": bitsandbytes.optim.AdamW8bit,
        "paged_adamw_8bit": bitsandbytes.optim.PagedAdamW8bit,
        "paged_adamw_32bit": bitsandbytes.optim.PagedAdamW32bit,
    }
    return kinds[config.optim](groups, **settings)


def build_scheduler(
    optimizer: torch.optim.Optimizer, config: TrainConfig, total_steps: int
) -> torch.optim.lr_scheduler.LRScheduler:
    """Return transformers' schedule of the given name over `total_steps`."""
    name = config.lr_scheduler_type
    warmup = warmup_steps(config, total_steps)
    return get_scheduler(name, optimizer, num_warmup_steps=warmup, num_training_steps=total_steps)


def warmup_steps(config: TrainConfig, total_steps: int) -> int:
    """Return the steps with a rising rate; `constant` has none."""
    if config.lr_scheduler_type == "constant":
        return 0
    return config.warmup_steps or int(config.warmup_ratio * total_steps + 0.5)
