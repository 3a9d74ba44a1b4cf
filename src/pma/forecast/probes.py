"""Merges of a constant-rate run as probes of what annealing it would give: free, where a decay is training.

Near a minimum the weights are a drift plus noise around it, in directions j that forget at rates r_j a step.
In each, noise adds h_j to the loss. A merge keeps a share of that which follows from where its checkpoints
lie, Σ_ab w_a w_b ρ_j^|t_a - t_b| with ρ = 1 - r; a decay f keeps another, the end of
    v_t = (1 - r f_t)² v_(t-1) + f_t² (1 - ρ²),  v_0 = 1.
So merges over several windows tell how h is spread over the rates, and the spread tells what any decay gives.
(The multi-power law's response 1 - (1 + C S)^-β is that of a gamma distribution of rates.) Both also move the
drift: a merge to the mean of its checkpoints' steps, a decay by Σ f further.

It is exact for a quadratic loss with noise as large as it gets. Real losses are not quadratic: there the
forecast wants a calibration over runs whose decays are known.
"""

# M merges, N checkpoints of a merge, J rates of forgetting, T steps of a decay, B draws

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from pma.errors import InputError
from pma.forecast.fitting import require_scipy
from pma.forecast.kernels import kept_variance

Floats = NDArray[np.float64]

#: rates of forgetting a step: from directions that forget at once to those that never do in a run
RATES_J = np.logspace(-6, -0.05, 60)
_ALPHAS = np.linspace(0.05, 2.0, 79)
FEWEST_WINDOWS = 3
_FEWEST_RAW = 6
# the prior of h: second differences over the logarithm of the rate, in shares of the largest gain
_ROUGHNESS = 0.02
DRAWS = 40


@dataclass(frozen=True, kw_only=True)
class Merge:
    """The held-out `loss` of a merge of checkpoints at `steps` with `weights`, and its `error`: one standard
    error of its difference to the raw loss, paired over documents.
    """

    steps: tuple[int, ...]
    weights: tuple[float, ...]
    loss: float
    error: float

    @property
    def mean_step(self) -> float:
        """Where the drift of the merge stands."""
        return float(np.dot(self.steps, self.weights))


@dataclass(frozen=True, kw_only=True)
class Steady:
    """Raw held-out loss at the constant rate: `level` + `fall` · step^-`alpha`."""

    level: float
    fall: float
    alpha: float

    def at(self, step: float) -> float:
        """The raw loss expected at a step, which need not be whole."""
        return float(self.level + self.fall * step**-self.alpha)


@dataclass(frozen=True, kw_only=True)
class Probed:
    """How noise is spread over rates of forgetting, `h_J`, draws of it, `h_BJ`, and the longest window."""

    steady: Steady
    h_J: Floats
    h_BJ: Floats
    longest_window: int


def steady_loss(steps: ArrayLike, losses: ArrayLike) -> Steady:
    """The power law through raw losses of the constant-rate part. Raises InputError for fewer than six."""
    steps_R, loss_R = np.asarray(steps, dtype=np.float64), np.asarray(losses, dtype=np.float64)
    if len(steps_R) < _FEWEST_RAW:
        raise InputError(
            f"{len(steps_R)} raw losses at the constant rate; expected at least {_FEWEST_RAW}, to tell "
            "how it falls"
        )
    best: tuple[float, Steady] | None = None
    for alpha in _ALPHAS:
        columns = np.column_stack((np.ones_like(steps_R), steps_R**-alpha))
        solution, *_ = np.linalg.lstsq(columns, loss_R, rcond=None)
        cost = float(np.square(columns @ solution - loss_R).sum())
        if best is None or cost < best[0]:
            best = (cost, Steady(level=float(solution[0]), fall=float(solution[1]), alpha=float(alpha)))
    assert best is not None
    return best[1]


def kept_by_merge(steps: ArrayLike, weights: ArrayLike) -> Floats:
    """The share of the noise's loss that a merge keeps, for each of `RATES_J`."""
    steps_N, weights_N = np.asarray(steps, dtype=np.float64), np.asarray(weights, dtype=np.float64)
    distance_NN = np.abs(steps_N[:, None] - steps_N)
    memory_J = 1 - RATES_J
    return np.array([float(weights_N @ memory**distance_NN @ weights_N) for memory in memory_J])


def kept_by_decay(shares_T: ArrayLike) -> Floats:
    """The share that a decay keeps: `shares_T` of the constant rate, a step each."""
    kept: Floats = kept_variance(np.asarray(shares_T, dtype=np.float64), RATES_J)
    return kept


def probe(steady: Steady, merges: Sequence[Merge], *, seed: int = 0, draws: int = DRAWS) -> Probed:
    """The spread of the noise that explains what `merges` gained over the raw loss at their mean step.

    It is not negative, and smooth over the logarithm of the rate as far as the merges leave it open; draws
    are refits to merges with other evaluation noise and another roughness. Raises InputError for fewer than
    three windows of different length.
    """
    optimize = require_scipy()
    windows = {merge.steps[-1] - merge.steps[0] for merge in merges}
    if len(windows - {0}) < FEWEST_WINDOWS:
        raise InputError(
            f"merges over {len(windows - {0})} windows of different length; expected at least "
            f"{FEWEST_WINDOWS}, from short to long: one does not tell fast noise from slow"
        )
    gain_M = np.array([steady.at(merge.mean_step) - merge.loss for merge in merges])
    error_M = np.maximum([merge.error for merge in merges], 1e-6)
    removed_MJ = np.array([1 - kept_by_merge(merge.steps, merge.weights) for merge in merges])
    smooth = np.diff(np.eye(len(RATES_J)), n=2, axis=0) / (_ROUGHNESS * max(float(gain_M.max()), 1e-6))
    left = np.vstack((removed_MJ / error_M[:, None], smooth))
    random = np.random.default_rng([seed, 2])

    def solved(gains: Floats, rough: Floats) -> Floats:
        found: Floats = optimize.nnls(left, np.append(gains / error_M, rough), maxiter=50 * len(RATES_J))[0]
        return found

    flat = np.zeros(len(smooth))
    drawn = [
        solved(gain_M + error_M * random.standard_normal(len(gain_M)), random.standard_normal(len(smooth)))
        for _ in range(draws)
    ]
    return Probed(steady=steady, h_J=solved(gain_M, flat), h_BJ=np.array(drawn), longest_window=max(windows))


def annealed_loss(probed: Probed, from_step: int, shares_T: ArrayLike) -> tuple[float, float]:
    """The loss after the decay `shares_T` from `from_step`, and the standard error that the merges leave.

    A decay much longer than the longest window probed is in part the prior's: see `Probed.longest_window`.
    """
    moved = float(np.sum(shares_T))
    removed_J = 1 - kept_by_decay(shares_T)
    expected = probed.steady.at(from_step + moved) - float(removed_J @ probed.h_J)
    return expected, float((probed.h_BJ @ removed_J).std())
