"""Properties that must hold of whatever is drawn: strategies, and checks as plain functions on what they draw.

`test_fuzz.py` tries a few fixed draws of each, `scripts/stress.py fuzz` random ones until its time is over.
"""

from __future__ import annotations

import dataclasses
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from hypothesis import HealthCheck, Phase, given, seed, settings
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


NAMES = (
    "configuration",
    "YAML",
    "taxonomy",
    "rules and objectives",
    "shard",
    "thresholds",
    "metadata",
    "any bytes as a file",
    "any values as rows",
    "votes",
    "columns of Parquet",
    "data specs",
    "texts and windows",
    "micro-batches",
    "epochs",
    "forwards of the server",
    "metrics",
    "metrics of votes",
    "requests by the schema",
    "bodies",
)
"""Of all properties; their modules take seconds to import."""

_ROUND = 200  # draws between two looks at the clock


def list_properties() -> dict[str, Property]:
    """Return all properties by their names."""
    import fuzz_config
    import fuzz_files
    import fuzz_numbers
    import fuzz_rows
    import fuzz_server
    import fuzz_texts

    parts = (fuzz_config, fuzz_files, fuzz_rows, fuzz_texts, fuzz_numbers, fuzz_server)
    return {name: each for part in parts for name, each in part.PROPERTIES.items()}


def try_draws(each: Property, number: int, chosen: int = 0, **more: Any) -> None:
    """Check a property on the known draws and on `number` drawn ones.

    Args:
        each: the property.
        number: of draws.
        chosen: seed, unless `derandomize` is among the settings.
        more: settings of hypothesis.

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
        report_multiple_bugs=False,
        **more,
    )
    @given(each.drawn)
    def attempt(draw: Any) -> None:
        each.check(draw)

    (attempt if more.get("derandomize") else seed(chosen)(attempt))()


def run_campaign(properties: Mapping[str, Property], until: float) -> Iterator[tuple[str, int, list[str]]]:
    """Try each property with seed after seed for its share of the time, and at least one.

    Args:
        properties: by name.
        until: end, on `time.monotonic`.

    Yields:
        Name, draws tried, and for a seed that found a fault what is needed to see it again: seed, blob, smallest draw.
    """
    left = sum(each.weight for each in properties.values())
    for name, each in properties.items():
        now = time.monotonic()
        end, left = now + (until - now) * each.weight / left, left - each.weight
        tried, chosen, faults = 0, 0, list[str]()
        while not chosen or (time.monotonic() < end and not faults):
            watched = _Watched(each.check)
            try:
                try_draws(dataclasses.replace(each, check=watched), _ROUND, chosen, print_blob=True)
            except Exception as error:
                where = "".join(traceback.format_exception(error, limit=-3))  # the blob stands among its notes
                faults.append(f"seed {chosen}, {_ROUND} draws; the smallest: {watched.last!r:.4000}\n{where:.4000}")
            tried += watched.tried
            chosen += 1
        yield name, tried, faults


class _Watched:
    """A check that counts its draws; the last one of a failed attempt is the smallest."""

    def __init__(self, check: Callable[[Any], None]) -> None:
        self.check = check
        self.tried = 0
        self.last: Any = None

    def __call__(self, draw: Any) -> None:
        self.tried, self.last = self.tried + 1, draw
        self.check(draw)
