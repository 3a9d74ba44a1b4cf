"""Learning-rate schedules: from any (step, rate) pairs to the rate of every step, and decays put behind them.

Laws of annealing sum over steps, so what lies between two logged rates, and before the first, has to be
decided; each decision is a note that the user is shown.
"""

# T steps; rates_T[t] is the rate of step t = 0 … T, and step 0 is before the first update

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
from numpy.typing import ArrayLike, NDArray

from pma.averaging.decay import DECAYS
from pma.errors import InputError, UsageError

MOST_STEPS = 20_000_000
# a rate that moved by less than this share is the same rate, written with fewer digits
_SAME = 1e-6
# unchanged intervals on either side that make a change between two logged rates a step and no slope
_FLAT_INTERVALS = 2


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """The learning rate of each step: `rates_T[t]` at step t, from 0 to the last one.

    `warmup_steps`: a linear warmup that was put before the first pair. `notes`: what was assumed, for people.
    """

    rates_T: NDArray[np.float64]
    warmup_steps: int = 0
    notes: tuple[str, ...] = ()

    @property
    def last_step(self) -> int:
        """T, the last step that has a rate."""
        return len(self.rates_T) - 1

    @property
    def peak_rate(self) -> float:
        """The highest rate."""
        return float(self.rates_T.max())

    @cached_property
    def warm_step(self) -> int:
        """The first step at the highest rate: where the warmup ends."""
        return int(np.argmax(self.rates_T >= self.peak_rate * (1 - _SAME)))

    @cached_property
    def sums(self) -> NDArray[np.float64]:
        """S1: the sum of rates over steps 1 … t, for each t; its first entry is 0."""
        return np.concatenate(([0.0], np.cumsum(self.rates_T[1:])))

    @cached_property
    def gaps(self) -> NDArray[np.float64]:
        """What the rate loses at each step, η_(t-1) - η_t; its first entry is 0. A warmup's are negative."""
        return np.concatenate(([0.0], self.rates_T[:-1] - self.rates_T[1:]))

    @cached_property
    def decay_steps(self) -> int:
        """The longest stretch of steps below the peak, after it was first there."""
        at_peak = np.flatnonzero(self.rates_T >= self.peak_rate * (1 - _SAME))
        return int(np.diff(np.append(at_peak, self.last_step + 1)).max()) - 1

    def lowest_after_peak(self, step: int) -> float:
        """The lowest rate from the first step at the peak up to `step`."""
        return float(self.rates_T[min(self.warm_step, step) : step + 1].min())

    def until(self, step: int) -> Schedule:
        """The schedule up to `step`. Raises UsageError where it ends before."""
        if not 0 < step <= self.last_step:
            raise UsageError(f"step {step} is not in the schedule, which has steps 1 to {self.last_step}")
        return replace(self, rates_T=self.rates_T[: step + 1])

    def held(self, steps: int) -> Schedule:
        """The schedule with its last rate for `steps` more."""
        _check_length(self.last_step + steps)
        return replace(self, rates_T=np.concatenate((self.rates_T, np.full(steps, self.rates_T[-1]))))

    def annealed(self, shape: str, steps: int, *, floor: float = 0.0) -> Schedule:
        """The schedule with a decay of `steps` behind it, from its last rate to `floor` of that rate.

        `shape`: cosine, linear or 1-sqrt. Raises UsageError for another shape, no steps, or a floor outside
        0 … 1.
        """
        if shape not in DECAYS:
            raise UsageError(f"there is no decay {shape!r}; there are {', '.join(DECAYS)}")
        if steps < 1:
            raise UsageError(f"a decay of {steps} steps is none; expected at least 1")
        if not 0 <= floor <= 1:
            raise UsageError(f"a decay's floor must lie between 0 and 1, not {floor:g}")
        _check_length(self.last_step + steps)
        decay = DECAYS[shape]
        tail = np.array([floor + (1 - floor) * decay(i / steps) for i in range(1, steps + 1)])
        tail = np.maximum(tail, floor)  # the cosine ends a rounding error above or below
        return replace(self, rates_T=np.concatenate((self.rates_T, self.rates_T[-1] * tail)))


