"""What a run over many rows found: the share that is flagged, the "harmful score" of safety papers.

In: the output's rows, counted. Out: `summary.json`, `summary.png`, a table.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from qlora_moderation.errors import printable
from qlora_moderation.metadata import write_json
from qlora_moderation.proportions import LEVEL, MOST_GROUPS

SUMMARY_FILE = "summary.json"
FIGURE_FILE = "summary.png"
_WIDEST = 48


def write_summary(output: Path, found: Mapping[str, Any]) -> None:
    """Write figure and file, the file last: where it stands, the run has finished."""
    from qlora_moderation.plots import plot_shares

    panels = {"all rows": _list_shares(found)}
    for column, groups in found["groups"].items():
        if groups:
            panels[f"by {column}"] = {value: _to_share(each["flagged"]) for value, each in groups.items()}
    plot_shares(panels, output / FIGURE_FILE)
    write_json(output / SUMMARY_FILE, found)


def describe_method(replicates: int) -> str:
    """Return how the intervals come about."""
    if not replicates:
        return "none"
    return (
        f"{LEVEL:.0%}: percentiles of {replicates} Poisson bootstrap draws of whole prompts; where all draws agree, the exact "
        "binomial interval (Clopper and Pearson) of as many trials as there are prompts"
    )


def render_summary(found: Mapping[str, Any]) -> list[str]:
    """Return the lines that are printed."""
    judged = found["judged"]
    lines = [
        f"{found['rows']:,} rows" + (f", {found['bad_rows']:,} of them bad (see error)" if found["bad_rows"] else "")
    ]
    if found["rows_in_several_windows"]:
        lines[0] += f", {found['rows_in_several_windows']:,} in several windows"
    if found["truncated_rows"]:
        lines[0] += f", {found['truncated_rows']:,} truncated"
    if not judged:
        return [*lines, "no row could be judged"]
    shares = _list_shares(found)
    lines += _render_table(
        ["all rows", "rows", "share", f"{LEVEL:.0%} interval"], shares, dict.fromkeys(shares, judged)
    )
    for column, groups in found["groups"].items():
        if groups is None:
            lines.append(
                f"--group_by {column}: has more than {MOST_GROUPS} values, so it gets no table; give another column and the "
                "same command again, nothing is scored anew"
            )
            continue
        shares = {value: _to_share(each["flagged"]) for value, each in groups.items()}
        counts = {value: each["judged"] for value, each in groups.items()}
        lines += [
            "",
            *_render_table([f"flagged, by {column}", "rows", "share", f"{LEVEL:.0%} interval"], shares, counts),
        ]
    return lines


Share = tuple[float, Sequence[float] | None]


def _to_share(found: Mapping[str, Any]) -> Share:
    return found["share"], found["interval"]


def _list_shares(found: Mapping[str, Any]) -> dict[str, Share]:
    if not found["judged"]:
        return {}
    named = {name: _to_share(each) for name, each in found["categories"].items()}
    ranked = sorted(named.items(), key=lambda item: -item[1][0])
    return {"flagged": _to_share(found["flagged"]), **dict(ranked)}


def _render_table(head: list[str], shares: Mapping[str, Share], counts: Mapping[str, int]) -> list[str]:
    cells = [head]
    for name, (share, edges) in shares.items():
        judged = counts[name]
        name = printable(name)  # a value of the rows steers no terminal
        label = name if len(name) <= _WIDEST else name[: _WIDEST - 1] + "\u2026"
        rows = f"{round(share * judged):,} of {judged:,}"
        interval = f"{_to_percent(edges[0])} to {_to_percent(edges[1])} %" if edges else ""
        cells.append([label, rows, f"{_to_percent(share)} %", interval])
    widths = [max(len(row[column]) for row in cells) for column in range(4)]
    return ["  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]).rstrip() for row in cells]


def _to_percent(share: float) -> str:
    """Return a share in percent; what is small but not nothing keeps a digit."""
    percent = 100 * share
    return f"{percent:.1g}" if 0 < percent < 0.01 else f"{percent:.2f}"
