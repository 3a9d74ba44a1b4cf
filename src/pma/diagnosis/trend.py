"""What the log says of the loss around a window: its smooth fall, the gradient's length, the rate's share of
its peak, and steps in the loss that the rate does not explain.
"""

# E entries of the log

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from pma.logs import TrainingCurves

Floats = NDArray[np.float64]

_FEWEST = 5  # entries to fit a trend through
_ENOUGH = 8  # entries wanted, even where the window has fewer
_RECENT = 8  # entries whose median gradient counts
_REWEIGHTINGS = 5
_HUBER = 2.0  # residuals beyond so many scales count less
_MAD_TO_SIGMA = 1.4826
_SHIFT_SIGMAS, _SHIFT_NATS, _SHIFT_ENTRIES = 8.0, 0.03, 6


@dataclass(frozen=True, kw_only=True)
class Trend:
    """Loss as a parabola in the logarithm of the step, from `first_step` to `last_step`; `scatter`: of logged
    losses around it.
    """

    coefficients: tuple[float, ...]
    first_step: float
    last_step: float
    scatter: float

    def at(self, steps: ArrayLike) -> Floats:
        """The loss at steps of that range; outside, that at its nearer end."""
        inside = np.clip(np.asarray(steps, np.float64), self.first_step, self.last_step)
        return np.asarray(np.polyval(self.coefficients, np.log(inside)), np.float64)


def trend(
    curves: TrainingCurves, first_step: float, last_step: float, phase_start: float = 0
) -> Trend | None:
    """The fall of the logged loss over a window, or over half the run if that is more, in one phase of the
    schedule.

    A logged value is taken for the mean since the entry before. None where fewer than five entries are left.
    """
    steps_E, loss_E = curves.series("loss")
    good = np.isfinite(loss_E) & (steps_E <= last_step) & (steps_E > 0)
    steps_E, loss_E = steps_E[good].astype(np.float64), loss_E[good]
    if len(steps_E) < _FEWEST:
        return None
    middle_E = steps_E - np.diff(steps_E, prepend=0.0) / 2
    in_window = 1 + int((middle_E >= min(first_step, last_step / 2)).sum())
    in_phase = int((middle_E >= phase_start).sum())
    start = len(steps_E) - min(max(in_window, _ENOUGH), max(in_phase, _FEWEST), len(steps_E))
    x_E, y_E = np.log(np.maximum(middle_E[start:], 0.5)), loss_E[start:]
    degree = 2 if len(x_E) >= _ENOUGH else 1
    weight_E = np.ones(len(x_E))
    for _ in range(_REWEIGHTINGS):
        coefficients = np.polyfit(x_E, y_E, degree, w=np.sqrt(weight_E))
        residual_E = np.abs(y_E - np.polyval(coefficients, x_E))
        scale = max(_MAD_TO_SIGMA * float(np.median(residual_E)), 1e-9)
        weight_E = 1 / np.maximum(residual_E / (_HUBER * scale), 1)
    return Trend(
        coefficients=tuple(coefficients.tolist()),
        first_step=float(min(middle_E[start], last_step)),
        last_step=last_step,
        scatter=scale,
    )


def gradient_norm(curves: TrainingCurves, last_step: float) -> float | None:
    """The median of the newest gradient norms up to a step; None where none is logged."""
    steps_E, norm_E = curves.series("grad_norm")
    found = norm_E[(steps_E <= last_step) & np.isfinite(norm_E) & (norm_E > 0)][-_RECENT:]
    return float(np.median(found)) if len(found) else None


def share_of_peak(curves: TrainingCurves, last_step: float) -> float:
    """The learning rate at a step as a share of the highest before; 1 where it is not logged."""
    steps_E, rate_E = curves.series("learning_rate")
    found = rate_E[(steps_E <= last_step) & np.isfinite(rate_E)]
    return float(found[-1] / found.max()) if len(found) and found.max() > 0 else 1.0


@dataclass(frozen=True, kw_only=True)
class Shift:
    """A step in the loss between two logged steps, of so many nats, beyond its trend."""

    before_step: int
    after_step: int
    nats: float


def shift(curves: TrainingCurves, first_step: float, last_step: float) -> Shift | None:
    """The largest step in the loss inside a window, if it is far beyond the scatter of both its sides: other
    data, perhaps, where no rate changes with it. It is down or up; breakaways are up alone.
    """
    steps_E, loss_E = curves.series("loss")
    inside = (steps_E >= first_step) & (steps_E <= last_step) & np.isfinite(loss_E)
    steps_E, loss_E = steps_E[inside], loss_E[inside]
    count = len(steps_E)
    if count < 2 * _SHIFT_ENTRIES:
        return None
    best: tuple[float, int, float] | None = None
    line_E = steps_E / (steps_E[-1] - steps_E[0])
    for cut in range(_SHIFT_ENTRIES, count - _SHIFT_ENTRIES + 1):
        after_E = (np.arange(count) >= cut).astype(np.float64)
        columns = np.column_stack((np.ones(count), line_E, after_E))
        solution, *_ = np.linalg.lstsq(columns, loss_E, rcond=None)
        rest_E = loss_E - columns @ solution
        sigma = max(float(np.sqrt(rest_E @ rest_E / (count - 3))), 1e-9)
        error = sigma * float(np.sqrt(np.linalg.inv(columns.T @ columns)[2, 2]))
        size = abs(float(solution[2])) / error
        if best is None or size > best[0]:
            best = (size, cut, float(solution[2]))
    assert best is not None
    size, cut, nats = best
    if size < _SHIFT_SIGMAS or abs(nats) < _SHIFT_NATS:
        return None
    return Shift(before_step=int(steps_E[cut - 1]), after_step=int(steps_E[cut]), nats=nats)
