"""Step 5 by many random cases: who decides what a step contains, and how it is cut."""

from __future__ import annotations

import itertools
import math
import random

import pytest

from qlora_moderation.batching import count_steps, epoch_order, micro_batches, micro_batches_by_prefix, step_batch

CASES = range(300)


def random_case(case: int) -> tuple[list[int], int, int]:
    """Lengths of texts, a token budget, and a number of ranks; some texts are longer than the budget."""
    rng = random.Random(case)
    longest = rng.choice([1, 7, 60, 500])
    lengths = [rng.randint(1, longest) for _ in range(rng.choice([0, 1, 2, 5, 16, 64, 200]))]
    return lengths, rng.choice([1, 16, 64, 512, 2048]), rng.choice([1, 2, 3, 8])


@pytest.fixture(params=["packed", "padded"])
def layout(request) -> str:
    return request.param


def test_every_position_stands_once_and_every_rank_has_as_many_micro_batches(layout):
    for case in CASES:
        lengths, budget, world_size = random_case(case)
        ranks = micro_batches(lengths, budget, layout, world_size)
        assert len(ranks) == world_size and len({len(rank) for rank in ranks}) == 1
        flat = [position for rank in ranks for members in rank for position in members]
        assert sorted(flat) == [*range(len(lengths))]


def test_the_budget_is_kept_with_padding_except_by_a_text_above_it(layout):
    alone = 0
    for case in CASES:
        lengths, budget, world_size = random_case(case)
        for members in itertools.chain(*micro_batches(lengths, budget, layout, world_size)):
            chosen = [lengths[i] for i in members]
            cost = sum(chosen) if layout == "packed" else len(chosen) * max(chosen, default=0)
            assert cost <= budget or len(members) == 1
            alone += cost > budget
    assert alone > 100


def test_packed_micro_batches_and_ranks_are_balanced():
    for case in CASES:
        lengths, budget, world_size = random_case(case)
        ranks = micro_batches(lengths, budget, "packed", world_size)
        tokens = [[sum(lengths[i] for i in members) for members in rank] for rank in ranks]
        longest = max(lengths, default=0)
        for totals in ([*itertools.chain(*tokens)], [*map(sum, tokens)]):
            assert max(totals, default=0) - min(totals, default=0) <= longest, case


def test_padded_ranks_differ_by_one_micro_batch_at_most():
    for case in CASES:
        lengths, budget, world_size = random_case(case)
        ranks = micro_batches(lengths, budget, "padded", world_size)
        tokens = [sum(lengths[i] for members in rank for i in members) for rank in ranks]
        assert max(tokens) - min(tokens) <= max(budget, *lengths, 0)


def test_no_rank_always_has_the_largest_micro_batch():
    lengths = [4, 3, 2, 1]
    ranks = micro_batches(lengths, 4, "packed", world_size=2)
    assert [sum(lengths[i] for members in rank for i in members) for rank in ranks] == [5, 5]


def test_padded_micro_batches_hold_texts_of_like_length():
    for case in CASES:
        lengths, budget, _ = random_case(case)
        batches = [sorted(lengths[i] for i in members) for members in micro_batches(lengths, budget, "padded")[0]]
        batches.sort(key=lambda chosen: (chosen[-1], chosen[0]))
        assert all(shorter[-1] <= longer[0] for shorter, longer in itertools.pairwise(batches))


def test_no_micro_batch_is_empty_without_need(layout):
    for case in CASES:
        lengths, budget, world_size = random_case(case)
        ranks = micro_batches(lengths, budget, layout, world_size)
        assert len(ranks[0]) <= math.ceil(len(lengths) / world_size), case


def test_packing_takes_at_most_twice_the_fewest_micro_batches():
    for case in CASES:
        lengths, budget, _ = random_case(case)
        if lengths and max(lengths) <= budget:
            # a count is given up when a text fits not even the emptiest micro-batch: all are then more than half full
            count, fewest = len(micro_batches(lengths, budget, "packed")[0]), sum(lengths) / budget
            assert fewest <= count <= 2 * fewest + 1


