"""The static part of the memory: weights, NF4 constants, gradients, optimiser state.

In: a model, whole, sharded, or without weights on the meta device. Out: bytes of this process, and a line for the log.
Activations come on top.
"""

from __future__ import annotations

import ctypes
import dataclasses
from collections.abc import Iterator
from typing import Any

from torch import nn

from qlora_moderation.distributed import local_part

_OPTIMIZER_BYTES = {"adamw_8bit": 2, "paged_adamw_8bit": 2}
_NF4_BYTES = 0.5  # of a weight
_NOT_NF4 = object()


@dataclasses.dataclass(frozen=True)
class _Held:
    """One parameter: its weights in the whole model, and what this process holds of it."""

    weights: int
    held_weights: int
    held_bytes: int
    constants: int
    trainable: bool


def _parameters(model: nn.Module) -> Iterator[_Held]:
    seen: set[int] = set()
    for module in model.modules():
        for parameter in module.parameters(recurse=False):
            if id(parameter) in seen:
                continue
            seen.add(id(parameter))
            own = local_part(parameter)
            bytes_ = own.numel() * own.element_size()
            state: Any = getattr(module, "quant_state", _NOT_NF4)
            if state is _NOT_NF4 or parameter is not module.weight:
                yield _Held(parameter.numel(), own.numel(), bytes_, 0, parameter.requires_grad)
            elif state is None:  # a Linear4bit that has no weights yet
                size, nested = parameter.numel(), getattr(parameter, "compress_statistics", True)
                yield _Held(size, size, int(size * _NF4_BYTES), size // 64 * (1 if nested else 4), False)
            else:
                size = state.shape.numel()
                yield _Held(size, size, bytes_, _constant_bytes(state), False)


def count_weights(model: nn.Module) -> tuple[int, int]:
    """Return (trainable, all) weights of the whole model; an NF4 weight counts as one, though two share a byte."""
    held = list(_parameters(model))
    return sum(part.weights for part in held if part.trainable), sum(part.weights for part in held)


def compute_static_memory(model: nn.Module, optim: str) -> dict[str, int]:
    """Return bytes of weights, quantisation constants, gradients and optimiser state that this process holds."""
    held = list(_parameters(model))
    trainable = sum(part.held_weights for part in held if part.trainable)
    # 8-bit states hold two bytes a weight and fp32 block scales beside them, which small tensors (kept in fp32) outweigh
    return {
        "weights": sum(part.held_bytes for part in held),
        "constants": sum(part.constants for part in held),
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


def return_free_memory() -> None:
    """Give the system back what the C library keeps of freed memory; glibc alone keeps it, gigabytes after large tensors."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)
