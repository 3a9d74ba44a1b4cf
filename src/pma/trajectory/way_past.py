"""Where a run broke away, the checkpoints before, and from where it can be led past."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from pma import logs
from pma.errors import InputError, UsageError
from pma.logs import Breakaway, Kind, TrainingCurves
from pma.trajectory.discover import Trajectory, TrajectoryPoint, discover, is_checkpoint
from pma.trajectory.window import of_one_phase

_LOG_DEPTH = 3  # folders between a log and its run, at most


@dataclass(frozen=True, kw_only=True)
class WayPast:
    """Where to go back to: checkpoints of steps below `before_step`, the newest of which are `checkpoints`.

    `reserve`: why that may not do, or None.
    """

    breakaway: Breakaway
    before_step: int
    checkpoints: tuple[TrajectoryPoint, ...]
    reserve: str | None = None


@dataclass(frozen=True, kw_only=True)
class Spikes:
    """Where a run's loss or gradient norm broke away; `run` is None where only a log was found."""

    curves: TrainingCurves
    ways_past: tuple[WayPast, ...]
    run: Path | None
    left_out: tuple[tuple[Path, str], ...] = ()


def spikes(
    path: Path,
    *,
    log: Path | None = None,
    names: Mapping[str, str] | None = None,
    pattern: str | None = None,
    last: int = 3,
) -> Spikes:
    """The breakaways of a run, or of a log, with the newest `last` checkpoints before each.

    `log`: the run's log where it is not in the run's folder; `names` as in `logs.read`. Of a log, the run is
    the nearest folder above it that is one. Raises InputError where there is no log.
    """
    if path.is_dir() and is_checkpoint(path):
        raise UsageError(f"{path} is one checkpoint; give the run that it belongs to, or a log")
    curves = logs.read(log or path, names=names)
    run, found = _run_at(path, pattern) if path.is_dir() else _run_above(path, pattern)
    return Spikes(
        curves=curves,
        ways_past=ways_past(found, logs.breakaways(curves), last=last),
        run=run,
        left_out=found.left_out,
    )


def _run_at(folder: Path, pattern: str | None) -> tuple[Path | None, Trajectory]:
    """A run that has logged but saved nothing yet, or a folder of logs, has breakaways too."""
    try:
        return folder, discover([folder], pattern)
    except InputError as error:
        return None, Trajectory(points=(), left_out=((folder, str(error)),))


def _run_above(log: Path, pattern: str | None) -> tuple[Path | None, Trajectory]:
    for folder in list(log.resolve().parents)[:_LOG_DEPTH]:
        try:
            return folder, discover([folder], pattern)
        except InputError:
            continue
    return None, Trajectory(points=())


def ways_past(found: Trajectory, breakaways: Sequence[Breakaway], *, last: int = 3) -> tuple[WayPast, ...]:
    """For each breakaway the newest `last` checkpoints before it that no other breakaway touches."""
    return tuple(_way_past(found, breakaway, breakaways, last) for breakaway in breakaways)


def _way_past(found: Trajectory, breakaway: Breakaway, others: Sequence[Breakaway], last: int) -> WayPast:
    # weights after the update of step s are first seen in the loss of step s + 1; so a checkpoint of the last
    # good step itself may already be bad, and one before it is not
    before = breakaway.good_step
    points = _before(found, before, last)
    while touched := [b.good_step for b in others if b.good_step < before and _touches(b, points)]:
        before = min(touched)
        points = _before(found, before, last)
    return WayPast(
        breakaway=breakaway, before_step=before, checkpoints=points, reserve=_reserve(points, before, last)
    )


def _before(found: Trajectory, step: int, last: int) -> tuple[TrajectoryPoint, ...]:
    return tuple([p for p in found.points if p.step is not None and p.step < step][-last:])


def _touches(breakaway: Breakaway, points: Sequence[TrajectoryPoint]) -> bool:
    # a blip is gone before the weights have moved
    return breakaway.kind is not Kind.BLIP and any(
        breakaway.good_step <= (point.step or 0) <= breakaway.last_step for point in points
    )


def _reserve(points: Sequence[TrajectoryPoint], before: int, last: int) -> str | None:
    if not points:
        return f"there is no complete checkpoint before step {before}"
    if len(points) < last:
        return f"there are only {len(points)} complete checkpoints before step {before}, not {last}"
    try:
        of_one_phase(points, allow_mixed=False)
    except UsageError as error:
        return str(error)
    return None
