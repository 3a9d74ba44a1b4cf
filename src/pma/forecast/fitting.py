"""A law fitted to curves: Huber loss on the logarithm of the loss, several seeded starts, weak priors.

A curve or three leave directions in which a law's parameters can go far at no cost, and forecasts of longer
decays go with them. Priors as wide as a factor of two around what such exponents are anywhere (a half) decide
where data do not, at the weight that their own effective number of independent rows gives them. They are in
units of the curves (highest rate, longest sum of rates), so they say the same at any scale.
"""

# R rows of all curves, P parameters; theta_P: the parameters as they are searched, mostly logarithms

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pma.errors import InputError, MissingExtra
from pma.forecast.coordinates import Coordinates, coordinates_of
from pma.forecast.curves import Curve, counted_once
from pma.forecast.gaps import Gaps
from pma.forecast.laws import Law

# of the Huber loss, on the logarithm of the loss: both laws' authors use it
HUBER_DELTA = 1e-3
STARTS = 6
_MOST_EVALUATIONS = 300
# a law outside its range may give no positive loss; its logarithm is taken of this
_LEAST_LOSS = 1e-3
# the share of a curve's rows that is one block: noise and misfit of neighbouring rows go together
_BLOCK_SHARE = 0.1
_SHORTEST_BLOCK = 4
# a rate this far below the peak, for so many rows, shows what annealing does
LEAST_FALL = 0.1
_FEWEST_FALLEN_ROWS = 5

Floats = NDArray[np.float64]


@dataclass(frozen=True, kw_only=True)
class Fit:
    """A law with the parameters that fit `curves` best. `residuals`: log loss minus log law, by curve, at the
    rows that count; `starts`: how many of how many starts ended there.
    """

    law: Law
    curves: tuple[Curve, ...]
    coordinates: Coordinates
    theta_P: Floats
    cost: float
    residuals: tuple[Floats, ...]
    prior_weight: float
    starts: tuple[int, int]

    @property
    def parameters(self) -> dict[str, float]:
        """The law's parameters by name, in the units of the curves' own rates."""
        values_P, _ = self.coordinates.values(self.theta_P)
        return dict(zip(self.law.parameters, values_P.tolist(), strict=True))


@dataclass(frozen=True, kw_only=True)
class Problem:
    """What is fitted: the rows that count of each curve, and the prior."""

    law: Law
    coordinates: Coordinates
    gaps: tuple[Gaps, ...]
    log_loss_R: Floats
    rows: tuple[int, ...]

    def evaluated(self, theta_P: Floats) -> tuple[Floats, Floats]:
        """Log loss minus log law at all rows, and its derivatives by theta."""
        values_P, chain_PP = self.coordinates.values(theta_P)
        parts = [self.law.evaluate(values_P, gaps) for gaps in self.gaps]
        loss_R = np.maximum(np.concatenate([part[0] for part in parts]), _LEAST_LOSS)
        jacobian_RP = np.concatenate([part[1] for part in parts]) @ chain_PP
        return self.log_loss_R - np.log(loss_R), -jacobian_RP / loss_R[:, None]

    def residuals(self, theta_P: Floats) -> Floats:
        """Log loss minus log law at all rows."""
        return self.evaluated(theta_P)[0]


def fit(law: Law, curves: Sequence[Curve], *, seed: int = 0, starts: int = STARTS) -> Fit:
    """`law` fitted to `curves` together. The same seed gives the same fit.

    Raises InputError where no curve leaves its highest rate: the annealing term is not in them.
    """
    require_annealing(curves)
    problem = problem_of(law, curves)
    drawn = problem.coordinates.starts(np.random.default_rng(seed), starts)
    free = [minimise(problem, start_P, 0.0, problem.coordinates.centre_P) for start_P in drawn[:1]]
    weight = long_run_variance(split(problem, problem.residuals(free[0].x)))
    found = [
        minimise(problem, start_P, weight, problem.coordinates.centre_P) for start_P in (free[0].x, *drawn)
    ]
    best = min(found, key=lambda each: float(each.cost))
    same = sum(bool(each.cost <= best.cost * 1.001) for each in found)
    return Fit(
        law=law,
        curves=tuple(curves),
        coordinates=problem.coordinates,
        theta_P=best.x,
        cost=float(best.cost),
        residuals=tuple(split(problem, problem.residuals(best.x))),
        prior_weight=weight,
        starts=(same, len(found)),
    )


