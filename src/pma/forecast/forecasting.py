"""What a schedule would give: the expected loss, an 80% and a 95% interval, and every reason to doubt them.

Three errors make up an interval, as squares. What the parameters leave open: the bootstrap. What the law
misses of curves it was not fitted to: the curves left out, one at a time. And what hangs on the law chosen:
half of what the second law says otherwise. Beyond what the curves show (longer runs, longer or deeper decays)
the law's own error grows with the root of the ratio, and the forecast says so.
"""

# R rows: steps whose loss is forecast; B draws, P parameters

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from pma.errors import UsageError
from pma.forecast.curves import Curve
from pma.forecast.fitting import Fit, fit
from pma.forecast.gaps import compress
from pma.forecast.laws import MULTI_POWER, TISSUE, Law
from pma.forecast.requests import Target
from pma.forecast.schedules import Schedule
from pma.forecast.uncertainty import DRAWS, HeldOut, bootstrap, held_out, misfit

LEVELS = (0.80, 0.95)
# a parameter is open where its 95% range spans more than this factor
_OPEN_FACTOR = 4.0
_OPEN_GAMMA = 0.75
# No fit is trusted further than this, in shares of the loss, however well it follows its own curves: what
# laws missed of curves of 25M and 100M parameters that were not fitted (docs/forecast.md). It stands for this
# many degrees of freedom beside those of the curves left out.
_LEAST_LAW_ERROR = 0.002
_LEAST_FREEDOM = 4
_BEYOND = 1.02
# a curve shows the peak rate where this share of its losses lies within a hundredth of it
_AT_PEAK, _AT_PEAK_SHARE = 0.99, 0.2
_ONE_PHASE = (
    "no curve has a fifth of its losses at its peak rate, so only the law tells what the decay gave from the "
    "rest"
)
_ONE_PHASE_FACTOR = 2.0

Floats = NDArray[np.float64]


@dataclass(frozen=True, kw_only=True)
class Shown:
    """What curves show of a schedule: the longest sum of rates, the longest decay (steps below the peak), the
    deepest (share of the peak that was lost).
    """

    total: float
    decay_steps: int
    depth: float


@dataclass(frozen=True, kw_only=True)
class Learned:
    """A law learned from curves, with what it may be off by; `second`: the other law, fitted to the same."""

    fit: Fit
    second: Fit
    theta_BP: Floats
    held: tuple[HeldOut, ...]

    @cached_property
    def shown(self) -> Shown:
        """What the curves show."""
        each = [_shown(curve.schedule, int(curve.steps_R[-1])) for curve in self.fit.curves]
        return Shown(
            total=max(s.total for s in each),
            decay_steps=max(s.decay_steps for s in each),
            depth=max(s.depth for s in each),
        )

    @cached_property
    def widened(self) -> tuple[tuple[str, float], ...]:
        """What enlarges the law's own error whatever is forecast: why, and by which factor."""
        shares = [
            np.mean(curve.schedule.rates_T[curve.steps_R] >= _AT_PEAK * curve.schedule.peak_rate)
            for curve in self.fit.curves
        ]
        return () if max(shares) >= _AT_PEAK_SHARE else ((_ONE_PHASE, _ONE_PHASE_FACTOR),)

    @cached_property
    def law_error(self) -> tuple[float, int]:
        """Standard error of log loss that is the law's own, and its degrees of freedom."""
        floor = max(_LEAST_LAW_ERROR, misfit(self.fit))
        if not self.held:
            return floor, _LEAST_FREEDOM
        squares = np.square([held.error for held in self.held])
        return max(floor, float(np.sqrt(squares.mean()))), _LEAST_FREEDOM + len(squares)

    @cached_property
    def parameter_intervals(self) -> dict[str, tuple[float, float]]:
        """95% ranges of the parameters over the draws."""
        values_BP = np.array([self.fit.coordinates.values(theta_P)[0] for theta_P in self.theta_BP])
        ranges_P2 = np.quantile(values_BP, (0.025, 0.975), axis=0).T.tolist()
        return {
            name: (low, high) for name, (low, high) in zip(self.fit.law.parameters, ranges_P2, strict=True)
        }

    @property
    def open_parameters(self) -> tuple[str, ...]:
        """Parameters that the curves do not determine, each by itself."""
        return tuple(
            name
            for name, (low, high) in self.parameter_intervals.items()
            if (high - low > _OPEN_GAMMA if name == "gamma" else high > _OPEN_FACTOR * low)
        )


