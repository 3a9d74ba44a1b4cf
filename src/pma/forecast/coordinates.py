"""The coordinates in which a law's parameters are searched: without units, mostly logarithms, bounded.

Rates are measured by the highest one, sums of rates by the longest, so that starts, bounds and priors say the
same for any model and any optimizer.
"""

# P parameters; theta_P: as they are searched; chain_PP: derivative of the law's parameters by theta

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from pma.forecast.curves import Curve
from pma.forecast.laws import MULTI_POWER, TISSUE, Law

Floats = NDArray[np.float64]

# Of each parameter in units of the curves: bounds, where starts are drawn, and the prior (centre, spread),
# as factors. L0 is in shares of the lowest loss, gamma as it is. Exponents are a half within a factor of two.
_FACTOR = float(np.log(2))
_LOSS_FALL = (1e-3, 20.0, 0.05, 0.5, None)
_EXPONENT = (0.02, 3.0, 0.25, 1.0, 0.5)
_RANGES = {
    "multi-power": {
        "A": _LOSS_FALL,
        "alpha": _EXPONENT,
        "B": (1e-5, 5.0, 0.01, 0.5, None),
        "C": (0.1, 1e8, 10.0, 1e5, None),
        "beta": (0.02, 10.0, 0.25, 1.0, 0.5),
    },
    "tissue": {
        "A": _LOSS_FALL,
        "alpha": _EXPONENT,
        "C": (1e-5, 5.0, 0.01, 0.5, None),
        "lambda": (1.0, 1e6, 30.0, 3000.0, None),
    },
}
_FLOOR_STARTS = (0.5, 0.98)
_GAMMA = (0.0, 2.0, 0.2, 1.0)
_GAMMA_PRIOR = (0.5, 0.25)


@dataclass(frozen=True, kw_only=True)
class Coordinates:
    """How theta becomes the parameters of `law`: `rate` and `total` are the units.

    `centre_P`, `spread_P`: the prior; an infinite spread is none. `start_low_P`, `start_high_P`: where starts
    are drawn.
    """

    law: Law
    rate: float
    total: float
    bounds: tuple[Floats, Floats]
    start_low_P: Floats
    start_high_P: Floats
    centre_P: Floats
    spread_P: Floats

    def starts(self, random: np.random.Generator, count: int) -> Floats:
        """`count` starting points, uniform in theta."""
        return random.uniform(self.start_low_P, self.start_high_P, (count, len(self.centre_P)))

    def values(self, theta_P: Floats) -> tuple[Floats, Floats]:
        """The law's parameters, and their derivatives by theta."""
        named = dict(zip(self.law.parameters, range(len(theta_P)), strict=True))
        values_P, chain_PP = np.exp(theta_P), np.zeros((len(theta_P), len(theta_P)))
        values_P[0], chain_PP[0, 0] = theta_P[0], 1.0
        alpha = values_P[named["alpha"]]
        values_P[named["A"]] *= self.total**alpha
        if self.law is MULTI_POWER:
            at = named["gamma"]
            values_P[at] = theta_P[at]
            values_P[named["B"]] /= self.rate
            values_P[named["C"]] *= self.rate ** values_P[at] / self.total
        else:
            forgotten = np.exp(-theta_P[named["lambda"]])
            values_P[named["lambda"]] = 1 - forgotten
            values_P[named["C"]] *= forgotten / self.rate
        chain_PP[1:, 1:] = np.diag(values_P[1:])
        chain_PP[named["A"], named["alpha"]] = values_P[named["A"]] * np.log(self.total) * alpha
        if self.law is MULTI_POWER:
            chain_PP[at, at] = 1.0
            chain_PP[named["C"], at] = values_P[named["C"]] * np.log(self.rate)
        else:
            chain_PP[named["lambda"], named["lambda"]] = forgotten
            chain_PP[named["C"], named["lambda"]] = -values_P[named["C"]]
        return values_P, chain_PP


def coordinates_of(law: Law, curves: Sequence[Curve]) -> Coordinates:
    """Coordinates in the units of `curves`."""
    lowest = min(float(curve.loss_R.min()) for curve in curves)
    columns = [(0.0, lowest, _FLOOR_STARTS[0] * lowest, _FLOOR_STARTS[1] * lowest, 0.0, np.inf)]
    for low, high, start_low, start_high, centre in _RANGES[law.name].values():
        prior = (0.0, np.inf) if centre is None else (np.log(centre), _FACTOR)
        columns.append((*np.log((low, high, start_low, start_high)), *prior))
    if law is MULTI_POWER:
        columns.append((*_GAMMA, *_GAMMA_PRIOR))
    low_P, high_P, start_low_P, start_high_P, centre_P, spread_P = np.array(columns, dtype=np.float64).T
    return Coordinates(
        law=law,
        rate=max(curve.schedule.peak_rate for curve in curves),
        total=max(float(curve.schedule.sums[curve.steps_R[-1]]) for curve in curves),
        bounds=(low_P, high_P),
        start_low_P=start_low_P,
        start_high_P=start_high_P,
        centre_P=centre_P,
        spread_P=spread_P,
    )


assert set(_RANGES) == {MULTI_POWER.name, TISSUE.name}
