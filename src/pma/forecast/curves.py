"""A loss curve and the schedule it was trained under, as a law is fitted to it."""

# R rows: steps with a loss

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from pma.errors import InputError
from pma.forecast.gaps import Gaps, compress
from pma.forecast.schedules import Schedule, whole_rising_steps

FEWEST_ROWS = 20
# more rows are averaged in bins: a fit learns no more from them, and takes longer
MOST_ROWS = 600


@dataclass(frozen=True, kw_only=True)
class Curve:
    """Losses `loss_R` at `steps_R` of a run that was trained under `schedule`."""

    name: str
    schedule: Schedule
    steps_R: NDArray[np.int64]
    loss_R: NDArray[np.float64]

    @property
    def gaps(self) -> Gaps:
        """What laws need of the schedule, at the curve's rows."""
        return compress(self.schedule, self.steps_R)

    def at(self, kept_R: NDArray[np.bool_]) -> Curve:
        """The curve at some of its rows."""
        return Curve(
            name=self.name,
            schedule=self.schedule,
            steps_R=self.steps_R[kept_R],
            loss_R=self.loss_R[kept_R],
        )


def curve_of(name: str, steps: ArrayLike, losses: ArrayLike, schedule: Schedule) -> Curve:
    """A checked curve. Rows of the warmup are left out: no law holds there. Many rows are averaged in bins,
    each at its middle step.

    Raises InputError where steps do not rise, a loss is not a positive number, rows are too few, or the
    schedule ends before the curve.
    """
    steps_R = whole_rising_steps(steps, name)
    loss_R = np.asarray(losses, dtype=np.float64)
    bad = np.flatnonzero(~np.isfinite(loss_R) | (loss_R <= 0))
    if len(bad):
        raise InputError(
            f"{name}: the loss at step {steps_R[bad[0]]} is {loss_R[bad[0]]:g}; expected positive "
            "numbers. Leave such rows out, and with them what follows a breakaway (pma spikes finds it)"
        )
    if len(steps_R) and steps_R[-1] > schedule.last_step:
        raise InputError(
            f"{name} has a loss at step {steps_R[-1]}, but its schedule ends at step "
            f"{schedule.last_step}; expected a rate for every step with a loss"
        )
    warm_R = steps_R >= max(schedule.warm_step, 1)
    loss_R, steps_R = loss_R[warm_R], steps_R[warm_R]
    if len(steps_R) < FEWEST_ROWS:
        raise InputError(
            f"{name} has {len(steps_R)} losses after the warmup; expected at least {FEWEST_ROWS}, "
            "or a law of seven parameters would follow their noise"
        )
    steps_R, loss_R = _binned(steps_R, loss_R)
    return Curve(name=name, schedule=schedule, steps_R=steps_R, loss_R=loss_R)


def counted_once(curves: Sequence[Curve]) -> list[Curve]:
    """The curves without rows that an earlier one has too: forks of one run share what lies before the fork,
    and a fit that counted it again would take one noise for several. A curve may keep no rows.
    """
    seen: set[tuple[int, float, float]] = set()
    kept = []
    for curve in curves:
        sums_R = curve.schedule.sums[curve.steps_R]
        rows = [
            (int(step), float(loss), float(f"{total:.9g}"))
            for step, loss, total in zip(curve.steps_R, curve.loss_R, sums_R, strict=True)
        ]
        kept.append(curve.at(np.array([row not in seen for row in rows])))
        seen.update(rows)
    return kept


def _binned(
    steps_R: NDArray[np.int64], loss_R: NDArray[np.float64]
) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """At most `MOST_ROWS` rows: each the mean of neighbours, at the middle one's step."""
    each = -(-len(steps_R) // MOST_ROWS)
    if each == 1:
        return steps_R, loss_R
    # what does not fill a bin is left out at the start, where curves are steep, and not at the end
    whole = len(steps_R) // each * each
    bins = loss_R[-whole:].reshape(-1, each)
    return steps_R[-whole:].reshape(-1, each)[:, each // 2], bins.mean(axis=1)
