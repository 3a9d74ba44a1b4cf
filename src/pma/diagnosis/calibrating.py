"""The constants of the prediction, fitted to windows of many runs whose gains were measured."""

# W windows, C constants

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from pma.diagnosis.evidence import Evidence
from pma.diagnosis.prediction import Constants, noise_and_cost
from pma.errors import MissingExtra

Floats = NDArray[np.float64]

FITTED = ("scale", "power", "rate_power", "spread_steps", "drift", "bend", "settled")
# errors of gains in nats, and as a share of what the loss fell
_EXPECTED, _EXPECTED_OF_FALL = 0.02, 0.15
# where the search begins, with the gradient's length known and without
_START = {
    True: Constants(
        scale=-1.8,
        power=0.6,
        rate_power=0.6,
        spread_steps=7,
        drift=1,
        bend=0.5,
        settled=0.2,
        error=0.02,
        error_of_cost=0.15,
    ),
    False: Constants(
        scale=0.2,
        power=0.4,
        rate_power=0.6,
        spread_steps=10,
        drift=1,
        bend=0.5,
        settled=0.2,
        error=0.02,
        error_of_cost=0.15,
    ),
}
# what is held near where the search begins, by so much, for runs that leave it open: constant rates know
# nothing of the rate's power
_HELD = {"rate_power": 0.2, "spread_steps": 10.0, "drift": 0.5, "bend": 0.5, "settled": 0.2}


def fitted(windows_W: Sequence[Evidence], gain_W: Sequence[float], *, gradient: bool) -> Constants:
    """Robust least squares; errors count in units of the expected ones. `gradient`: use its length, or
    leave it aside.
    """
    try:
        from scipy.optimize import least_squares
    except ImportError:
        raise MissingExtra("calibrating a diagnosis", "forecast", "scipy") from None
    start = _START[gradient]
    known = [found if gradient else replace(found, gradient=None) for found in windows_W]
    gains = np.asarray(gain_W, np.float64)

    expected_W = np.hypot(_EXPECTED, _EXPECTED_OF_FALL * np.array([found.fall for found in known]))

    def constants(values_C: Floats) -> Constants:
        return replace(start, **dict(zip(FITTED, values_C.tolist(), strict=True)))

    def residuals(values_C: Floats) -> Floats:
        tried = constants(values_C)
        noise_W, cost_W = noise_and_cost(known, tried)
        misses_W = (noise_W - cost_W - gains) / expected_W
        held = [(getattr(tried, name) - getattr(start, name)) / by for name, by in _HELD.items()]
        return np.append(misses_W, held)

    start_C = np.array([getattr(start, name) for name in FITTED])
    found = least_squares(residuals, start_C, loss="soft_l1", x_scale=np.maximum(np.abs(start_C), 0.5))
    return _with_errors(constants(found.x), known, gains)


def _with_errors(constants: Constants, known: Sequence[Evidence], gains: Floats) -> Constants:
    """The standard error of a gain where drift costs little, and the share of the cost that explains the
    rest.
    """
    noise_W, cost_W = noise_and_cost(known, constants)
    miss_W = noise_W - cost_W - gains
    cheap_W = np.abs(cost_W) <= np.median(np.abs(cost_W))
    error = float(np.sqrt(np.mean(miss_W[cheap_W] ** 2)))
    dear_W = ~cheap_W
    more = np.mean(miss_W[dear_W] ** 2) - error**2 if dear_W.any() else 0.0
    share = float(np.sqrt(max(more, 0.0) / np.mean(cost_W[dear_W] ** 2))) if more > 0 else 0.0
    return replace(constants, error=error, error_of_cost=share)
