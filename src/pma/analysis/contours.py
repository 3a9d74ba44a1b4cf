"""The loss on the plane through last, the merge and a third point, as plain values for a chart."""

# P parameters, K checkpoints, G batches of text

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import count

import numpy as np
from numpy.typing import ArrayLike, NDArray

from pma.analysis import planes
from pma.analysis.curvature import Surface
from pma.analysis.deviations import principal_mixtures
from pma.errors import InputError

Values = NDArray[np.float64]
_MARGIN = 0.5


@dataclass(frozen=True, kw_only=True)
class Mark:
    """A checkpoint's projection onto the plane, and how far it is from the plane itself."""

    step: int | None
    x: float
    y: float
    distance: float


@dataclass(frozen=True, kw_only=True)
class Contours:
    """`loss` at every `y` (rows) and `x`: distances from the merge, x towards last. `third`: what else the
    plane goes through, in words. `lowest`: the minimum if it is on the plane's part that was drawn.
    """

    tokens: int
    x: tuple[float, ...]
    y: tuple[float, ...]
    loss: tuple[tuple[float, ...], ...]
    checkpoints: tuple[Mark, ...]
    third: str
    lowest: tuple[float, float] | None


def contours(
    surface: Surface,
    merge_P: ArrayLike,
    points_KP: ArrayLike,
    *,
    steps: Sequence[int | None],
    best: int,
    points_a_side: int,
    advance: Callable[[int], None] = lambda done: None,
) -> Contours:
    """The plane through the merge, last and the `best` checkpoint; where that is last, along the first
    principal direction of the checkpoints. `advance` hears how many points are done.

    Raises InputError where these lie on a line.
    """
    merge, points = np.asarray(merge_P), np.asarray(points_KP)
    if len(points) < 3:  # to be told apart from what rounding of the merge adds
        raise InputError("two checkpoints and their merge lie on a line: no plane")
    if best != len(points) - 1:
        third, words = points[best], f"the checkpoint of lowest loss, step {steps[best]}"
    else:
        _, mixtures_JK = principal_mixtures(points - merge)
        third = merge + mixtures_JK[0] @ (points - merge)
        words = "the first principal direction of the checkpoints; last is the one of lowest loss"
    try:
        plane = planes.through(np.array([merge, points[-1], third]))
    except InputError as error:
        raise InputError("last, the merge and the other checkpoints lie on a line: no plane") from error
    plane = replace(plane, origin_P=merge)
    at_K2, away_K = plane.coordinates(points), plane.distances(points)
    shown = np.vstack([at_K2, [[0, 0]]])
    reach = max(np.ptp(shown[:, 0]), np.ptp(shown[:, 1]))  # square: both axes are distances
    axes = [planes.axis(_around(shown[:, i], reach), points=points_a_side, margin=_MARGIN) for i in (0, 1)]

    numbers = count(1)

    def losses(theta_P: Values) -> Values:
        found = surface.losses(theta_P)
        advance(next(numbers))
        return found

    grid = planes.grid(losses, plane, *axes)
    loss_YX = np.tensordot(surface.share_B, grid.losses_GYX, 1)
    if not np.isfinite(loss_YX).all():
        raise InputError("the loss is not finite everywhere on the plane")
    return Contours(
        tokens=surface.tokens,
        x=_short(grid.x_X),
        y=_short(grid.y_Y),
        loss=tuple(_short(row) for row in loss_YX),
        checkpoints=tuple(
            Mark(step=step, x=float(x), y=float(y), distance=float(away))
            for step, (x, y), away in zip(steps, at_K2, away_K, strict=True)
        ),
        third=words,
        lowest=planes.minimum(grid.x_X, grid.y_Y, loss_YX),
    )


def _around(coordinates: Values, reach: float) -> list[float]:
    middle = float(coordinates.min() + coordinates.max()) / 2
    return [middle - reach / 2, middle + reach / 2]


def _short(values: Values) -> tuple[float, ...]:
    return tuple(float(f"{value:.7g}") for value in values)
