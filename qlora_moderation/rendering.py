"""A report's parts as Markdown or as one self-contained HTML page.

In: headings, paragraphs, tables, figures. Out: text. Whatever comes from data is escaped, and rows reach the page as JSON that
its script shows as text only.
"""

from __future__ import annotations

import base64
import dataclasses
import hashlib
import html
import json
from collections.abc import Mapping, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any


@dataclasses.dataclass(frozen=True)
class Heading:
    """A section's title; `level` 2 or 3."""

    text: str
    level: int = 2


@dataclasses.dataclass(frozen=True)
class Paragraph:
    """Prose; a warning is set off."""

    text: str
    is_warning: bool = False


@dataclasses.dataclass(frozen=True)
class Tiles:
    """Headline figures: (value, what it is, its interval or nothing)."""

    items: Sequence[tuple[str, str, str]]


@dataclasses.dataclass(frozen=True)
class Table:
    """Rows of values below column names; a value may be (number, [low, high])."""

    columns: Sequence[str]
    rows: Sequence[Sequence[Any]]


@dataclasses.dataclass(frozen=True)
class Figure:
    """A PNG file beside the report."""

    file: str
    caption: str


Part = Heading | Paragraph | Tiles | Table | Figure


def format_value(value: Any) -> str:
    """Return a number, text or (number, interval) as text; nothing for what is undefined."""
    if isinstance(value, tuple):
        number, edges = value
        shown = format_value(number)
        return f"{shown} ({edges[0]:.3f} to {edges[1]:.3f})" if shown and edges else shown
    if value is None:
        return ""
    if isinstance(value, bool | str):
        return str(value)
    return f"{value:,}" if isinstance(value, int) else f"{value:.3f}"


def render_markdown(title: str, parts: Sequence[Part]) -> str:
    """Return the parts as Markdown."""
    lines = [f"# {title}\n"]
    for part in parts:
        if isinstance(part, Heading):
            lines.append(f"{'#' * part.level} {part.text}\n")
        elif isinstance(part, Paragraph):
            lines.append(f"{'**Note:** ' if part.is_warning else ''}{part.text}\n")
        elif isinstance(part, Tiles):
            lines.append(
                "".join(f"- {what}: {value}{f' ({edges})' if edges else ''}\n" for value, what, edges in part.items)
            )
        elif isinstance(part, Figure):
            lines.append(f"![{part.caption}]({part.file})\n")
        else:
            head = [
                "| " + " | ".join(_escape_cell(column) for column in part.columns) + " |",
                "|" + "---|" * len(part.columns),
            ]
            cells = [[_escape_cell(format_value(value)) for value in row] for row in part.rows]
            lines.append("\n".join([*head, *("| " + " | ".join(row) + " |" for row in cells)]) + "\n")
    return "\n".join(lines)


def _escape_cell(text: str) -> str:
    return html.escape(text, quote=False).replace("|", "/").replace("\n", " ")


def render_page(title: str, parts: Sequence[Part], rows: Mapping[str, Any], directory: Path) -> str:
    """Return one HTML page without outside resources, whose policy forbids any script but its own.

    Args:
        title: of the page.
        parts: in their order.
        rows: what the script reads: `rows`, `categories`, `models`, `references`.
        directory: where the figures are.
    """
    package = files("qlora_moderation")
    template = package.joinpath("report_page.html").read_text(encoding="utf-8")
    script = package.joinpath("report_page.js").read_text(encoding="utf-8")
    body = [f"<h1>{html.escape(title)}</h1>", _render_contents(parts)]
    body += [_render_part(part, directory) for part in parts]
    # `<` would let a text end the element that holds the data
    data = json.dumps(rows, ensure_ascii=True, separators=(",", ":")).replace("<", "\\u003c")
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    replaced = {
        "@@TITLE@@": html.escape(title),
        "@@SCRIPT_HASH@@": digest,
        "@@BODY@@": "\n".join(body),
        "@@DATA@@": data,
        "@@SCRIPT@@": script,
    }
    page = []
    for piece in template.split("@@"):  # in one pass, so that no text from data is ever taken for a slot
        page.append(replaced.get(f"@@{piece}@@", piece))
    return "".join(page)


def _render_contents(parts: Sequence[Part]) -> str:
    titles = [part.text for part in parts if isinstance(part, Heading) and part.level == 2]
    links = [f'<a href="#{_anchor(text)}">{html.escape(text)}</a>' for text in titles]
    links.append('<a href="#rows">Rows</a>')
    return f'<nav aria-label="Sections">{"".join(links)}</nav>'


def _anchor(text: str) -> str:
    return "".join(c if c.isascii() and c.isalnum() else "-" for c in text.lower())


def _render_part(part: Part, directory: Path) -> str:
    if isinstance(part, Heading):
        mark = f' id="{_anchor(part.text)}"' if part.level == 2 else ""
        return f"<h{part.level}{mark}>{html.escape(part.text)}</h{part.level}>"
    if isinstance(part, Paragraph):
        return f"<p{' class=warning' if part.is_warning else ''}>{html.escape(part.text)}</p>"
    if isinstance(part, Tiles):
        tiles = []
        for value, *texts in part.items:
            spans = "".join(f"<span>{html.escape(text)}</span>" for text in texts)
            tiles.append(f'<div class="tile"><b>{html.escape(value)}</b>{spans}</div>')
        return f'<div class="tiles">{"".join(tiles)}</div>'
    if isinstance(part, Figure):
        image = base64.b64encode((directory / part.file).read_bytes()).decode()
        caption = html.escape(part.caption, quote=True)
        return f'<figure><img alt="{caption}" src="data:image/png;base64,{image}"><figcaption>{caption}</figcaption></figure>'
    head = "".join(f'<th scope="col">{html.escape(column)}</th>' for column in part.columns)
    rows = "".join(f"<tr>{''.join(map(_render_cell, row))}</tr>" for row in part.rows)
    return f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table></div>'


def _render_cell(value: Any) -> str:
    number, edges = value if isinstance(value, tuple) else (value, None)
    shown = html.escape(format_value(number))
    if edges and shown:
        shown += f"<small>{edges[0]:.3f} to {edges[1]:.3f}</small>"
    sortable = number is None or (isinstance(number, int | float) and not isinstance(number, bool))
    key = f' data-value="{"" if number is None else number}"' if sortable else ""
    return f"<td{key}>{shown}</td>"
