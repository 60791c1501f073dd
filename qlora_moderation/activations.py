"""Activations: what a step holds beside weights, gradients and optimiser, seen by running it without data.

In: a blueprint. Out: bytes. No formula of any architecture stands here: the network itself, with PEFT's or our adapters, goes
forward and backward over tensors that have shapes and no contents (torch's `FakeTensorMode`), and every storage is counted
from the operation that makes it to its end. What kernels allocate for themselves is not seen, see `estimate`.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import weakref
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AttentionInterface

from qlora_moderation.attention import cast_as_products, fit_key_heads
from qlora_moderation.blueprint import Blueprint
from qlora_moderation.errors import ModerationError, brief
from qlora_moderation.layout import MicroBatch, Segments, build_micro_batch
from qlora_moderation.loss import compute_loss
from qlora_moderation.model import ModerationModel
from qlora_moderation.recomputation import Recomputation, recompute_layers

COUNTED_ATTENTION = "qlora_moderation_counted"
# layers that show what one more costs: the first passes no gradients on, the last reads few tokens
_SHORT = 3


class EstimateError(ModerationError):
    """A network whose activations cannot be foreseen."""


@dataclasses.dataclass(frozen=True)
class Activations:
    """Bytes beside weights and gradients.

    Attributes:
        kept: held between the forward and the backward pass.
        forward, backward: the most that is held at any moment of each, temporaries included.
    """

    kept: int
    forward: int
    backward: int

    @property
    def peak(self) -> int:
        """The most that is held at any moment."""
        return max(self.forward, self.backward)


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of distinct storages that operations have made and that still live.

    Args:
        known: tensors whose storages do not count.
    """

    def __init__(self, known: list[torch.Tensor]) -> None:
        super().__init__()
        self.live = self.peak = 0
        self._seen: dict[int, Any] = {id(storage): storage for storage in (t.untyped_storage() for t in known)}

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor):
                self._note(tensor.untyped_storage())
        return result

    def _note(self, storage: torch.UntypedStorage) -> None:
        key, size = id(storage), storage.nbytes()
        if key in self._seen:
            return

        def forget(_: object) -> None:
            self.live -= size
            del self._seen[key]

        self._seen[key] = weakref.ref(storage, forget)
        self.live += size
        self.peak = max(self.peak, self.live)


def compute_activations(
    blueprint: Blueprint, recomputation: Recomputation, tokens: int, device_type: str, gathered: bool = False
) -> Activations:
    """Return what one micro-batch holds.

    A network of many layers is judged by two short ones: a further layer, or pair of layers where every second one recomputes,
    costs what the last one cost.

    Args:
        blueprint: the network; NF4 layers count as plain ones of the same shape, which hold no more activations.
        recomputation: which layers recompute.
        tokens: T of the micro-batch, padding included.
        device_type: `cuda` counts what a variable-length kernel saves, `cpu` what the attention there does.
        gathered: count `--method full` as fsdp runs it, on weights gathered in the compute type.

    Raises:
        EstimateError: see `run_step`.
    """
    plain, whole = blueprint.without_nf4(), blueprint.layers
    stride = 2 if recomputation == "selective" else 1
    short = _SHORT + (whole - _SHORT) % stride
    if whole <= short + stride:
        return run_step(plain, recomputation, tokens, device_type, gathered)
    one, more = (
        run_step(plain.with_layers(layers), recomputation, tokens, device_type, gathered)
        for layers in (short, short + stride)
    )
    times = (whole - short) // stride
    # with more layers the peak may move from one pass to the other, but each grows evenly
    pairs = zip(dataclasses.astuple(one), dataclasses.astuple(more), strict=True)
    return Activations(*(first + times * (second - first) for first, second in pairs))


def run_step(
    blueprint: Blueprint, recomputation: Recomputation, tokens: int, device_type: str, gathered: bool
) -> Activations:
    """Return what a forward and a backward pass through all layers hold; arguments as in `compute_activations`.

    Raises:
        EstimateError: the network looks at values, which are not there.
    """
    network = blueprint.build(torch.device("meta"))[0]
    recompute_layers(network, recomputation)
    half = None if blueprint.compute_dtype == torch.float32 else blueprint.compute_dtype
    # autocast of the CPU stands for that of CUDA: without CUDA no tensor can claim to lie there
    model = ModerationModel(network, blueprint.spec.kind == "encoder", torch.device("cpu"), half)
    if blueprint.layout == "packed" and device_type == "cuda" and half is not None:
        model.classifier.set_attn_implementation(COUNTED_ATTENTION)
    if gathered and half is not None and blueprint.config.method == "full":
        model.autocast_dtype = None
        getattr(model.classifier, model.classifier.base_model_prefix).to(half)
    batch = build_example(blueprint, tokens)
    with FakeTensorMode() as mode:
        known = _lay_out(model)
        seen = _imagine(batch, mode)
        known += [tensor for tensor in vars(seen).values() if isinstance(tensor, torch.Tensor)]
        labels, weight = torch.zeros(len(batch.last), len(blueprint.categories)), torch.ones(len(batch.last))
        model.train()
        try:
            with _unheard(), LiveBytes(known) as bytes_:
                loss = compute_loss(model(seen), labels, weight, 1.0)
                kept, forward = bytes_.live, bytes_.peak
                bytes_.peak = kept
                loss.backward()
        except Exception as error:  # of torch, transformers and PEFT, for operations that need values
            raise EstimateError(
                f"{blueprint.spec.name}: its activations cannot be counted without data ({brief(error)})"
            ) from None
    return Activations(kept, forward, bytes_.peak)


