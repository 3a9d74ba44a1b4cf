"""What weights and log tell of any window that ends with the newest of the checkpoints read."""

# M checkpoints that were read, N of a window

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, cached_property

import numpy as np
from numpy.typing import ArrayLike, NDArray

from pma.diagnosis.trend import Trend, gradient_norm, share_of_peak, trend
from pma.diagnosis.walk import squared_distances
from pma.logs import TrainingCurves

Floats = NDArray[np.float64]

_RECENT_UPDATES = 9
# what two updates' squared length is of one's, where it is not known: between noise and drift
_BETWEEN = 3.0
# twice the share of an update that is noise at least: none at all has no logarithm
_LEAST_SHARE = 1e-3


@dataclass(frozen=True, kw_only=True)
class Evidence:
    """What is known of a window without evaluating: `count` checkpoints; the length `noisy_step` that noise
    adds to the weights in a step, of weights of length `weights`; `spread`, the variance of the members
    around their mean; `gradient`, the length logged, and `rate_share`, the rate's share of its peak; `fall`,
    the loss at the members' mean step over that at the newest, and `bend`, their mean loss over that.
    """

    count: int
    noisy_step: float
    weights: float
    spread: float
    gradient: float | None
    rate_share: float
    fall: float
    bend: float


@dataclass(frozen=True, kw_only=True, eq=False)
class Basis:
    """Checkpoints of one phase at `steps_M`, inner products of their deviations from any one point, the
    length of the newest's `weights`, the log, and the step at which the phase begins.
    """

    steps_M: Sequence[float]
    deviations_MM: Floats
    weights: float
    curves: TrainingCurves
    phase_start: float = 0.0

    @property
    def last_step(self) -> float:
        """Of the newest checkpoint."""
        return self.steps_M[-1]

    @cached_property
    def gradient(self) -> float | None:
        """The gradient's length now, where it is logged."""
        return gradient_norm(self.curves, self.last_step)

    @cached_property
    def rate_share(self) -> float:
        """Of its peak."""
        return share_of_peak(self.curves, self.last_step)

    @cached_property
    def noisy_step(self) -> float:
        """The length that noise adds to the weights in a step, from the newest updates."""
        return noisy_step(self.steps_M, self.deviations_MM)

    @cached_property
    def trend(self) -> Callable[[float], Trend | None]:
        """The fall of the loss that goes with a window from that step on; None where the log is too short."""
        return cache(lambda first_step: trend(self.curves, first_step, self.last_step, self.phase_start))

    def window(self, chosen_N: Sequence[int]) -> Evidence | None:
        """Of the checkpoints of these numbers, the newest last; None without a trend."""
        steps = np.asarray(self.steps_M, np.float64)[list(chosen_N)]
        fall = self.trend(float(steps[0]))
        if fall is None:
            return None
        at_mean = float(fall.at(steps.mean()))
        inside_NN = self.deviations_MM[np.ix_(chosen_N, chosen_N)]
        return Evidence(
            count=len(steps),
            noisy_step=self.noisy_step,
            weights=self.weights,
            # half the mean of all squared distances, those of members from themselves among them
            spread=float(squared_distances(inside_NN).mean()) / 2,
            gradient=self.gradient,
            rate_share=self.rate_share,
            fall=at_mean - float(fall.at(steps[-1])),
            bend=max(float(fall.at(steps).mean()) - at_mean, 0.0),
        )


def noisy_step(steps_M: ArrayLike, deviations_MM: ArrayLike) -> float:
    """The length that noise adds to the weights in a step, from the newest updates.

    A drift alone makes the square of two updates four times that of one; fresh noise twice. What is beyond
    twice is drift's.
    """
    steps = np.asarray(steps_M, np.float64)[-_RECENT_UPDATES - 1 :]
    squared = squared_distances(deviations_MM)[-len(steps) :, -len(steps) :]
    one, two = np.diag(squared, 1), np.diag(squared, 2)
    ratio = float(two.mean() / one.mean()) if len(two) and one.mean() > 0 else _BETWEEN
    return float(np.sqrt(np.mean(one / np.diff(steps)) * np.clip(4 - ratio, _LEAST_SHARE, 2) / 2))
