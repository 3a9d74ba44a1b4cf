"""The chart of a forecast: curves, the expected loss with its intervals, and the same for several lengths."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from pma.errors import UsageError, printable
from pma.reporting.charts import COLOURS, finished, require_altair, scale_of
from pma.reporting.page import Section, render

_WIDTH, _HEIGHT = 640, 280
_CURVES = ("#5b6b7b", "#8d7a5b", "#6b8ba4", "#a08aa8", "#7f9a7f", "#b09090")
_FORECAST, _CONSTANT = "expected loss, with 80% and 95% intervals", "expected at the peak rate"


def forecast_chart(
    curves: Sequence[Mapping[str, Any]],
    expected: Sequence[Mapping[str, float]],
    lengths: Sequence[Mapping[str, Any]],
) -> Any:
    """Above: `curves` (name, step, loss) and `expected` (step, loss, constant, low80, high80, low95, high95).
    Below, if there are several: `lengths`, the same by `steps` of the decay.
    """
    alt = require_altair()
    named = [{**row, "name": printable(str(row["name"]))} for row in curves]
    names = list(dict.fromkeys(row["name"] for row in named))
    drawn = _CURVES[: len(names)] if len(names) <= len(_CURVES) else [_CURVES[0]] * len(names)
    shades = alt.Scale(
        domain=[*names, _FORECAST, _CONSTANT], range=[*drawn, COLOURS["annealed"], COLOURS["merged"]]
    )
    colour = alt.Color(
        "name:N", scale=shades, title=None, legend=alt.Legend(orient="top", columns=3, labelLimit=400)
    )
    losses = [row["loss"] for row in named] + [row["low95"] for row in expected]
    title, scale = "loss (nats a token)", scale_of(alt, losses)
    y = alt.Y("loss:Q", title=title, scale=scale)
    x = alt.X("step:Q", title="step", axis=alt.Axis(format="~s", tickCount=8))
    points = alt.Chart(alt.Data(values=named)).mark_circle(size=9, opacity=0.5, clip=True)
    parts = [points.encode(x=x, y=y, color=colour), *_bands(alt, expected, x, title, scale)]
    for name, field in ((_CONSTANT, "constant"), (_FORECAST, "loss")):
        rows = [{"step": row["step"], "loss": row[field], "name": name} for row in expected]
        parts.append(
            alt.Chart(alt.Data(values=rows))
            .mark_line(clip=True, strokeWidth=1.5)
            .encode(x=x, y=y, color=colour)
        )
    chart = alt.layer(*parts).properties(width=_WIDTH, height=_HEIGHT)
    if len(lengths) > 1:
        chart = alt.vconcat(chart, _by_length(alt, lengths))
    return finished(chart)


def outlook_chart(models: Sequence[Mapping[str, Any]], expected: Sequence[Mapping[str, float]]) -> Any:
    """`models` that were evaluated (name, step of the newest checkpoint, loss, checkpoints), and what decays
    of several lengths are `expected` to give (step of their end, loss, low80, high80, low95, high95).
    """
    alt = require_altair()
    colours = {
        "raw checkpoint": COLOURS["raw"],
        "merge": COLOURS["merged"],
        "annealed": COLOURS["annealed"],
        _FORECAST: COLOURS["annealed"],
    }
    named = [{**row, "name": printable(str(row["name"]))} for row in models]
    there = [name for name in colours if name in {row["name"] for row in named} or name == _FORECAST]
    shades = alt.Scale(domain=there, range=[colours[name] for name in there])
    colour = alt.Color(
        "name:N", scale=shades, title=None, legend=alt.Legend(orient="top", columns=4, labelLimit=400)
    )
    title = "held-out loss (nats a token)"
    scale = scale_of(alt, [row["loss"] for row in named] + [row["low95"] for row in expected])
    x = alt.X("step:Q", title="step", axis=alt.Axis(format="~s", tickCount=8))
    y = alt.Y("loss:Q", title=title, scale=scale)
    seen = ["name:N", "step:Q", "checkpoints:Q", "loss:Q"]
    points = alt.Chart(alt.Data(values=named)).mark_circle(size=36, opacity=0.8, clip=True)
    rows = [{**row, "name": _FORECAST} for row in expected]
    base = alt.Chart(alt.Data(values=rows))
    bars = [
        base.mark_rule(strokeWidth=width, opacity=opacity).encode(
            x=x,
            y=alt.Y(f"low{level}:Q", title=title, scale=scale),
            y2=f"high{level}:Q",
            color=colour,
        )
        for level, width, opacity in ((95, 1.5, 0.8), (80, 5, 0.5))
    ]
    line = base.mark_line(point=True, strokeDash=[4, 3]).encode(x=x, y=y, color=colour)
    parts = (points.encode(x=x, y=y, color=colour, tooltip=seen), *bars, line)
    return finished(alt.layer(*parts).properties(width=_WIDTH, height=_HEIGHT))


def write_forecast_chart(chart: Any, path: Path, lead: str) -> None:
    """Write `chart` as a picture (.png) or a page that opens offline (.html), by the name of `path`."""
    if path.suffix not in (".png", ".html"):
        raise UsageError(f"-o {path} has another ending than .png or .html; expected one of them")
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".png":
        chart.save(path, scale_factor=2)
        return
    section = Section(heading="Loss by step, and by length of the decay", paragraphs=[], chart=chart)
    path.write_text(render("Forecast", lead, [section], f"pma-llm {version('pma-llm')}"), encoding="utf-8")


def _bands(alt: Any, rows: Sequence[Mapping[str, float]], x: Any, title: str, scale: Any) -> list[Any]:
    base = alt.Chart(alt.Data(values=list(rows)))
    return [
        base.mark_area(clip=True, opacity=opacity, color=COLOURS["annealed"]).encode(
            x=x, y=alt.Y(f"low{level}:Q", title=title, scale=scale), y2=f"high{level}:Q"
        )
        for level, opacity in ((95, 0.15), (80, 0.25))
    ]


def _by_length(alt: Any, rows: Sequence[Mapping[str, Any]]) -> Any:
    base = alt.Chart(alt.Data(values=list(rows))).encode(
        x=alt.X("steps:Q", title="steps of the decay", axis=alt.Axis(format="~s", tickCount=8))
    )
    title = "loss at its end (nats a token)"
    y = alt.Y("loss:Q", title=title, scale=alt.Scale(zero=False))
    bars = [
        base.mark_rule(strokeWidth=width, color=COLOURS["annealed"], opacity=opacity).encode(
            y=alt.Y(f"low{level}:Q", title=title, scale=alt.Scale(zero=False)), y2=f"high{level}:Q"
        )
        for level, width, opacity in ((95, 1.5, 0.7), (80, 5, 0.5))
    ]
    line = base.mark_line(color=COLOURS["annealed"], point={"color": COLOURS["annealed"]}).encode(y=y)
    constant = base.mark_line(color=COLOURS["merged"], point={"color": COLOURS["merged"]}).encode(
        y=alt.Y("constant:Q", title=title, scale=alt.Scale(zero=False))
    )
    return alt.layer(*bars, constant, line).properties(width=_WIDTH, height=_HEIGHT - 80)
