"""Charts as Altair specifications, from plain numbers. The same chart is drawn in the page and as a PNG.

Names may come from untrusted files: a control character in one would abort the whole process in the PNG
renderer, so all are escaped.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pma.errors import MissingExtra, printable

# one colour per kind of model, throughout: raw, merged, annealed
COLOURS = {"raw": "#5b6b7b", "merged": "#d9730d", "annealed": "#2f7d5b"}
_WIDTH = 640
_SMOOTHING_REACH = 7


@dataclass(frozen=True, kw_only=True)
class Series:
    """A training run: (tokens, loss) and (tokens, learning rate), and its kind (a key of `COLOURS`)."""

    name: str
    kind: str
    losses: Sequence[tuple[int, float]]
    learning_rates: Sequence[tuple[int, float]]


def training_chart(series: Sequence[Series]) -> Any:
    """Training loss over tokens, smoothed over the raw points, with the learning rate below."""
    alt = require_altair()
    loss_rows = [
        {"model": printable(s.name), "tokens": tokens, "loss": loss, "smoothed": smooth}
        for s in series
        for (tokens, loss), smooth in zip(s.losses, _smoothed([y for _, y in s.losses]), strict=True)
    ]
    rate_rows = [
        {"model": printable(s.name), "tokens": tokens, "rate": rate}
        for s in series
        for tokens, rate in s.learning_rates
    ]
    colour = _colours(alt, {printable(s.name): s.kind for s in series})
    x = alt.X("tokens:Q", title="training tokens", axis=alt.Axis(format="~s", tickCount=8))
    y = alt.Y(
        "loss:Q",
        title="training loss (nats a token)",
        scale=scale_of(alt, [y for s in series for _, y in s.losses]),
    )
    base = alt.Chart(alt.Data(values=loss_rows)).encode(
        x=alt.X("tokens:Q", title=None, axis=alt.Axis(format="~s", tickCount=8))
    )
    points = base.mark_circle(size=7, opacity=0.25, clip=True).encode(y=y, color=colour)
    lines = base.mark_line(clip=True).encode(y="smoothed:Q", color=colour)
    rates = (
        alt.Chart(alt.Data(values=rate_rows), width=_WIDTH, height=90)
        .mark_line()
        .encode(
            x=x,
            y=alt.Y("rate:Q", title="learning rate", axis=alt.Axis(format="~e", tickCount=3)),
            color=colour,
        )
    )
    upper = (points + lines).properties(width=_WIDTH, height=260)
    return finished(alt.vconcat(upper, rates).resolve_scale(x="shared"))


def held_out_chart(points: Sequence[Mapping[str, Any]]) -> Any:
    """Held-out loss over training. `points`: tokens, loss, model (its name) and kind (a key of `COLOURS`)."""
    alt = require_altair()
    shown = [{**point, "model": printable(point["model"])} for point in points]
    colour = _colours(alt, {point["model"]: point["kind"] for point in shown})
    base = alt.Chart(alt.Data(values=shown)).encode(
        x=alt.X("tokens:Q", title="training tokens", axis=alt.Axis(format="~s", tickCount=8)),
        y=alt.Y("loss:Q", title="held-out loss (nats a token)", scale=alt.Scale(zero=False)),
        color=colour,
        tooltip=["model:N", alt.Tooltip("tokens:Q", format=",d"), alt.Tooltip("loss:Q", format=".4f")],
    )
    return finished(
        (base.mark_line() + base.mark_point(filled=True, size=60)).properties(width=_WIDTH, height=280)
    )


def comparison_chart(rows: Sequence[Mapping[str, Any]]) -> Any:
    """Bars: how much better than last each model is, with 95% intervals. `rows`: title, kind, value, low,
    high.
    """
    alt = require_altair()
    kinds = {row["kind"] for row in rows}
    shown = [{**row, "title": printable(row["title"])} for row in rows]
    base = alt.Chart(alt.Data(values=shown)).encode(
        y=alt.Y("title:N", title=None, sort=[row["title"] for row in shown], axis=alt.Axis(labelLimit=400))
    )
    bars = base.mark_bar(height=20).encode(
        x=alt.X(
            "value:Q",
            title="held-out loss below last (nats a token), with 95% interval",
            axis=alt.Axis(tickCount=6),
        ),
        color=alt.Color(
            "kind:N",
            scale=alt.Scale(domain=sorted(kinds), range=[COLOURS[k] for k in sorted(kinds)]),
            legend=None,
        ),
        tooltip=["title:N", alt.Tooltip("value:Q", format=".4f")],
    )
    errors = base.mark_rule(strokeWidth=2, color="#222222").encode(x="low:Q", x2="high:Q")
    return finished((bars + errors).properties(width=_WIDTH - 200, height=34 * len(rows)))


def require_altair() -> Any:
    """The module altair. Raises MissingExtra where it, or what it draws PNGs with, is not installed."""
    try:
        import altair
        import vl_convert  # noqa: F401  # what altair draws PNGs with
    except ImportError as error:
        raise MissingExtra("a report", "report", str(error.name)) from error
    return altair


def _colours(alt: Any, kind_of: Mapping[str, str]) -> Any:
    names = list(dict.fromkeys(kind_of))
    scale = alt.Scale(domain=names, range=[COLOURS[kind_of[name]] for name in names])
    return alt.Color(
        "model:N", scale=scale, title=None, legend=alt.Legend(orient="top", labelLimit=400, symbolOpacity=1)
    )


def scale_of(alt: Any, values: Sequence[float]) -> Any:
    """A scale for losses over training. Cut off the first steep fall, which would flatten all the rest."""
    if not values:
        return alt.Scale(zero=False)
    ordered = sorted(values)
    low, high = ordered[0], ordered[int(0.95 * (len(ordered) - 1))]
    margin = 0.1 * (high - low) or 0.1
    return alt.Scale(domain=[low - margin, high + margin], zero=False)


def _smoothed(values: Sequence[float]) -> list[float]:
    """Means over a window centred on each point, cut off at the ends: smooth without lagging behind."""
    reach = min(_SMOOTHING_REACH, len(values) // 20)  # few points are drawn as they are
    windows = (values[max(0, i - reach) : i + reach + 1] for i in range(len(values)))
    return [sum(window) / len(window) for window in windows]


def finished(chart: Any) -> Any:
    """`chart` in the house's style; only the outermost chart can be configured."""
    return (
        chart.configure_view(stroke=None)
        .configure_axis(gridColor="#e8e8e8", labelFontSize=12, titleFontSize=12, titleFontWeight="normal")
        .configure_legend(labelFontSize=12)
    )
