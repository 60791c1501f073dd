"""Which windows the next forward takes.

In: lengths of what waits, by request. Out: how many windows each request gives. Pure Python.
"""

from __future__ import annotations

from collections.abc import Sequence


def plan_batch(lengths: Sequence[Sequence[int]], begun: Sequence[int], max_tokens: int, most: int) -> list[int]:
    """Choose what the next forward takes.

    Each request gives one window in turn, in the order of arrival, until the budget is full: a long text or list does not
    keep the others waiting, and the oldest request always gets on.

    Args:
        lengths: tokens of the windows of each request, in the order of arrival.
        begun: how many of them were taken before; at least one is left of each.
        max_tokens: budget; the first window is taken even above it.
        most: windows in a forward.

    Returns:
        How many windows each request gives.
    """
    taken = [0] * len(lengths)
    tokens = count = 0
    going_on: Sequence[int] = range(len(lengths))
    while going_on:
        more = []
        for index in going_on:
            position = begun[index] + taken[index]
            size = lengths[index][position]
            if count and (tokens + size > max_tokens or count >= most):
                continue
            taken[index] += 1
            tokens += size
            count += 1
            if position + 1 < len(lengths[index]):
                more.append(index)
        going_on = more
    return taken
