"""The static part of the memory: weights, NF4 constants, gradients, optimiser state.

In: a model. Out: bytes, and a line for the log. Activations come on top.
"""

from __future__ import annotations

from typing import Any

from torch import nn

_OPTIMIZER_BYTES = {"adamw_8bit": 2, "paged_adamw_8bit": 2}


def count_weights(model: nn.Module) -> tuple[int, int]:
    """Return (trainable, all) weights; an NF4 weight counts as one, though two share a byte."""
    trainable = everything = 0
    for parameter in model.parameters():
        state = getattr(parameter, "quant_state", None)
        size = parameter.numel() if state is None else state.shape.numel()
        everything += size
        trainable += size if parameter.requires_grad else 0
    return trainable, everything


def compute_static_memory(model: nn.Module, optim: str) -> dict[str, int]:
    """Return bytes of weights, quantisation constants, gradients and optimiser state."""
    weights = constants = trainable = 0
    for parameter in model.parameters():
        weights += parameter.numel() * parameter.element_size()
        constants += _constant_bytes(getattr(parameter, "quant_state", None))
        trainable += parameter.numel() if parameter.requires_grad else 0
    # 8-bit states hold two bytes a weight and fp32 block scales beside them, which small tensors (kept in fp32) outweigh
    return {
        "weights": weights,
        "constants": constants,
        "gradients": 4 * trainable,
        "optimizer": _OPTIMIZER_BYTES.get(optim, 8) * trainable,
    }


def _constant_bytes(state: Any) -> int:
    if state is None:
        return 0
    own = sum(t.numel() * t.element_size() for t in (state.absmax, state.code, state.offset) if t is not None)
    return own + _constant_bytes(state.state2)


def describe_static_memory(model: nn.Module, optim: str) -> str:
    """Return one line with the parts in GiB."""
    parts = compute_static_memory(model, optim)
    total = sum(parts.values()) / 2**30
    shown = ", ".join(f"{name} {size / 2**30:.3f}" for name, size in parts.items())
    return f"static memory {total:.3f} GiB ({shown}); activations come on top"
