"""Charts of a look around a merge, from its plain values: the line, the plane, directions, experts."""

# J principal directions, L layers

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from pma.reporting.charts import COLOURS, finished, require_altair
from pma.reporting.contour_chart import contour_ground

_WIDTH, _SQUARE, _PANEL_WIDTH, _PANEL_HEIGHT = 640, 420, 290, 170
_MEASURED, _EXPANDED = "measured", "by slope and curvature at the merge"
_MERGE_AGREES, _NEIGHBOUR_AGREES = "last and merge", "last and its neighbour"
_LOWEST = "#c2185b"
_NUMBER = ".4f"


def line_chart(line: Mapping[str, Any], bending: Mapping[str, Any] | None) -> Any:
    """Loss by place on the line, with the interval of its gain over last; and the parabola of the expansion,
    put through the merge.
    """
    alt = require_altair()
    rows = [_place(place) for place in line["places"]]
    names = {0.0: "last", 1.0: "merge"}
    if line["t"] not in names:
        names[line["t"]] = "advised"
    x = alt.X(
        "t:Q",
        title="t: 0 is last, 1 the merge, more is beyond",
        axis=alt.Axis(values=[row["t"] for row in rows], labelExpr="datum.value"),  # formats would round
        scale=alt.Scale(nice=False, padding=12),
    )
    y = alt.Y("loss:Q", title="held-out loss (nats a token)", scale=alt.Scale(zero=False))
    tooltip = [
        alt.Tooltip("t:Q", format=".2f"),
        *(alt.Tooltip(f"{name}:Q", format=_NUMBER) for name in ("loss", "gain", "gain_low", "gain_high")),
    ]
    shades = alt.Scale(domain=[_MEASURED, _EXPANDED], range=["#44525f", COLOURS["annealed"]])
    colour = alt.Color("drawn:N", title=None, scale=shades, legend=alt.Legend(orient="top", labelLimit=400))
    base = alt.Chart(alt.Data(values=rows)).encode(x=x)
    bars = base.mark_rule(strokeWidth=1.5, opacity=0.6).encode(y=alt.Y("low:Q"), y2="high:Q", color=colour)
    drawn = base.mark_line(strokeWidth=1.5).encode(y=y, color=colour)
    dots = base.mark_point(filled=True, size=55, opacity=1).encode(y=y, color=colour, tooltip=tooltip)
    marks = [{**row, "name": names[row["t"]]} for row in rows if row["t"] in names]
    marked = alt.Chart(alt.Data(values=marks)).encode(x=x, y=y)
    kinds = alt.Scale(
        domain=["last", "merge", "advised"], range=[COLOURS["raw"], COLOURS["merged"], COLOURS["annealed"]]
    )
    big = marked.mark_point(filled=True, size=150, opacity=1, stroke="white").encode(
        fill=alt.Fill("name:N", scale=kinds, legend=None), tooltip=tooltip
    )
    words = marked.mark_text(dy=-16, fontSize=12).encode(text="name:N")
    layers = [bars, drawn, dots, big, words]
    if bending is not None:
        expanded = [row for row in _parabola(line, bending) if _within(row["loss"], rows)]
        layers.insert(0, _dashed(alt, expanded, x, y, colour))
    return finished(alt.layer(*layers).resolve_scale(fill="independent").properties(width=_WIDTH, height=300))


def _place(place: Mapping[str, Any]) -> dict[str, Any]:
    loss, gain = float(place["loss"]["value"]), place["gain"]
    row = {"t": float(place["t"]), "loss": loss, "drawn": _MEASURED, "gain": None, "low": loss, "high": loss}
    if gain is None:
        return row
    last = loss + gain["value"]
    row |= {"gain": gain["value"], "gain_low": gain["low"], "gain_high": gain["high"]}
    return row | {"low": last - gain["high"], "high": last - gain["low"]}