@dataclass(frozen=True, kw_only=True)
class Forecast:
    """Losses at `steps_R`, with intervals by level; `constant_R`: the same at the highest rate throughout.

    `widened`: why the law's own error was enlarged, and by which factor. `gain` of the last row: what the
    schedule gives over the constant rate, with its 95% interval; `anneals`: whether it leaves that rate.
    """

    steps_R: NDArray[np.int64]
    loss_R: Floats
    constant_R: Floats
    error_R: Floats
    intervals: dict[float, tuple[Floats, Floats]]
    widened: tuple[tuple[str, float], ...]
    gain: float
    gain_interval: tuple[float, float]
    anneals: bool

    @property
    def told(self) -> bool:
        """Whether the last loss is known better than what annealing gives at all."""
        if not self.anneals:
            return True
        low, high = self.gain_interval
        return low > 0 and high - low < 2 * self.gain


def learn(curves: Sequence[Curve], *, law: Law = MULTI_POWER, seed: int = 0, draws: int = DRAWS) -> Learned:
    """`law` and the other one, fitted to `curves` together, and how far they may be off.

    Raises InputError where the annealing term is not in the curves.
    """
    other = TISSUE if law is MULTI_POWER else MULTI_POWER
    fitted = fit(law, curves, seed=seed)
    return Learned(
        fit=fitted,
        second=fit(other, curves, seed=seed),
        theta_BP=bootstrap(fitted, draws=draws, seed=seed),
        held=tuple(held_out(fitted)),
    )


def forecast(learned: Learned, schedule: Schedule, steps_R: NDArray[np.int64]) -> Forecast:
    """The losses that `schedule` would give at `steps_R` (rising, within it)."""
    from scipy import stats

    if not len(steps_R) or steps_R[0] < 1 or steps_R[-1] > schedule.last_step:
        raise UsageError(f"the schedule has steps 1 to {schedule.last_step}; forecasts are for steps in it")
    log_R, draws_BR = _by_draw(learned, schedule, steps_R)
    second = learned.second
    values_P, _ = second.coordinates.values(second.theta_P)
    second_R = np.log(second.law.evaluate(values_P, compress(schedule, steps_R))[0])
    asked = _shown(schedule, int(steps_R[-1]))
    widened = (*learned.widened, *_beyond(learned.shown, asked))
    own, freedom = learned.law_error
    own *= float(np.prod([factor for _, factor in widened]))
    error_R = np.sqrt(draws_BR.var(axis=0) + own**2 + ((second_R - log_R) / 2) ** 2)
    intervals = {}
    for level in LEVELS:
        reach_R = float(stats.t.ppf((1 + level) / 2, freedom)) * error_R
        intervals[level] = (np.exp(log_R - reach_R), np.exp(log_R + reach_R))
    held_at_peak = _constant(schedule)
    constant_R, _ = _by_draw(learned, held_at_peak, steps_R)
    end = np.exp(constant_R[-1])
    low, high = intervals[0.95][0][-1], intervals[0.95][1][-1]
    return Forecast(
        steps_R=steps_R,
        loss_R=np.exp(log_R),
        constant_R=np.exp(constant_R),
        error_R=error_R,
        intervals=intervals,
        widened=widened,
        gain=float(end - np.exp(log_R[-1])),
        gain_interval=(float(end - high), float(end - low)),
        anneals=asked.depth > 0.01,
    )


def forecast_of(learned: Learned, target: Target) -> Forecast:
    """The forecast of a target's rows."""
    return forecast(learned, target.schedule, target.steps_R)


def _by_draw(learned: Learned, schedule: Schedule, steps_R: NDArray[np.int64]) -> tuple[Floats, Floats]:
    """Log loss of the fit, and of every draw."""
    gaps, fitted = compress(schedule, steps_R), learned.fit
    rows = []
    for theta_P in (fitted.theta_P, *learned.theta_BP):
        values_P, _ = fitted.coordinates.values(theta_P)
        rows.append(np.log(np.maximum(fitted.law.evaluate(values_P, gaps)[0], 1e-3)))
    return rows[0], np.array(rows[1:])


def _constant(schedule: Schedule) -> Schedule:
    """The schedule that stays at its peak once it is there."""
    peak = max(schedule.warm_step, 1)
    return schedule.until(peak).held(schedule.last_step - peak)


def _shown(schedule: Schedule, last_step: int) -> Shown:
    until = schedule.until(last_step)
    return Shown(
        total=float(until.sums[-1]),
        decay_steps=until.decay_steps,
        depth=1 - until.lowest_after_peak(last_step) / until.peak_rate,
    )


def _beyond(shown: Shown, asked: Shown) -> tuple[tuple[str, float], ...]:
    """In which ways what is asked for goes beyond what the curves show, and how far."""
    ways = (
        ("a sum of rates {:.3g} times that of the longest curve", asked.total, shown.total),
        ("a decay {:.3g} times as long as the longest", asked.decay_steps, shown.decay_steps),
        ("a fall of the rate {:.3g} times as deep as the deepest", asked.depth, shown.depth),
    )
    return tuple(
        (f"this goes beyond what the curves show: {text.format(wanted / had)}", float(np.sqrt(wanted / had)))
        for text, wanted, had in ways
        if wanted > _BEYOND * had
    )