def from_pairs(
    steps: ArrayLike, rates: ArrayLike, *, warmup_steps: int | None = None, where: str = "the schedule"
) -> Schedule:
    """The schedule through (step, rate) pairs.

    Between pairs the rate is a straight line; but a change between two pairs of a log that repeats its rate
    before and after is a step, taken at the later pair. Before the first pair: a linear warmup from 0 over
    `warmup_steps`, then the first rate. By default the warmup reaches to the first pair, as what logs leave
    out is mostly the warmup.

    Raises InputError where steps do not rise or are not whole, rates are negative or not finite, or there are
    none; `where` is said in the message.
    """
    steps_P = whole_rising_steps(steps, where)
    rates_P = np.asarray(rates, dtype=np.float64)
    bad = np.flatnonzero(~np.isfinite(rates_P) | (rates_P < 0))
    if len(bad):
        raise InputError(
            f"{where}: the learning rate at step {steps_P[bad[0]]} is {rates_P[bad[0]]:g}; expected "
            "numbers, 0 or more"
        )
    if not rates_P.max() > 0:
        raise InputError(f"{where}: every learning rate is 0; expected some above")
    _check_length(int(steps_P[-1]))
    every = np.arange(steps_P[-1] + 1)
    rates_T = np.interp(every, steps_P, rates_P)
    for at in _steps_of_a_log(rates_P):
        rates_T[steps_P[at] + 1 : steps_P[at + 1]] = rates_P[at]
    first, notes, warmup = int(steps_P[0]), [], 0
    if first > 1 or warmup_steps:
        warmup = first if warmup_steps is None else min(warmup_steps, first)
        rates_T[: first + 1] = rates_P[0] * np.minimum(1.0, every[: first + 1] / max(warmup, 1))
        if warmup_steps is None:
            notes.append(
                f"{where} begins at step {first}: a linear warmup from 0 up to there is assumed "
                "(--warmup says another)"
            )
    return Schedule(rates_T=rates_T, warmup_steps=warmup, notes=tuple(notes))


def whole_rising_steps(steps: ArrayLike, where: str) -> NDArray[np.int64]:
    """`steps` as integers. Raises InputError unless they are whole, not negative, and rise."""
    values = np.asarray(steps, dtype=np.float64)
    if not len(values):
        raise InputError(f"{where} has no rows; expected steps with numbers")
    bad = np.flatnonzero(~np.isfinite(values) | (values < 0) | (values != np.floor(values)))
    if len(bad):
        raise InputError(f"{where}: row {bad[0] + 1} has step {values[bad[0]]:g}; expected a whole number")
    falls = np.flatnonzero(np.diff(values) <= 0)
    if len(falls):
        row = int(falls[0]) + 1
        raise InputError(
            f"{where}: steps do not rise: row {row + 1} has step {values[row]:g} after {values[row - 1]:g}; "
            "expected each step once, in order (of a run that was restarted, the rows it goes on from)"
        )
    return values.astype(np.int64)


def _steps_of_a_log(rates_P: NDArray[np.float64]) -> Sequence[int]:
    """Pairs after which the rate jumps: it is the same for some intervals before, and again after."""
    same = np.abs(np.diff(rates_P)) <= _SAME * rates_P.max()
    reach = _FLAT_INTERVALS
    return [
        i
        for i in range(reach, len(same) - reach)
        if not same[i] and same[i - reach : i].all() and same[i + 1 : i + 1 + reach].all()
    ]


def _check_length(last_step: int) -> None:
    if last_step > MOST_STEPS:
        raise InputError(f"a schedule of {last_step:,} steps is too long; at most {MOST_STEPS:,} are summed")