@contextlib.contextmanager
def _unheard() -> Iterator[None]:
    """Keep the traceback that torch logs of an operation without values to itself: it is said in one line."""
    logger = logging.getLogger("torch._subclasses.fake_tensor")
    level = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        logger.setLevel(level)


def build_example(blueprint: Blueprint, tokens: int) -> MicroBatch:
    """Return a micro-batch of so many tokens in texts of the longest length; how they are cut changes next to nothing."""
    longest = min(blueprint.config.max_length, tokens)
    lengths = [longest] * (tokens // longest)
    if blueprint.layout == "packed" and tokens % longest:
        lengths.append(tokens % longest)
    if blueprint.layout == "padded" and len(lengths) > 1:
        lengths[-1] -= 1  # rows of one length need no mask
    return build_micro_batch([[0] * length for length in lengths], blueprint.layout, 0, torch.device("cpu"))


def _imagine(batch: MicroBatch, mode: FakeTensorMode) -> MicroBatch:
    def take(tensor: torch.Tensor | None) -> Any:
        return None if tensor is None else mode.from_tensor(tensor)

    segments, last = batch.segments, take(batch.last)
    return MicroBatch(
        input_ids=take(batch.input_ids),
        position_ids=take(batch.position_ids),
        last=last,
        attention_mask=take(batch.attention_mask),
        segments=None if segments is None else Segments(segments.lengths, take(segments.borders), last),
    )


def _lay_out(model: nn.Module) -> list[torch.Tensor]:
    """Put shapes in the place of weights and buffers, with gradients as after a first micro-batch; returns all of them."""
    known: list[torch.Tensor] = []
    replaced: dict[int, torch.Tensor] = {}
    for module in model.modules():
        tables: tuple[dict[str, Any], dict[str, Any]] = (module._parameters, module._buffers)
        for table in tables:
            for name, old in table.items():
                if old is None:
                    continue
                if id(old) not in replaced:
                    new = torch.empty(old.shape, dtype=old.dtype)
                    if isinstance(old, nn.Parameter):
                        new = nn.Parameter(new, requires_grad=old.requires_grad)
                    if old.requires_grad:
                        new.grad = torch.empty_like(new)
                        known.append(new.grad)
                    replaced[id(old)] = new
                    known.append(new)
                table[name] = replaced[id(old)]
    return known


class _VariableLengthAttention(torch.autograd.Function):
    """Holds what a variable-length kernel holds: queries, keys, values, output, log-sum-exp; then gradients of the first three.

    Its backward pass sums the queries' gradient in fp32 (Dao, FlashAttention-2, arXiv 2307.08691, algorithm 2).
    """

    @staticmethod
    def forward(ctx: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        attended = torch.empty_like(query)
        sums = torch.empty(query.shape[1], query.shape[0], dtype=torch.float32)
        ctx.save_for_backward(query, key, value, attended, sums)
        return attended

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, ...]:
        query, key, value, _, sums = ctx.saved_tensors
        summed, row_sums = torch.empty_like(query, dtype=torch.float32), torch.empty_like(sums)
        found = tuple(torch.empty_like(tensor) for tensor in (query, key, value))
        if key.shape != query.shape:  # the kernel sums over the queries' heads behind its end
            spread = [torch.empty(len(key), *query.shape[1:], dtype=key.dtype) for _ in range(2)]
            del spread
        del summed, row_sums
        return found


def _counted_attention(
    module: nn.Module, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *others: Any, **unused: Any
) -> tuple[torch.Tensor, None]:
    """Stand in for the attention of a packed row on CUDA, where `attention` says what is really computed."""
    query, key, value = cast_as_products(query, key, value)
    key, value = fit_key_heads(query, key, value)
    q, k, v = (tensor[0].transpose(0, 1).contiguous() for tensor in (query, key, value))
    attended: Any = _VariableLengthAttention.apply(q, k, v)
    return attended[None], None


AttentionInterface.register(COUNTED_ATTENTION, _counted_attention)