def _parabola(line: Mapping[str, Any], bending: Mapping[str, Any]) -> list[dict[str, Any]]:
    slope, curvature = bending["parabola"]
    by_place = {place["t"]: place["loss"]["value"] for place in line["places"]}
    low, high = min(by_place), max(by_place)
    places = [low + (high - low) * step / 60 for step in range(61)]
    return [
        {"t": t, "loss": by_place[1.0] + (1 - t) * slope + (1 - t) ** 2 * curvature / 2, "drawn": _EXPANDED}
        for t in places
    ]


def _within(loss: float, rows: Sequence[Mapping[str, Any]]) -> bool:
    """Far from the merge the parabola may leave all bounds, and would flatten what was measured."""
    values = [row["loss"] for row in rows]
    margin = 0.3 * (max(values) - min(values))
    return bool(min(values) - margin <= loss <= max(values) + margin)


def _dashed(alt: Any, rows: Sequence[Mapping[str, Any]], x: Any, y: Any, colour: Any) -> Any:
    drawn = alt.Chart(alt.Data(values=list(rows))).mark_line(strokeWidth=1.5, strokeDash=[5, 4])
    return drawn.encode(x=x, y=y, color=colour)


def plane_chart(plane: Mapping[str, Any]) -> Any:
    """Bands of equal loss on the plane, the checkpoints' way over it, the merge and the lowest point."""
    alt = require_altair()
    titles = ("distance from the merge towards last", "distance across")
    ground = contour_ground(alt, plane["x"], plane["y"], plane["loss"], titles=titles, cells=80, tooltip=True)
    checkpoints = plane["checkpoints"]
    places = [
        {**mark, "model": "last" if mark is checkpoints[-1] else "checkpoint", "order": order}
        for order, mark in enumerate(checkpoints)
    ]
    single = [{"x": 0.0, "y": 0.0, "model": "merge", "distance": 0.0, "step": None}]
    if plane["lowest"] is not None:
        x, y = plane["lowest"]
        single.append({"x": x, "y": y, "model": "lowest on the plane", "distance": 0.0, "step": None})
    names = ["checkpoint", "last", "merge", "lowest on the plane"]
    shades = [COLOURS["raw"], "#1d2530", COLOURS["merged"], _LOWEST]
    way = alt.Chart(alt.Data(values=places)).mark_line(color=COLOURS["raw"], strokeWidth=1, opacity=0.6)
    dots = (
        alt.Chart(alt.Data(values=places + single))
        .mark_point(filled=True, size=110, opacity=1, stroke="white", strokeWidth=1)
        .encode(
            x="x:Q",
            y="y:Q",
            shape=alt.Shape(
                "model:N",
                title=None,
                scale=alt.Scale(domain=names, range=["circle", "circle", "circle", "cross"]),
                legend=alt.Legend(orient="top", labelLimit=400),
            ),
            fill=alt.Fill("model:N", title=None, scale=alt.Scale(domain=names, range=shades)),
            tooltip=[
                alt.Tooltip("model:N"),
                alt.Tooltip("step:Q", format=",d"),
                *(alt.Tooltip(f"{name}:Q", format=".3g") for name in ("x", "y")),
                alt.Tooltip("distance:Q", title="off the plane", format=".3g"),
            ],
        )
    )
    chart = ground + way.encode(x="x:Q", y="y:Q", order="order:Q") + dots
    return finished(chart.properties(width=_SQUARE, height=_SQUARE))


def directions_chart(directions: Sequence[Mapping[str, Any]]) -> Any:
    """By principal direction: its share of the variance, slope, curvature, and part of the gain."""
    alt = require_altair()
    panels = [
        _bars(alt, directions, "variance_share", "share of the variance", ".0%"),
        _intervals(alt, directions, "part_of_gain", "part of the predicted gain (nats)"),
        _intervals(alt, directions, "slope", "slope along it"),
        _intervals(alt, directions, "curvature", "curvature along it"),
    ]
    return finished(alt.vconcat(alt.hconcat(*panels[:2]), alt.hconcat(*panels[2:])))


