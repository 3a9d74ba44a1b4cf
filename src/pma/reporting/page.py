"""The HTML page: text, a table and charts in one file that opens offline."""

from __future__ import annotations

import html
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Any


@dataclass(frozen=True, kw_only=True)
class Section:
    """A part of a page: a heading, paragraphs, then a table, an Altair chart or commands, whichever there
    are.
    """

    heading: str
    paragraphs: Sequence[str] = ()
    columns: Sequence[str] = ()
    rows: Sequence[Sequence[str]] = ()
    chart: Any = None
    commands: Sequence[tuple[str, str]] = field(default=())


_DRAW = 'specs.forEach((spec, i) => vegaEmbed("#chart" + i, spec, {actions: false, renderer: "svg"}));'
_STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; color: #1d2530; max-width: 62rem; margin: 2rem auto; }
body { padding: 0 1rem; }
h1 { font-size: 1.6rem; margin-bottom: .3rem; }
h2 { font-size: 1.15rem; margin: 2.2rem 0 .4rem; }
p.lead { font-size: 1.1rem; }
table { border-collapse: collapse; width: 100%; font-size: .85rem; font-variant-numeric: tabular-nums; }
th, td { text-align: right; padding: .3rem .45rem; border-bottom: 1px solid #e3e6ea; white-space: nowrap; }
th:first-child, td:first-child { text-align: left; white-space: normal; }
.chart svg { max-width: 100%; height: auto; }
th { font-weight: 600; }
.wide, .chart { width: 100%; overflow-x: auto; }
pre { background: #f4f5f7; padding: .5rem .8rem; overflow-x: auto; margin: .2rem 0 .8rem; font-size: .85rem; }
p.status { color: #6a7480; font-size: .85rem; margin: 0 0 .8rem; }
p.status::before { content: "●"; margin-right: .4rem; color: #9aa3ad; }
p.status.live::before { color: #2f9d5b; }
footer { color: #6a7480; font-size: .85rem; margin: 3rem 0 1rem; }
"""


@dataclass(frozen=True, kw_only=True)
class Status:
    """A line below the title. `reload_seconds`: the page reloads itself so often; None once nothing more
    comes.
    """

    text: str
    reload_seconds: int | None = None


def render(
    title: str, lead: str, sections: Sequence[Section], footer: str, status: Status | None = None
) -> str:
    """A complete page. All text is escaped: names may come from untrusted files."""
    body = [f"<h1>{html.escape(title)}</h1>", *_status(status), f'<p class="lead">{html.escape(lead)}</p>']
    charts: list[dict[str, Any]] = []
    for section in sections:
        body.append(f"<h2>{html.escape(section.heading)}</h2>")
        body += [f"<p>{html.escape(paragraph)}</p>" for paragraph in section.paragraphs]
        if section.rows:
            body.append(_table(section.columns, section.rows))
        if section.chart is not None:
            body.append(f'<div class="chart" id="chart{len(charts)}"></div>')
            charts.append(section.chart.to_dict())
        for what, line in section.commands:
            body.append(f"<div>{html.escape(what)}</div><pre>{html.escape(line)}</pre>")
    body.append(f"<footer>{html.escape(footer)}</footer>")
    script = ""
    if charts:
        # a "<" in a name could end the script element early; in JSON it can be written by its number
        specs = json.dumps(charts).replace("<", "\\u003c")
        # the specifications come first: the bundle ends with the snippet that draws them
        script = f'<script type="module">const specs = {specs};\n{_bundle()}</script>'
    reload = ""
    if status is not None and status.reload_seconds is not None:
        reload = f'<meta http-equiv="refresh" content="{status.reload_seconds:d}">'
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{html.escape(title)}</title>'
        '<link rel="icon" href="data:,">'
        f'<meta name="viewport" content="width=device-width">{reload}<style>{_STYLE}</style></head>\n'
        f"<body>{''.join(body)}{script}</body></html>\n"
    )


@cache
def _bundle() -> str:
    """What draws the charts: the same for every page, and slow to make."""
    import vl_convert

    bundle: str = vl_convert.javascript_bundle(_DRAW)
    return bundle


def _status(status: Status | None) -> list[str]:
    if status is None:
        return []
    kind = "status" if status.reload_seconds is None else "status live"
    return [f'<p class="{kind}">{html.escape(status.text)}</p>']


def _table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    head = "".join(f"<th>{html.escape(column)}</th>" for column in columns)
    lines = ["<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in row) + "</tr>" for row in rows]
    table = f"<table><thead><tr>{head}</tr></thead><tbody>{''.join(lines)}</tbody></table>"
    return f'<div class="wide">{table}</div>'
