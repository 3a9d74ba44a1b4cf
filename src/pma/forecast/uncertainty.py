"""How far a fitted law may be off: what its parameters leave open, and what the law itself misses.

Parameters: a bootstrap. Residuals are drawn in blocks of neighbouring steps, because neighbours go together:
they share the data's order and the law's misfit, and single residuals would make intervals too narrow by the
square root of a block's length. Each draw has priors with centres drawn from the priors, so that directions
in which only the prior decides are as wide as the prior.

The law: each curve is left out once and its end forecast from the others; of a single curve, its last
quarter.
"""

# B draws, P parameters

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from pma.errors import InputError
from pma.forecast.curves import Curve, counted_once
from pma.forecast.fitting import (
    Fit,
    block_rows,
    long_run_variance,
    minimise,
    problem_of,
    require_annealing,
)

DRAWS = 60
# the end of a curve: the mean over the last of its rows, as single losses are noisy
END_SHARE = 0.05
_TAIL_SHARE = 0.25
# a curve is left out only where the others keep as many rows as this share of all
_LEAST_KEPT = 0.3
_FEWEST_END_ROWS = 3

Floats = NDArray[np.float64]


@dataclass(frozen=True, kw_only=True)
class HeldOut:
    """The forecast of a curve's end that was not fitted: log loss minus log forecast. `whole`: all of the
    curve was left out, and not only its last quarter.
    """

    name: str
    error: float
    whole: bool


def bootstrap(fit: Fit, *, draws: int = DRAWS, seed: int = 0) -> Floats:
    """Parameters, as theta, of `draws` refits to curves with other noise, `theta_BP`."""
    random = np.random.default_rng([seed, 1])
    problem = problem_of(fit.law, fit.curves, fit.coordinates)
    fitted_R = problem.log_loss_R - problem.residuals(fit.theta_P)
    held_P = np.isfinite(fit.coordinates.spread_P)
    drawn = []
    for _ in range(draws):
        noise = np.concatenate([_resampled(each, random) for each in fit.residuals])
        centre_P = fit.coordinates.centre_P.copy()
        centre_P[held_P] += fit.coordinates.spread_P[held_P] * random.standard_normal(held_P.sum())
        again = replace(problem, log_loss_R=fitted_R + noise)
        drawn.append(minimise(again, fit.theta_P, fit.prior_weight, centre_P).x)
    return np.array(drawn)


def held_out(fit: Fit) -> list[HeldOut]:
    """Errors of the law at the ends of curves that were left out, one curve at a time."""
    counted = counted_once(fit.curves)
    rows = sum(len(curve.steps_R) for curve in counted)
    found = []
    for index, own in enumerate(counted):
        others = [curve for i, curve in enumerate(fit.curves) if i != index]
        if len(own.steps_R) < _FEWEST_END_ROWS or rows - len(own.steps_R) < _LEAST_KEPT * rows:
            continue
        error = _error_without(fit, others, fit.curves[index])
        if error is not None:
            found.append(HeldOut(name=own.name, error=error, whole=True))
    if not found:
        found = [held for curve in fit.curves if (held := _without_tail(fit, curve)) is not None]
    return found


def misfit(fit: Fit) -> float:
    """The spread of a block's mean residual: what the law misses of the curves that it was fitted to."""
    shortest = min(block_rows(len(each)) for each in fit.residuals if len(each))
    return float(np.sqrt(long_run_variance(fit.residuals) / shortest))


def _without_tail(fit: Fit, curve: Curve) -> HeldOut | None:
    kept_R = np.arange(len(curve.steps_R)) < (1 - _TAIL_SHARE) * len(curve.steps_R)
    others = [curve.at(kept_R) if each is curve else each for each in fit.curves]
    error = _error_without(fit, others, curve)
    return HeldOut(name=curve.name, error=error, whole=False) if error is not None else None


def _error_without(fit: Fit, others: Sequence[Curve], curve: Curve) -> float | None:
    """The error at the end of `curve` of the law fitted to `others`; None where they do not determine it."""
    try:
        require_annealing(others)
    except InputError:
        return None
    problem = problem_of(fit.law, others, fit.coordinates)
    found = minimise(problem, fit.theta_P, fit.prior_weight, fit.coordinates.centre_P)
    values_P, _ = fit.coordinates.values(found.x)
    ends = max(_FEWEST_END_ROWS, round(END_SHARE * len(curve.steps_R)))
    predicted_R = fit.law.evaluate(values_P, curve.gaps)[0][-ends:]
    return float(np.mean(np.log(curve.loss_R[-ends:]) - np.log(predicted_R)))


def _resampled(residuals: Floats, random: np.random.Generator) -> Floats:
    """As many residuals, of blocks that begin anywhere in the curve, around its end as if it were a ring."""
    rows = len(residuals)
    length = block_rows(rows)
    starts = random.integers(0, rows, size=-(-rows // length))
    at = (starts[:, None] + np.arange(length)) % rows
    drawn: Floats = residuals[at.ravel()[:rows]]
    return drawn
