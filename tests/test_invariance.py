"""Law 2 through every program: `tests/invariance.py` with few texts; `scripts/stress.sh invariance` has a thousand."""

from __future__ import annotations

from invariance import ALLOWED, make_pairs, measure


def test_logits_do_not_depend_on_company_layout_processes_or_program(runs, rows, tmp_path):
    found = list(measure(runs["full"].weights, make_pairs(rows, 60, seed=1), tmp_path, seed=1))
    assert [name for name, batches, _ in found if batches > 1] == [name for name, *_ in found] and len(found) == 6
    # NaN, which a pair that was left out has, compares as False
    assert all(difference <= ALLOWED for *_, difference in found), found
