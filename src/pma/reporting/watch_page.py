"""The page of `pma watch`: raw and merged over training, the gain, the newest points; from plain values."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any, TypeVar

from pma.errors import printable
from pma.quantities import count_text
from pma.reporting.charts import COLOURS, finished, require_altair, scale_of
from pma.reporting.page import Section, Status, render

T = TypeVar("T")

# with thousands of points a page would grow without end: older ones are thinned out
MOST_DRAWN = 300
_NEWEST_DRAWN = 100
_ROWS = 15
_MANY = 40
_WIDTH = 760
_NORMAL_95 = 1.96
_LEFT_BEHIND = "#c3cad1"
_RAW, _LEFT = "raw checkpoint", "left behind by a restart"


@dataclass(frozen=True, kw_only=True)
class Measured:
    """What a chart is of: the names of its values in a point, and words."""

    last: str
    merged: str
    gain: str
    title: str
    unit: str
    better: str


LOSS = Measured(
    last="loss_last",
    merged="loss_merged",
    gain="gain",
    title="held-out loss",
    unit="nats a token",
    better="below",
)
SCORE = Measured(
    last="score_last",
    merged="score_merged",
    gain="score_gain",
    title="mean score on the tasks",
    unit="share of one",
    better="above",
)


@dataclass(frozen=True, kw_only=True)
class Watched:
    """What is shown. A point: step, tokens (or None), window (steps), note (or None) and values, as
    `watch.Point` has them.

    `points`: all that are drawn, see `thinned`, of `of_points`. `abandoned`: of lineages that restarts left
    behind. `waiting`: what is there and not taken. `written`: when, in words. `reload_seconds`: None once the
    watch is over.
    """

    run: str
    merge: str
    points: Sequence[Mapping[str, Any]]
    of_points: int
    abandoned: Sequence[Mapping[str, Any]] = ()
    waiting: Sequence[str] = ()
    notes: Sequence[str] = ()
    written: str
    reload_seconds: int | None = None


def watch_page(watched: Watched) -> str:
    """The page as HTML."""
    sections = [section for measured in (LOSS, SCORE) for section in _drawn(watched, measured)]
    if watched.points:
        columns, rows = points_table(watched.points[-_ROWS:][::-1])
        sections.append(Section(heading="Newest points", columns=columns, rows=rows))
    if watched.waiting:
        sections.append(Section(heading="Not taken", paragraphs=watched.waiting))
    if watched.notes:
        sections.append(Section(heading="Notes", paragraphs=list(reversed(watched.notes))))
    over = f"The watch is over; the same command goes on with it. Written {watched.written}."
    live = f"Live: this page reloads itself. Written {watched.written}."
    status = Status(
        text=over if watched.reload_seconds is None else live, reload_seconds=watched.reload_seconds
    )
    footer = f"pma-llm {version('pma-llm')}"
    return render(f"Watching {watched.run}", watch_lead(watched.points), sections, footer, status)


def watch_lead(points: Sequence[Mapping[str, Any]]) -> str:
    """One sentence on the newest point."""
    if not points:
        return "No checkpoint has been evaluated yet."
    point, values = points[-1], points[-1]["values"]
    where = f"Step {point['step']:,}" + (
        f", {count_text(point['tokens'])} tokens" if point["tokens"] is not None else ""
    )
    said = []
    for measured in (LOSS, SCORE):
        if measured.last not in values:
            continue
        raw = f"the raw checkpoint's {measured.title} is {values[measured.last]:.4f}"
        if measured.merged in values:
            gain, error = values[measured.gain], values[f"{measured.gain}_error"]
            merged = f"the merge of the last {len(point['window'])} has {values[measured.merged]:.4f}"
            raw += f", {merged}: {'better' if gain >= 0 else 'worse'} by {abs(gain):.4f} ± {error:.4f}"
        said.append(raw)
    return f"{where}: {'; '.join(said)}."


def points_table(points: Sequence[Mapping[str, Any]]) -> tuple[list[str], list[list[str]]]:
    """Headings and cells of points, in the order given; what no point has is left out."""
    columns = ["step"]
    rows = [[f"{point['step']:,}"] for point in points]
    if any(point["tokens"] is not None for point in points):
        columns.append("tokens")
        for row, point in zip(rows, points, strict=True):
            row.append("" if point["tokens"] is None else count_text(point["tokens"]))
    for measured, noun in ((LOSS, "loss"), (SCORE, "score")):
        if not any(measured.last in point["values"] for point in points):
            continue
        columns += [f"{noun}, last", f"{noun}, merged", "better by"]
        for row, point in zip(rows, points, strict=True):
            row += [_with_error(point["values"], name) for name in (measured.last, measured.merged)]
            row.append(_with_error(point["values"], measured.gain, "+"))
    columns.append("merge of")
    for row, point in zip(rows, points, strict=True):
        window = point["window"]
        row.append(f"{len(window)}: steps {window[0]:,} to {window[-1]:,}" if window else "")
    return columns, rows


def _with_error(values: Mapping[str, float], name: str, sign: str = "") -> str:
    return f"{values[name]:{sign}.4f} ± {values[f'{name}_error']:.4f}" if name in values else ""


def _drawn(watched: Watched, measured: Measured) -> list[Section]:
    points = [point for point in watched.points if measured.last in point["values"]]
    left = [point for point in watched.abandoned if measured.last in point["values"]]
    if not points and not left:
        return []
    notes = [
        "Bars and shading: the 95% interval of a merge's gain over the raw checkpoint that it ends with, "
        "paired by document or by item; ± is one standard error."
    ]
    if len(watched.points) < watched.of_points:
        notes.append(f"Drawn: {len(watched.points)} of {watched.of_points} points; all are in the store.")
    if left:
        notes.append("Grey: points of lineages that the trainer left by going back.")
    heading = measured.title[0].upper() + measured.title[1:]
    chart = watch_chart(points, left, measured, printable(watched.merge))
    return [Section(heading=f"{heading} over training", paragraphs=notes, chart=chart)]


def thinned(points: Sequence[T]) -> list[T]:
    """At most `MOST_DRAWN` of the points: the newest, and evenly spread ones of those before."""
    if len(points) <= MOST_DRAWN:
        return list(points)
    old, new = points[:-_NEWEST_DRAWN], points[-_NEWEST_DRAWN:]
    places = MOST_DRAWN - _NEWEST_DRAWN
    return [*(old[len(old) * i // places] for i in range(places)), *new]


def watch_chart(
    points: Sequence[Mapping[str, Any]], left: Sequence[Mapping[str, Any]], measured: Measured, merge: str
) -> Any:
    """Raw and merged over training, the gain below; over tokens where all points have them, else steps."""
    alt = require_altair()
    in_tokens = all(point["tokens"] is not None for point in [*points, *left])
    rows = [row for point in points for row in _rows(point, measured, merge, in_tokens)]
    rows += [
        {**row, "model": _LEFT, "line": f"{_LEFT} {row['model']}"}
        for point in left
        for row in _rows(point, measured, merge, in_tokens)
    ]
    title = "training tokens" if in_tokens else "step"
    axis = alt.Axis(format="~s" if in_tokens else ",d", tickCount=8)
    models = [_RAW, merge, _LEFT] if left else [_RAW, merge]
    colours = [COLOURS["raw"], COLOURS["merged"], _LEFT_BEHIND][: len(models)]
    colour = alt.Color(
        "model:N",
        title=None,
        scale=alt.Scale(domain=models, range=colours),
        legend=alt.Legend(orient="top", labelLimit=400, symbolOpacity=1),
    )
    base = alt.Chart(alt.Data(values=rows)).encode(color=colour)
    # of few points all are shown, of many not the first steep fall
    losses = [row["value"] for row in rows] if measured is LOSS and len(rows) >= _MANY else []
    y = alt.Y("value:Q", title=f"{measured.title} ({measured.unit})", scale=scale_of(alt, losses))
    tooltip = [
        alt.Tooltip("model:N"),
        alt.Tooltip("step:Q", format=",d"),
        alt.Tooltip("value:Q", format=".4f"),
        alt.Tooltip("gain:Q", format="+.4f"),
        alt.Tooltip("averaged:Q", title="checkpoints averaged"),
    ]
    upper_x = alt.X("at:Q", title=None, axis=axis, scale=alt.Scale(zero=False))
    lines = base.mark_line(strokeWidth=1.5, clip=True).encode(x=upper_x, y=y, detail="line:N")
    dots = base.mark_point(filled=True, opacity=1, clip=True, size=_dot_size(rows)).encode(
        x=upper_x, y=y, tooltip=tooltip
    )
    bars = base.transform_filter("isValid(datum.low)").mark_rule(strokeWidth=1.5, opacity=0.55, clip=True)
    bars = bars.encode(x=upper_x, y=alt.Y("low:Q"), y2="high:Q")
    upper = (bars + lines + dots).properties(width=_WIDTH, height=300)
    lower_x = alt.X("at:Q", title=title, axis=axis, scale=alt.Scale(zero=False))
    return finished(
        alt.vconcat(upper, _gain_chart(alt, rows, merge, lower_x, measured)).resolve_scale(x="shared")
    )


def _gain_chart(alt: Any, rows: Sequence[Mapping[str, Any]], merge: str, x: Any, measured: Measured) -> Any:
    gains = [row for row in rows if row["gain"] is not None and row["model"] == merge]
    base = alt.Chart(alt.Data(values=gains)).encode(x=x)
    y = alt.Y("gain:Q", title=f"{measured.better} raw")
    band = base.mark_area(opacity=0.18, color=COLOURS["merged"]).encode(
        y=alt.Y("gain_low:Q", title=f"{measured.better} raw"), y2="gain_high:Q"
    )
    line = base.mark_line(strokeWidth=1.5, color=COLOURS["merged"]).encode(y=y)
    dots = base.mark_point(filled=True, opacity=1, size=_dot_size(gains), color=COLOURS["merged"]).encode(y=y)
    zero = alt.Chart(alt.Data(values=[{"zero": 0}])).mark_rule(color="#888888", strokeDash=[4, 3])
    return (band + line + dots + zero.encode(y="zero:Q")).properties(width=_WIDTH, height=110)


def _dot_size(rows: Sequence[object]) -> int:
    return 45 if len(rows) <= 120 else 14


def _rows(point: Mapping[str, Any], measured: Measured, merge: str, in_tokens: bool) -> list[dict[str, Any]]:
    """The raw and the merged point, as the chart has them."""
    values = point["values"]
    at = point["tokens"] if in_tokens else point["step"]
    nothing = {"gain": None, "low": None, "high": None, "gain_low": None, "gain_high": None}
    raw = {"at": at, "step": point["step"], "model": _RAW, "line": _RAW, "value": values[measured.last]}
    rows = [{**nothing, **raw, "averaged": 1}]
    if measured.merged in values:
        value, gain = values[measured.merged], values[measured.gain]
        reach = _NORMAL_95 * values[f"{measured.gain}_error"]
        rows.append(
            {
                **raw,
                "model": merge,
                "line": merge,
                "value": value,
                "low": value - reach,
                "high": value + reach,
                "gain": gain,
                "gain_low": gain - reach,
                "gain_high": gain + reach,
                "averaged": len(point["window"]),
            }
        )
    return rows
