"""Rounding through NF4, byte for byte as bitsandbytes does it on a CPU, in a tenth of its time.

In: a weight [R, K]. Out: the fp32 weights that a QLoRA adapter was trained against. Used by step 11.

bitsandbytes takes blocks of 64 weights, scales each by the inverse of its largest magnitude, searches each scaled weight among
15 borders and packs the 16 codes; the magnitudes may be quantised, too ("double quantisation"; Dettmers et al. 2023,
arXiv:2305.14314). Here the search is one table look-up and one comparison, block of rows by block of rows, and nothing is
packed. Whatever concerns the magnitudes is left to bitsandbytes. `tests/test_nf4.py` compares the bytes.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator

import torch

BLOCK = 64
"""Weights that share one magnitude."""

_BINS = 32  # a unit of the scaled weight; two borders are at least .08 apart, so that no bin holds two
_PIECE = 1 << 16  # weights at a time: small enough to stay in a core's cache


@functools.cache
def _tables() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return (codes [16], borders below a bin's start, the border inside a bin or 2) for the bins of [-1, 1]."""
    from bitsandbytes.functional import get_4bit_type

    codes = get_4bit_type("nf4", device="cpu").float()
    borders = (codes[:-1] + codes[1:]) / 2
    inside = _find_bins(borders)
    below = torch.searchsorted(inside, torch.arange(2 * _BINS + 1, dtype=inside.dtype))
    border = torch.full((2 * _BINS + 1,), 2.0)
    border[inside.long()] = borders
    return codes, below, border


def _find_bins(scaled: torch.Tensor) -> torch.Tensor:
    return torch.add(_BINS, scaled, alpha=_BINS).to(torch.int32)  # never falls as `scaled` rises, rounding included


def rows_per_piece(columns: int) -> int:
    """Return how many rows of a weight make a piece: about 65,000 weights, and whole blocks."""
    whole = BLOCK // math.gcd(BLOCK, columns)
    return max(1, _PIECE // (columns * whole)) * whole


class RoundedWeight:
    """A weight as NF4 gives it back, computed piece by piece.

    Args:
        weight: [R, K], in the type that was quantised; finite.
        double_quant: whether the magnitudes are quantised as well.
        threads: as many as bitsandbytes would have; None: those of the caller. Their mean is taken off the magnitudes before
            they are quantised, and its last digit depends on how many threads share the sum.
    """

    def __init__(self, weight: torch.Tensor, double_quant: bool, threads: int | None = None) -> None:
        from bitsandbytes.functional import dequantize_blockwise, quantize_blockwise

        self._columns = weight.shape[1]
        flat = weight.reshape(-1)
        full = flat.numel() - flat.numel() % BLOCK
        self._blocks, self._rest = flat[:full].view(-1, BLOCK), flat[full:]
        magnitudes = [piece.float().abs().amax(dim=1) for piece in self._blocks.split(_PIECE // BLOCK)]
        if len(self._rest):
            magnitudes.append(self._rest.float().abs().max().clamp(min=1e-38).view(1))
        self._absmax = torch.cat(magnitudes)
        self._given_back = self._absmax
        if double_quant:
            own = torch.get_num_threads()
            torch.set_num_threads(threads or own)
            offset = self._absmax.mean()
            torch.set_num_threads(own)
            if not bool(torch.isfinite(offset)):
                return
            self._given_back = dequantize_blockwise(*quantize_blockwise(self._absmax - offset, blocksize=256))
            self._given_back += offset

    @property
    def is_finite(self) -> bool:
        """Whether the weight is."""
        return bool(torch.isfinite(self._absmax).all())

    def rows(self, start: int, stop: int) -> torch.Tensor:
        """Return rows [stop - start, K] in fp32; `start` and `stop` come from `pieces_of`."""
        first, end = start * self._columns // BLOCK, stop * self._columns // BLOCK
        scale = 1.0 / self._absmax[first:end].clamp(min=1e-38).view(-1, 1)
        values = _give_back(self._blocks[first:end].float() * scale, self._given_back[first:end]).view(-1)
        if stop * self._columns % BLOCK:  # the last block is short: bitsandbytes divides there instead
            rest = _give_back((self._rest.float() / self._absmax[-1]).view(1, -1), self._given_back[-1:])
            values = torch.cat([values, rest.view(-1)])
        return values.view(stop - start, self._columns)


def _give_back(scaled: torch.Tensor, magnitudes: torch.Tensor) -> torch.Tensor:
    """Round scaled weights [blocks, ...] to their codes and scale them back."""
    codes, below, border = _tables()
    flat = scaled.clamp_(-1, 1).view(-1)
    bins = _find_bins(flat)
    index = torch.index_select(below, 0, bins) + (flat > torch.index_select(border, 0, bins))
    return torch.index_select(codes, 0, index).view(scaled.shape) * magnitudes.view(-1, 1)


def round_through_nf4(weight: torch.Tensor, double_quant: bool) -> torch.Tensor:
    """Return the whole weight [R, K] as NF4 gives it back, in fp32."""
    rounded = RoundedWeight(weight, double_quant)
    return torch.cat([rounded.rows(start, stop) for start, stop in pieces_of(weight.shape)])


def pieces_of(shape: torch.Size | tuple[int, ...]) -> Iterator[tuple[int, int]]:
    """Yield (start, stop) over the rows of a weight [R, K]."""
    step = rows_per_piece(shape[1])
    for start in range(0, shape[0], step):
        yield start, min(start + step, shape[0])


def round_with_bitsandbytes(weight: torch.Tensor, double_quant: bool) -> torch.Tensor:
    """Return the same by bitsandbytes' own functions, for a weight of whole blocks: the reference.

    Its CPU kernel (0.50.2) starts a new block with every row, so that it misreads rows that are no whole number of blocks;
    here it is shown the blocks as rows.
    """
    from bitsandbytes.functional import dequantize_4bit, quantize_4bit

    packed, state = quantize_4bit(
        weight.reshape(-1, BLOCK), blocksize=BLOCK, compress_statistics=double_quant, quant_type="nf4"
    )
    state.dtype = torch.float32
    return dequantize_4bit(packed, state).view(weight.shape)
