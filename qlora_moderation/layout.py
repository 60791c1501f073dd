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
from qlora_moderation.prefix import SharedPrefixes, share_prefixes


@dataclasses.dataclass(frozen=True)
class Segments:
    """The S texts of a packed row.

    Attributes:
        lengths: of the whole texts, on the host.
        borders: [S + 1] where the whole texts begin and end, one after the other, for CUDA kernels.
        last: [S] place of each text's last token in the row.
        prefixes: where the row holds common prefixes once; None: it holds whole texts.
    """

    lengths: tuple[int, ...]
    borders: torch.Tensor
    last: torch.Tensor
    prefixes: SharedPrefixes | None = None


@dataclasses.dataclass(frozen=True)
class MicroBatch:
    """S texts as the model reads them.

    Attributes:
        input_ids: [1, T] packed, [S, L] padded on the right.
        position_ids: like `input_ids`: the place of each token in its text.
        last: [S] position of each text's last token: in the row when packed, in its own row when padded.
        attention_mask: [S, L] when padded, None when packed.
        segments: the texts of a packed row, None when padded.
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
    ids: Sequence[Sequence[int] | np.ndarray],
    layout: Layout,
    pad_id: int,
    device: torch.device,
    shares: bool = False,
) -> MicroBatch:
    """Lay S texts out as one packed row or as padded rows.

    Args:
        ids: of each text.
        layout: `packed` or `padded`.
        pad_id: fills padded rows.
        device: to put them on.
        shares: let a packed row hold common prefixes once; dropout would then fall on them once, too.
    """
    texts = [np.asarray(text, dtype=np.int64) for text in ids]
    lengths = [len(text) for text in texts]
    if layout == "packed":
        return _pack(texts, lengths, device, share_prefixes(texts) if shares else None)
    longest = max(lengths)
    rows = torch.full((len(texts), longest), pad_id)
    for row, text in zip(rows, texts, strict=True):
        row[: len(text)] = torch.from_numpy(text)
    return MicroBatch(
        input_ids=send(rows, device),
        position_ids=torch.arange(longest, device=device).expand(len(texts), -1),
        last=send(torch.tensor(lengths) - 1, device),
        attention_mask=send((torch.arange(longest)[None] < torch.tensor(lengths)[:, None]).long(), device),
    )


def _pack(
    texts: list[np.ndarray], lengths: list[int], device: torch.device, prefixes: SharedPrefixes | None
) -> MicroBatch:
    row, positions = np.concatenate(texts), np.concatenate([np.arange(length) for length in lengths])
    borders = torch.tensor([0, *itertools.accumulate(lengths)])
    last = borders[1:] - 1
    if prefixes is not None:
        row, positions, last = row[prefixes.origins], positions[prefixes.origins], prefixes.places[last]
        prefixes = prefixes.map(lambda tensor: send(tensor, device))
    last = send(last, device)
    return MicroBatch(
        input_ids=send(torch.from_numpy(row)[None], device),
        position_ids=send(torch.from_numpy(positions)[None], device),
        last=last,
        segments=Segments(tuple(lengths), send(borders.int(), device), last, prefixes),
    )
