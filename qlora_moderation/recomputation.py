"""Checkpointing of activations: which layers keep them and which recompute them in the backward pass.

In: a network and one of three words. Out: the same network, whose layers know what to do. Part of step 6.
"""

from __future__ import annotations

from typing import Any, Literal

from torch import nn

from qlora_moderation.errors import ConfigError

Recomputation = Literal["none", "selective", "all"]
RECOMPUTATIONS: tuple[Recomputation, ...] = ("none", "selective", "all")
"""From the fastest to the smallest."""


def find_layer_list(network: nn.Module) -> nn.ModuleList:
    """Return the list of decoder or encoder layers: the largest list of modules.

    Raises:
        ConfigError: there is none.
    """
    lists = [module for module in network.modules() if isinstance(module, nn.ModuleList) and len(module)]
    if not lists:
        raise ConfigError(f"{type(network).__name__}: has no list of layers; use --sharding ddp without checkpointing")
    return max(lists, key=lambda found: sum(parameter.numel() for parameter in found.parameters()))


def recompute_layers(network: Any, which: Recomputation) -> None:
    """Let no layer, every second one or all recompute their activations in the backward pass.

    `selective` is every second layer, not the fewest that an estimate asks for: then a run does not depend on how much of a
    card was free, and the token budget fits what is left in finer steps and at less cost. The last two layers keep theirs: the
    last has few (see `last_layer`), and the backward pass of the one before would otherwise add its own recomputed ones while
    those of all others are held.

    Args:
        network: a stock classifier, or PEFT's wrapper around one.
        which: which layers.

    Raises:
        ConfigError: `selective` for a backbone whose layers cannot be told apart.
    """
    if which == "none":
        return
    network.gradient_checkpointing_enable({"use_reentrant": False})
    if which == "all":
        return
    layers: list[Any] = list(find_layer_list(network))
    for layer in [*layers[-1:], *layers[-2::-2]]:
        if not hasattr(layer, "gradient_checkpointing"):
            raise ConfigError(
                f"--gradient_checkpointing selective: {type(layer).__name__} cannot be told to keep its activations; use all"
            )
        layer.gradient_checkpointing = False
