"""A micro-batch as tensors: one packed row, or padded rows.

In: lists of token ids. Out: a `MicroBatch` on a device. Step 5 to 6 of the straight line.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Sequence

import numpy as np
import torch

from qlora_moderation.batching import Layout


@dataclasses.dataclass(frozen=True)
class Segments:
    """Where the S texts of a packed row lie: lengths on the host, [S + 1] borders on the device for CUDA kernels."""

    lengths: tuple[int, ...]
    borders: torch.Tensor


@dataclasses.dataclass(frozen=True)
class MicroBatch:
    """S texts as the model reads them.

    Attributes:
        input_ids: [1, T] packed, [S, L] padded on the right.
        position_ids: like `input_ids`; restarts at 0 for each text of a packed row.
        last: [S] position of each text's last token: in the row when packed, in its own row when padded.
        attention_mask: [S, L] when padded, None when packed.
        segments: borders of a packed row, None when padded.
    """

    input_ids: torch.Tensor
    position_ids: torch.Tensor
    last: torch.Tensor
    attention_mask: torch.Tensor | None = None
    segments: Segments | None = None


def send(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Copy a tensor from the host to a device; a GPU fetches it by itself, and the host goes on meanwhile."""
    if device.type != "cuda":
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)


def build_micro_batch(
    ids: Sequence[Sequence[int] | np.ndarray], layout: Layout, pad_id: int, device: torch.device
) -> MicroBatch:
    """Lay S texts out as one packed row or as padded rows."""
    lengths = [len(text) for text in ids]
    if layout == "packed":
        borders = [0, *itertools.accumulate(lengths)]
        row = torch.from_numpy(np.concatenate([np.asarray(text, dtype=np.int64) for text in ids]))[None]
        positions = torch.from_numpy(np.concatenate([np.arange(length) for length in lengths]))[None]
        on_device = send(torch.tensor(borders, dtype=torch.int32), device)
        return MicroBatch(
            input_ids=send(row, device),
            position_ids=send(positions, device),
            last=send(torch.tensor(borders[1:]).sub_(1), device),
            segments=Segments(tuple(lengths), on_device),
        )
    longest = max(lengths)
    rows = torch.full((len(ids), longest), pad_id)
    for row_index, text in enumerate(ids):
        rows[row_index, : len(text)] = torch.from_numpy(np.asarray(text, dtype=np.int64))
    return MicroBatch(
        input_ids=send(rows, device),
        position_ids=torch.arange(longest, device=device).expand(len(ids), -1),
        last=send(torch.tensor(lengths) - 1, device),
        attention_mask=send((torch.arange(longest)[None] < torch.tensor(lengths)[:, None]).long(), device),
    )
