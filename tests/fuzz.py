"""Properties that must hold of whatever is drawn: strategies, and checks as plain functions on what they draw.

`test_fuzz.py` tries a few fixed draws of each, `scripts/stress.py fuzz` random ones until its time is over.
"""

from __future__ import annotations

import dataclasses
import time
import traceback
from collections.abc import Callable, Iterator
from typing import Any

from hypothesis import HealthCheck, Phase, Verbosity, given, seed, settings
from hypothesis.strategies import SearchStrategy


@dataclasses.dataclass(frozen=True)
class Property:
    """What is drawn, what must hold of it, and draws that once broke it.

    Attributes:
        drawn: strategy.
        check: raises where the property does not hold.
        known: draws that are always tried.
        weight: share of a campaign's time.
    """

    drawn: SearchStrategy[Any]
    check: Callable[[Any], None]
    known: tuple[Any, ...] = ()
    weight: float = 1.0


def list_properties() -> dict[str, Property]:
    """Return all properties by their names."""
    import fuzz_config
    import fuzz_files
    import fuzz_numbers
    import fuzz_rows
    import fuzz_texts

    parts = (fuzz_config, fuzz_files, fuzz_rows, fuzz_texts, fuzz_numbers)
    return {name: each for part in parts for name, each in part.PROPERTIES.items()}


def try_draws(each: Property, number: int, **more: Any) -> None:
    """Check a property on the known draws and on `number` drawn ones.

    Raises:
        Exception: what the smallest draw that breaks it raises.
    """
    for draw in each.known:
        each.check(draw)

    @settings(
        max_examples=number,
        deadline=None,
        database=None,
        suppress_health_check=list(HealthCheck),
        phases=[phase for phase in Phase if phase is not Phase.explain],
        **more,
    )
    @given(each.drawn)
    def attempt(draw: Any) -> None:
        each.check(draw)

    if "derandomize" not in more:
        attempt = seed(more.pop("seed", 0))(attempt)
    attempt()