def _x(alt: Any) -> Any:
    return alt.X("number:O", title="principal direction", axis=alt.Axis(labelAngle=0))


def _bars(alt: Any, rows: Sequence[Mapping[str, Any]], name: str, title: str, form: str) -> Any:
    values = [{"number": number, "value": row[name]} for number, row in enumerate(rows, 1)]
    chart = alt.Chart(alt.Data(values=values)).mark_bar(color=COLOURS["raw"])
    y = alt.Y("value:Q", title=title, axis=alt.Axis(format=form, tickCount=5))
    tooltip = [alt.Tooltip("number:O"), alt.Tooltip("value:Q", format=".1%")]
    return chart.encode(x=_x(alt), y=y, tooltip=tooltip).properties(width=_PANEL_WIDTH, height=_PANEL_HEIGHT)


def _intervals(alt: Any, rows: Sequence[Mapping[str, Any]], name: str, title: str) -> Any:
    values = [{"number": number, **row[name]} for number, row in enumerate(rows, 1)]
    base = alt.Chart(alt.Data(values=values)).encode(x=_x(alt))
    tooltip = [
        alt.Tooltip("number:O"),
        *(alt.Tooltip(f"{each}:Q", format=".3g") for each in ("value", "low", "high")),
    ]
    y = alt.Y("value:Q", title=title, axis=alt.Axis(tickCount=5))
    dots = base.mark_point(filled=True, size=60, opacity=1, color=COLOURS["merged"])
    bars = base.mark_rule(strokeWidth=2, color=COLOURS["merged"], opacity=0.6)
    zero = alt.Chart(alt.Data(values=[{"zero": 0}])).mark_rule(color="#888888", strokeDash=[4, 3])
    chart = (
        zero.encode(y="zero:Q")
        + bars.encode(y=alt.Y("low:Q", title=title), y2="high:Q")
        + dots.encode(y=y, tooltip=tooltip)
    )
    return chart.properties(width=_PANEL_WIDTH, height=_PANEL_HEIGHT)


def experts_chart(experts: Mapping[str, Any]) -> Any:
    """Agreement by layer: of last with the merge and with its neighbour, above chance."""
    alt = require_altair()
    pairs = ((_MERGE_AGREES, experts["merge"]), (_NEIGHBOUR_AGREES, experts["neighbour"]))
    rows = [
        {"layer": layer, "pair": pair, "share": share, "whole": whole}
        for pair, agreed in pairs
        for layer, (share, whole) in enumerate(
            zip(agreed["by_layer"], agreed["whole_by_layer"], strict=True), 1
        )
    ]
    shades = alt.Scale(domain=[_MERGE_AGREES, _NEIGHBOUR_AGREES], range=[COLOURS["merged"], COLOURS["raw"]])
    base = alt.Chart(alt.Data(values=rows)).encode(
        x=alt.X("layer:O", title="layer", axis=alt.Axis(labelAngle=0)),
        y=alt.Y(
            "share:Q",
            title="share of a token's experts that are the same",
            scale=alt.Scale(zero=False),
            axis=alt.Axis(format="%"),
        ),
        color=alt.Color("pair:N", title=None, scale=shades, legend=alt.Legend(orient="top", labelLimit=400)),
        tooltip=[
            "pair:N",
            "layer:O",
            alt.Tooltip("share:Q", format=".1%"),
            alt.Tooltip("whole:Q", title="all the same", format=".1%"),
        ],
    )
    drawn = base.mark_line(strokeWidth=1.5) + base.mark_point(filled=True, size=60, opacity=1)
    chance = {"chance": experts["top"] / experts["experts"], "says": "by chance"}
    rule = alt.Chart(alt.Data(values=[chance])).encode(y="chance:Q")
    chance_line = rule.mark_rule(color="#888888", strokeDash=[4, 3])
    chance_words = rule.mark_text(align="left", x=4, dy=-7, color="#666666").encode(text="says:N")
    return finished((drawn + chance_line + chance_words).properties(width=_WIDTH, height=240))
