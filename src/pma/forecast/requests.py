"""What was asked for, from files and numbers: curves with their schedules, and the schedules to forecast."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from pma.errors import UsageError
from pma.forecast.curves import FEWEST_ROWS, Curve
from pma.forecast.schedules import Schedule
from pma.forecast.tables import Table, read_table

#: lengths of a decay that are forecast beside the one asked for, as multiples
LENGTHS = (0.25, 0.5, 1.0, 2.0, 4.0)
_MOST_SHOWN = 400


@dataclass(frozen=True, kw_only=True)
class Anneal:
    """A decay of `shape` over `steps`, from the first curve's run at `from_step` (its last step where None),
    to `floor` of the rate there.
    """

    shape: str
    steps: int
    from_step: int | None = None
    floor: float = 0.0


@dataclass(frozen=True, kw_only=True)
class Target:
    """A schedule whose losses at `steps_R` are asked for. `known_R`: the losses it had, where a file tells
    them; they are compared and never fitted. `decay_steps`: the length of the decay, of an `Anneal`.
    """

    name: str
    schedule: Schedule
    steps_R: NDArray[np.int64]
    known_R: NDArray[np.float64] | None = None
    decay_steps: int | None = None


@dataclass(frozen=True, kw_only=True)
class Request:
    """Curves to fit, the `target`, and the same decay at other `lengths`; `notes`: what was assumed."""

    curves: tuple[Curve, ...]
    target: Target
    lengths: tuple[Target, ...]
    notes: tuple[str, ...]


def request(
    curve_paths: Sequence[Path],
    schedule_paths: Sequence[Path] = (),
    *,
    target_path: Path | None = None,
    anneal: Anneal | None = None,
    warmup_steps: int | None = None,
    lengths: Sequence[float] = LENGTHS,
) -> Request:
    """Curves and target from files.

    Schedules go, in order, with the curves that have no rates of their own, or one with each curve. One more,
    where neither target nor anneal is given, is the target; without any, the last curve's schedule is, if it
    goes on beyond the curve. Raises UsageError where that does not come out, InputError for a file that
    cannot be used.
    """
    if not curve_paths:
        raise UsageError("which curves? Such as: pma forecast --curve loss.csv --anneal cosine --steps 4000")
    if target_path is not None and anneal is not None:
        raise UsageError("--target is a schedule of its own and --anneal makes one; give one of them")
    tables = [read_table(path) for path in curve_paths]
    paired, left_path = _paired(tables, schedule_paths, asked=target_path is not None or anneal is not None)
    schedules = [table.schedule(warmup_steps) for table in paired]
    curves = [table.curve(schedule) for table, schedule in zip(tables, schedules, strict=True)]
    notes = [note for table in (*tables, *paired) for note in table.notes]
    notes += [note for schedule in schedules for note in schedule.notes]
    others: list[Target] = []
    if anneal is not None:
        target, others = _annealed(curves[0], anneal, lengths)
    else:
        target = _given(target_path or left_path, curves[-1], warmup_steps)
        notes += target.schedule.notes
    return Request(
        curves=tuple(curves), target=target, lengths=tuple(others), notes=tuple(dict.fromkeys(notes))
    )


def _paired(
    tables: Sequence[Table], paths: Sequence[Path], *, asked: bool
) -> tuple[list[Table], Path | None]:
    """For each curve the table that tells its rates; and the schedule that is left over for the target."""
    lacking = [i for i, table in enumerate(tables) if not table.rates]
    left = None
    if not asked and len(paths) == len(lacking) + 1:
        *paths, left = paths
    rates = list(tables)
    if len(paths) == len(tables):
        rates = [read_table(path) for path in paths]
    elif len(paths) == len(lacking):
        for i, path in zip(lacking, paths, strict=True):
            rates[i] = read_table(path)
    else:
        raise UsageError(
            f"{len(tables)} curves, {len(lacking)} of them without learning rates, and {len(paths)} "
            "schedules: expected one --schedule for each curve without rates, in order, or one for each curve"
        )
    return rates, left


def _annealed(curve: Curve, anneal: Anneal, lengths: Sequence[float]) -> tuple[Target, list[Target]]:
    last_step = int(curve.steps_R[-1])
    start = anneal.from_step if anneal.from_step is not None else last_step
    if start < 1:
        raise UsageError(f"--from {start} is before the first step; expected a step of the run")
    run = curve.schedule
    trunk = run.until(start) if start <= run.last_step else run.held(start - run.last_step)
    counts = {max(1, round(anneal.steps * length)): None for length in sorted({*lengths, 1.0})}

    def target(steps: int) -> Target:
        schedule = trunk.annealed(anneal.shape, steps, floor=anneal.floor)
        name = f"{anneal.shape} over {steps} steps from step {start}"
        return Target(name=name, schedule=schedule, steps_R=_shown(schedule), decay_steps=steps)

    return target(anneal.steps), [target(steps) for steps in counts]


def _given(path: Path | None, curve: Curve, warmup_steps: int | None) -> Target:
    if path is None:
        schedule = curve.schedule
        if schedule.last_step <= curve.steps_R[-1]:
            raise UsageError(
                "what is to be forecast? Expected --anneal cosine --steps 4000, --target with a file of "
                f"step,lr, or a --schedule that goes beyond the last loss (step {curve.steps_R[-1]})"
            )
        return Target(name=f"the schedule of {curve.name}", schedule=schedule, steps_R=_shown(schedule))
    table = read_table(path)
    schedule = table.schedule(warmup_steps)
    if len(table.losses) < FEWEST_ROWS:
        return Target(name=str(path), schedule=schedule, steps_R=_shown(schedule))
    known = table.curve(schedule)
    return Target(name=str(path), schedule=schedule, steps_R=known.steps_R, known_R=known.loss_R)


def _shown(schedule: Schedule) -> NDArray[np.int64]:
    """Steps at which a forecast is drawn: from the warmup's end to the last, evenly."""
    every = np.linspace(max(schedule.warm_step, 1), schedule.last_step, _MOST_SHOWN)
    return np.unique(every.astype(np.int64))
