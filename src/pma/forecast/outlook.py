"""What a decay of a run would give, from its merges: expected loss, intervals, and reasons to doubt them."""

# K known decays of the same run

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from pma.forecast.calibration import Calibration, Case, Decay, Promise, promise, spread_at
from pma.forecast.forecasting import LEVELS
from pma.forecast.probes import Probe

_BEYOND = 1.02


@dataclass(frozen=True, kw_only=True)
class Outlook:
    """The `loss` expected after a decay of `steps` from `from_step`, with `intervals` by level, each a range.

    `gain`: over the loss expected of a raw checkpoint where the decay starts, `gain_interval` of 95%.
    `at_rate`: the loss expected of a raw checkpoint after as many more steps at the constant rate. `known`:
    how many decays of the run itself were used; `moved_by` them, in nats. `widened`: why the error was
    enlarged, and by which factor.
    """

    from_step: int
    steps: int
    loss: float
    error: float
    intervals: dict[float, tuple[float, float]]
    gain: float
    gain_interval: tuple[float, float]
    at_rate: float
    promise: Promise
    known: int
    moved_by: float
    widened: tuple[tuple[str, float], ...]

    @property
    def told(self) -> bool:
        """Whether the loss is known better than what annealing gives at all."""
        low, high = self.gain_interval
        return low > 0 and high - low < 2 * self.gain


def outlook(
    probes: Sequence[Probe],
    from_step: int,
    decay: Decay,
    calibration: Calibration,
    known: Sequence[Case] = (),
    *,
    seed: int = 0,
) -> Outlook:
    """The forecast from `probes` of the run at `from_step`. `known`: decays of the same run, with the probes
    before each.

    Raises InputError where the probes do not tell.
    """
    from scipy import stats

    spread = spread_at(tuple(probes), from_step, calibration.alpha, seed=seed)
    made = promise(spread, decay.shares)
    shift, own = _from_known(calibration, from_step, known)
    widened = _beyond(calibration, made, decay)
    own *= float(np.prod([factor for _, factor in widened]))
    # the probes' own error is in the calibration's already, as far as it was there
    more = max(made.error**2 - (calibration.probe_error * made.gain) ** 2, 0.0)
    error = math.hypot(own * made.gain, math.sqrt(more))
    loss = calibration.corrected(made) - shift * made.gain
    intervals = {}
    for level in LEVELS:
        reach = float(stats.t.ppf((1 + level) / 2, calibration.freedom)) * error
        intervals[level] = (loss - reach, loss + reach)
    start = spread.drift_loss(from_step)
    low, high = intervals[0.95]
    return Outlook(
        from_step=from_step,
        steps=decay.steps,
        loss=loss,
        error=error,
        intervals=intervals,
        gain=start - loss,
        gain_interval=(start - high, start - low),
        at_rate=spread.drift_loss(from_step + decay.steps),
        promise=made,
        known=len(known),
        moved_by=-shift * made.gain,
        widened=widened,
    )


def _from_known(calibration: Calibration, from_step: int, known: Sequence[Case]) -> tuple[float, float]:
    """What known decays of the run say that this forecast is too high by, in shares of its gain, and the
    standard deviation that is left: a normal variable given K others.
    """
    run, fork = calibration.of_run**2, calibration.of_fork**2
    total = run + fork + calibration.of_decay**2
    if not known:
        return 0.0, math.sqrt(total)
    miss_K = np.array([_miss(calibration, case) for case in known])
    place_K = np.array([case.from_step for case in known])
    shared_KK = run + fork * (place_K[:, None] == place_K) + calibration.of_decay**2 * np.eye(len(known))
    shared_K = run + fork * (place_K == from_step)
    weight_K = np.linalg.solve(shared_KK, shared_K)
    return float(weight_K @ miss_K), math.sqrt(max(total - float(weight_K @ shared_K), 0.0))


def _miss(calibration: Calibration, case: Case) -> float:
    """Forecast less truth of a known decay, as a share of its gain."""
    spread = spread_at(case.probes, case.from_step, calibration.alpha, draws=0)
    made = promise(spread, case.shares_T)
    return (calibration.corrected(made) - case.loss) / max(made.gain, 1e-9)


def _beyond(calibration: Calibration, made: Promise, decay: Decay) -> tuple[tuple[str, float], ...]:
    """In which ways the decay goes beyond what the calibration and the probes have seen, and how far."""
    low, high = calibration.moved
    ways = (
        ("it moves the drift {:.2g} times as far as any decay of the calibration", made.moved, high),
        ("it moves the drift 1/{:.2g} as far as any decay of the calibration", low, made.moved),
        ("it is {:.2g} times as long as the longest window of merges", decay.steps, made.longest_window),
    )
    return tuple(
        (text.format(wanted / had), math.sqrt(wanted / had))
        for text, wanted, had in ways
        if wanted > _BEYOND * had
    )
