"""Planes in the space of parameters: through three points, or through the mean along the two directions in
which points vary most.
"""

# P parameters, K points, G batches of text

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from pma.errors import InputError

Values = NDArray[np.float64]


@dataclass(frozen=True, kw_only=True)
class Plane:
    """`origin_P` and two directions of length one at right angles. Coordinates are distances from it."""

    origin_P: Values
    axes_2P: Values

    def coordinates(self, points_KP: ArrayLike) -> Values:
        """Where the points' projections lie, shape (K, 2)."""
        return (np.atleast_2d(np.asarray(points_KP)) - self.origin_P) @ self.axes_2P.T

    def distances(self, points_KP: ArrayLike) -> Values:
        """How far the points are from the plane, shape (K,)."""
        points = np.atleast_2d(np.asarray(points_KP))
        within_KP = self.coordinates(points) @ self.axes_2P
        return np.asarray(np.linalg.norm(points - self.origin_P - within_KP, axis=1))

    def point(self, x: float, y: float) -> Values:
        """The parameters at these coordinates, shape (P,)."""
        return np.asarray(self.origin_P + x * self.axes_2P[0] + y * self.axes_2P[1])


def through(points_3P: ArrayLike) -> Plane:
    """The plane through three points: the origin is their mean, the first axis points from the first to the
    second. Raises InputError where they lie on a line.
    """
    points = np.asarray(points_3P, dtype=np.float64)
    along, other = points[1] - points[0], points[2] - points[0]
    length = np.linalg.norm(along)
    first = along / length if length else along
    rest = other - (other @ first) * first
    height = np.linalg.norm(rest)
    if not length or height <= 1e-9 * np.linalg.norm(other):
        raise InputError("three models lie on a line, expected three that span a plane; choose others")
    return Plane(origin_P=points.mean(axis=0), axes_2P=np.array([first, rest / height]))


def principal(points_KP: ArrayLike) -> tuple[Plane, Values]:
    """The plane through the points' mean along their two principal directions, and the share of their
    variance along every direction, shape (K,). By the Gram matrix of deviations: nothing of P × P is made.
    Signs: the last point has coordinates that are not negative. Raises InputError where the points span no
    plane.
    """
    points = np.asarray(points_KP, dtype=np.float64)
    deviations_KP = points - points.mean(axis=0)
    values, vectors_KK = np.linalg.eigh(deviations_KP @ deviations_KP.T)
    values, vectors_KK = np.maximum(values[::-1], 0), vectors_KK[:, ::-1]
    if len(values) < 2 or values[1] <= 1e-12 * values[0] or not values[0]:
        raise InputError(f"{len(points)} models span no plane; choose three or more that differ")
    signs = np.where(vectors_KK[-1, :2] < 0, -1.0, 1.0)
    axes = (vectors_KK[:, :2] * signs / np.sqrt(values[:2])).T @ deviations_KP
    return Plane(origin_P=points.mean(axis=0), axes_2P=axes), values / values.sum()


@dataclass(frozen=True, kw_only=True)
class Grid:
    """Losses on a plane: `losses_GYX` by batch of text, at `x_X` and `y_Y`."""

    x_X: Values
    y_Y: Values
    losses_GYX: Values


def axis(coordinates: Sequence[float], *, points: int, margin: float = 0.3) -> Values:
    """`points` places over the range of the coordinates, and a share `margin` of it beyond on each side."""
    low, high = min(coordinates), max(coordinates)
    reach = margin * (high - low)
    return np.linspace(low - reach, high + reach, points)


def grid(losses: Callable[[Values], Values], plane: Plane, x_X: Values, y_Y: Values) -> Grid:
    """`losses` (of parameters, by batch of text) at every point of the grid."""
    rows = [[losses(plane.point(float(x), float(y))) for x in x_X] for y in y_Y]
    return Grid(x_X=x_X, y_Y=y_Y, losses_GYX=np.moveaxis(np.array(rows), -1, 0))


def minimum(x_X: Values, y_Y: Values, loss_YX: Values, *, reach: int = 3) -> tuple[float, float] | None:
    """Where the loss is lowest: that of the quadratic form fitted to the grid's points within `reach` cells
    of its lowest one. None where that lies on the grid's edge or the form has no minimum near it: then the
    minimum is outside, or there is none.
    """
    row, column = np.unravel_index(int(loss_YX.argmin()), loss_YX.shape)
    if row in (0, len(y_Y) - 1) or column in (0, len(x_X) - 1):
        return None
    rows = slice(max(0, row - reach), row + reach + 1)
    columns = slice(max(0, column - reach), column + reach + 1)
    y, x = np.meshgrid(y_Y[rows] - y_Y[row], x_X[columns] - x_X[column], indexing="ij")
    x, y = x.ravel() / _step(x_X), y.ravel() / _step(y_Y)
    terms = np.stack([np.ones_like(x), x, y, x * x / 2, x * y, y * y / 2], axis=1)
    (_, gx, gy, xx, xy, yy), *_ = np.linalg.lstsq(terms, loss_YX[rows, columns].ravel(), rcond=None)
    hessian = np.array([[xx, xy], [xy, yy]])
    if np.linalg.eigvalsh(hessian)[0] <= 0:
        return None
    dx, dy = np.linalg.solve(hessian, [-gx, -gy])
    if max(abs(dx), abs(dy)) > reach:
        return None
    return float(x_X[column] + dx * _step(x_X)), float(y_Y[row] + dy * _step(y_Y))


def _step(places: Values) -> float:
    return float(places[1] - places[0])