def test_the_cut_is_the_same_each_time(layout):
    lengths, budget, world_size = [5] * 40 + [9] * 7, 64, 2
    assert micro_batches(lengths, budget, layout, world_size) == micro_batches(lengths, budget, layout, world_size)


@pytest.mark.parametrize(("size", "per_step"), [(1, 1), (1, 16), (16, 16), (17, 16), (100, 7), (5, 1), (33, 32)])
def test_each_epoch_holds_each_pair_once_and_its_last_step_is_the_smaller(size, per_step):
    steps = count_steps(size, per_step)
    assert steps == math.ceil(size / per_step)
    for epoch in range(3):
        batches = [step_batch(size, per_step, 1, epoch * steps + step) for step in range(steps)]
        assert [len(batch) for batch in batches[:-1]] == [per_step] * (steps - 1)
        assert len(batches[-1]) == size - per_step * (steps - 1)
        assert all(len(set(batch)) == len(batch) for batch in batches)
        assert sorted(itertools.chain(*batches)) == [*range(size)]


def test_a_step_depends_on_seed_and_epoch_and_nothing_else():
    orders = {(seed, epoch): epoch_order(50, seed, epoch) for seed in range(4) for epoch in range(4)}
    assert len(set(orders.values())) == 16
    random.seed(3)
    epoch_order.cache_clear()
    assert all(epoch_order(50, *key) == order for key, order in reversed(orders.items()))
    # another step size cuts the same order
    whole = [pair for step in range(5) for pair in step_batch(50, 10, 2, step)]
    assert whole == [pair for step in range(2) for pair in step_batch(50, 25, 2, step)] == [*epoch_order(50, 2, 0)]
    assert step_batch(50, 10, 2, 5) == epoch_order(50, 2, 1)[:10]


def test_an_order_is_random():
    """Chi-squared over the place of pair 0 in 400 epochs of 10 pairs: 9 degrees of freedom, 27.9 is the 0.1 % point."""
    places = [epoch_order(10, 5, epoch).index(0) for epoch in range(400)]
    assert sum((places.count(place) - 40) ** 2 / 40 for place in range(10)) < 27.9


def test_the_order_is_written_down():
    """A change would silently change what every resumed run learns."""
    assert epoch_order(8, 42, 0) == (1, 7, 2, 3, 5, 6, 4, 0)


def test_common_prefixes_stay_together_and_count_once():
    lengths, shared = [10, 10, 10, 10, 10, 10], [0, 5, 5, 0, 5, 5]
    assert micro_batches_by_prefix(lengths, shared, 20) == [[[0, 1, 2], [3, 4, 5]]]
    assert micro_batches_by_prefix(lengths, shared, 40) == [[[0, 1, 2, 3, 4, 5]]]
    assert micro_batches_by_prefix(lengths, shared, 40, 2) == [[[0, 1, 2]], [[3, 4, 5]]]
    assert micro_batches_by_prefix([30] * 4, [0] + [29] * 3, 40) == [[[0, 1], [2, 3]]]  # 80 tokens of whole texts
    assert micro_batches_by_prefix([50, 1], [0, 0], 10) == [[[0], [1]]]


def test_micro_batches_by_prefix_hold_every_text_once_within_the_budget():
    rng = random.Random(0)
    for _ in range(300):
        lengths = [rng.randint(1, 30) for _ in range(rng.randint(1, 40))]
        shared = [0, *(rng.randint(0, min(a, b) - 1) for a, b in itertools.pairwise(lengths))]
        budget, ranks = rng.randint(1, 60), rng.randint(1, 4)
        dealt = micro_batches_by_prefix(lengths, shared, budget, ranks)
        assert len({len(mine) for mine in dealt}) == 1
        bins = [members for mine in dealt for members in mine if members]
        assert sorted(i for members in bins for i in members) == list(range(len(lengths)))
        for members in bins:
            assert members == list(range(members[0], members[-1] + 1))
            tokens = sum(lengths[i] - shared[i] for i in members) + shared[members[0]]
            assert len(members) == 1 or (tokens <= budget and sum(lengths[i] for i in members) <= 2 * budget)