def problem_of(law: Law, curves: Sequence[Curve], coordinates: Coordinates | None = None) -> Problem:
    """What fitting `law` to `curves` means; `coordinates` of another fit keep its units and bounds."""
    counted = [curve for curve in counted_once(curves) if len(curve.steps_R)]
    return Problem(
        law=law,
        coordinates=coordinates or coordinates_of(law, curves),
        gaps=tuple(curve.gaps for curve in counted),
        log_loss_R=np.log(np.concatenate([curve.loss_R for curve in counted])),
        rows=tuple(len(curve.steps_R) for curve in counted),
    )


def minimise(
    problem: Problem, start_P: Floats, prior_weight: float, centre_P: Floats, *, tolerance: float = 1e-8
) -> Any:
    """The best theta from `start_P` on, with priors around `centre_P`; scipy's result."""
    optimize = require_scipy()
    coordinates = problem.coordinates
    held_P = np.isfinite(coordinates.spread_P)
    prior = np.diag(np.sqrt(prior_weight) / coordinates.spread_P)[held_P]
    count = len(problem.log_loss_R)

    # scipy asks for residuals and derivatives one after the other, and one sum gives both
    @functools.lru_cache(maxsize=2)
    def evaluated(theta: bytes) -> tuple[Floats, Floats]:
        theta_P = np.frombuffer(theta)
        residual_R, jacobian_RP = problem.evaluated(theta_P)
        both = np.append(residual_R, prior @ (theta_P - centre_P))
        return both, np.vstack((jacobian_RP, prior))

    def huber(z: Floats) -> Floats:
        # the rows' by Huber's rule, the prior's squares as they are; first and second derivative below
        far = z > 1
        far[count:] = False
        root = np.sqrt(np.where(far, z, 1.0))
        return np.array(
            [np.where(far, 2 * root - 1, z), np.where(far, 1 / root, 1.0), np.where(far, -0.5 / root**3, 0.0)]
        )

    low_P, high_P = coordinates.bounds
    return optimize.least_squares(
        lambda theta_P: evaluated(theta_P.tobytes())[0],
        np.clip(start_P, low_P, high_P),
        jac=lambda theta_P: evaluated(theta_P.tobytes())[1],
        bounds=(low_P, high_P),
        loss=huber,
        f_scale=HUBER_DELTA,
        x_scale="jac",
        ftol=tolerance,
        xtol=tolerance,
        max_nfev=_MOST_EVALUATIONS,
    )


def split(problem: Problem, values_R: Floats) -> list[Floats]:
    """Values of all rows by curve."""
    return np.split(values_R, np.cumsum(problem.rows)[:-1])


def block_rows(rows: int) -> int:
    """How many neighbouring rows of a curve go together."""
    return min(rows, max(_SHORTEST_BLOCK, round(_BLOCK_SHARE * rows)))


def long_run_variance(residuals: Sequence[Floats]) -> float:
    """The variance that one independent row would have: that of a block's mean, times the block's rows.

    Residuals beyond five times the Huber δ are cut: the fit does not follow them either.
    """
    squares, blocks = 0.0, 0
    for each in residuals:
        length = block_rows(len(each))
        cut = np.clip(each, -5 * HUBER_DELTA, 5 * HUBER_DELTA)
        means = [cut[i : i + length].mean() for i in range(0, len(cut) - length + 1, length)]
        squares += length * float(np.square(means).sum())
        blocks += len(means)
    return max(squares / max(blocks, 1), 1e-12)


def require_annealing(curves: Sequence[Curve]) -> None:
    """Raise InputError unless some curve shows losses at rates well below its peak."""
    for curve in curves:
        rate_R = curve.schedule.rates_T[curve.steps_R]
        peaked_R = curve.steps_R >= curve.schedule.warm_step
        fallen_R = peaked_R & (rate_R <= (1 - LEAST_FALL) * curve.schedule.peak_rate)
        if fallen_R.sum() >= _FEWEST_FALLEN_ROWS:
            return
    raise InputError(
        "the learning rate never falls in these curves, so they do not say what annealing gives: at a "
        "constant rate any size of the annealing term fits. Expected at least "
        f"{_FEWEST_FALLEN_ROWS} losses at rates below {100 * (1 - LEAST_FALL):.0f}% of the peak in one of "
        "them. Add the curve of a run that was annealed, of a drop of the rate, or of a short decay from a "
        "late checkpoint (5% of its steps is enough to begin with)"
    )


def require_scipy() -> Any:
    """scipy.optimize. Raises MissingExtra where it is not installed."""
    try:
        from scipy import optimize
    except ImportError:
        raise MissingExtra("a forecast", "forecast", "scipy") from None
    return optimize
