"""Merges of a constant-rate run as probes of what annealing it would give: free, where a decay is training.

Near a minimum the weights are a drift plus noise around it, in directions j that forget at rates r_j a step.
In each, noise adds h_j to the loss. A merge keeps a share of that which follows from where its checkpoints
lie, Σ_ab w_a w_b ρ_j^|t_a - t_b| with ρ = 1 - r; a decay f keeps another, the end of
    v_t = (1 - r f_t)² v_(t-1) + f_t² (1 - ρ²),  v_0 = 1.
So merges over several windows tell how h is spread over the rates, and the spread tells what any decay gives.
(The multi-power law's response 1 - (1 + C S)^-β is that of a gamma distribution of rates.) Both also move the
drift: a merge to the mean of its checkpoints' steps, a decay by Σ f further. Where the drift stands, the loss
is level + fall · step^-α. A raw checkpoint is a merge of one.

It is exact for a quadratic loss with noise as large as it gets. Real losses are not quadratic: there the
forecast is calibrated over runs whose decays are known (`pma.forecast.calibration`).
"""

# M models, N checkpoints of one, J rates of forgetting, T steps of a decay, B draws, U = 2 + J unknowns

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
#: exponents of the drift's loss that are tried where none is known
ALPHAS = tuple(float(alpha) for alpha in np.linspace(0.1, 1.5, 29))
FEWEST_WINDOWS = 3
DRAWS = 40
# All in shares of what the best merge gains over the raw checkpoint that it ends with. The prior of h: second
# differences over the logarithm of the rate.
_ROUGHNESS = 0.02
# what the model misses of a merge, and of a raw checkpoint, which is one draw of the noise and no mean
_MERGE_MISFIT, _RAW_SCATTER = 0.02, 0.1


@dataclass(frozen=True, kw_only=True)
class Probe:
    """The held-out `loss` of the average of checkpoints at `steps` with `weights`; of one, the raw
    checkpoint. `error`: one standard error of its difference to the others, paired over documents.
    """

    steps: tuple[int, ...]
    weights: tuple[float, ...]
    loss: float
    error: float = 0.0

    @property
    def mean_step(self) -> float:
        """Where its drift stands."""
        return float(np.dot(self.steps, self.weights))

    @property
    def window_steps(self) -> int:
        """From its oldest checkpoint to its newest."""
        return self.steps[-1] - self.steps[0]


@dataclass(frozen=True, kw_only=True)
class Spread:
    """How noise is spread over rates of forgetting, and what the drift's loss is: `unknowns_U` are level,
    fall (at `from_step`) and h_J; `unknowns_BU` are draws of it. `longest_window`: in steps.
    """

    from_step: int
    alpha: float
    unknowns_U: Floats
    unknowns_BU: Floats
    longest_window: int

    def drift_loss(self, step: float) -> float:
        """The loss without noise where the drift stands at `step`, which need not be whole."""
        level, fall = self.unknowns_U[:2]
        return float(level + fall * (step / self.from_step) ** -self.alpha)


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


def merge_gain(probes: Sequence[Probe], from_step: int) -> float:
    """What the best merge that ends at `from_step` gains over the raw checkpoint there, in nats: the scale of
    everything.

    Raises InputError where there is no raw checkpoint, or no merge is better.
    """
    raw = [probe.loss for probe in probes if probe.steps == (from_step,)]
    merged = [probe.loss for probe in probes if len(probe.steps) > 1 and probe.steps[-1] == from_step]
    if not raw or not merged or min(merged) >= raw[0]:
        raise InputError(
            f"no merge that ends at step {from_step} is better than the raw checkpoint there, so merges do "
            "not show what annealing gives; the learning rate may be low already, or the checkpoints too few"
        )
    return raw[0] - min(merged)


def spread_of(
    probes: Sequence[Probe],
    from_step: int,
    *,
    alphas: Sequence[float] = ALPHAS,
    seed: int = 0,
    draws: int = DRAWS,
) -> Spread:
    """The spread of the noise, and the drift, that explain the losses of `probes`, for a decay from
    `from_step`; with the exponent of `alphas` that fits best.

    h is not negative, and smooth over the logarithm of the rate as far as the merges leave it open; draws are
    refits to models with other noise, as large as the probes scatter, and another roughness. Raises
    InputError for fewer than three windows of different length.
    """
    windows = {probe.window_steps for probe in probes} - {0}
    if len(windows) < FEWEST_WINDOWS:
        raise InputError(
            f"merges over {len(windows)} windows of different length; expected at least {FEWEST_WINDOWS}, "
            "from short to long: one does not tell fast noise from slow"
        )
    gain = merge_gain(probes, from_step)
    share_M = np.array([_RAW_SCATTER if len(p.steps) == 1 else _MERGE_MISFIT for p in probes])
    error_M = np.hypot(share_M * gain, [probe.error for probe in probes])
    removed_MJ = np.array([1 - kept_by_merge(probe.steps, probe.weights) for probe in probes])
    place_M = np.array([probe.mean_step / from_step for probe in probes])
    loss_M = np.array([probe.loss for probe in probes])
    smooth = np.diff(np.eye(len(RATES_J)), n=2, axis=0) / (_ROUGHNESS * gain)
    smooth = np.hstack((np.zeros((len(smooth), 2)), smooth))
    random, solve = np.random.default_rng([seed, 2]), require_scipy().nnls

    def solved(alpha: float, losses: Floats, rough: Floats) -> tuple[Floats, float]:
        columns = np.column_stack((np.ones_like(place_M), place_M**-alpha, -removed_MJ))
        left = np.vstack((columns / error_M[:, None], smooth))
        found = solve(left, np.append(losses / error_M, rough), maxiter=50 * left.shape[1])
        return found[0], float(found[1])

    flat = np.zeros(len(smooth))
    best = min(alphas, key=lambda alpha: solved(alpha, loss_M, flat)[1])
    found_U, norm = solved(best, loss_M, flat)
    scatter_M = error_M * max(1.0, norm / np.sqrt(len(loss_M)))
    drawn = [
        solved(
            best,
            loss_M + scatter_M * random.standard_normal(len(loss_M)),
            random.standard_normal(len(smooth)),
        )[0]
        for _ in range(draws)
    ]
    return Spread(
        from_step=from_step,
        alpha=best,
        unknowns_U=found_U,
        unknowns_BU=np.array(drawn).reshape(draws, 2 + len(RATES_J)),
        longest_window=max(windows),
    )


def annealed_loss(spread: Spread, shares_T: ArrayLike, *, progress: float = 1.0) -> tuple[float, float]:
    """The loss after the decay `shares_T` from where `spread` was learned, and the standard error that the
    probes leave. `progress`: how far a decay moves the drift, as a share of Σ f.

    A decay much longer than the longest window is in part the prior's: see `Spread.longest_window`.
    """
    moved = progress * float(np.sum(shares_T))
    place = 1 + moved / spread.from_step
    row_U = np.concatenate(([1.0, place**-spread.alpha], kept_by_decay(shares_T) - 1))
    error = float((spread.unknowns_BU @ row_U).std()) if len(spread.unknowns_BU) else 0.0
    return float(spread.unknowns_U @ row_U), error
