"""Causal attention inside each text of a packed row, registered with transformers.

In: queries, keys, values of one packed row. Out: attended values. Part of step 6.

transformers hands its mask over only to attention functions it knows a mask for, so this one gets none and the borders
arrive as the keyword `segments`. On CUDA in half precision one variable-length kernel serves all texts; elsewhere each
text has its own call, which on CPU costs less than a dense block mask.
"""

from __future__ import annotations

import functools
import inspect
from typing import Any

import torch
from transformers import AttentionInterface

from qlora_moderation.layout import Segments

PACKED_ATTENTION = "qlora_moderation_packed"


def _attend_by_text(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, segments: Segments, scale: float):
    groups = query.shape[1] // key.shape[1]
    if groups > 1:
        key, value = key.repeat_interleave(groups, dim=1), value.repeat_interleave(groups, dim=1)
    one_each = query.shape[2] == len(segments.lengths)
    queries = query.split(1 if one_each else segments.lengths, dim=2)
    parts = zip(queries, *(tensor.split(segments.lengths, dim=2) for tensor in (key, value)), strict=True)
    attended = [
        torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=not one_each, scale=scale)
        for q, k, v in parts
    ]
    return torch.cat(attended, dim=2).transpose(1, 2)


def _attend_variable_length(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, segments: Segments, scale: float
) -> torch.Tensor:
    from torch.nn.attention.varlen import varlen_attn

    known = _kernel_parameters()
    key, value = fit_key_heads(query, key, value)
    options: dict[str, Any] = {"scale": scale}
    if key.shape[1] != query.shape[1]:
        options["enable_gqa"] = True
    q, k, v = (tensor[0].transpose(0, 1).contiguous() for tensor in (query, key, value))
    longest, borders = max(segments.lengths), segments.borders
    if len(q) == len(segments.lengths):  # last tokens see all of their texts
        own = torch.arange(len(borders), dtype=borders.dtype, device=borders.device)
        attended: Any = varlen_attn(q, k, v, own, borders, 1, longest, **options)
    else:
        # torch 2.11 says causal by a flag, later versions by a window that never looks ahead
        options |= {"window_size": (-1, 0)} if "window_size" in known else {"is_causal": True}
        attended = varlen_attn(q, k, v, borders, borders, longest, longest, **options)
    return attended[None]


@functools.cache
def _kernel_parameters() -> frozenset[str]:
    from torch.nn.attention.varlen import varlen_attn

    return frozenset(inspect.signature(varlen_attn).parameters)


def fit_key_heads(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return keys and values [1, heads, T, head size] as this torch's kernel takes them: a later one repeats heads itself."""
    groups = query.shape[1] // key.shape[1]
    if groups == 1 or "enable_gqa" in _kernel_parameters():
        return key, value
    return key.repeat_interleave(groups, dim=1), value.repeat_interleave(groups, dim=1)


def cast_as_products(*tensors: torch.Tensor) -> list[torch.Tensor]:
    """Return tensors in the type that autocast gives to products, as torch's own attention takes them; without it as they are.

    Positions turn queries and keys in fp32 where weights are fp32, and a CUDA kernel for texts of any length has half precision
    alone.
    """
    kind = tensors[0].device.type
    if not torch.is_autocast_enabled(kind):
        return list(tensors)
    return [tensor.to(torch.get_autocast_dtype(kind)) for tensor in tensors]


def packed_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    segments: Segments | None = None,
    **unused: Any,
) -> tuple[torch.Tensor, None]:
    """Attend causally inside each text.

    Args:
        module: the calling attention layer.
        query: [1, heads, T, head size]; or [1, heads, S, head size], the last token of each of the S texts alone.
        key, value: [1, key-value heads, T, head size].
        attention_mask: always None for this function.
        scaling: factor on the products; None: 1 / sqrt(head size).
        dropout: must be 0; packed rows are for backbones without dropout.
        segments: borders of the texts; None: the row is one text.
        unused: what other attention functions need.

    Returns:
        [1, T or S, heads, head size], and None for the weights.

    Raises:
        ValueError: a mask, several rows, dropout, or an attention variant that this function does not compute.
    """
    if attention_mask is not None or query.shape[0] != 1 or dropout:
        raise ValueError("packed attention takes one row, no mask and no dropout")
    if unused.get("softcap") is not None or unused.get("s_aux") is not None:
        raise ValueError("packed attention computes neither soft caps nor sinks; use the padded layout")
    if segments is None:
        length, device = key.shape[2], query.device
        borders = torch.tensor([0, length], dtype=torch.int32, device=device)
        segments = Segments((length,), borders, torch.tensor([length - 1], device=device))
    query, key, value = cast_as_products(query, key, value)
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    half = query.dtype in (torch.float16, torch.bfloat16)
    attend = _attend_variable_length if query.is_cuda and half else _attend_by_text
    prefixes, all_tokens = segments.prefixes, query.shape[2] == key.shape[2]
    if prefixes is None:
        return attend(query, key, value, segments, scale), None
    queries = prefixes.spread(query) if all_tokens else query
    attended = attend(queries, prefixes.spread(key), prefixes.spread(value), segments, scale)
    return prefixes.collect(attended) if all_tokens else attended, None


AttentionInterface.register(PACKED_ATTENTION, packed_attention)
