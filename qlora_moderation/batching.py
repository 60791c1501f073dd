"""Who decides what a step contains: epoch order, step batches, micro-batches.

In: numbers of pairs and their lengths in tokens. Out: lists of indices. Step 5 of the straight line; pure Python.

A step is a random set of pairs and depends on data, seed and step size alone. Only inside the step are pairs sorted and
cut into micro-batches, which changes the cost of a step and nothing else.
"""

from __future__ import annotations

import functools
import heapq
import math
import random
from collections.abc import Callable, Mapping, Sequence
from typing import Literal

Layout = Literal["packed", "padded"]


@functools.lru_cache(maxsize=2)
def epoch_order(size: int, seed: int, epoch: int) -> tuple[int, ...]:
    """Return a permutation of `range(size)` that depends on size, seed and epoch alone."""
    order = list(range(size))
    random.Random(f"order {seed} {epoch}").shuffle(order)
    return tuple(order)


def count_steps(size: int, pairs_per_step: int) -> int:
    """Return the steps of one epoch; the last one may be smaller."""
    return math.ceil(size / pairs_per_step)


def step_batch(size: int, pairs_per_step: int, seed: int, step: int) -> tuple[int, ...]:
    """Return the distinct pairs of 0-based `step`, counted through all epochs."""
    epoch, position = divmod(step, count_steps(size, pairs_per_step))
    return epoch_order(size, seed, epoch)[position * pairs_per_step : (position + 1) * pairs_per_step]


def micro_batches(
    lengths: Sequence[int], max_tokens: int, layout: Layout, world_size: int = 1
) -> list[list[list[int]]]:
    """Deal the texts of a step, or of a set to score, to ranks and micro-batches.

    Args:
        lengths: tokens of each text.
        max_tokens: most tokens of a micro-batch, padding included; a text above it stands alone.
        layout: `packed` balances the tokens of all micro-batches; `padded` puts texts of like length together.
        world_size: number of ranks.

    Returns:
        [rank][micro-batch] -> positions in `lengths`. Every position stands exactly once; every rank has the same number
        of micro-batches, and some of them may be empty where texts are fewer than ranks.
    """
    if layout == "padded":
        cut = _cut_padded(lengths, max_tokens)
        count = math.ceil(len(cut) / world_size) * world_size
        bins = _cut_evenly(lengths, max_tokens, min(count, len(lengths)))
        cost = {id(members): len(members) * max((lengths[i] for i in members), default=0) for members in bins}
    else:
        fewest = min(math.ceil(sum(lengths) / max_tokens), len(lengths))
        count = math.ceil(fewest / world_size) * world_size
        balanced = _balance(lengths, max_tokens, count)
        while balanced is None:
            count += world_size
            balanced = _balance(lengths, max_tokens, count)
        bins = balanced
        cost = {id(members): sum(lengths[i] for i in members) for members in bins}
    return _deal(bins, cost, world_size)


def micro_batches_by_prefix(
    lengths: Sequence[int], shared: Sequence[int], max_tokens: int, world_size: int = 1
) -> list[list[list[int]]]:
    """Deal texts that stand in the order of their tokens, so that common prefixes stay together and count once.

    Args:
        lengths: tokens of each text.
        shared: tokens that each has in common with the one before it.
        max_tokens: most tokens of a micro-batch, half of what its whole texts may have; a text above it stands alone.
        world_size: number of ranks.

    Returns:
        As `micro_batches`.
    """

    def cut(most: int) -> list[list[int]]:
        bins: list[list[int]] = []
        tokens = whole = 0
        for i, (length, common) in enumerate(zip(lengths, shared, strict=True)):
            if not bins or tokens + length - common > most or whole + length > 2 * max_tokens:
                bins.append([])
                tokens = whole = common = 0
            bins[-1].append(i)
            tokens, whole = tokens + length - common, whole + length
        return bins

    count = math.ceil(len(cut(max_tokens)) / world_size) * world_size
    bins = _cut_smallest(cut, max_tokens, count)
    cost = {id(members): sum(lengths[i] - shared[i] for i in members) + shared[members[0]] for members in bins}
    return _deal(bins, cost, world_size)


def _deal(bins: list[list[int]], cost: Mapping[int, int], world_size: int) -> list[list[list[int]]]:
    """Give micro-batches of like cost to all ranks at the same time, in turning order, so that none always has the largest."""
    bins.sort(key=lambda members: -cost[id(members)])
    bins.extend([] for _ in range(-len(bins) % world_size))
    rounds = [bins[start : start + world_size] for start in range(0, len(bins), world_size)]
    turned = [members[::-1] if index % 2 else members for index, members in enumerate(rounds)]
    return [[members[rank] for members in turned] for rank in range(world_size)]


def _cut_smallest(cut: Callable[[int], list[list[int]]], most: int, count: int) -> list[list[int]]:
    """Cut with the smallest limit up to `most` that gives at most `count` micro-batches."""
    low, high = 1, most
    while low < high:
        middle = (low + high) // 2
        if len(cut(middle)) <= count:
            high = middle
        else:
            low = middle + 1
    return cut(high)


def _cut_evenly(lengths: Sequence[int], max_tokens: int, count: int) -> list[list[int]]:
    """Cut texts sorted by length into `count` padded micro-batches whose largest is as small as can be."""
    bins = _cut_smallest(lambda most: _cut_padded(lengths, most), max_tokens, count)
    while len(bins) < count:
        largest = max(bins, key=len)
        bins.remove(largest)
        bins += [largest[: len(largest) // 2], largest[len(largest) // 2 :]]
    return bins


def _cut_padded(lengths: Sequence[int], max_tokens: int) -> list[list[int]]:
    bins: list[list[int]] = []
    for i in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        if not bins or (len(bins[-1]) + 1) * lengths[bins[-1][0]] > max_tokens:
            bins.append([])
        bins[-1].append(i)
    return bins


def _balance(lengths: Sequence[int], max_tokens: int, count: int) -> list[list[int]] | None:
    """Longest text first into the emptiest of `count` bins; None where a bin overflows that holds several texts."""
    bins: list[list[int]] = [[] for _ in range(count)]
    heap = [(0, index) for index in range(count)]
    for i in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        tokens, index = heapq.heappop(heap)
        if bins[index] and tokens + lengths[i] > max_tokens:
            return None
        bins[index].append(i)
        heapq.heappush(heap, (tokens + lengths[i], index))
    return bins
