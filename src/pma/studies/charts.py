"""Figures of the studies: panels of lines with the spread over seeds, in the house's style."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from pma.reporting.charts import COLOURS, finished, require_altair

# raw, merged and annealed as everywhere; further models in this order
_MORE = ("#3b6fb6", "#a04ea0", "#b8a03a", "#50a5a5", "#c25b5b", "#777777", "#8a5a3c", "#d48fb4")
_PANEL_WIDTH, _PANEL_HEIGHT = 230, 190
_BARS_WIDTH = 400
_SQUARE = 250


def panels(
    points: Sequence[Mapping[str, Any]],
    *,
    x: str,
    log_x: bool = False,
    models: Sequence[str] = (),
    lines: bool = True,
    width: int = _PANEL_WIDTH,
) -> Any:
    """A row of panels for each `metric` (in words, the axis' title), a column for each `panel`; lines join
    the means over seeds of each `model`, and thin bars reach from the lowest seed to the highest. `points`:
    panel, metric, x, y, model; one for each seed. `models`: their order in the legend.
    """
    alt = require_altair()
    metrics = list(dict.fromkeys(point["metric"] for point in points))
    columns = list(dict.fromkeys(point["panel"] for point in points))
    colour = colours(alt, models or list(dict.fromkeys(point["model"] for point in points)))
    rows = []
    for metric in metrics:
        row = []
        for column in columns:
            mine = [p for p in points if p["metric"] == metric and p["panel"] == column]
            base = alt.Chart(alt.Data(values=mine)).encode(
                x=alt.X(
                    "x:Q",
                    title=x if metric == metrics[-1] else None,
                    scale=alt.Scale(type="log", nice=False) if log_x else alt.Scale(zero=False),
                    axis=alt.Axis(format="~g" if log_x else "~s", tickCount=5),
                ),
                color=colour,
            )
            title = metric if column == columns[0] else None
            y = alt.Y("mean(y):Q", title=title, scale=alt.Scale(zero=False))
            drawn = base.mark_point(filled=True, size=45).encode(y=y)
            if lines:
                drawn = base.mark_line().encode(y=y) + drawn
            spread = base.mark_rule(opacity=0.6).encode(y=alt.Y("min(y):Q", title=title), y2="max(y):Q")
            row.append((drawn + spread).properties(width=width, height=_PANEL_HEIGHT, title=column))
        rows.append(alt.hconcat(*row))
    return finished(alt.vconcat(*rows))


def facets(
    points: Sequence[Mapping[str, Any]],
    *,
    x: str,
    y: str,
    shades: Mapping[str, str],
    frame: tuple[float, float],
    columns: int = 3,
) -> Any:
    """A panel for each `panel` of the points, several in a row; a line for each model of `shades` in its
    colour. `frame`: the least and the largest y.
    """
    alt = require_altair()
    scale = alt.Scale(domain=list(shades), range=list(shades.values()))
    order = list(dict.fromkeys(point["panel"] for point in points))
    chart = (
        alt.Chart(alt.Data(values=list(points)))
        .mark_line(strokeWidth=1.4, clip=True)
        .encode(
            x=alt.X("x:Q", scale=alt.Scale(zero=False), title=x),
            y=alt.Y("y:Q", scale=alt.Scale(domain=list(frame)), title=y),
            color=alt.Color(
                "model:N",
                scale=scale,
                sort=list(shades),
                title=None,
                legend=alt.Legend(orient="top", labelLimit=400, columns=3),
            ),
        )
        .properties(width=_PANEL_WIDTH, height=140)
        .facet(alt.Facet("panel:N", title=None, sort=order), columns=columns)
        .resolve_scale(x="independent")
    )
    return finished(chart)


def bars(rows: Sequence[Mapping[str, Any]], *, y: str, groups: Sequence[str], models: Sequence[str]) -> Any:
    """A row of panels for each `metric` of the rows, a column for each `panel`: bars in `groups`, one a
    `model`, with 95% intervals; zero is the raw model. Rows: panel, metric, group, model, value, low, high.
    """
    alt = require_altair()
    columns = list(dict.fromkeys(row["panel"] for row in rows))
    colour = colours(alt, models)
    made = []
    for metric in dict.fromkeys(row["metric"] for row in rows):
        drawn = []
        for column in columns:
            mine = [row for row in rows if row["metric"] == metric and row["panel"] == column]
            base = alt.Chart(alt.Data(values=mine)).encode(
                x=alt.X("group:N", title=None, sort=list(groups), axis=alt.Axis(labelAngle=0)),
                xOffset=alt.XOffset("model:N", sort=list(models)),
            )
            shown = base.mark_bar().encode(y=alt.Y("value:Q", title=y), color=colour)
            reach = base.mark_rule(strokeWidth=1.5, color="#222222").encode(y="low:Q", y2="high:Q")
            title = f"{column}: {metric}"
            drawn.append((shown + reach).properties(width=_BARS_WIDTH, height=_PANEL_HEIGHT, title=title))
        made.append(alt.hconcat(*drawn))
    return finished(alt.vconcat(*made))


def agreement(points: Sequence[Mapping[str, Any]], *, x: str, y: str) -> Any:
    """A square panel for each `panel` of the points, in a row: what was predicted against what was measured,
    coloured by `model`; on the line they are equal. `points`: panel, x, y, model.
    """
    alt = require_altair()
    values = [p[axis] for p in points for axis in ("x", "y")] or [0.0, 1.0]
    ends = [min(values), max(values)]
    scale, axis = alt.Scale(domain=ends, nice=True), alt.Axis(format=".2f", tickCount=6)
    across, up = alt.X("x:Q", title=x, scale=scale, axis=axis), alt.Y("y:Q", title=y, scale=scale, axis=axis)
    colour = colours(alt, list(dict.fromkeys(p["model"] for p in points)))
    line = alt.Chart(alt.Data(values=[{"x": end, "y": end} for end in ends]))
    equal = line.mark_line(color="#999999", strokeWidth=1).encode(x=across, y=up)
    drawn = []
    for panel in dict.fromkeys(p["panel"] for p in points):
        mine = alt.Chart(alt.Data(values=[p for p in points if p["panel"] == panel]))
        shown = mine.mark_point(filled=True, size=40, opacity=0.8).encode(x=across, y=up, color=colour)
        drawn.append((equal + shown).properties(width=_SQUARE, height=_SQUARE, title=panel))
    return finished(alt.hconcat(*drawn))


def colours(alt: Any, models: Sequence[str]) -> Any:
    """The colour of each model: the house's for raw, merged and annealed."""
    more = iter(_MORE * 3)
    shades = [COLOURS[name] if name in COLOURS else next(more) for name in models]
    return alt.Color(
        "model:N",
        sort=list(models),
        scale=alt.Scale(domain=list(models), range=shades),
        title=None,
        legend=alt.Legend(orient="top", labelLimit=400, symbolOpacity=1),
    )


def stage_name(stage: Mapping[str, Any], tokens_a_step: int) -> str:
    """`early (1.0M tokens)`, of a case's `stage` and `step`."""
    return f"{stage['stage']} ({stage['step'] * tokens_a_step / 1e6:.2g}M tokens)"


def mean_of(by_seed: Sequence[Mapping[str, float]], name: str) -> float:
    """Mean over seeds of one figure."""
    return sum(each[name] for each in by_seed) / len(by_seed)
