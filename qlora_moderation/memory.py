"""The static part of the memory: weights, NF4 constants, adapters, gradients, optimiser state.

In: a model, whole, sharded, or without weights on the meta device. Out: bytes of this process, and a line for the log.
Activations come on top, see `estimate`.
"""

from __future__ import annotations

import ctypes
import dataclasses
import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from qlora_moderation.distributed import local_part

_BLOCK = 64  # weights of an NF4 block
_NESTED_BLOCK = 256  # blocks whose magnitudes double quantisation keeps together, and values of a block of 8-bit states
_LEAST_8BIT = 4096  # bitsandbytes keeps the states of smaller tensors in fp32
_LEAST_PAGED = 100_000  # and those of smaller tensors unpaged
_MAP_BYTES = 4 * 256  # a table of the 256 values that 8 bits stand for
_NOT_NF4 = object()


@dataclasses.dataclass(frozen=True)
class Held:
    """One parameter: its weights in the whole model, and what one process holds of it.

    Attributes:
        weights: of the whole parameter.
        held_weights: of this process's part; of an NF4 weight all, because nothing asks.
        held_bytes: of this process's part.
        constants: bytes of NF4 constants, which every process holds whole.
        trainable: whether it has a gradient.
    """

    weights: int
    held_weights: int
    held_bytes: int
    constants: int
    trainable: bool


def list_held(model: nn.Module, slices: int = 1) -> Iterator[Held]:
    """Yield what one process holds of each distinct parameter.

    Args:
        model: whole, sharded already, or on the meta device.
        slices: into how many fsdp would cut the rows of every whole parameter; the first process's, the largest, are meant.
    """
    seen: set[int] = set()
    for module in model.modules():
        for parameter in module.parameters(recurse=False):
            if id(parameter) in seen:
                continue
            seen.add(id(parameter))
            own = local_part(parameter)
            state: Any = getattr(module, "quant_state", _NOT_NF4)
            if state is _NOT_NF4 or parameter is not module.weight:
                kept = _cut(own.numel(), own.shape[0] if own.ndim else 1, slices)
                yield Held(parameter.numel(), kept, kept * own.element_size(), 0, parameter.requires_grad)
            elif state is None:  # a Linear4bit that has no weights yet
                yield _foresee_nf4(parameter, slices)
            else:
                rows = own.shape[0]
                size, bytes_ = state.shape.numel(), _cut(rows, rows, slices) * own.element_size()
                yield Held(size, size, bytes_, _constant_bytes(state), False)


def _cut(numel: int, rows: int, slices: int) -> int:
    """Return the numbers of the largest of `slices` slices; fsdp cuts along rows."""
    return math.ceil(rows / slices) * (numel // rows) if numel else 0


def _foresee_nf4(parameter: Any, slices: int) -> Held:
    size, nested = parameter.numel(), parameter.compress_statistics
    storage = parameter.quant_storage.itemsize
    rows = (size + 1) // (2 * storage)  # bitsandbytes lays the payload out as one column
    blocks = math.ceil(size / _BLOCK)
    constants = 4 * blocks + 4 * 16
    if nested:
        constants = blocks + 4 * math.ceil(blocks / _NESTED_BLOCK) + _MAP_BYTES + 4 * 16 + 4  # one offset
    return Held(size, size, _cut(rows, rows, slices) * storage, constants, False)


def _constant_bytes(state: Any) -> int:
    nested = (state.state2.absmax, state.state2.code) if state.nested else ()
    return sum(tensor.nbytes for tensor in (state.absmax, state.code, state.offset, *nested) if tensor is not None)


def count_weights(model: nn.Module) -> tuple[int, int]:
    """Return (trainable, all) weights of the whole model; an NF4 weight counts as one, though two share a byte."""
    held = list(list_held(model))
    return sum(part.weights for part in held if part.trainable), sum(part.weights for part in held)


def compute_static_memory(model: nn.Module, optim: str, slices: int = 1) -> dict[str, int]:
    """Return bytes of weights, NF4 constants, adapters, gradients and optimiser state that one process holds.

    Args:
        model: see `list_held`.
        optim: transformers' name of the optimiser.
        slices: see `list_held`.

    Returns:
        `adapters` are what is trained beside frozen weights, the head included; where all is trained, `weights` hold it. What
        the paged optimisers can move to the host does not count.
    """
    held = list(list_held(model, slices))
    trained = [part for part in held if part.trainable]
    adapters = sum(part.held_bytes for part in trained) if len(trained) < len(held) else 0
    return {
        "weights": sum(part.held_bytes for part in held) - adapters,
        "constants": sum(part.constants for part in held),
        "adapters": adapters,
        "gradients": sum(part.held_bytes for part in trained),
        "optimizer": _optimizer_bytes([part.held_weights for part in trained], optim),
    }


def _optimizer_bytes(sizes: list[int], optim: str) -> int:
    """Return the bytes of both moments, as torch's and bitsandbytes' (0.50) optimisers lay them out."""
    if optim.startswith("adamw_torch"):
        return sum(8 * size + 4 for size in sizes)  # a count of steps for each tensor
    if optim.startswith("paged_"):
        sizes = [size for size in sizes if size < _LEAST_PAGED]
    if optim == "paged_adamw_32bit":
        return sum(8 * size for size in sizes)
    small = [size for size in sizes if size < _LEAST_8BIT]
    large = [size for size in sizes if size >= _LEAST_8BIT]
    blocks = sum(math.ceil(size / _NESTED_BLOCK) for size in large)
    return 8 * sum(small) + 2 * sum(large) + 2 * 4 * blocks + 2 * _MAP_BYTES * bool(large)


def describe_parts(parts: dict[str, int]) -> str:
    """Return the parts in GiB, in one line."""
    return ", ".join(f"{name} {size / 2**30:.3f}" for name, size in parts.items() if size)


def describe_static_memory(model: nn.Module, optim: str) -> str:
    """Return one line with the parts in GiB."""
    parts = compute_static_memory(model, optim)
    return f"static memory {sum(parts.values()) / 2**30:.3f} GiB ({describe_parts(parts)}); activations come on top"


def is_shortage(error: BaseException) -> bool:
    """Say whether an error means that a device has no memory left; for the CPU torch has no kind of error of its own."""
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or "DefaultCPUAllocator" in str(error)


def return_free_memory() -> None:
    """Give the system back what the C library keeps of freed memory; glibc alone keeps it, gigabytes after large tensors."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)
