"""Rounding through NF4: the bytes of bitsandbytes, in pieces."""

from __future__ import annotations

import itertools
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from bitsandbytes.functional import dequantize_blockwise, quantize_4bit

from qlora_moderation.nf4 import BLOCK, RoundedWeight, pieces_of, round_through_nf4, round_with_bitsandbytes


def unpack(weight: torch.Tensor, double_quant: bool) -> torch.Tensor:
    """bitsandbytes' packed codes, unpacked by hand: high nibble first, times the block's magnitude."""
    packed, state = quantize_4bit(weight, blocksize=BLOCK, compress_statistics=double_quant, quant_type="nf4")
    magnitudes = state.absmax
    if double_quant:
        magnitudes = dequantize_blockwise(state.absmax, state.state2) + state.offset
    nibbles = torch.stack([packed >> 4, packed & 15], dim=-1).reshape(-1)[: weight.numel()]
    each = magnitudes.repeat_interleave(BLOCK)[: weight.numel()]
    return (state.code[nibbles.long()] * each).view(weight.shape)


@pytest.mark.parametrize("double_quant", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(256, 384), (100, 100), (7, 5), (3, 64), (1, 63), (128, 96), (33, 1376), (600, 192)])
def test_the_bytes_are_bitsandbytes(shape, dtype, double_quant):
    weight = (torch.randn(shape, generator=torch.Generator().manual_seed(shape[1])) * 0.02).to(dtype)
    weight[0, :5] = 0
    if weight.numel() > 200:
        weight.view(-1)[64:128] = 0  # a block without a magnitude
    expected = unpack(weight, double_quant)
    assert torch.equal(round_through_nf4(weight, double_quant), expected)
    if weight.numel() % BLOCK == 0:
        assert torch.equal(round_with_bitsandbytes(weight, double_quant), expected)


def test_borders_between_codes_fall_on_bitsandbytes_side():
    """Every border, and its neighbours in fp32, in a block whose magnitude is one."""
    from bitsandbytes.functional import get_4bit_type

    codes = get_4bit_type("nf4", device="cpu")
    borders = (codes[:-1] + codes[1:]) / 2
    up = torch.full_like(borders, 2.0)
    values = torch.cat([borders, torch.nextafter(borders, up), torch.nextafter(borders, -up), codes, torch.ones(3)])
    assert len(values) == BLOCK
    weight = torch.stack([values, -values])
    assert torch.equal(round_through_nf4(weight, False), unpack(weight, False))


def test_a_worker_with_one_thread_rounds_as_the_caller_would():
    """The mean of many magnitudes has another last digit in one thread than in two."""
    generator = torch.Generator().manual_seed(0)
    weights = [torch.randn(1024, 4096, generator=generator) * 0.02 for _ in range(4)]
    threads = torch.get_num_threads()
    expected = [round_with_bitsandbytes(weight, True) for weight in weights]

    def work(weight):
        rounded = RoundedWeight(weight, True, threads)
        assert torch.get_num_threads() == 1
        return torch.cat([rounded.rows(*place) for place in pieces_of(weight.shape)])

    with ThreadPoolExecutor(1, "worker", torch.set_num_threads, (1,)) as pool:
        found = list(pool.map(work, weights))
    torch.set_num_threads(threads)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_pieces_are_whole_blocks_and_give_the_whole():
    weight = torch.randn(1000, 96)
    places = list(pieces_of(weight.shape))
    assert len(places) > 1 and places[0][0] == 0 and places[-1][1] == 1000
    assert all(a[1] == b[0] and a[1] * 96 % BLOCK == 0 for a, b in itertools.pairwise(places))
    rounded = RoundedWeight(weight, True)
    pieces = [rounded.rows(*place) for place in places]
    assert torch.equal(torch.cat(pieces), round_through_nf4(weight, True))
    assert torch.equal(pieces[1], rounded.rows(*places[1]))  # in any order
