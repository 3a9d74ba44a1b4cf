"""A walk of checkpoints as a drift and noise around it, fitted to their squared distances.

Two checkpoints a time t apart differ by (v t)² + 2 s (1 - exp(-r t)) + 2 w: a drift of speed v, noise of
variance s that is forgotten at rate r a step, and noise of variance w that no two checkpoints share. It is
the Ornstein-Uhlenbeck walk of stochastic gradient descent around a minimum that moves.
"""

# N checkpoints, P pairs of them, R rates of forgetting, C terms of the model

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations

import numpy as np
from numpy.typing import ArrayLike, NDArray

from pma.errors import InputError

Floats = NDArray[np.float64]

#: of which two differences of one lag can be told from one another
FEWEST_CHECKPOINTS = 4
_RATES = 121
# rates are looked for between these, times one over the longest and the shortest distance
_SLOWEST, _FASTEST = 0.1, 8.0


@dataclass(frozen=True, kw_only=True)
class Walk:
    """`speed`: of the drift, a step. `noise`: variance s that is forgotten at `rate` a step; `fresh`: w,
    which no two checkpoints share. Variances are sums over all coordinates. `misfit`: root mean square error
    of the squared distances, relative.
    """

    speed: float
    noise: float
    rate: float
    fresh: float
    misfit: float

    def memory(self, distance_steps: float) -> float:
        """Autocorrelation of the noise of two checkpoints so far apart."""
        total = self.noise + self.fresh
        return float(self.noise * np.exp(-self.rate * distance_steps) / total) if total > 0 else 0.0

    def kept(self, steps_N: ArrayLike, weights_N: ArrayLike) -> float:
        """The share of the noise's variance that a merge of checkpoints at these steps keeps."""
        steps, weights = np.asarray(steps_N, np.float64), np.asarray(weights_N, np.float64)
        total = self.noise + self.fresh
        if total <= 0:
            return 1.0
        shared_NN = self.noise * np.exp(-self.rate * np.abs(steps[:, None] - steps))
        return float(weights @ (shared_NN + self.fresh * np.eye(len(steps))) @ weights / total)

    def effective(self, steps_N: ArrayLike) -> float:
        """As how many independent checkpoints their plain mean averages the noise away."""
        count = np.size(steps_N)
        return 1 / self.kept(steps_N, np.full(count, 1 / count))

    def drift_share(self, distance_steps: float) -> float:
        """The share of the squared distance over so many steps that is drift."""
        drift = (self.speed * distance_steps) ** 2
        noise = 2 * self.noise * -np.expm1(-self.rate * distance_steps) + 2 * self.fresh
        return float(drift / (drift + noise)) if drift + noise > 0 else 0.0


def squared_distances(deviations_NN: ArrayLike) -> Floats:
    """Squared distances between checkpoints, from inner products of their deviations from any one point."""
    gram = np.asarray(deviations_NN, np.float64)
    norms = np.diag(gram)
    return np.maximum(norms[:, None] + norms - 2 * gram, 0.0)


def fit(steps_N: Sequence[float], deviations_NN: ArrayLike) -> Walk:
    """The walk that the checkpoints' squared distances fit best; errors count relative to the distance.

    Raises InputError for fewer than four checkpoints: with three, drift and noise cannot be told apart.
    """
    steps = np.asarray(steps_N, np.float64)
    if len(steps) < FEWEST_CHECKPOINTS:
        raise InputError(
            f"{len(steps)} checkpoints: drift and noise cannot be told apart; expected at least "
            f"{FEWEST_CHECKPOINTS}"
        )
    first, second = np.triu_indices(len(steps), 1)
    lag_P = np.abs(steps[second] - steps[first])
    squared_P = squared_distances(deviations_NN)[first, second]
    if not squared_P.any():
        return Walk(speed=0.0, noise=0.0, rate=1 / lag_P.max(), fresh=0.0, misfit=0.0)
    scale_P = np.maximum(squared_P, 1e-9 * squared_P.max())
    best: tuple[float, float, Floats] | None = None
    for rate in np.geomspace(_SLOWEST / lag_P.max(), _FASTEST / lag_P.min(), _RATES):
        terms_PC = np.column_stack((lag_P**2, -2 * np.expm1(-rate * lag_P), np.full(len(lag_P), 2.0)))
        found_C, cost = _not_negative(terms_PC / scale_P[:, None], squared_P / scale_P)
        if best is None or cost < best[0]:
            best = (cost, float(rate), found_C)
    assert best is not None
    cost, rate, (drift, noise, fresh) = best
    return Walk(
        speed=float(np.sqrt(drift)),
        noise=float(noise),
        rate=rate,
        fresh=float(fresh),
        misfit=float(np.sqrt(cost / len(lag_P))),
    )


def _not_negative(terms_PC: Floats, target_P: Floats) -> tuple[Floats, float]:
    """Least squares without negative coefficients, by trying every set of terms: there are seven."""
    terms = terms_PC.shape[1]
    scale_C = np.linalg.norm(terms_PC, axis=0)
    best, lowest = np.zeros(terms), float(target_P @ target_P)
    for count in range(1, terms + 1):
        for chosen in map(list, combinations(range(terms), count)):
            columns = terms_PC[:, chosen] / scale_C[chosen]
            solution = np.linalg.lstsq(columns, target_P, rcond=None)[0]
            cost = float(np.square(columns @ solution - target_P).sum())
            if (solution >= 0).all() and cost < lowest * (1 - 1e-9):
                best, lowest = np.zeros(terms), cost
                best[chosen] = solution / scale_C[chosen]
    return best, lowest
