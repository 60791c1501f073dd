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
    parts = zip(*(tensor.split(segments.lengths, dim=2) for tensor in (query, key, value)), strict=True)
    attended = [
        torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale) for q, k, v in parts
    ]
    return torch.cat(attended, dim=2).transpose(1, 2)


def _attend_variable_length(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, segments: Segments, scale: float
) -> torch.Tensor:
    from torch.nn.attention.varlen import varlen_attn

    groups = query.shape[1] // key.shape[1]
    if groups > 1:
        key, value = key.repeat_interleave(groups, dim=1), value.repeat_interleave(groups, dim=1)
    q, k, v = (tensor[0].transpose(0, 1).contiguous() for tensor in (query, key, value))
    longest = max(segments.lengths)
    borders = segments.borders
    attended: Any = varlen_attn(q, k, v, borders, borders, longest, longest, scale=scale, **_causal_option())
    return attended[None]


@functools.cache
def _causal_option() -> dict[str, Any]:
    """Torch 2.11 says causal by a flag, later versions by a window that never looks ahead."""
    from torch.nn.attention.varlen import varlen_attn

    parameters = inspect.signature(varlen_attn).parameters
    return {"window_size": (-1, 0)} if "window_size" in parameters else {"is_causal": True}


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
        query: [1, heads, T, head size].
        key, value: [1, key-value heads, T, head size].
        attention_mask: always None for this function.
        scaling: factor on the products; None: 1 / sqrt(head size).
        dropout: must be 0; packed rows are for backbones without dropout.
        segments: borders of the texts; None: the row is one text.
        unused: what other attention functions need.

    Returns:
        [1, T, heads, head size], and None for the weights.

    Raises:
        ValueError: a mask, several rows, dropout, or an attention variant that this function does not compute.
    """
    if attention_mask is not None or query.shape[0] != 1 or dropout:
        raise ValueError("packed attention takes one row, no mask and no dropout")
    if unused.get("softcap") is not None or unused.get("s_aux") is not None:
        raise ValueError("packed attention computes neither soft caps nor sinks; use the padded layout")
    length = query.shape[2]
    segments = segments or Segments((length,), torch.tensor([0, length], dtype=torch.int32, device=query.device))
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    half = query.dtype in (torch.float16, torch.bfloat16)
    attend = _attend_variable_length if query.is_cuda and half else _attend_by_text
    return attend(query, key, value, segments, scale), None


AttentionInterface.register(PACKED_ATTENTION, packed_attention)
