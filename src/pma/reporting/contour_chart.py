"""Contours of a loss on a plane: bands of colour, from the losses on a coarse grid."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

Values = NDArray[np.float64]
_LEVELS = 12


def contour_ground(
    alt: Any,
    x: ArrayLike,
    y: ArrayLike,
    loss: ArrayLike,
    *,
    titles: Sequence[str],
    cells: int = 60,
    tooltip: bool = False,
) -> Any:
    """Bands of equal loss. `loss`: a row for each y. `titles`: of both axes. `cells`: drawn a side."""
    fine_x, fine_y, fine = _finer(np.asarray(x), np.asarray(y), np.asarray(loss), cells)
    # a little over half, or gaps shine through
    dx, dy = ((each[1] - each[0]) * 0.55 for each in (fine_x, fine_y))
    drawn = [
        f"{a - dx:.6g},{a + dx:.6g},{b - dy:.6g},{b + dy:.6g},{fine[j, i]:.6g}"
        for j, b in enumerate(fine_y)
        for i, a in enumerate(fine_x)
    ]
    # as text, since Altair checks every one of thousands of values
    table = alt.InlineData(values="\n".join(["x,x2,y,y2,loss", *drawn]), format=alt.CsvDataFormat(type="csv"))
    # levels crowd at the bottom, where the models are
    levels = np.quantile(fine, np.linspace(0, 1, _LEVELS + 1))[1:-1]
    colour = alt.Color(
        "loss:Q",
        title="loss",
        scale=alt.Scale(type="threshold", domain=[float(f"{v:.5g}") for v in levels], range=_shades(_LEVELS)),
        legend=alt.Legend(format=".3f", labelFontSize=9),
    )
    ground = (
        alt.Chart(table)
        .mark_rect()
        .encode(
            x=alt.X("x:Q", title=titles[0], scale=alt.Scale(nice=False, zero=False)),
            x2="x2:Q",
            y=alt.Y("y:Q", title=titles[1], scale=alt.Scale(nice=False, zero=False)),
            y2="y2:Q",
            color=colour,
        )
    )
    return ground.encode(tooltip=[alt.Tooltip("loss:Q", format=".4f")]) if tooltip else ground


def _shades(count: int) -> list[str]:
    """From pale, the lowest loss, to dark."""
    pale, dark = np.array([247, 251, 255]), np.array([33, 84, 138])
    mixed = [pale + (dark - pale) * share for share in np.linspace(0, 1, count)]
    return ["#" + "".join(f"{round(part):02x}" for part in each) for each in mixed]


def _finer(x: Values, y: Values, loss: Values, cells: int) -> tuple[Values, Values, Values]:
    """The losses between the grid's points, by a spline through them, so that bands look like contours. Where
    scipy is not installed or points are few, the grid's own.
    """
    try:
        from scipy.interpolate import RectBivariateSpline
    except ImportError:
        return x, y, loss
    if min(len(x), len(y)) <= 3:
        return x, y, loss
    fine_x, fine_y = (np.linspace(each[0], each[-1], cells) for each in (x, y))
    return fine_x, fine_y, np.asarray(RectBivariateSpline(y, x, loss)(fine_y, fine_x))
