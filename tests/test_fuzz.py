"""A few fixed draws of every property of the fuzz campaign, and the draws that once broke one."""

from __future__ import annotations

import pytest
from fuzz import NAMES, list_properties, try_draws

FEW = 25


def test_the_table_of_names_is_whole():
    assert [*list_properties()] == [*NAMES]


@pytest.mark.parametrize("name", NAMES)
def test_a_property_holds(name):
    try_draws(list_properties()[name], FEW, derandomize=True)


def test_a_property_that_does_not_hold_is_told_with_its_smallest_draw():
    from fuzz import Property, run_campaign
    from hypothesis import strategies as st

    def check(number: int) -> None:
        assert number < 7

    ((name, tried, faults),) = run_campaign({"small": Property(st.integers(), check)}, until=0.0)
    assert name == "small" and tried > 0 and len(faults) == 1
    assert "seed 0" in faults[0] and "the smallest: 7\n" in faults[0] and "reproduce_failure" in faults[0]
