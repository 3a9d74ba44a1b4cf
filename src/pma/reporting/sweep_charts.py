"""Charts of a sweep over schemes and windows: a heat map of N by V for each scheme, and loss against N."""

# N: how many checkpoints a merge averages (`last`); V: how far apart they are (`every`)

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from math import ceil, isfinite
from pathlib import Path
from typing import Any

from pma.errors import InputError, printable
from pma.reporting.charts import COLOURS, finished, require_altair
from pma.reporting.page import Section, render

# told apart with any kind of colour blindness (after Okabe and Ito); 7 colours and 6 shapes have no common
# divisor, so that together they tell 42 schemes apart
_SCHEME_COLOURS = ["#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9", "#e69f00", "#222222"]
_SCHEME_SHAPES = ["circle", "square", "triangle-up", "diamond", "cross", "triangle-down"]
_BEST, _WORST = COLOURS["annealed"], "#edf5f1"
_WIDTH = 900
_CELL_WIDTH, _CELL_HEIGHT = 62, 32
_PANEL_WIDTH = 130
_NORMAL_95 = 1.96
_BARS = (
    "Bars are 95% intervals of each merge's gain over the last raw checkpoint, paired by {of}. The best of "
    "many looks better than it is: confirm it on other text."
)


@dataclass(frozen=True, kw_only=True)
class Drawn:
    """What a chart shows of each merge: what it is called, its unit, and which way is better."""

    name: str
    unit: str
    explained: str
    higher_is_better: bool = False


LOSS = Drawn(
    name="Loss",
    unit="nats a token",
    explained="Losses are held-out, in nats a token. " + _BARS.format(of="document"),
)
SCORE = Drawn(
    name="Score",
    unit="weighted mean of all tasks",
    explained="The weighted mean of the tasks' scores, as a share of one. " + _BARS.format(of="item"),
    higher_is_better=True,
)


def sweep_chart(rows: Sequence[Mapping[str, Any]], drawn: Drawn = LOSS) -> Any:
    """A heat map of N by V for each scheme, where either varies, above loss against N for each V.

    A row is a merge: scheme, last (N), every (V as text, "-" for all checkpoints), every_order (to sort V
    by), at (the step it ends at), loss (nats a token), gain (loss of the last raw checkpoint minus loss, or
    None) and standard_error (of the gain). Merges that end at different steps are drawn in panels of their
    own, with scales of their own. With `drawn` SCORE, "loss" and gain are scores. Raises InputError where no
    row has a finite loss.
    """
    alt = require_altair()
    shown = _shown(rows)
    groups = [[row for row in shown if row["at"] == at] for at in _distinct(shown, "at")]
    schemes = list(dict.fromkeys(row["scheme"] for row in shown))
    step = f", at step {shown[0]['at']}" if len(groups) == 1 else ""
    parts = []
    if len({(row["last"], row["every"]) for row in shown}) > 1:
        gains = all(row["gain"] is not None for row in shown)
        what = "Gain over the last checkpoint" if gains else drawn.name
        maps = [_heat_maps(alt, group, schemes, gains, drawn, named=not step) for group in groups]
        parts.append(
            alt.vconcat(*maps, title=f"{what}, {drawn.unit}{step}").resolve_scale(color="independent")
        )
    curves = [_curves(alt, group, schemes, drawn, named=not step) for group in groups]
    parts.append(alt.vconcat(*curves, title=f"{drawn.name}, with the 95% interval of the gain{step}"))
    chart = alt.vconcat(*parts, spacing=40).resolve_scale(color="independent", shape="independent")
    return finished(chart).configure_title(anchor="start", fontSize=14, fontWeight="normal")


