"""The beginning that all texts of a packed row share, computed once.

In: token ids of S texts. Out: a row that holds their common prefix once, and the way to each whole text and back. Step 5 to 6.

Every text begins with the template, so under causal attention its first tokens have the same hidden states in all of them:
about a tenth of BeaverTails' tokens, and more where several answers to one question stand together. Products, norms and
feed-forward parts run on the row; attention alone runs on whole texts. Logits and gradients are those of whole texts.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch.autograd.function import once_differentiable

_LEAST_SPARED = 0.02  # of all tokens: what going to whole texts and back costs in attention


@dataclasses.dataclass(frozen=True)
class SharedPrefix:
    """Where the F tokens of S whole texts lie in a row of T = F - (S - 1) P tokens: the prefix, then the rest of each text.

    Attributes:
        length: P, tokens of the prefix.
        places: [F] place in the row of each token of the texts, one text after the other.
        origins: [T] for each token of the row its place in those texts; for the prefix, that in the first text.
        copies: [(S - 1) P] places in those texts of the prefix, in all but the first text.
    """

    length: int
    places: torch.Tensor
    origins: torch.Tensor
    copies: torch.Tensor

    def spread(self, row: torch.Tensor) -> torch.Tensor:
        """Return [1, heads, F, size] of all texts from [1, heads, T, size] of the row."""
        spread: Any = _Spread.apply(row[0].transpose(0, 1), self)
        return spread.transpose(0, 1)[None]

    def collect(self, texts: torch.Tensor) -> torch.Tensor:
        """Return [1, T, heads, size] of the row from [1, F, heads, size] of all texts."""
        collected: Any = _Collect.apply(texts[0], self)
        return collected[None]

    def map(self, move: Callable[[torch.Tensor], torch.Tensor]) -> SharedPrefix:
        """Return the same with each tensor moved."""
        return SharedPrefix(self.length, move(self.places), move(self.origins), move(self.copies))


class _Spread(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, row: torch.Tensor, prefix: SharedPrefix) -> torch.Tensor:
        ctx.prefix = prefix
        return row.index_select(0, prefix.places)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_texts: torch.Tensor) -> tuple[torch.Tensor, None]:
        prefix = ctx.prefix
        d_row = d_texts.index_select(0, prefix.origins)
        copies = d_texts.index_select(0, prefix.copies).unflatten(0, (-1, prefix.length))
        d_row[: prefix.length] += copies.sum(0, dtype=torch.float32).to(d_row.dtype)
        return d_row, None


class _Collect(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, texts: torch.Tensor, prefix: SharedPrefix) -> torch.Tensor:
        ctx.prefix = prefix
        return texts.index_select(0, prefix.origins)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_row: torch.Tensor) -> tuple[torch.Tensor, None]:
        # what the other texts say of the prefix is not read
        return d_row.index_select(0, ctx.prefix.places).index_fill_(0, ctx.prefix.copies, 0.0), None


def measure_prefix(ids: Sequence[np.ndarray]) -> int:
    """Return how many tokens all texts begin with, each keeping one of its own; 0 where sharing them would not pay."""
    most = min(map(len, ids)) - 1
    if len(ids) == 1 or most < 1:
        return 0
    beginnings = np.stack([text[:most] for text in ids])
    differ = (beginnings != beginnings[0]).any(axis=0)
    length = int(differ.argmax()) if differ.any() else most
    return length if length * (len(ids) - 1) >= _LEAST_SPARED * sum(map(len, ids)) else 0


def share_prefix(lengths: Sequence[int], length: int) -> SharedPrefix:
    """Return where the tokens of texts of these lengths lie, on the host."""
    starts = np.cumsum([0, *lengths[:-1]])
    copies = (starts[1:, None] + np.arange(length)).reshape(-1)
    is_copy = np.zeros(sum(lengths), dtype=bool)
    is_copy[copies] = True
    origins = np.flatnonzero(~is_copy)
    places = np.empty(len(is_copy), dtype=np.int64)
    places[origins] = np.arange(len(origins))
    places[copies] = np.tile(np.arange(length), len(lengths) - 1)
    return SharedPrefix(length, *(torch.from_numpy(part) for part in (places, origins, copies)))