def write_sweep_chart(
    rows: Sequence[Mapping[str, Any]], path_without_suffix: Path, drawn: Drawn = LOSS
) -> tuple[Path, Path]:
    """Write `sweep_chart` as a picture (.png) and a page (.html) that opens offline; returns both paths."""
    chart = sweep_chart(rows, drawn)
    folder, name = path_without_suffix.parent, path_without_suffix.name
    # not with_suffix, which would take the ".5" of "sweep-0.5" for one
    picture, page = folder / f"{name}.png", folder / f"{name}.html"
    shown = _shown(rows)
    schemes, undrawn = len({row["scheme"] for row in shown}), len(rows) - len(shown)
    lead = f"{_counted(len(shown), 'merge')}, {_counted(schemes, 'scheme')}."
    what = drawn.name.lower()
    notes = [drawn.explained] + ([f"Not drawn, as the {what} is not finite: {undrawn}."] if undrawn else [])
    section = Section(heading=f"{drawn.name} by scheme and window", paragraphs=notes, chart=chart)
    folder.mkdir(parents=True, exist_ok=True)
    chart.save(picture, scale_factor=2)
    page.write_text(render("Sweep", lead, [section], f"pma-llm {version('pma-llm')}"), encoding="utf-8")
    return picture, page


def _shown(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The rows that can be drawn, by V, N and scheme as they first came, with text made safe."""
    kept = [row for row in rows if isfinite(row["loss"])]
    if not kept:
        raise InputError("no merge of the sweep has a finite loss; there is nothing to draw")
    shown = []
    for row in sorted(kept, key=lambda row: (row["at"], row["every_order"], row["last"])):
        error = row["standard_error"] if isfinite(row["standard_error"]) else 0.0
        gain = row["gain"] if row["gain"] is not None and isfinite(row["gain"]) else None
        values = {name: row[name] for name in ("last", "every_order", "at", "loss")}
        values |= {"low": row["loss"] - _NORMAL_95 * error, "high": row["loss"] + _NORMAL_95 * error}
        every = "all" if row["every"] == "-" else printable(row["every"])
        shown.append({**values, "scheme": printable(row["scheme"]), "every": every, "gain": gain})
    return shown


def _heat_maps(
    alt: Any,
    rows: Sequence[Mapping[str, Any]],
    schemes: Sequence[str],
    gains: bool,
    drawn: Drawn,
    *,
    named: bool,
) -> Any:
    """A map for each scheme, of merges that end at one step, which the titles say where `named`."""
    losses = [row["loss"] for row in rows]
    low, high = min(losses), max(losses)
    worst = low if drawn.higher_is_better else high
    # a domain without a width would paint equal losses as the worst
    margin = 0.0 if high > low else 1e-4
    shades = [_WORST, _BEST] if drawn.higher_is_better else [_BEST, _WORST]
    colour = alt.Color(
        "loss:Q",
        title=drawn.name.lower(),
        scale=alt.Scale(domain=[low - margin, high + margin], range=shades, zero=False, nice=False),
        legend=alt.Legend(format=".4f", tickCount=4, gradientLength=100) if high > low else None,
    )
    cells = [
        {
            **row,
            "text": f"{row['gain']:+.4f}" if gains else f"{row['loss']:.4f}",
            "dark": high > low and abs(row["loss"] - worst) / (high - low) > 0.8,
        }
        for row in rows
    ]
    step = f", step {rows[0]['at']}" if named else ""
    lasts, everys = _distinct(rows, "last"), _distinct(rows, "every")
    panels = [
        _heat_map(
            alt, [cell for cell in cells if cell["scheme"] == scheme], lasts, everys, colour
        ).properties(title=_panel_title(alt, scheme + step))
        for scheme in schemes
        if any(cell["scheme"] == scheme for cell in cells)
    ]
    return alt.concat(*panels, columns=_columns(len(panels), _CELL_WIDTH * len(lasts)))


def _heat_map(
    alt: Any, cells: Sequence[Mapping[str, Any]], lasts: Sequence[int], everys: Sequence[str], colour: Any
) -> Any:
    # the same cells in each map, also those that a scheme has no merge for
    x = alt.X("last:O", title="checkpoints (N)", scale=alt.Scale(domain=lasts), axis=alt.Axis(labelAngle=0))
    y = alt.Y("every:N", title="apart (V)", scale=alt.Scale(domain=everys), axis=alt.Axis(labelLimit=160))
    base = alt.Chart(
        alt.Data(values=cells),
        width=max(_PANEL_WIDTH, _CELL_WIDTH * len(lasts)),
        height=_CELL_HEIGHT * len(everys),
    ).encode(x=x, y=y, tooltip=_tooltip(alt))
    ink = alt.condition("datum.dark", alt.value("#ffffff"), alt.value("#1d2530"))
    text = base.mark_text(fontSize=11).encode(text="text:N", color=ink)
    return base.mark_rect(stroke="white", strokeWidth=2).encode(color=colour) + text


def _curves(
    alt: Any, rows: Sequence[Mapping[str, Any]], schemes: Sequence[str], drawn: Drawn, *, named: bool
) -> Any:
    """A panel for each V, of merges that end at one step, which the titles say where `named`."""
    step = f", step {rows[0]['at']}" if named else ""
    lasts, everys = _distinct(rows, "last"), _distinct(rows, "every")
    width = max(220, 75 * len(lasts))
    panels = [
        _curve(alt, [row for row in rows if row["every"] == every], lasts, schemes, drawn).properties(
            width=width, height=240, title=_panel_title(alt, _apart(every) + step)
        )
        for every in everys
    ]
    return alt.concat(*panels, columns=_columns(len(panels), width)).resolve_scale(y="shared")


def _curve(
    alt: Any, rows: Sequence[Mapping[str, Any]], lasts: Sequence[int], schemes: Sequence[str], drawn: Drawn
) -> Any:
    domain = list(schemes)
    legend = alt.Legend(orient="top", labelLimit=300, columns=4, symbolOpacity=1)
    colour = alt.Color(
        "scheme:N", title=None, scale=alt.Scale(domain=domain, range=_SCHEME_COLOURS), legend=legend
    )
    shape = alt.Shape(
        "scheme:N", title=None, scale=alt.Scale(domain=domain, range=_SCHEME_SHAPES), legend=legend
    )
    base = alt.Chart(alt.Data(values=rows)).encode(
        x=alt.X(
            "last:O", title="checkpoints (N)", scale=alt.Scale(domain=lasts), axis=alt.Axis(labelAngle=0)
        ),
        # beside one another, or the bars of schemes that are about as good would hide each other
        xOffset=alt.XOffset("scheme:N", sort=domain, scale=alt.Scale(domain=domain, paddingOuter=1)),
        color=colour,
        tooltip=_tooltip(alt),
    )
    title, scale = f"{drawn.name.lower()} ({drawn.unit})", alt.Scale(zero=False)
    bars = base.mark_rule(strokeWidth=1.5, opacity=0.55).encode(
        y=alt.Y("low:Q", title=title, scale=scale), y2="high:Q"
    )
    y = alt.Y("loss:Q", title=title, scale=scale)
    lines = base.mark_line(strokeWidth=1.5).encode(y=y)
    return bars + lines + base.mark_point(filled=True, size=55, opacity=1).encode(y=y, shape=shape)


def _columns(panels: int, panel_width: int) -> int:
    """As many as fit on a page, but no more than fill all rows about equally."""
    fit = max(1, _WIDTH // (panel_width + 60))
    return ceil(panels / ceil(panels / fit))


def _panel_title(alt: Any, text: str) -> Any:
    return alt.TitleParams(text, anchor="middle", fontSize=12, limit=220)


def _tooltip(alt: Any) -> list[Any]:
    names = [alt.Tooltip("scheme:N"), alt.Tooltip("last:Q", title="N"), alt.Tooltip("every:N", title="V")]
    return [*names, alt.Tooltip("loss:Q", format=".4f"), alt.Tooltip("gain:Q", format="+.4f")]


def _distinct(rows: Sequence[Mapping[str, Any]], name: str) -> list[Any]:
    order = "every_order" if name == "every" else name
    return list(dict.fromkeys(row[name] for row in sorted(rows, key=lambda row: row[order])))


def _apart(every: str) -> str:
    return "all checkpoints" if every == "all" else f"{every} apart"


def _counted(count: int, noun: str) -> str:
    return f"{count} {noun}" + ("" if count == 1 else "s")
